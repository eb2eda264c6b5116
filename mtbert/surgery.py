"""Gradient surgery in Gram space: the K×K matrix of the task gradients' dot products in, K weights out.

Every method here gives a combination Σ_k w_k·g_k, and chooses w from G_ij = g_i·g_j alone. So no rank needs
a whole gradient, and a method is a function of a K×K matrix. PCGrad is ours, with the paper's own formulation
beside it (`pcgrad_vectors`); the others are TorchJD's Gramian weightings (https://torchjd.org).

Shapes: K tasks in this step, P parameters.

A method keeps the scale of its source. Who swaps one for another should know how long Σ_k w_k·g_k is; "mean"
and "sum" below are meant for gradients that do not conflict:

    method       source                              needs     combined gradient
    sum          -                                   -         sum
    mean         -                                   -         mean
    pcgrad       Yu et al. 2020, Algorithm 1         -         sum; with `reduction: mean` mean (Pytorch-PCGrad)
    gradvac      Wang et al. 2021                    -         sum, more where cosines fall below their average
    upgrad       Quinton and Rey 2024                quadprog  mean
    dualproj     Lopez-Paz and Ranzato 2017, eq. 11  quadprog  mean
    mgda         Sener and Koltun 2018, Algorithm 2  -         the shortest convex combination of those that are not 0
    cagrad       Liu, B. et al. 2021                 cvxpy     mean + a vector c times as long as the mean
    aligned_mtl  Senushkin et al. 2023               -         mean, after all singular values became the least
    imtl_g       Liu, L. et al. 2021                 -         Σ w = 1, projections on all g_k equal; w_k may be < 0
    krum         Blanchard et al. 2017, but by sums  -         mean of the n_selected most central gradients
                 of distances, not of their squares
    fairgrad     Ban and Ji 2024                     scipy     for alpha 1 of length √K, however long the g_k are
    pcd          arXiv:2606.29521                    -         as long as the first task's gradient

A step with a single task has nothing to weigh: its weight is 1, whatever the method. Methods with scale-free
weights see the Gram matrix divided by its trace, because TorchJD compares with absolute constants: gradients
under 0.01 long would make `upgrad` a plain mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mtbert.errors import UserError
from mtbert.methods import build_method
from mtbert.randomness import addressed_rng

Reduction = Literal["sum", "mean"]
Orders = Sequence[Sequence[int]] | Tensor


def pcgrad(gram_KK: Tensor, orders: Orders, reduction: Reduction) -> Tensor:
    """Weights of PCGrad (Yu et al. 2020, Algorithm 1), exact in Gram space.

    Row i of `coefficients_KK` writes task i's projected gradient as a combination of the original gradients.
    It is projected onto the normal planes of the *original* gradients it conflicts with, so a projection
    against j changes the one coefficient (i, j). Projecting never lengthens a vector, hence
    |coefficient_ij|·‖g_j‖ ≤ ‖g_i‖: the rounding stays that of the Gram matrix, however ill-conditioned.

    Args:
        gram_KK: dot products of the task gradients, any floating dtype; the arithmetic is fp64.
        orders: row i lists the tasks that gradient i is projected against, in order; i itself is passed over.
        reduction: `sum` of the projected gradients (the paper) or their `mean` (Pytorch-PCGrad).

    Returns fp64 weights of shape (K,) on the device of `gram_KK`.
    """
    gram = gram_KK.detach().double().cpu().numpy()
    coefficients_KK = np.eye(len(gram))
    for i, order in enumerate(_as_lists(orders)):
        for j in order:
            dot = coefficients_KK[i] @ gram[:, j]
            # A zero gradient conflicts with nothing; rounding or underflow may say otherwise.
            if j != i and dot < 0 and gram[j, j] > 0:
                coefficients_KK[i, j] -= dot / gram[j, j]
    weights_K = coefficients_KK.sum(axis=0) if reduction == "sum" else coefficients_KK.mean(axis=0)
    return torch.from_numpy(weights_K).to(gram_KK.device)


def pcgrad_vectors(gradients_KP: Tensor, orders: Orders, reduction: Reduction) -> Tensor:
    """The combined gradient (P,) by the paper's algorithm, slow and obvious: the reference for `pcgrad`."""
    projected_KP = gradients_KP.clone()
    for i, order in enumerate(_as_lists(orders)):
        for j in order:
            dot = projected_KP[i] @ gradients_KP[j]
            if j != i and dot < 0:
                projected_KP[i] -= dot / (gradients_KP[j] @ gradients_KP[j]) * gradients_KP[j]
    return projected_KP.sum(dim=0) if reduction == "sum" else projected_KP.mean(dim=0)


def task_orders(seed: int, step: int, tasks: int) -> list[list[int]]:
    """PCGrad's random orders: for each of K = `tasks` tasks, the K - 1 others. The same on every rank."""
    generator = addressed_rng(seed, "pcgrad orders", step)
    return [generator.permutation([j for j in range(tasks) if j != i]).tolist() for i in range(tasks)]


def conflicts(gram_KK: Tensor) -> tuple[Tensor, float]:
    """Pairwise cosines (K, K) in fp64, and the share of the K(K-1)/2 pairs whose cosine is negative.

    A zero gradient has cosine 0 with every gradient, itself included. One task alone conflicts at rate 0.
    """
    gram_KK = gram_KK.detach().double()
    norm_K = gram_KK.diagonal().sqrt()
    norms_KK = torch.outer(norm_K, norm_K)
    cosine_KK = torch.where(norms_KK > 0, gram_KK / norms_KK, 0.0).clamp(-1.0, 1.0)
    tasks = len(gram_KK)
    pairs = tasks * (tasks - 1) // 2
    return cosine_KK, int((cosine_KK.triu(1) < 0).sum()) / max(pairs, 1)


class Surgery:
    """One method with its options, its randomness and its state; the engine asks it for weights once a step.

    Args:
        method: a name in `AGGREGATORS`.
        options: of that method, by name: the keyword arguments of its factory below.
        seed: with the step it addresses every random draw: ranks draw alike, a resumed run continues alike.

    Raises `UserError` for an unknown method or option, an impossible value, or a missing pip extra.
    """

    def __init__(self, method: str, options: dict[str, Any], seed: int) -> None:
        self.method = method
        self._seed = seed
        self._weigh: Weigh = build_method("surgery", AGGREGATORS, method, options)
        self._state: dict[str, Tensor] = {}

    def weights(self, gram_KK: Tensor, step: int, tasks: Sequence[int] | None = None) -> Tensor:
        """Weights (K,) in fp32 on the device of `gram_KK`: the combined gradient is Σ_k weights[k]·g_k.

        Args:
            gram_KK: fp32 or fp64, of the reduced gradients, equal on all ranks, finite. Do not widen it: its dtype
                tells methods that look for its rank (`aligned_mtl`, `imtl_g`, `pcd`) how much is rounding.
            step: number of the step in the run.
            tasks: which tasks of the run these K are, each at most once; default 0 … K-1. What `gradvac` learns
                about a pair of tasks stays with that pair, whatever else a schedule draws.

        Raises `UserError` where the method cannot work with the tasks of this step (`krum`, `pcd`).
        """
        tasks = tuple(range(len(gram_KK)) if tasks is None else tasks)
        assert gram_KK.shape == (len(tasks), len(tasks)) and len(set(tasks)) == len(tasks)
        on_cpu_KK = gram_KK.detach().cpu()
        assert on_cpu_KK.isfinite().all(), "the engine skips a step whose gradients are not finite"
        if len(tasks) == 1:
            return torch.ones(1, device=gram_KK.device)
        weights_K = self._weigh(on_cpu_KK, Context(self._seed, step, tasks, self._state))
        return weights_K.to(gram_KK.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """What `gradvac` and `pcd` have learnt so far, by task of the run; empty for the other methods."""
        return {f"{self.method}.{name}": value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()` of a run with the same method, bit for bit.

        Raises `UserError` for the state of another method.
        """
        foreign = [name for name in state if not name.startswith(f"{self.method}.")]
        if foreign:
            raise UserError(
                f"surgery.method {self.method}: the checkpoint was made with {foreign[0].partition('.')[0]}; "
                f"resume with that method"
            )
        self._state = {name.partition(".")[2]: value.clone() for name, value in state.items()}


# ------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Context:
    """What a method may use besides the Gram matrix. `state` is its own to fill, with tensors."""

    seed: int
    step: int
    tasks: tuple[int, ...]
    state: dict[str, Tensor]


Weigh = Callable[[Tensor, Context], Tensor]
"""(gram_KK on the CPU, context) → weights_K"""


def _sum() -> Weigh:
    return lambda gram_KK, context: torch.ones(len(gram_KK))


def _mean() -> Weigh:
    return lambda gram_KK, context: torch.full((len(gram_KK),), 1 / len(gram_KK))


def _pcgrad(*, reduction: Reduction = "sum") -> Weigh:
    """`reduction`: sum of the projected gradients (the paper), or mean (Pytorch-PCGrad)."""
    return lambda gram_KK, context: pcgrad(gram_KK, task_orders(context.seed, context.step, len(gram_KK)), reduction)


def _upgrad(*, reg_eps: float = 1e-4) -> Weigh:
    """`reg_eps`: see `_projector`."""
    return _scale_free(_torchjd().UPGradWeighting(projector=_projector(reg_eps)))


def _dualproj(*, reg_eps: float = 1e-4) -> Weigh:
    """`reg_eps`: see `_projector`."""
    return _scale_free(_torchjd().DualProjWeighting(projector=_projector(reg_eps)))


def _of_those_that_pull(weigh: Weigh) -> Weigh:
    """For methods that would choose a task without any gradient in the step (λ = 0, no pair above a threshold) before
    all others, so that no task would train: such tasks take no part."""

    def of_those_that_pull(gram_KK: Tensor, context: Context) -> Tensor:
        pull_K = gram_KK.diagonal() > 0
        if pull_K.all() or not pull_K.any():
            return weigh(gram_KK, context)
        weights_K = torch.zeros(len(gram_KK))
        weights_K[pull_K] = weigh(gram_KK[pull_K][:, pull_K], context).float() if pull_K.sum() > 1 else 1.0
        return weights_K

    return of_those_that_pull


def _mgda(*, epsilon: float = 1e-3, max_iters: int = 100) -> Weigh:
    """Frank-Wolfe: `epsilon` is the step size under which it stops, `max_iters` its longest course."""
    return _of_those_that_pull(_scale_free(_torchjd().MGDAWeighting(epsilon=epsilon, max_iters=max_iters)))


def _cagrad(*, c: float, norm_eps: float = 1e-4) -> Weigh:
    """`c`: radius around the mean, in lengths of the mean; 0 is the mean, and from 1 on no task gets worse.

    `norm_eps`: the worst-case combination counts as zero below this share of √trace. Then there is no direction to go
    to from the mean, and the mean it is, for `c` below 1; TorchJD's answer, no weight at all, lies outside of the ball.
    """
    weigh = _scale_free(_torchjd().CAGradWeighting(c=c, norm_eps=norm_eps))

    def in_the_ball(gram_KK: Tensor, context: Context) -> Tensor:
        weights_K = weigh(gram_KK, context)
        return weights_K if c >= 1 or weights_K.any() else torch.full((len(gram_KK),), 1 / len(gram_KK))

    weigh_pulling = _of_those_that_pull(in_the_ball)

    def around_the_mean_of_all(gram_KK: Tensor, context: Context) -> Tensor:
        pulling = int((gram_KK.diagonal() > 0).sum())
        return weigh_pulling(gram_KK, context) * ((pulling or len(gram_KK)) / len(gram_KK))

    return around_the_mean_of_all


def _aligned_mtl(*, scale_mode: Literal["min", "median", "rmse"] = "min") -> Weigh:
    """`scale_mode`: which singular value all of them become."""
    return _scale_free(_torchjd().AlignedMTLWeighting(scale_mode=scale_mode))


def _imtl_g() -> Weigh:
    return _scale_free(_torchjd().IMTLGWeighting())


def _gradvac(*, beta: float = 0.5, eps: float = 1e-8) -> Weigh:
    """`beta`: share of the new cosine in the running average; `eps` keeps denominators off zero."""
    return _scale_free(_torchjd().GradVacWeighting(beta=beta, eps=eps))


def _krum(*, n_byzantine: int, n_selected: int = 1) -> Weigh:
    """`n_byzantine`: gradients that may be arbitrary; `n_selected`: gradients that are kept.

    Of a step in which too few tasks have a gradient to judge by, the mean of these is kept.
    """
    krum = _scale_free(_torchjd().KrumWeighting(n_byzantine=n_byzantine, n_selected=n_selected))
    least = max(n_byzantine + 3, n_selected)

    @_of_those_that_pull
    def weigh(gram_KK: Tensor, context: Context) -> Tensor:
        return krum(gram_KK, context) if len(gram_KK) >= least else _mean()(gram_KK, context)

    def checked(gram_KK: Tensor, context: Context) -> Tensor:
        if len(gram_KK) < least:
            raise UserError(
                f"surgery.method krum: n_byzantine {n_byzantine} and n_selected {n_selected} need {least} tasks "
                f"in a step, step {context.step} has {len(gram_KK)}; choose another method"
            )
        return weigh(gram_KK, context)

    return checked


def _fairgrad(*, alpha: float, max_iters: int | None = None) -> Weigh:
    """`alpha`: 0 is the mean, 1 proportional fairness, the larger the nearer to max-min; `max_iters` of the solver,
    default 100·K."""
    if alpha < 0:
        raise ValueError(f"alpha must be non-negative, but got {alpha}")
    if max_iters is not None and max_iters < 1:
        raise ValueError(f"max_iters must be 1 or more, but got {max_iters}")
    unit = _scale_free(_torchjd().FairGradWeighting(alpha=alpha, max_iters=max_iters))

    def weigh(gram_KK: Tensor, context: Context) -> Tensor:
        # The solver is reliable near trace 1 only. The weights solve G·w = w^(-1/alpha), so those of s·G are
        # s^(-alpha / (1 + alpha)) times those of G.
        scale: float = (gram_KK.double().trace().item() or 1.0) ** (-alpha / (1 + alpha))
        try:
            return unit(gram_KK, context).double() * scale
        except ValueError as error:  # w^(-1/alpha) overflows
            raise UserError(f"surgery.options.alpha: the solver fails with {alpha}: {error}; 0 is the mean") from None

    return weigh


def _pcd(*, tau: float | list[float] = 0.02, beta: float = 0.999, eps: float = 1e-8) -> Weigh:
    """`tau`: progress promised to the tasks after the first, in shares of what their own gradient would bring.

    One value for all of them or one each. `beta`: decay of the average squared norms; `eps` is added to them.
    """
    taus = torch.tensor(tau, dtype=torch.float64) if isinstance(tau, list) else tau
    weighting = _torchjd().PCDWeighting(tau=taus, beta=beta, eps=eps)

    def weigh(gram_KK: Tensor, context: Context) -> Tensor:
        known = len(context.state.get("_sq_norm_ema", gram_KK))
        if context.tasks != tuple(range(known)):
            raise UserError(
                f"surgery.method pcd: the first task leads every step and all are averaged in step, but step "
                f"{context.step} has tasks {list(context.tasks)} only; use schedule.kind round_robin, not unbalanced"
            )
        if isinstance(tau, list) and len(tau) != len(gram_KK) - 1:
            raise UserError(f"surgery.options.tau: {len(tau)} values for {len(gram_KK) - 1} tasks after the first")
        return _call(weighting, gram_KK, context)

    return weigh


AGGREGATORS: dict[str, Callable[..., Weigh]] = {
    "sum": _sum,
    "mean": _mean,
    "pcgrad": _pcgrad,
    "gradvac": _gradvac,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "mgda": _mgda,
    "cagrad": _cagrad,
    "aligned_mtl": _aligned_mtl,
    "imtl_g": _imtl_g,
    "krum": _krum,
    "fairgrad": _fairgrad,
    "pcd": _pcd,
}
"""Method name → factory; the factory's keyword arguments are the method's options, in TorchJD's names."""


# ------------------------------------------------------------------------------------------------ TorchJD


def _torchjd() -> Any:
    """TorchJD, imported when asked for: it brings cvxpy along where that is installed; PCGrad needs neither."""
    import torchjd.aggregation

    return torchjd.aggregation


def _projector(reg_eps: float) -> Any:
    """`reg_eps` times the trace is added to the diagonal; the price: g_k·(Σ w g) ≥ -reg_eps·trace·w_k, not 0."""
    import torchjd.linalg

    if reg_eps <= 0:  # TorchJD takes 0, and its solver fails where gradients are parallel or zero
        raise ValueError(f"reg_eps must be above 0, but got {reg_eps}")
    return torchjd.linalg.QuadprogProjector(reg_eps=reg_eps)


def _scale_free(weighting: Any) -> Weigh:
    """`weighting` on the Gram matrix of trace 1; where all gradients are zero, uniform weights."""

    def weigh(gram_KK: Tensor, context: Context) -> Tensor:
        trace = gram_KK.double().trace()
        if trace == 0:
            return torch.full((len(gram_KK),), 1 / len(gram_KK))
        return _call(weighting, (gram_KK.double() / trace).to(gram_KK.dtype), context)

    return weigh


def _call(weighting: Any, gram_KK: Tensor, context: Context) -> Tensor:
    """One call of a TorchJD weighting, with its random draws addressed and its state kept in `context`."""
    from torchjd import Stateful

    with torch.random.fork_rng(devices=[]):  # TorchJD draws from torch's global CPU generator
        if isinstance(weighting, Stateful):
            _restore(weighting, gram_KK, context)
        torch.default_generator.manual_seed(int(addressed_rng(context.seed, "torchjd", context.step).integers(2**63)))
        weights_K: Tensor = weighting(gram_KK)
    for name, part in weighting.state_dict().items():
        context.state[name][_among(context.tasks, part)] = part
    return weights_K


def _restore(weighting: Any, gram_KK: Tensor, context: Context) -> None:
    """Loads the part of the state that belongs to this step's tasks; new tasks start at TorchJD's zeros."""
    # TorchJD gives its buffers a size in the first call, and only then can they be loaded.
    weighting.reset()
    weighting(torch.eye(len(gram_KK), dtype=gram_KK.dtype))
    parts = weighting.state_dict()
    for name, part in parts.items():
        old = context.state.get(name, part.new_zeros([0] * part.ndim))
        if old.ndim != part.ndim:
            raise UserError(f"surgery: the checkpoint's {name} has shape {list(old.shape)}; it was damaged")
        size = max(*old.shape, 1 + max(context.tasks)) if part.ndim else 0
        grown = part.new_zeros([size] * part.ndim)
        grown[tuple(slice(n) for n in old.shape)] = old
        context.state[name] = grown
        parts[name] = grown[_among(context.tasks, part)]
    weighting.load_state_dict(parts)


def _among(tasks: tuple[int, ...], part: Tensor) -> Any:
    """Index of the rows (and columns) of `tasks` in the run-wide tensor that `part` was cut from."""
    return np.ix_(*[tasks] * part.ndim)


# ------------------------------------------------------------------------------------------------ helpers


def _as_lists(orders: Orders) -> Sequence[Sequence[int]]:
    return orders.tolist() if isinstance(orders, Tensor) else orders
