"""Losses per example, and how an answer becomes a prediction.

Every loss returns one value per example, unreduced: the engine divides the sum over a rank's share by the number of
examples in the *global* batch, so an example weighs the same whatever rank it lands on.

Shapes: B examples of a batch, C classes. Answers are fp32, as heads give them, and so are losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mtbert.config import TaskConfig


def cross_entropy(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """−log softmax(scores) of the true class, (B,). Labels are class numbers, int64."""
    return F.cross_entropy(scores_BC, labels_B, reduction="none")


def bce(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    """Binary cross-entropy of the logit of class 1, (B,). Labels are 0 and 1, int64."""
    return F.binary_cross_entropy_with_logits(logits_B, labels_B.float(), reduction="none")


def mse(values_B: Tensor, labels_B: Tensor) -> Tensor:
    """Squared distance, (B,). Labels are float32, in their own units; so in `huber`."""
    return (values_B - labels_B).square()


def huber(values_B: Tensor, labels_B: Tensor) -> Tensor:
    """Quadratic within one label unit, linear outside (δ = 1)."""
    return F.huber_loss(values_B, labels_B, reduction="none")


def cosine_embedding(cosines_B: Tensor, similar_B: Tensor, margin: float = 0.0) -> Tensor:
    """1 − cos for similar texts, ReLU(cos − margin) for others: torch's CosineEmbeddingLoss, given the cosines.

    A label between 0 and 1 mixes the two by its share of being similar; paper B leaves open how its similarities 0 … 5
    became the labels ±1 of this loss, and the two ends of the scale are what any way must agree on.
    """
    return (1 - cosines_B) * similar_B + F.relu(cosines_B - margin) * (1 - similar_B)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "huber": huber,
    "cosine_embedding": cosine_embedding,
}


"""By name; `mnrl` is none of them, for it compares the examples of a batch (mtbert/ranking.py)."""


def example_losses(task: TaskConfig, answers: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of each example, (B,); not for loss mnrl, which no example has alone."""
    if task.loss_kind == "cosine_embedding":
        if task.regression:
            labels_B = (labels_B - task.range[0]) / (task.range[1] - task.range[0])
        return cosine_embedding(answers, labels_B, task.margin)
    return LOSSES[task.loss_kind](answers, labels_B)


def predict(task: TaskConfig, answers: Tensor) -> Tensor:
    """Class numbers, or values clamped to the task's range; one per example.

    A cosine counts as a paraphrase from 0.5 on, the middle between the targets that `cosine_embedding` pulls to: 0 for
    the lowest label of a range and 1 for the highest. A triplet's class is 1 where the match is nearer than the hard
    negative.
    """
    if task.regression:
        low, high = task.range
        if task.loss_kind == "cosine_embedding":
            answers = low + (high - low) * answers
        return answers.clamp(low, high)
    if task.kind == "triplets":
        return (answers > 0).long()
    if task.loss_kind == "cross_entropy":
        return answers.argmax(dim=-1)
    return (answers >= (0.0 if task.loss_kind == "bce" else 0.5)).long()


def probabilities(task: TaskConfig, answers: Tensor) -> Tensor:
    """The probability of every class, (B, C) fp32; no column where the task has none.

    Similarities are values, and a cosine is no probability either: nothing pulls it towards a frequency.
    """
    if not task.probability_columns:
        return answers.new_zeros(len(answers), 0)
    if task.loss_kind == "cross_entropy":
        return answers.softmax(dim=-1)
    positive_B = answers.sigmoid()
    return torch.stack([1 - positive_B, positive_B], dim=-1)
