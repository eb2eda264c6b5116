"""Gram space equals vector space, and every member of AGGREGATORS has the properties its method promises.

Gradients that the tests compare are measured in Gram space too: ‖Σ (v_k - w_k)·g_k‖² = (v - w)ᵀ G (v - w).
"""

import math
import random
import re
import sys
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torchjd.aggregation import GradVacWeighting, PCDWeighting, PCGradWeighting

from mtbert.config import SurgeryMethod
from mtbert.errors import UserError, to_install
from mtbert.surgery import AGGREGATORS, Reduction, Surgery, conflicts, pcgrad, pcgrad_vectors, task_orders

SCALES = [0.0, 1e-15, 1e-5, 1.0, 1e15]
TASKS = [2, 3, 6]
OPTIONS: dict[str, dict[str, Any]] = {
    "cagrad": {"c": 0.5},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0, "n_selected": 2},  # of three tasks the nearest two tie for the centre
}

every_method = pytest.mark.parametrize("method", AGGREGATORS)


def methods(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", names)


def surgery(method: str, **options: Any) -> Surgery:
    return Surgery(method, {**OPTIONS.get(method, {}), **options}, seed=5)


def gradients(tasks: int, rank: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random (K, P) fp64 gradients of a given rank; about half of the pairs conflict."""
    generator = torch.Generator().manual_seed(1000 * tasks + 10 * rank + seed)
    left_KR = torch.randn(tasks, rank, generator=generator, dtype=torch.float64)
    right_RP = torch.randn(rank, 2 * tasks, generator=generator, dtype=torch.float64)
    return scale * left_KR @ right_RP


def gram(tasks: int, seed: int = 0) -> Tensor:
    """Gram matrix of `tasks` linearly independent gradients."""
    gradients_KP = gradients(tasks, tasks, seed=seed)
    return gradients_KP @ gradients_KP.T


def grams(scale: float = 1.0, least: int = 2) -> Iterator[Tensor]:
    """Gram matrices of full rank, deficient, of rank one, and with a zero gradient."""
    for tasks in (tasks for tasks in TASKS if tasks >= least):
        for rank in sorted({1, tasks - 1, tasks}):
            gradients_KP = gradients(tasks, rank, scale)
            yield gradients_KP @ gradients_KP.T
        gradients_KP = gradients(tasks, tasks, scale)
        gradients_KP[tasks // 2] = 0
        yield gradients_KP @ gradients_KP.T


def length(weights_K: Tensor, gram_KK: Tensor) -> float:
    """‖Σ_k w_k·g_k‖"""
    weights_K = weights_K.double()
    return (weights_K @ gram_KK.double() @ weights_K).clamp(min=0).sqrt().item()


def total(gram_KK: Tensor) -> float:
    """(Σ_k ‖g_k‖²)^½, the yardstick for errors."""
    return gram_KK.double().trace().sqrt().item()


# ------------------------------------------------------------------------------------------------ PCGrad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("tasks", range(2, 9))
def test_gram_space_pcgrad_equals_the_papers_algorithm(tasks: int, scale: float, reduction: Reduction) -> None:
    for rank in range(1, tasks + 1):
        gradients_KP = gradients(tasks, rank, scale)
        orders = task_orders(seed=rank, step=tasks, tasks=tasks)
        weights_K = pcgrad(gradients_KP @ gradients_KP.T, orders, reduction)
        expected_P = pcgrad_vectors(gradients_KP, orders, reduction)
        tolerance = 1e-13 * tasks * gradients_KP.norm().item()
        torch.testing.assert_close(weights_K @ gradients_KP, expected_P, rtol=0, atol=tolerance)


def test_rounding_does_not_grow_when_gradients_differ_much_in_length() -> None:
    gradients_KP = gradients(6, 6) * torch.logspace(-8, 8, 6, dtype=torch.float64)[:, None]
    orders = task_orders(0, 0, 6)
    weights_K = pcgrad(gradients_KP @ gradients_KP.T, orders, "sum")
    error_P = weights_K @ gradients_KP - pcgrad_vectors(gradients_KP, orders, "sum")
    assert error_P.norm() < 1e-14 * gradients_KP.norm()


@pytest.mark.parametrize("tasks", range(2, 9))
def test_pcgrad_equals_torchjd_with_the_same_order(tasks: int) -> None:
    for rank in range(1, tasks + 1):
        gradients_KP = gradients(tasks, rank)
        gram_KK = gradients_KP @ gradients_KP.T
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            orders_KK = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
            torch.manual_seed(rank)
            theirs_K = PCGradWeighting()(gram_KK)
        torch.testing.assert_close(pcgrad(gram_KK, orders_KK, "sum"), theirs_K, rtol=1e-12, atol=1e-12)


def test_pcgrad_by_hand() -> None:
    # g1 = (1, 0), g2 = (-1, 1): g1 loses its part along g2, (1, 0) + ½·(-1, 1); g2 its part along g1, (0, 1)
    gram_KK = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    assert pcgrad(gram_KK, [[1], [0]], "sum").tolist() == [2.0, 1.5]
    assert pcgrad(gram_KK, [[1], [0]], "mean").tolist() == [1.0, 0.75]


def test_projection_is_against_the_original_gradients() -> None:
    gradients_KP = torch.tensor([[1.0, 0.2], [-1.0, 0.3], [0.1, -1.0]], dtype=torch.float64)
    orders = [[1, 2], [0, 2], [0, 1]]
    against_projected_KP = gradients_KP.clone()
    for i, order in enumerate(orders):
        for j in order:
            dot = against_projected_KP[i] @ against_projected_KP[j]
            if dot < 0:
                against_projected_KP[i] -= dot / against_projected_KP[j].square().sum() * against_projected_KP[j]
    combined_P = pcgrad(gradients_KP @ gradients_KP.T, orders, "sum") @ gradients_KP
    torch.testing.assert_close(combined_P, pcgrad_vectors(gradients_KP, orders, "sum"))
    assert (combined_P - against_projected_KP.sum(dim=0)).norm() > 0.1


def test_pcgrad_survives_a_norm_that_underflows_to_zero() -> None:
    assert pcgrad(torch.tensor([[1.0, -1e-30], [-1e-30, 0.0]]), [[1], [0]], "sum").tolist() == [1.0, 1.0]


def test_task_orders_are_addressed_and_uniform() -> None:
    assert task_orders(1, 2, 4) == task_orders(1, 2, 4)
    assert len({str(task_orders(seed, step, 4)) for seed in range(5) for step in range(5)}) == 25
    drawn = [str(task_orders(0, step, 3)[1]) for step in range(2000)]
    assert set(drawn) == {"[0, 2]", "[2, 0]"}
    assert 900 < drawn.count("[0, 2]") < 1100
    for i, order in enumerate(task_orders(3, 4, 8)):
        assert sorted([*order, i]) == list(range(8))


def test_task_orders_are_frozen() -> None:
    """After a change here a checkpoint no longer continues its run."""
    assert task_orders(0, 1, 4) == [[1, 2, 3], [3, 0, 2], [3, 1, 0], [0, 2, 1]]


# ------------------------------------------------------------- properties that every method has


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_finite(method: str, scale: float, dtype: torch.dtype) -> None:
    for gram_KK in grams(scale, least=3):
        weights_K = surgery(method).weights(gram_KK.to(dtype), step=0)
        assert weights_K.dtype == torch.float32 and weights_K.shape == (len(gram_KK),)
        assert weights_K.isfinite().all()


@every_method
@pytest.mark.parametrize("scale", SCALES)
def test_one_task_has_weight_one(method: str, scale: float) -> None:
    assert surgery(method).weights(torch.tensor([[scale**2]]), step=0, tasks=[3]).tolist() == [1.0]


def global_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().tolist(), str(numpy_state["state"]["key"].tolist()), random.getstate()


@every_method
def test_no_global_generator_is_touched(method: str) -> None:
    before = global_states()
    surgery(method).weights(gram(8), step=0)
    after = global_states()
    assert before == after


@every_method
def test_no_global_generator_is_read(method: str) -> None:
    gram_KK = gram(8)
    first_K = surgery(method).weights(gram_KK, step=3)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        again_K = surgery(method).weights(gram_KK, step=3)
    assert torch.equal(first_K, again_K)


@every_method
def test_state_round_trip_continues_bit_for_bit(method: str) -> None:
    whole, parts = surgery(method), surgery(method)
    for step in range(6):
        gram_KK = gram(4, seed=step)
        state = parts.state_dict()
        parts = surgery(method)
        parts.load_state_dict(state)
        assert torch.equal(whole.weights(gram_KK, step), parts.weights(gram_KK, step))
    assert bool(whole.state_dict()) == (method in ("gradvac", "pcd"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pcgrad", {"reduction": "mean"}),
        *(("gradvac", {name: 0.9}) for name in ("beta", "eps")),
        *((method, {"reg_eps": 0.5}) for method in ("upgrad", "dualproj")),
        *(("mgda", option) for option in ({"epsilon": 0.9}, {"max_iters": 1})),
        *(("cagrad", option) for option in ({"c": 0.1}, {"norm_eps": 10.0})),
        *(("aligned_mtl", {"scale_mode": mode}) for mode in ("median", "rmse")),
        *(("krum", option) for option in ({"n_selected": 1}, {"n_byzantine": 1, "n_selected": 1})),
        *(("fairgrad", option) for option in ({"alpha": 2.0}, {"max_iters": 1})),
        *(("pcd", option) for option in ({"tau": 0.5}, {"tau": [0.5, 0.02, 0.02]}, {"beta": 0.1}, {"eps": 100.0})),
    ],
    ids=str,
)
def test_every_option_counts(method: str, options: dict[str, Any]) -> None:
    usual, other = surgery(method), surgery(method, **options)
    steps = [(usual.weights(gram(4, seed), seed), other.weights(gram(4, seed), seed)) for seed in range(3)]
    assert not all(torch.equal(one_K, two_K) for one_K, two_K in steps)


def test_one_promise_for_all_tasks_is_one_each() -> None:
    one, each = surgery("pcd", tau=0.3), surgery("pcd", tau=[0.3, 0.3, 0.3])
    for step in range(3):
        torch.testing.assert_close(one.weights(gram(4, step), step), each.weights(gram(4, step), step))


@methods("aligned_mtl", "imtl_g")
def test_rounding_is_no_direction(method: str) -> None:
    """Three gradients in a plane: what fp32 leaves of the third direction must not count as one."""
    gradients_KP = gradients(3, 2)
    exact_K = surgery(method).weights(gradients_KP @ gradients_KP.T, step=0)
    rounded_K = surgery(method).weights((gradients_KP @ gradients_KP.T).float(), step=0)
    torch.testing.assert_close(rounded_K, exact_K, rtol=1e-3, atol=1e-3)


@every_method
def test_the_gram_matrix_is_left_alone(method: str) -> None:
    gram_KK = gram(8)
    before_KK = gram_KK.clone()
    surgery(method).weights(gram_KK, step=0)
    assert torch.equal(gram_KK, before_KK)


# ------------------------------------------------------------- properties of some methods


def assert_scales(method: str, exponent: float, **options: Any) -> None:
    """w(s·G) = s^exponent · w(G). Powers of two leave the mantissas alone, so the solvers' paths are the same."""
    for gram_KK in grams(least=3):
        weights_K = surgery(method, **options).weights(gram_KK, step=0)
        for scale in 4.0 ** np.array([-50, 50]):
            scaled_K = surgery(method, **options).weights(scale * gram_KK, step=0)
            torch.testing.assert_close(scaled_K, weights_K * scale**exponent, rtol=1e-6, atol=0)


@methods(*(name for name in AGGREGATORS if name not in ("fairgrad", "pcd")))
def test_weights_are_scale_invariant(method: str) -> None:
    assert_scales(method, exponent=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_fairgrad_weights_fall_with_scale(alpha: float) -> None:
    assert_scales("fairgrad", exponent=-alpha / (1 + alpha), alpha=alpha)


def test_pcd_is_scale_invariant_without_eps() -> None:
    assert_scales("pcd", exponent=0, eps=0.0)


@methods("sum", "mean", "upgrad", "dualproj", "mgda", "cagrad", "aligned_mtl", "imtl_g", "krum", "fairgrad")
def test_permutation_equivariant(method: str) -> None:
    options = {"epsilon": 1e-9, "max_iters": 1000} if method == "mgda" else {}
    for gram_KK in grams(least=3):
        order_K = torch.randperm(len(gram_KK), generator=torch.Generator().manual_seed(len(gram_KK)))
        weights_K = surgery(method, **options).weights(gram_KK, step=0)
        permuted_K = surgery(method, **options).weights(gram_KK[order_K][:, order_K], step=0)
        assert length(permuted_K - weights_K[order_K], gram_KK[order_K][:, order_K]) <= 1e-3 * total(gram_KK)


def test_pcgrad_is_permutation_equivariant_up_to_its_orders() -> None:
    for gram_KK in grams():
        tasks = len(gram_KK)
        place_K = torch.randperm(tasks, generator=torch.Generator().manual_seed(tasks))  # old name of each task
        orders = task_orders(0, 0, tasks)
        renamed = [[place_K.tolist().index(j) for j in orders[old]] for old in place_K.tolist()]
        weights_K = pcgrad(gram_KK, orders, "sum")
        permuted_K = pcgrad(gram_KK[place_K][:, place_K], renamed, "sum")
        torch.testing.assert_close(permuted_K, weights_K[place_K], rtol=1e-9, atol=1e-9)


@methods("sum", "mean", "pcgrad", "gradvac", "upgrad")
def test_linear_under_scaling_of_single_tasks(method: str) -> None:
    """A(diag(c)·J) is linear in c > 0 (Quinton and Rey 2024, definition 3)."""
    options = {"reg_eps": 1e-10} if method == "upgrad" else {}
    for tasks in range(2, 9):
        gradients_KP = gradients(tasks, tasks)
        generator = torch.Generator().manual_seed(tasks)
        one_K, two_K = torch.rand(2, tasks, generator=generator, dtype=torch.float64) + 0.1

        def combined(scale_K: Tensor, gradients_KP: Tensor = gradients_KP, options: dict[str, Any] = options) -> Tensor:
            scaled_KP = scale_K[:, None] * gradients_KP
            return surgery(method, **options).weights(scaled_KP @ scaled_KP.T, step=0).double() @ scaled_KP

        both_P = combined(2 * one_K + 3 * two_K)
        expected_P = 2 * combined(one_K) + 3 * combined(two_K)
        assert (both_P - expected_P).norm() <= 1e-5 * expected_P.norm()


def assert_non_conflicting(weights_K: Tensor, gram_KK: Tensor, tolerance: float) -> None:
    """No task's gradient has a negative dot product with the combination, in units of ‖g_k‖·total."""
    dots_K = gram_KK @ weights_K.double()
    floor_K = -tolerance * gram_KK.diagonal().sqrt() * total(gram_KK)
    assert (dots_K >= floor_K).all(), (dots_K, floor_K)


@methods("upgrad", "dualproj")
@pytest.mark.parametrize("scale", SCALES[1:])
def test_projections_onto_the_dual_cone_conflict_no_more_than_their_regularisation(method: str, scale: float) -> None:
    for gram_KK in grams(scale):
        for reg_eps in (1e-4, 1e-8):
            weights_K = surgery(method, reg_eps=reg_eps).weights(gram_KK, step=0).double()
            slack_K = gram_KK @ weights_K + reg_eps * gram_KK.trace() * weights_K
            # the weights come back in fp32: 1e-7 of the largest
            assert (slack_K >= -1e-6 * weights_K.abs().max() * gram_KK.trace()).all()


def test_mgda_and_wide_cagrad_are_non_conflicting() -> None:
    for gram_KK in grams():
        mgda_K = surgery("mgda", epsilon=1e-9, max_iters=1000).weights(gram_KK, step=0)
        assert_non_conflicting(mgda_K, gram_KK, tolerance=0.01)
        assert_non_conflicting(surgery("cagrad", c=1.0).weights(gram_KK, step=0), gram_KK, tolerance=1e-3)


def test_pcgrad_of_two_tasks_is_non_conflicting() -> None:
    for seed in range(50):
        gram_KK = gram(2, seed)
        assert_non_conflicting(surgery("pcgrad").weights(gram_KK, step=seed), gram_KK, tolerance=1e-6)


@methods("pcgrad", "upgrad", "dualproj")
def test_without_conflict_nothing_is_changed(method: str) -> None:
    gram_KK = gradients(5, 5).abs() @ gradients(5, 5).abs().T
    expected = 1.0 if method == "pcgrad" else 0.2
    torch.testing.assert_close(surgery(method).weights(gram_KK, step=0), torch.full((5,), expected))


# ------------------------------------------------------------------------------------------- closed forms


@pytest.fixture
def conflicting_KK() -> Tensor:
    """Two gradients of lengths 1 and 3 at 120°."""
    return torch.tensor([[1.0, -1.5], [-1.5, 9.0]], dtype=torch.float64)


@pytest.mark.parametrize("cosine", [-1.0, -0.5, 0.0, 0.2, 0.9])
def test_mgda_of_two_tasks(cosine: float) -> None:
    # Sener and Koltun 2018, equation 4
    gram_KK = torch.tensor([[1.0, 3 * cosine], [3 * cosine, 9.0]], dtype=torch.float64)
    alpha = float(np.clip((9 - 3 * cosine) / (10 - 6 * cosine), 0, 1))
    weights_K = surgery("mgda").weights(gram_KK, step=0)
    torch.testing.assert_close(weights_K, torch.tensor([alpha, 1 - alpha]))


def test_upgrad_of_two_tasks_is_the_mean_of_pcgrad(conflicting_KK: Tensor) -> None:
    expected_K = surgery("pcgrad", reduction="mean").weights(conflicting_KK, step=0)
    weights_K = surgery("upgrad", reg_eps=1e-10).weights(conflicting_KK, step=0)
    torch.testing.assert_close(weights_K, expected_K)


def test_dualproj_of_two_tasks_projects_the_mean(conflicting_KK: Tensor) -> None:
    # mean·g1 = (1 - 1.5) / 2 < 0: its part along g1, -0.25·g1, goes
    weights_K = surgery("dualproj", reg_eps=1e-10).weights(conflicting_KK, step=0)
    torch.testing.assert_close(weights_K, torch.tensor([0.75, 0.5]))


def test_imtl_g_projects_equally_on_all_tasks() -> None:
    for tasks in TASKS:
        gram_KK = gram(tasks)
        weights_K = surgery("imtl_g").weights(gram_KK, step=0).double()
        projections_K = gram_KK @ weights_K / gram_KK.diagonal().sqrt()
        torch.testing.assert_close(projections_K, projections_K.mean().expand(tasks), rtol=1e-3, atol=1e-5)
        assert weights_K.sum().item() == pytest.approx(1, abs=1e-5)


def test_aligned_mtl_of_orthogonal_gradients_shortens_all_to_the_least() -> None:
    weights_K = surgery("aligned_mtl").weights(torch.diag(torch.tensor([1.0, 4.0, 16.0])), step=0)
    torch.testing.assert_close(weights_K, torch.tensor([1.0, 0.5, 0.25]) / 3)


def test_cagrad_stays_in_its_ball_and_lifts_the_worst_task() -> None:
    for tasks in TASKS:
        gram_KK, mean_K = gram(tasks), torch.full((tasks,), 1 / tasks)
        weights_K = surgery("cagrad", c=0.5).weights(gram_KK, step=0)
        assert length(weights_K - mean_K, gram_KK) <= 0.5001 * length(mean_K, gram_KK) + 1e-6 * total(gram_KK)
        assert (gram_KK @ weights_K.double()).min() >= (gram_KK @ mean_K.double()).min() - 1e-6 * gram_KK.trace()


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [("mgda", {}, 1), ("cagrad", {"c": 0.4}, 2 / 3), ("cagrad", {"c": 1.0}, 2 / 3), ("cagrad", {"c": 2.0}, 2 / 3)],
)
def test_a_task_without_a_gradient_stops_no_other(method: str, options: dict[str, Any], share: float) -> None:
    """λ = 0, no pair above a threshold, or a task learnt by heart. `share`: of the mean, which is of all tasks."""
    gram_KK = gram(3)
    gram_KK[1, :] = gram_KK[:, 1] = 0
    weights_K = surgery(method, **options).weights(gram_KK, step=0).double()
    assert weights_K @ gram_KK @ weights_K > 1e-3 * gram_KK.trace()
    alone_K = surgery(method, **options).weights(gram_KK[::2, ::2], step=0).double()
    torch.testing.assert_close(weights_K, share * torch.tensor([alone_K[0], 0, alone_K[1]], dtype=torch.float64))
    gram_KK[0, :] = gram_KK[:, 0] = 0
    last_K = surgery(method, **options).weights(gram_KK, step=0)
    torch.testing.assert_close(last_K, torch.tensor([0, 0, 1.0 if method == "mgda" else 1 / 3]))


def test_krum_chooses_no_task_without_a_gradient() -> None:
    """Which is nearer to all others than these to each other."""
    gram_KK = torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    weights_K = surgery("krum", n_byzantine=1).weights(gram_KK, step=0)
    assert weights_K[2] == 0 and weights_K.sum() == 1
    few_K = surgery("krum", n_byzantine=1).weights(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])), step=0)
    torch.testing.assert_close(few_K, torch.tensor([1.0, 1, 0, 1, 0]) / 3)


def test_cagrad_stays_in_its_ball_where_the_worst_case_is_nothing() -> None:
    for gram_KK in (
        torch.diag(torch.tensor([1.0, 1.0, 1e-12])),
        torch.tensor([[1.0, -1.0, 0], [-1.0, 1.0, 0], [0, 0, 1]]),
    ):
        mean_K = torch.full((3,), 1 / 3)
        weights_K = surgery("cagrad", c=0.4).weights(gram_KK, step=0)
        assert length(weights_K - mean_K, gram_KK) <= 0.4001 * length(mean_K, gram_KK)


def test_methods_that_start_from_the_mean() -> None:
    gram_KK = gram(5)
    for weights_K in (
        surgery("mean").weights(gram_KK, step=0),
        surgery("cagrad", c=0.0).weights(gram_KK, step=0),
        surgery("fairgrad", alpha=0.0).weights(gram_KK, step=0),
        surgery("krum", n_selected=5).weights(gram_KK, step=0),
        surgery("sum").weights(gram_KK, step=0) / 5,
    ):
        torch.testing.assert_close(weights_K, torch.full((5,), 0.2))


@pytest.mark.parametrize("scale", SCALES[1:])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_solves_its_equation(alpha: float, scale: float) -> None:
    for tasks in TASKS:
        gram_KK = scale**2 * gram(tasks)
        weights_K = surgery("fairgrad", alpha=alpha).weights(gram_KK, step=0).double()
        torch.testing.assert_close(gram_KK @ weights_K, weights_K ** (-1 / alpha), rtol=1e-2, atol=0.0)


def test_krum_selects_the_central_gradient() -> None:
    gradients_KP = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.2, 1.0], [9.0, -9.0]])
    weights_K = surgery("krum", n_byzantine=1, n_selected=1).weights(gradients_KP @ gradients_KP.T, step=0)
    assert weights_K[3] == 0 and weights_K.max() == 1


def test_first_step_of_gradvac_is_pcgrad() -> None:
    # The targets start at cosine 0: it vaccinates just those pairs that PCGrad projects. Two tasks, because from
    # three on the random orders matter, and TorchJD draws its own.
    for seed in range(20):
        weights_K = surgery("gradvac").weights(gram(2, seed), step=0)
        torch.testing.assert_close(weights_K, surgery("pcgrad").weights(gram(2, seed), step=0))


def test_pcd_keeps_its_promise_and_the_length_of_the_first_gradient() -> None:
    for tasks in TASKS:
        gram_KK = gram(tasks)
        weights_K = surgery("pcd", tau=0.02).weights(gram_KK, step=0).double()
        assert length(weights_K, gram_KK) == pytest.approx(gram_KK[0, 0].sqrt().item(), rel=1e-5)
        assert (gram_KK @ weights_K)[1:].min() > 0


# -------------------------------------------------------------------------------------------------- state


def test_stateful_methods_equal_torchjd_step_by_step() -> None:
    theirs, ours = PCDWeighting(), surgery("pcd")
    for step in range(5):
        gram_KK = 4.0**step * gram(4, seed=step)
        assert torch.equal(ours.weights(gram_KK, step), theirs(gram_KK).float())
    # two tasks: no order to draw
    vaccine, ours = GradVacWeighting(), surgery("gradvac")
    for step in range(5):
        gram_KK = gram(2, seed=step)
        torch.testing.assert_close(ours.weights(gram_KK, step), vaccine(gram_KK).float(), rtol=1e-5, atol=1e-6)


def test_gradvac_remembers_each_pair_whatever_is_drawn_between() -> None:
    pairs, alone = surgery("gradvac"), surgery("gradvac")
    for step in range(4):
        pairs.weights(gram(2, seed=5 + step), step, tasks=[1, 4])
        weights_K = pairs.weights(gram(2, seed=step), step, tasks=[0, 4])
        assert torch.equal(weights_K, alone.weights(gram(2, seed=step), step, tasks=[0, 4]))
    assert pairs.state_dict()["gradvac._phi_t"].shape == (5, 5)


def test_state_of_another_method_is_refused() -> None:
    vaccine = surgery("gradvac")
    vaccine.weights(gram(2), step=0)
    with pytest.raises(UserError, match=r"surgery.method pcgrad: the checkpoint was made with gradvac; resume"):
        surgery("pcgrad").load_state_dict(vaccine.state_dict())
    for shape in ([], [3], [3, 3, 3]):
        vaccine.load_state_dict({"gradvac._phi_t": torch.zeros(shape)})
        with pytest.raises(UserError, match=r"_phi_t has shape .*; it was damaged"):
            vaccine.weights(torch.eye(3), 0)


# --------------------------------------------------------------------------------------------- golden table


GOLDEN = {
    "sum": [1.0, 1.0, 1.0],
    "mean": [0.3333333, 0.3333333, 0.3333333],
    "pcgrad": [1.25, 2.3, 1.0875],
    "gradvac": [1.23125, 2.3, 1.15],
    "upgrad": [0.4128902, 0.7663636, 0.3634336],
    "dualproj": [0.3333333, 0.4330302, 0.3333333],
    "mgda": [0.2046683, 0.5923796, 0.2029521],
    "cagrad": [0.3333333, 0.7206317, 0.3333333],
    "aligned_mtl": [0.1924918, 0.3883735, 0.2071179],
    "imtl_g": [0.2408233, 0.5561060, 0.2030707],
    "krum": [0.0, 0.5, 0.5],
    "fairgrad": [0.6670233, 1.5388283, 0.7398663],
    "pcd": [1.1543927, 1.2005684, 0.0],
}


def test_golden_table() -> None:
    gram_KK = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 1.0, -0.3], [0.5, -0.3, 2.0]], dtype=torch.float64)
    weights = {method: surgery(method).weights(gram_KK, step=3).tolist() for method in AGGREGATORS}
    assert weights == {method: pytest.approx(row, abs=1e-6) for method, row in GOLDEN.items()}


def test_draws_inside_torchjd_are_frozen() -> None:
    """They come from its global generator, seeded for the step."""
    assert [surgery("gradvac").weights(gram(5), step).tolist() for step in (0, 1)] == [
        pytest.approx([1.542899, 1.088397, 2.421436, 1.641835, 1.883317], abs=1e-5),
        pytest.approx([1.629525, 1.096667, 1.161046, 2.279012, 1.877884], abs=1e-5),
    ]


# ------------------------------------------------------------------------------------------------ conflicts


def test_conflicts() -> None:
    gradients_KP = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    cosine_KK, rate = conflicts(gradients_KP @ gradients_KP.T)
    expected = [[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert cosine_KK.tolist() == expected
    assert rate == 1 / 6
    assert conflicts(torch.ones(1, 1)) == (torch.ones(1, 1), 0.0)
    cosine_KK, rate = conflicts(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
    assert cosine_KK.tolist() == [[1.0, -0.5], [-0.5, 1.0]] and rate == 1
    cosine_KK, rate = conflicts(torch.tensor([[1.0, -1.1], [-1.1, 1.0]]))
    assert cosine_KK.tolist() == [[1.0, -1.0], [-1.0, 1.0]] and rate == 1, "rounding makes no cosine longer than 1"
    cosine_KK, rate = conflicts(torch.tensor([[1.0, 1.1], [1.1, 1.0]]))
    assert cosine_KK.tolist() == [[1.0, 1.0], [1.0, 1.0]] and rate == 0


# ------------------------------------------------------------------------------------------ user's mistakes


def test_configurations_know_the_methods() -> None:
    assert list(get_args(SurgeryMethod)) == list(AGGREGATORS)


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("pc_grad", {}, r"surgery\.method 'pc_grad': no such method; valid: pcgrad, .*aligned_mtl"),
        ("UPGrad", {}, r"valid: upgrad, "),
        ("cagrad", {"radius": 1, "c": 0.4}, r"surgery\.options\.radius: cagrad has no such option; valid: .*c"),
        ("gradvac", {"bta": 0.5}, r"surgery\.options\.bta: gradvac has no such option; valid: beta, eps"),
        ("sum", {"c": 1}, r"surgery\.options\.c: sum has no such option; it takes none"),
        ("cagrad", {}, r"surgery\.options\.c: cagrad needs it"),
        ("cagrad", {"c": -1}, r"surgery\.options of cagrad: c must be non-negative"),
        ("cagrad", {"c": "wide"}, r"surgery\.options\.c: .*number.*\(got 'wide'\)"),
        ("cagrad", {"c": math.inf}, r"surgery\.options\.c: should be a finite number \(got inf\)"),
        ("fairgrad", {"alpha": 1, "max_iters": 0}, r"surgery\.options of fairgrad: max_iters must be 1 or more"),
        ("upgrad", {"reg_eps": 0}, r"surgery\.options of upgrad: reg_eps must be above 0"),
        ("dualproj", {"reg_eps": -1}, r"surgery\.options of dualproj: reg_eps must be above 0"),
        ("fairgrad", {"alpha": -1}, r"surgery\.options of fairgrad: alpha must be non-negative"),
        ("pcgrad", {"reduction": "max"}, r"surgery\.options\.reduction: .*'sum' or 'mean' \(got 'max'\)"),
        ("aligned_mtl", {"scale_mode": "max"}, r"surgery\.options\.scale_mode: .*\(got 'max'\)"),
    ],
)
def test_mistakes_are_told_in_one_line(method: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        Surgery(method, options, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "module"),
    [("upgrad", "quadprog"), ("dualproj", "qpsolvers"), ("cagrad", "clarabel"), ("fairgrad", "scipy")],
)
def test_a_missing_solver_names_the_extra(method: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery(method)  # with the solver there
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"surgery.method {method}: .*{re.escape(to_install('surgery'))}"):
        surgery(method)


@pytest.mark.parametrize(("n_byzantine", "n_selected", "least"), [(0, 1, 3), (1, 1, 4), (0, 5, 5), (2, 2, 5)])
def test_krum_needs_some_tasks(n_byzantine: int, n_selected: int, least: int) -> None:
    krum = surgery("krum", n_byzantine=n_byzantine, n_selected=n_selected)
    krum.weights(gram(least), step=7)
    told = (
        rf"^surgery\.method krum: n_byzantine {n_byzantine} and n_selected {n_selected} need {least} tasks in a step, "
        rf"step 7 has {least - 1}; choose another method$"
    )
    with pytest.raises(UserError, match=told):
        krum.weights(gram(least - 1), step=7)
    Surgery("krum", {"n_byzantine": 0}, seed=0).weights(gram(3), step=0)


def test_pcd_needs_its_tasks_every_step() -> None:
    leader = surgery("pcd")
    leader.weights(torch.eye(3), step=0)
    for tasks in ([0, 2], [1, 2], [2, 1, 0]):
        with pytest.raises(UserError, match=r"surgery.method pcd: .* step 1 has tasks"):
            leader.weights(torch.eye(len(tasks)), step=1, tasks=tasks)
    with pytest.raises(UserError, match=r"surgery.options.tau: 3 values for 2 tasks"):
        Surgery("pcd", {"tau": [0.1, 0.1, 0.1]}, seed=0).weights(torch.eye(3), step=0)


def test_gram_matrix_that_is_not_finite_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        surgery("sum").weights(torch.full((2, 2), torch.nan), step=0)


@pytest.mark.parametrize(("shape", "tasks"), [((2, 2), [0]), ((2, 2), [1, 1]), ((2, 3), [0, 1]), ((3, 2), None)])
def test_gram_matrix_of_other_tasks_is_our_own_bug(shape: tuple[int, int], tasks: list[int] | None) -> None:
    with pytest.raises(AssertionError):
        surgery("sum").weights(torch.ones(shape), step=0, tasks=tasks)


@methods("upgrad", "dualproj", "mgda", "cagrad", "fairgrad")
def test_without_any_gradient_tasks_weigh_the_same(method: str) -> None:
    assert surgery(method).weights(torch.zeros(4, 4), step=0).tolist() == [0.25] * 4
