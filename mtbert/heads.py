"""Heads on top of the shared encoder, and the model that joins them.

Shapes: B examples, D width of the encoder, C outputs. A head sees the sentence vectors of a batch: one per example, or
for a pair encoded separately two, and answers with class scores (B, C), one logit or a value (B,).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mtbert.config import EncoderConfig, HeadConfig, TaskConfig
from mtbert.encoder import Encoder, EncoderShape, dropout, initialise
from mtbert.packing import Packed


def concat(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    return torch.cat([first_BD, second_BD], dim=-1)


def weighted_dot(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Elementwise product; with the linear layer after it a dot product with learnt weights (paper D)."""
    return first_BD * second_BD


def difference(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """u, v and |u − v| side by side (Sentence-BERT, Reimers and Gurevych 2019, §3)."""
    return torch.cat([first_BD, second_BD, (first_BD - second_BD).abs()], dim=-1)


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": concat,
    "weighted_dot": weighted_dot,
    "difference": difference,
}
"""How two sentence vectors become one; `linear` and `joint` have one to begin with, the cosine heads compare two."""


class Head(nn.Module):
    """Dropout, hidden layers (ReLU and dropout each), output layer; the cosine heads compare instead of an output.

    cosine answers `high`·cos(u, v), relu_cosine `high`·ReLU(cos(u, v)) (paper C: 5·ReLU), with `high` the highest
    label; for pair_classification `high` is 1 and the cosine itself goes to the loss. With hidden layers both texts
    pass through the same ones first.
    """

    def __init__(self, task: TaskConfig, width: int) -> None:
        super().__init__()
        config: HeadConfig = task.head
        self.kind = config.kind
        self.dropout = config.dropout
        self.high = task.range[1] if task.kind == "pair_regression" else 1.0
        inputs = {"concat": 2, "difference": 3}.get(config.kind, 1) * width
        widths = [inputs, *config.hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], outputs(task)) if not self.compares else None

    @property
    def compares(self) -> bool:
        return self.kind in ("cosine", "relu_cosine")

    def forward(self, vectors_BD: Tensor, generator: Generator | None = None) -> Tensor:
        if self.compares:
            first_BD, second_BD = (self._transform(half, generator) for half in vectors_BD.chunk(2))
            # in fp32: the cosine of near neighbours differs from 1 by less than bf16 resolves
            cosine_B = F.cosine_similarity(first_BD.float(), second_BD.float(), dim=-1)
            return self.high * (F.relu(cosine_B) if self.kind == "relu_cosine" else cosine_B)
        if self.kind in HEADS:
            vectors_BD = HEADS[self.kind](*vectors_BD.chunk(2))
        assert self.output is not None
        scores_BC: Tensor = self.output(self._transform(vectors_BD, generator)).float()
        return scores_BC.squeeze(-1)  # (B,) where there is one output

    def _transform(self, vectors_BD: Tensor, generator: Generator | None) -> Tensor:
        vectors_BD = dropout(vectors_BD, self.dropout, generator)
        for layer in self.hidden:
            vectors_BD = dropout(F.relu(layer(vectors_BD)), self.dropout, generator)
        return vectors_BD


def outputs(task: TaskConfig) -> int:
    """Width of a head's answer: a score per class, or one logit or value."""
    return task.classes if task.loss_kind == "cross_entropy" else 1


class MultiTaskModel(nn.Module):
    """One encoder shared by all tasks, one head per task."""

    def __init__(self, shape: EncoderShape, encoder: EncoderConfig, tasks: Mapping[str, TaskConfig], seed: int) -> None:
        super().__init__()
        self.pooling = encoder.pooling
        self.encoder = Encoder(shape, encoder.dropout)
        self.heads = nn.ModuleDict({name: Head(task, shape.hidden_size) for name, task in tasks.items()})
        initialise(self, seed)

    def forward(self, task: str, packed: Packed, generator: Generator | None = None) -> Tensor:
        """The task's answers for a packed batch, fp32. Dropout is on when there is a generator to draw it from."""
        vectors = self.encoder.sentence_vectors(packed, self.pooling, generator)
        answers: Tensor = self.heads[task](vectors, generator)
        return answers
