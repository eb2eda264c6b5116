"""Heads on top of the shared encoder, and the model that joins them.

Shapes: B examples, P sequences of a batch, R rows that may be either, D width of the encoder, C outputs. A head sees
the sentence vectors of a batch: one per example, for a pair encoded separately two, for a triplet three (all first
texts, then all second ones, …), and answers with class scores (B, C), one logit or a value (B,).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mtbert.config import EncoderConfig, HeadConfig, SharedLayerConfig, TaskConfig
from mtbert.encoder import Encoder, EncoderShape, Linear, dropout, initialise
from mtbert.errors import UserError
from mtbert.packing import Packed


def concat(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """u and v side by side, (B, 2·D)."""
    return torch.cat([first_BD, second_BD], dim=-1)


def weighted_dot(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Elementwise product; with the linear layer after it a dot product with learnt weights (paper D)."""
    return first_BD * second_BD


def difference(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """u, v and |u − v| side by side, (B, 3·D) (Sentence-BERT, Reimers and Gurevych 2019, §3)."""
    return torch.cat([first_BD, second_BD, (first_BD - second_BD).abs()], dim=-1)


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": concat,
    "weighted_dot": weighted_dot,
    "difference": difference,
}
"""How two sentence vectors become one; `linear` and `joint` have one to begin with, the cosine heads compare two."""


class Head(nn.Module):
    """Dropout, hidden layers (ReLU and dropout each), output layer; the cosine heads compare instead of an output.

    cosine answers s·cos(u, v), relu_cosine s·ReLU(cos(u, v)); s is `head.scale`, for pair_regression by default the
    highest label (paper C: 5·ReLU). With loss bce the answer is the logit s·(cos(u, v) − ½): like `cosine_embedding`,
    it counts texts as a pair from a cosine of ½ on. With hidden layers all texts pass through the same ones first.
    Of a triplet (text, match, hard negative) the answer is cos(u, v) − cos(u, w): above 0 the match is nearer.
    """

    def __init__(self, task: TaskConfig, width: int) -> None:
        super().__init__()
        config: HeadConfig = task.head
        self.kind = config.kind
        self.texts = 1 if config.kind in ("linear", "joint") else task.texts
        self.dropout = config.dropout
        self.scale = config.scale or _default_scale(task)
        self.middle = 0.5 if task.loss_kind == "bce" else 0.0  # of the cosines
        inputs = {"concat": 2, "difference": 3}.get(config.kind, 1) * width
        widths = [inputs, *config.hidden]
        self.hidden = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = Linear(widths[-1], outputs(task)) if not self.compares else None

    @property
    def compares(self) -> bool:
        return self.kind in ("cosine", "relu_cosine")

    def forward(self, vectors_PD: Tensor, generator: Generator | None = None) -> Tensor:
        """Answers in fp32, (B, C), or (B,) where C is 1. Dropout is on when there is a generator to draw it from.

        Args:
            vectors_PD: all first texts, then all second ones, …; of a joint pair, both texts as one sequence.
        """
        if self.compares:
            return self.scale * (self._cosine(vectors_PD, generator) - self.middle)
        vectors_BD = HEADS[self.kind](*_apart(vectors_PD, 2)) if self.kind in HEADS else vectors_PD
        assert self.output is not None
        scores_BC: Tensor = self.scale * self.output(self._transform(vectors_BD, generator)).float()
        # not squeeze(-1) in any case: ONNX refuses it where it would do nothing
        return scores_BC.squeeze(-1) if scores_BC.shape[-1] == 1 else scores_BC

    def _cosine(self, vectors_PD: Tensor, generator: Generator | None) -> Tensor:
        # in fp32: the cosine of near neighbours differs from 1 by less than bf16 resolves
        first_BD, *others = (self._transform(part, generator).float() for part in _apart(vectors_PD, self.texts))
        cosines = [F.cosine_similarity(first_BD, other_BD, dim=-1) for other_BD in others]
        cosine_B = cosines[0] if len(cosines) == 1 else cosines[0] - cosines[1]
        return F.relu(cosine_B) if self.kind == "relu_cosine" else cosine_B

    def _transform(self, rows_RD: Tensor, generator: Generator | None) -> Tensor:
        rows_RD = dropout(rows_RD, self.dropout, generator)
        for layer in self.hidden:
            rows_RD = dropout(F.relu(layer(rows_RD)), self.dropout, generator)
        return rows_RD


def _apart(vectors_PD: Tensor, texts: int) -> tuple[Tensor, ...]:
    """All first texts, all second ones, …; not `chunk`, which torch.export takes to mean this very number of rows."""
    return vectors_PD.view(texts, -1, vectors_PD.shape[-1]).unbind()


def outputs(task: TaskConfig) -> int:
    """Width of a head's answer: a score per class, or one logit or value."""
    return task.class_count if task.loss_kind == "cross_entropy" else 1


def _default_scale(task: TaskConfig) -> float:
    if task.head.kind not in ("cosine", "relu_cosine") or task.loss_kind == "cosine_embedding":
        return 1.0
    if task.loss_kind == "bce":
        return 20.0  # cosines lie close together; 1 / 20 is the temperature of contrastive losses
    return task.range[1] if task.regression else 1.0


def _by_name(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Raises `UserError` for a name such as `train`, which is an attribute of every module."""
    named = nn.ModuleDict()
    for name, module in modules.items():
        if hasattr(named, name):
            raise UserError(f"{name}: PyTorch keeps this name for itself; give the task or shared layer another")
        named[name] = module
    return named


class MultiTaskModel(nn.Module):
    """One encoder shared by all tasks, one head per task, and layers that some heads have in common (paper B).

    Args:
        seed: of the initial weights; None leaves the model on the meta device, without memory, for
            `load_state_dict(..., assign=True)`.
    """

    def __init__(
        self,
        shape: EncoderShape,
        encoder: EncoderConfig,
        tasks: Mapping[str, TaskConfig],
        seed: int | None,
        shared_layers: Mapping[str, SharedLayerConfig] | None = None,
    ) -> None:
        super().__init__()
        width = shape.hidden_size
        widths = {name: layer.width or width for name, layer in (shared_layers or {}).items()}
        self.pooling = encoder.pooling
        self.layer_of = {name: task.head.shared for name, task in tasks.items()}
        inputs = {name: widths[layer] if layer else width for name, layer in self.layer_of.items()}
        with torch.device("meta" if seed is None else "cpu"):
            self.encoder = Encoder(shape, encoder.dropout)
            self.shared = _by_name({name: Linear(width, out) for name, out in widths.items()})
            self.heads = _by_name({name: Head(task, inputs[name]) for name, task in tasks.items()})
        if seed is not None:
            initialise(self, seed)

    def forward(self, task: str, packed: Packed, generator: Generator | None = None) -> Tensor:
        """The task's answers for a packed batch, fp32. Dropout is on when there is a generator to draw it from."""
        return self.answer(task, self.vectors(packed, generator), generator)

    def vectors(self, packed: Packed, generator: Generator | None = None) -> Tensor:
        """A sentence vector per sequence of the batch, (P, D)."""
        return self.encoder.sentence_vectors(packed, self.pooling, generator)

    def answer(self, task: str, vectors_PD: Tensor, generator: Generator | None = None) -> Tensor:
        """The second half of `forward`."""
        head = self.heads[task]
        assert isinstance(head, Head)
        if layer := self.layer_of[task]:
            vectors_PD = F.relu(self.shared[layer](dropout(vectors_PD, head.dropout, generator)))
        answers: Tensor = head(vectors_PD, generator)
        return answers
