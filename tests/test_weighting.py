"""Weights of the losses against TorchJD's scalarizers, and what they learn through a save and a load."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchjd.scalarization as torchjd
from torch import Tensor

from mtbert.config import WeightingMethod
from mtbert.errors import UserError
from mtbert.weighting import WEIGHTINGS, Weighting

OPTIONS: dict[str, dict[str, Any]] = {"stch": {"mu": 0.3}, "cosmos": {"lambda_": 0.5}, "imtl_l": {"lr": 0.1}}
STEPS = 12


def weighting(method: str, regression: tuple[bool, ...] = (False, True, False), seed: int = 0) -> Weighting:
    return Weighting(method, OPTIONS.get(method, {}), regression, seed)


def losses(step: int, tasks: int = 3) -> Tensor:
    """Positive, and falling at different rates."""
    return 0.1 + torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)[:tasks] * torch.exp(
        -torch.tensor([0.1, 0.02, 0.3], dtype=torch.float64)[:tasks] * step
    )


def run(method: Weighting, steps: range, tasks: tuple[int, ...] = (0, 1, 2)) -> list[list[float]]:
    said = []
    for step in steps:
        known = losses(step)[list(tasks)]
        said.append(method.factors(known, tasks, step, epoch=step // 4).tolist())
        method.learn(known, tasks, step, step // 4, 1.0, after_K=known * torch.tensor([0.9, 0.8, 1.1])[list(tasks)])
    return said


# TorchJD's way: differentiate the total, step an optimizer on what it learns
def _gradient(scalarizer: Any, values: Tensor) -> list[float]:
    values = values.clone().requires_grad_()
    return torch.autograd.grad(scalarizer(values), values)[0].tolist()


def _learning(scalarizer: Any, lr: float) -> list[list[float]]:
    scalarizer = scalarizer.double()
    adam = torch.optim.Adam(scalarizer.parameters(), lr=lr)
    said = []
    for step in range(STEPS):
        said.append(_gradient(scalarizer, losses(step)))
        adam.zero_grad()
        scalarizer(losses(step)).backward()
        adam.step()
    return said


def _famo() -> list[list[float]]:
    famo, said = torchjd.FAMO(3).double(), []
    for step in range(STEPS):
        said.append(_gradient(famo, losses(step)))
        famo.update(losses(step) * torch.tensor([0.9, 0.8, 1.1]))
    return said


def _dwa() -> list[list[float]]:
    dwa, said = torchjd.DWA(2.0), []
    for step in range(STEPS):
        if step and step % 4 == 0:
            dwa.step()
        said.append(_gradient(dwa, losses(step)))
    return said


def _stateless(scalarizer: Any) -> list[list[float]]:
    return [_gradient(scalarizer, losses(step)) for step in range(STEPS)]


ORACLES: dict[str, Callable[[], list[list[float]]]] = {
    "imtl_l": lambda: _learning(torchjd.IMTLL(3), lr=0.1),
    "famo": _famo,
    "dwa": _dwa,
    "mean": lambda: _stateless(torchjd.Mean()),
    "gls": lambda: _stateless(torchjd.GeometricMean()),
    "stch": lambda: _stateless(torchjd.STCH(0.3)),
    "cosmos": lambda: _stateless(torchjd.COSMOS(0.5, torch.ones(3).double())),
    "pbi": lambda: _stateless(torchjd.PBI(5.0, torch.ones(3).double())),
}


@pytest.mark.parametrize("method", ORACLES)
def test_factors_are_those_of_torchjd(method: str) -> None:
    found = torch.tensor(run(weighting(method), range(STEPS)))
    torch.testing.assert_close(found, torch.tensor(ORACLES[method]()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["gls", "famo"])
def test_a_loss_of_0_leaves_the_others_their_factors(method: str) -> None:
    """As a batch has in which no pair was selected. Logarithms of 0 would be the end of all tasks."""
    learning, without = weighting(method), weighting(method)
    some = torch.tensor([0.7, 0.0, 0.4], dtype=torch.float64)
    factors = learning.factors(some, (0, 1, 2), 0, 0)
    expected = without.factors(some[[0, 2]], (0, 2), 0, 0)
    assert factors[1] == 0 and torch.equal(factors[[0, 2]], expected)
    learning.learn(some, (0, 1, 2), 0, 0, 1.0, some * 0.9)
    assert all(value.isfinite().all() for value in learning.state_dict().values())
    assert learning.factors(torch.zeros(3, dtype=torch.float64), (0, 1, 2), 1, 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["homoscedastic", "imtl_l"])
def test_a_loss_of_0_does_not_drive_its_task_s_weight(method: str) -> None:
    learning = weighting(method)
    for step in range(20):
        learning.learn(torch.tensor([0.7, 0.0, 0.4], dtype=torch.float64), (0, 1, 2), step, 0, 1.0)
    first, untouched, third = learning.shown().values()
    assert untouched == list(weighting(method).shown().values())[1] and first != untouched != third


def test_homoscedastic_is_torchjd_s_for_regressions_and_twice_its_precision_for_classifications() -> None:
    """TorchJD's UW is ½·e^(−s)·L + ½·s for every task."""
    method = Weighting("homoscedastic", {"lr": 0.1}, [True] * 3, 0)
    expected = torch.tensor(_learning(torchjd.UW(3), lr=0.1))
    torch.testing.assert_close(torch.tensor(run(method, range(STEPS))), expected, rtol=1e-6, atol=1e-8)
    assert weighting("homoscedastic").factors(losses(0), (0, 1, 2), 0, 0).tolist() == [1.0, 0.5, 1.0]


def test_log_variances_come_to_rest_where_they_should() -> None:
    """d/ds (c·e^(−s)·L + s/2) = 0 at s = log 2cL."""
    method = Weighting("homoscedastic", {"lr": 0.05}, [False, True], 0)
    constant = torch.tensor([0.7, 2.0])
    for step in range(600):
        method.learn(constant, (0, 1), step, 0, 1.0)
    assert list(method.shown().values()) == pytest.approx([math.log(1.4), math.log(2)], abs=0.01)


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_continues_bit_for_bit_and_draws_by_step(method: str) -> None:
    straight = run(weighting(method), range(STEPS))
    first = weighting(method)
    assert run(first, range(6)) == straight[:6]
    second = weighting(method)
    second.load_state_dict(first.state_dict())
    assert run(second, range(6, STEPS)) == straight[6:]


@pytest.mark.parametrize("method", ["homoscedastic", "imtl_l", "famo"])
def test_a_task_that_sits_out_keeps_what_is_known_of_it(method: str) -> None:
    one = weighting(method)
    run(one, range(4))
    before = one.state_dict()
    run(one, range(4, 8), tasks=(0, 2))
    for name, value in one.state_dict().items():
        assert value[1] == before[name][1], name
        assert value[0] != before[name][0], name


def test_dwa_goes_by_the_last_two_epochs_that_a_task_was_in() -> None:
    """Epochs have four steps; task 1 sits out the third."""
    one = weighting("dwa")
    run(one, range(8))
    run(one, range(8, 12), tasks=(0, 2))
    means = [[float(losses(step)[task]) for step in range(12)] for task in range(3)]
    first, second, third = ([np.mean(each[start : start + 4]) for each in means] for start in (0, 4, 8))
    rates = [third[0] / second[0], second[1] / first[1], third[2] / second[2]]
    expected = 3 * np.exp(np.array(rates) / 2) / np.exp(np.array(rates) / 2).sum()
    assert one.factors(losses(12), (0, 1, 2), 12, 3).tolist() == pytest.approx(expected.tolist())


def test_random_draws_follow_seed_and_step() -> None:
    one, same, other = (weighting("random", seed=seed) for seed in (0, 0, 1))
    assert one.factors(losses(0), (0, 1, 2), 5, 0).equal(same.factors(losses(3), (0, 1, 2), 5, 0))
    assert not one.factors(losses(0), (0, 1, 2), 5, 0).equal(one.factors(losses(0), (0, 1, 2), 6, 0))
    assert not one.factors(losses(0), (0, 1, 2), 5, 0).equal(other.factors(losses(0), (0, 1, 2), 5, 0))


def test_configurations_know_the_methods() -> None:
    assert list(get_args(WeightingMethod)) == list(WEIGHTINGS)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("homoscedestic", {}, r"weighting\.method 'homoscedestic': no such method; valid: homoscedastic, "),
        ("dwa", {"temp": 1}, r"weighting\.options\.temp: dwa has no such option; valid: temperature"),
        ("dwa", {"temperature": 0}, r"weighting\.options of dwa: temperature must be above 0"),
        ("stch", {}, r"weighting\.options\.mu: stch needs it"),
        ("stch", {"mu": -1}, r"weighting\.options of stch: .*mu"),
        ("famo", {"lr": -1}, r"weighting\.options of famo: lr and weight_decay must not be negative"),
    ],
)
def test_mistakes_are_told(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Weighting(method, options, [False], 0)


def test_another_method_s_state_is_refused() -> None:
    with pytest.raises(UserError, match="the checkpoint was made with homoscedastic"):
        weighting("famo").load_state_dict(weighting("homoscedastic").state_dict())
    two = Weighting("famo", {}, [False] * 2, 0)
    with pytest.raises(UserError, match="state is of other tasks, or was damaged"):
        weighting("famo").load_state_dict(two.state_dict())
