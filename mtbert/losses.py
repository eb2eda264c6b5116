"""Losses per example, and how an answer becomes a prediction.

Every loss returns one value per example, unreduced: the engine divides the sum over a rank's share by the number of
examples in the *global* batch, so an example weighs the same whatever rank it lands on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mtbert.config import TaskConfig


def cross_entropy(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    return F.cross_entropy(scores_BC, labels_B, reduction="none")


def bce(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_B, labels_B.float(), reduction="none")


def mse(values_B: Tensor, labels_B: Tensor) -> Tensor:
    return (values_B - labels_B).square()


def huber(values_B: Tensor, labels_B: Tensor) -> Tensor:
    """Quadratic within one label unit, linear outside (δ = 1)."""
    return F.huber_loss(values_B, labels_B, reduction="none")


def cosine_embedding(cosines_B: Tensor, labels_B: Tensor) -> Tensor:
    """1 − cos for label 1, ReLU(cos) for label 0: torch's CosineEmbeddingLoss with margin 0, given the cosines."""
    return (1 - cosines_B) * labels_B + F.relu(cosines_B) * (1 - labels_B)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "huber": huber,
    "cosine_embedding": cosine_embedding,
}


def predict(task: TaskConfig, answers: Tensor) -> Tensor:
    """Class numbers, or values clamped to the task's range; one per example.

    A cosine counts as a paraphrase from 0.5 on, the middle between the targets that `cosine_embedding` pulls to.
    """
    if task.kind == "pair_regression":
        return answers.clamp(*task.range)
    if task.loss_kind == "cross_entropy":
        return answers.argmax(dim=-1)
    return (answers >= (0.5 if task.loss_kind == "cosine_embedding" else 0.0)).long()
