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
from torch.nn import functional as F

from mtbert.config import LossKind, TaskConfig
from mtbert.heads import Head
from mtbert.losses import LOSSES, example_losses, predict, probabilities

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
    """Ranking is in test_ranking.py: no example has it alone."""
    assert {*LOSSES, "mnrl"} == set(get_args(LossKind))


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


@pytest.mark.parametrize("margin", [0.0, 0.3, -0.2])
def test_cosine_embedding(margin: float) -> None:
    """Torch's takes the two vectors and labels ±1; ours what a cosine head answers and labels 0, 1."""
    task = make_task("pair_classification", head={"kind": "cosine"}, loss="cosine_embedding", margin=margin)
    first, second, labels = draw(COUNT, 4), draw(COUNT, 4, seed=9), classes(2)
    theirs = nn.CosineEmbeddingLoss(margin=margin, reduction="none")(first, second, 2 * labels - 1)
    ours = example_losses(task, Head(task, 4)(torch.cat([first, second])), labels)
    torch.testing.assert_close(ours, theirs)


def test_cosine_embedding_of_similarities() -> None:
    """At the ends of the scale it is torch's with labels ±1, between them their mixture; predictions use the scale."""
    values = {"head": {"kind": "cosine"}, "loss": "cosine_embedding", "margin": 0.1, "range": (1.0, 5.0)}
    task = make_task("pair_regression", **values)
    first, second = draw(COUNT, 4), draw(COUNT, 4, seed=9)
    answers = Head(task, 4)(torch.cat([first, second]))
    loss = nn.CosineEmbeddingLoss(margin=0.1, reduction="none")
    similar, other = (loss(first, second, torch.full((COUNT,), sign)) for sign in (1.0, -1.0))
    for label, wanted in ((5.0, similar), (1.0, other), (2.0, 0.25 * similar + 0.75 * other)):
        torch.testing.assert_close(example_losses(task, answers, torch.full((COUNT,), label)), wanted)
    torch.testing.assert_close(predict(task, answers), (1 + 4 * F.cosine_similarity(first, second)).clamp(1, 5))
    assert predict(task, torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 3, 5], "what the loss pulls towards"


def test_bce_of_a_cosine_head_is_indifferent_at_one_half() -> None:
    """So that cosine and linear heads can be compared with the loss, and the cosine that counts, the same."""
    first, second, labels = draw(COUNT, 4), draw(COUNT, 4, seed=9), classes(2)
    cosines = F.cosine_similarity(first, second)
    for scale in (None, 7.0):
        task = make_task("pair_classification", head={"kind": "cosine", "scale": scale})
        answers = Head(task, 4)(torch.cat([first, second]))
        probabilities = torch.sigmoid((scale or 20) * (cosines - 0.5)).double()
        theirs = log_loss(labels.numpy(), probabilities.numpy())
        assert example_losses(task, answers, labels).mean().item() == pytest.approx(theirs, rel=1e-5)
        assert predict(task, answers).tolist() == (cosines >= 0.5).long().tolist()


@pytest.mark.parametrize("kind", LOSSES)
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
    for loss in ("cosine_embedding", "mnrl"):
        task = make_task("pair_classification", head={"kind": "cosine"}, loss=loss)
        assert predict(task, torch.tensor([-1.0, 0.0, 0.499, 0.5, 1.0])).tolist() == [0, 0, 0, 1, 1]


def test_a_triplet_s_match_is_the_nearer_one_above_zero() -> None:
    task = make_task("triplets", head={"kind": "cosine"}, columns={"text": ["a", "b", "c"]})
    assert predict(task, torch.tensor([-1.5, -1e-6, 0.0, 1e-6, 1.5])).tolist() == [0, 0, 0, 1, 1]


def test_probabilities_are_there_where_a_loss_pulls_towards_them() -> None:
    scores, logits = draw(COUNT, 5).double(), draw(COUNT).double()
    shares = np.exp(scores.numpy()) / np.exp(scores.numpy()).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(make_task("classification", classes=5), scores), shares)
    positive = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(probabilities(make_task("pair_classification"), logits), np.c_[1 - positive, positive])
    cosines = make_task("pair_classification", head={"kind": "cosine"}, loss="cosine_embedding")
    for task in (cosines, make_task("pair_regression")):
        assert probabilities(task, logits).shape == (COUNT, 0)


@given(st.floats(-1e6, 1e6, width=32))
def test_values_stay_in_the_task_s_range(value: float) -> None:
    task = make_task("pair_regression", range=(1.0, 4.0))
    [prediction] = predict(task, torch.tensor([value])).tolist()
    assert prediction == min(max(value, 1.0), 4.0)


@pytest.mark.parametrize("kind", ["classification", "pair_classification", "pair_regression"])
def test_no_answers_give_no_predictions(kind: str) -> None:
    assert predict(make_task(kind), torch.zeros((0, 2) if kind == "classification" else 0)).shape == (0,)
