"""Each loss against torch's own module or scikit-learn's, per example; predictions at their borders."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import Tensor, nn

from mtbert.config import LossKind, TaskConfig
from mtbert.losses import LOSSES, predict

COUNT = 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def classes(count: int, seed: int = 1) -> Tensor:
    return torch.randint(count, (COUNT,), generator=torch.Generator().manual_seed(seed))


def make_task(kind: str, **over: Any) -> TaskConfig:
    single = kind == "classification"
    head = {"kind": "linear" if single else "joint"}
    columns = {"text": ["a"] if single else ["a", "b"]}
    return TaskConfig(**{"kind": kind, "train": "t", "dev": "d", "head": head, "columns": columns, **over})


def test_names_are_those_of_the_configuration() -> None:
    assert set(LOSSES) == set(get_args(LossKind))


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy(seed: int) -> None:
    scores, labels = draw(COUNT, 5, seed=seed), classes(5)
    ours = LOSSES["cross_entropy"](scores, labels)
    assert torch.equal(ours, nn.CrossEntropyLoss(reduction="none")(scores, labels))
    theirs = log_loss(labels.numpy(), scores.double().softmax(-1).numpy(), labels=range(5))
    assert ours.mean().item() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_bce(seed: int) -> None:
    logits, labels = draw(COUNT, seed=seed), classes(2)
    ours = LOSSES["bce"](logits, labels)
    assert torch.equal(ours, nn.BCEWithLogitsLoss(reduction="none")(logits, labels.float()))
    assert ours.mean().item() == pytest.approx(log_loss(labels.numpy(), logits.double().sigmoid().numpy()), rel=1e-5)


def test_bce_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([200.0, -200.0], requires_grad=True)
    losses = LOSSES["bce"](logits, torch.tensor([0, 1]))
    losses.sum().backward()
    assert losses.tolist() == [200.0, 200.0]
    assert logits.grad is not None and logits.grad.tolist() == [1.0, -1.0]


def test_mse() -> None:
    values, labels = draw(COUNT), draw(COUNT, seed=1)
    torch.testing.assert_close(LOSSES["mse"](values, labels), nn.MSELoss(reduction="none")(values, labels))


def test_huber_is_quadratic_up_to_one_unit() -> None:
    values, labels = draw(COUNT), draw(COUNT, seed=1)
    gap = (values - labels).abs().double().numpy()
    assert gap.min() < 1 < gap.max()
    by_hand = np.where(gap <= 1, gap**2 / 2, gap - 0.5)
    np.testing.assert_allclose(LOSSES["huber"](values, labels).numpy(), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cosine_embedding(seed: int) -> None:
    """Torch's takes the two vectors and labels ±1."""
    first, second, labels = draw(COUNT, 4, seed=seed), draw(COUNT, 4, seed=seed + 9), classes(2)
    theirs = nn.CosineEmbeddingLoss(reduction="none")(first, second, 2 * labels - 1)
    ours = LOSSES["cosine_embedding"](torch.cosine_similarity(first, second), labels)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_one_loss_per_example_and_none_for_no_example(kind: str) -> None:
    """Unreduced, so that an example weighs the same whatever rank it lands on: gradients of a split batch add up."""
    shape = (COUNT, 5) if kind == "cross_entropy" else (COUNT,)
    labels = draw(COUNT, seed=1) if kind in ("mse", "huber") else classes(2)
    answers = draw(*shape).requires_grad_()
    losses = LOSSES[kind](answers, labels)
    assert losses.shape == (COUNT,)
    assert LOSSES[kind](answers[:0], labels[:0]).shape == (0,)
    [whole] = torch.autograd.grad(losses.sum() / COUNT, answers)
    parts = [LOSSES[kind](answers[part], labels[part]).sum() / COUNT for part in (slice(0, 5), slice(5, None))]
    [split] = torch.autograd.grad(parts[0] + parts[1], answers)
    torch.testing.assert_close(whole, split)


# ------------------------------------------------------------------------------------------------ predictions


def test_class_predictions_are_the_highest_score() -> None:
    for task in (make_task("classification", classes=5), make_task("pair_classification", loss="cross_entropy")):
        scores = draw(COUNT, task.classes)
        predictions = predict(task, scores)
        assert predictions.tolist() == np.argmax(scores.numpy(), axis=1).tolist()
        assert not predictions.is_floating_point()


def test_a_logit_counts_as_a_paraphrase_from_probability_one_half_on() -> None:
    task = make_task("pair_classification")
    assert predict(task, torch.tensor([-9.0, -1e-6, 0.0, 1e-6, 9.0])).tolist() == [0, 0, 1, 1, 1]


def test_a_cosine_counts_as_a_paraphrase_from_one_half_on() -> None:
    task = make_task("pair_classification", head={"kind": "cosine"}, loss="cosine_embedding")
    assert predict(task, torch.tensor([-1.0, 0.0, 0.499, 0.5, 1.0])).tolist() == [0, 0, 0, 1, 1]


@given(st.floats(-1e6, 1e6, width=32))
def test_values_stay_in_the_task_s_range(value: float) -> None:
    task = make_task("pair_regression", range=(1.0, 4.0))
    [prediction] = predict(task, torch.tensor([value])).tolist()
    assert prediction == min(max(value, 1.0), 4.0)


@pytest.mark.parametrize("kind", ["classification", "pair_classification", "pair_regression"])
def test_no_answers_give_no_predictions(kind: str) -> None:
    assert predict(make_task(kind), torch.zeros((0, 2) if kind == "classification" else 0)).shape == (0,)
