"""Weights of the task losses: K losses in, the K factors ∂f/∂ℓ of one total loss f(ℓ₁ … ℓ_K) out.

Factors multiply a task's gradients (those of its head too) after they were reduced and before surgery, so a method may
look at the losses of the whole batch over all ranks: f is exactly the total loss that would be differentiated on one
machine. λ is already in ℓ_k = λ_k·L_k. Legend: K tasks of the step, N tasks of the run.

    method         source                             total loss f; what it learns
    fixed          -                                  Σ ℓ
    homoscedastic  Kendall et al. 2018, eq. 7 and 10  Σ c·e^(−s)·ℓ + s/2, with s = log σ², c = 1 for a classification
                                                      (softmax, eq. 10) and ½ for a regression (Gaussian, eq. 7)
    imtl_l         Liu et al. 2021, eq. 9             Σ e^s·ℓ − s
    dwa            Liu et al. 2019, eq. 7             Σ w·ℓ, w = K·softmax(rate / T), rate = ℓ(epoch−1) / ℓ(epoch−2)
    famo           Liu et al. 2023, Algorithm 1       the factors z/ℓ, scaled to a convex combination; z = softmax(w)
    mean           -                                  Σ ℓ / K
    gls            Chennupati et al. 2019             (Π ℓ)^(1/K); losses must be above 0
    stch           Lin et al. 2024                    μ·log Σ exp(ℓ / (K·μ)), a smooth maximum
    random         Lin et al. 2022, Algorithm 2       Σ w·ℓ, w = softmax of normal draws, addressed by the step
    cosmos         Ruchte and Grabocka 2021           Σ ℓ − lambda_·cos(ℓ, 1)
    pbi            Zhang and Li 2007                  the losses' length along 1, + θ times their distance from it

What methods learn are a few numbers per task of the run: s, w and Adam's moments, or sums of losses. They are the same
on every rank, because the losses are, and lie in the checkpoint. A task that sits a step out keeps its own. `mean` to
`pbi` are TorchJD's scalarizers; those with state are ours, because TorchJD's cannot be saved, and held against it in
tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtbert.errors import UserError
from mtbert.methods import build_method
from mtbert.randomness import addressed_rng

TINY = 1e-8  # keeps logarithms and quotients of losses finite, as in FAMO's published code


@dataclass(frozen=True)
class Seen:
    """A step as a method sees it: losses (K,) in fp64, λ included, and which tasks of the run they belong to."""

    losses_K: Tensor
    tasks: Tensor  # (K,) int64
    step: int
    epoch: int
    after_K: Tensor | None = None  # losses on the same batch after the update, where the method wants them


class Method:
    """The total loss is f(ℓ); `state` holds what is learnt, with an entry per task of the run."""

    wants_losses_after = False

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def start(self, regression_N: Tensor) -> None:
        """`regression_N`: which tasks of the run predict a value."""

    def factors(self, seen: Seen, seed: int) -> Tensor:
        return torch.ones_like(seen.losses_K)

    def learn(self, seen: Seen, rate: float) -> None:
        """After the update. `rate` is what the schedule multiplies every learning rate by."""

    def shown(self) -> Tensor | None:
        """What people want to see of each task of the run (N,)."""
        return None


class Weighting:
    """One method with its options, its randomness and its state; the engine asks it for factors once a step.

    Args:
        method: a name in `WEIGHTINGS`.
        options: of that method, by name.
        regression: for each task of the run, whether it predicts a value (`homoscedastic` weighs those by half).
        seed: with the step it addresses every random draw, alike on all ranks.

    Raises `UserError` for an unknown method or option or an impossible value.
    """

    def __init__(self, method: str, options: dict[str, Any], regression: Sequence[bool], seed: int) -> None:
        self.method = method
        self._seed = seed
        self._method: Method = build_method("weighting", WEIGHTINGS, method, options)
        self._method.start(torch.tensor(regression))

    @property
    def wants_losses_after(self) -> bool:
        """Whether `learn` needs the losses on the same batch after the update: one more forward pass a step."""
        return self._method.wants_losses_after

    def factors(self, losses_K: Tensor, tasks: Sequence[int], step: int, epoch: int) -> Tensor:
        """∂f/∂ℓ (K,) in fp64 on the CPU, for the losses over all ranks of the tasks in the step."""
        return self._method.factors(_seen(losses_K, tasks, step, epoch), self._seed)

    def learn(
        self,
        losses_K: Tensor,
        tasks: Sequence[int],
        step: int,
        epoch: int,
        rate: float,
        after_K: Tensor | None = None,
    ) -> None:
        """Once after each update that took place, with the losses that `factors` saw."""
        self._method.learn(_seen(losses_K, tasks, step, epoch, after_K), rate)

    def shown(self) -> dict[int, float]:
        """The learnt number of each task of the run (log σ² or s, the logit w), for methods that have one."""
        shown_N = self._method.shown()
        return {} if shown_N is None else dict(enumerate(shown_N.tolist()))

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{self.method}.{name}": value.clone() for name, value in self._method.state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()` of a run with the same method, bit for bit; from none as it is.

        Raises `UserError` for the state of another method or of other tasks.
        """
        foreign = [name for name in state if not name.startswith(f"{self.method}.")]
        if foreign:
            raise UserError(
                f"weighting.method {self.method}: the checkpoint was made with {foreign[0].partition('.')[0]}; "
                f"resume with that method"
            )
        like = {name: (value.shape, value.dtype) for name, value in self.state_dict().items()}
        if state and {name: (value.shape, value.dtype) for name, value in state.items()} != like:
            raise UserError(f"weighting.method {self.method}: the checkpoint's state is of other tasks, or was damaged")
        self._method.state |= {name.partition(".")[2]: value.clone() for name, value in state.items()}


def _seen(losses_K: Tensor, tasks: Sequence[int], step: int, epoch: int, after_K: Tensor | None = None) -> Seen:
    after_K = None if after_K is None else after_K.double()
    return Seen(losses_K.double(), torch.tensor(tasks, dtype=torch.int64), step, epoch, after_K)


# --------------------------------------------------------------------------------------------- methods that learn


class _Learnt(Method):
    """One number per task, learnt with Adam (Kingma and Ba 2015, betas 0.9 and 0.999) at a rate of its own."""

    def __init__(self, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        if lr < 0 or weight_decay < 0:
            raise ValueError("lr and weight_decay must not be negative")
        self.lr, self.weight_decay = lr, weight_decay

    def start(self, regression_N: Tensor) -> None:
        zeros_N = torch.zeros(len(regression_N), dtype=torch.float64)
        self.state = {name: zeros_N.clone() for name in ("value", "exp_avg", "exp_avg_sq", "steps")}

    def descend(self, tasks: Tensor, gradient_K: Tensor, rate: float) -> None:
        """One Adam step on the numbers of `tasks`; the others keep their moments and their count of steps."""
        value, first, second, steps = (self.state[name][tasks] for name in ("value", "exp_avg", "exp_avg_sq", "steps"))
        gradient_K = gradient_K + self.weight_decay * value
        first, second, steps = 0.9 * first + 0.1 * gradient_K, 0.999 * second + 0.001 * gradient_K.square(), steps + 1
        spread = (second / (1 - 0.999**steps)).sqrt() + 1e-8
        value = value - rate * self.lr * first / (1 - 0.9**steps) / spread
        for name, numbers in (("value", value), ("exp_avg", first), ("exp_avg_sq", second), ("steps", steps)):
            self.state[name][tasks] = numbers

    def _descend_where_lost(self, seen: Seen, gradient_K: Tensor, rate: float) -> None:
        """A loss of 0 (λ = 0, no pair above a threshold) tells nothing, and would raise its factor at every step."""
        lost_K = seen.losses_K != 0
        if lost_K.any():
            self.descend(seen.tasks[lost_K], gradient_K[lost_K], rate)

    def shown(self) -> Tensor:
        return self.state["value"]


class _Homoscedastic(_Learnt):
    def start(self, regression_N: Tensor) -> None:
        super().start(regression_N)
        self.share_N = torch.where(regression_N, 0.5, 1.0).double()

    def factors(self, seen: Seen, seed: int) -> Tensor:
        return self.share_N[seen.tasks] * (-self.state["value"][seen.tasks]).exp()

    def learn(self, seen: Seen, rate: float) -> None:
        # d/ds (c·e^(−s)·ℓ + s/2)
        self._descend_where_lost(seen, 0.5 - self.factors(seen, 0) * seen.losses_K, rate)


class _ImtlL(_Learnt):
    def factors(self, seen: Seen, seed: int) -> Tensor:
        return self.state["value"][seen.tasks].exp()

    def learn(self, seen: Seen, rate: float) -> None:
        # d/ds (e^s·ℓ − s)
        self._descend_where_lost(seen, self.factors(seen, 0) * seen.losses_K - 1, rate)


class _Famo(_Learnt):
    """The logits descend along the change of log ℓ over the update, measured on the same batch."""

    wants_losses_after = True

    def factors(self, seen: Seen, seed: int) -> Tensor:
        share_K = torch.softmax(self.state["value"][seen.tasks], dim=0) / (seen.losses_K + TINY)
        share_K = torch.where(seen.losses_K == 0, 0.0, share_K)  # nothing to learn there, and log 0 to take
        return share_K / (share_K.sum() if share_K.any() else 1.0)

    def learn(self, seen: Seen, rate: float) -> None:
        assert seen.after_K is not None
        fallen_K = (seen.losses_K + TINY).log() - (seen.after_K + TINY).log()
        fallen_K = torch.where((seen.losses_K == 0) | (seen.after_K == 0), 0.0, fallen_K)
        z_K = torch.softmax(self.state["value"][seen.tasks], dim=0)
        # its own rate throughout: the published algorithm knows no schedule for it
        self.descend(seen.tasks, z_K * (fallen_K - z_K @ fallen_K), 1.0)


class _Dwa(Method):
    """Uniform until a task has been through two epochs."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, but got {temperature}")
        self.temperature = temperature

    def start(self, regression_N: Tensor) -> None:
        zeros_N = torch.zeros(len(regression_N), dtype=torch.float64)
        # mean losses of the last epoch and the one before (0: none yet), and the sum and number of this one's
        self.state = {name: zeros_N.clone() for name in ("last", "before_last", "sum", "count")}
        self.state["epoch"] = torch.zeros(1, dtype=torch.int64)

    def factors(self, seen: Seen, seed: int) -> Tensor:
        self._turn(seen.epoch)
        last_K, before_K = self.state["last"][seen.tasks], self.state["before_last"][seen.tasks]
        rate_K = torch.where(before_K > 0, last_K / before_K, 1.0)
        return len(rate_K) * torch.softmax(rate_K / self.temperature, dim=0)

    def learn(self, seen: Seen, rate: float) -> None:
        self.state["sum"][seen.tasks] += seen.losses_K
        self.state["count"][seen.tasks] += 1

    def _turn(self, epoch: int) -> None:
        """Close the epoch before this one."""
        if epoch == int(self.state["epoch"]):
            return
        count_N = self.state["count"]
        mean_N = self.state["sum"] / count_N
        for name, newer_N in (("before_last", self.state["last"]), ("last", mean_N)):
            self.state[name] = torch.where(count_N > 0, newer_N, self.state[name])
        self.state |= {"sum": torch.zeros_like(mean_N), "count": torch.zeros_like(mean_N)}
        self.state["epoch"] = torch.tensor([epoch])


# ------------------------------------------------------------------------------------------ TorchJD's scalarizers


class _Scalarized(Method):
    """The gradient of one of TorchJD's scalarizers at the losses; `make(K)` builds it for so many tasks."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make

    def factors(self, seen: Seen, seed: int) -> Tensor:
        losses_K = seen.losses_K.clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):  # TorchJD draws from torch's global CPU generator
            torch.default_generator.manual_seed(int(addressed_rng(seed, "weighting", seen.step).integers(2**63)))
            total = self.make(len(losses_K))(losses_K)
        return torch.autograd.grad(total, losses_K)[0]


class _Gls(_Scalarized):
    """Of the losses above 0: where a batch has no pair to learn from, no other task would have a factor."""

    def factors(self, seen: Seen, seed: int) -> Tensor:
        factors_K = torch.zeros_like(seen.losses_K)
        if (above_K := seen.losses_K != 0).any():
            factors_K[above_K] = super().factors(replace(seen, losses_K=seen.losses_K[above_K]), seed)
        return factors_K


def _torchjd() -> Any:
    import torchjd.scalarization

    return torchjd.scalarization


def _fixed() -> Method:
    return Method()


def _homoscedastic(*, lr: float = 1e-2) -> Method:
    """`lr`: Adam's rate for s; s starts at 0."""
    return _Homoscedastic(lr)


def _imtl_l(*, lr: float = 1e-2) -> Method:
    """`lr`: Adam's rate for s; s starts at 0."""
    return _ImtlL(lr)


def _dwa(*, temperature: float = 2.0) -> Method:
    """`temperature`: larger is more uniform."""
    return _Dwa(temperature)


def _famo(*, lr: float = 0.025, weight_decay: float = 1e-3) -> Method:
    """`lr`, `weight_decay`: of Adam on the logits w."""
    return _Famo(lr, weight_decay)


def _mean() -> Method:
    return _Scalarized(lambda tasks: _torchjd().Mean())


def _gls() -> Method:
    return _Gls(lambda tasks: _torchjd().GeometricMean())


def _stch(*, mu: float) -> Method:
    """`mu`: smaller is nearer to the maximum."""
    _torchjd().STCH(mu)  # refuses what is impossible now
    return _Scalarized(lambda tasks: _torchjd().STCH(mu))


def _random() -> Method:
    return _Scalarized(lambda tasks: _torchjd().Random())


def _cosmos(*, lambda_: float) -> Method:
    """`lambda_`: how much a uniform vector of losses is worth."""
    _torchjd().COSMOS(lambda_, torch.ones(1))
    return _Scalarized(lambda tasks: _torchjd().COSMOS(lambda_, torch.ones(tasks, dtype=torch.float64)))


def _pbi(*, theta: float = 5.0) -> Method:
    """`theta`: what unequal losses cost."""
    _torchjd().PBI(theta, torch.ones(1))
    return _Scalarized(lambda tasks: _torchjd().PBI(theta, torch.ones(tasks, dtype=torch.float64)))


WEIGHTINGS: dict[str, Callable[..., Method]] = {
    "fixed": _fixed,
    "homoscedastic": _homoscedastic,
    "imtl_l": _imtl_l,
    "dwa": _dwa,
    "famo": _famo,
    "mean": _mean,
    "gls": _gls,
    "stch": _stch,
    "random": _random,
    "cosmos": _cosmos,
    "pbi": _pbi,
}
"""Method name → factory; the factory's keyword arguments are the method's options, TorchJD's under TorchJD's names."""
