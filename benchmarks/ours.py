"""A training step of ours: through the engine, and the same arithmetic in a bare loop without DeepSpeed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workload import TASKS, draw, loss_of
from mtbert.config import EncoderConfig, EngineConfig, OptimizerConfig
from mtbert.encoder import EncoderShape
from mtbert.engine import Engine, combine, gram, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.randomness import addressed_generator
from mtbert.ranks import choose_precision
from mtbert.runs import Rank
from mtbert.surgery import Surgery

OPTIMIZER = OptimizerConfig(lr=1e-5)


def losses_of(model: MultiTaskModel, size: int, pool: int, number: int) -> dict[int, list[Callable[[], Tensor]]]:
    """The step's losses, one micro-batch each, of batches as a schedule with `bucket: pool` cuts them."""
    batch = draw(number, size, pool, alike=True)

    def build(task: str, k: int) -> Tensor:
        packed = pack([ids for text in batch.sentences[task] for ids in text])
        generator = addressed_generator(torch.device("cpu"), 0, "dropout", number, k)
        return loss_of(task, model(task, packed, generator), batch.labels[task])

    return {k: [lambda task=task, k=k: build(task, k)] for k, task in enumerate(TASKS)}  # type: ignore[misc]


def engine(shape: EncoderShape, method: str, size: int, pool: int) -> Callable[[int], object]:
    model = MultiTaskModel(shape, EncoderConfig(pooling="pooler"), TASKS, seed=0)
    groups = parameter_groups(model, OPTIMIZER, TASKS, shape.layers)
    host = Engine(model, groups, TASKS, EngineConfig(), OPTIMIZER, Surgery(method, {}, 0), Rank())
    return lambda number: host.step(number, losses_of(host.model, size, pool, number))


class BareLoop:
    """PCGrad without DeepSpeed: flat gradients, Gram, combination and a fused AdamW on fp32 masters, one process.

    What it takes tells what DeepSpeed adds; `passes` has the seconds of its forwards and backwards alone, by number.
    Without `surgery` all tasks accumulate into one gradient, as whoever knows nothing of surgery would do: what that
    saves is what surgery costs in all, its measurements included.
    """

    def __init__(self, shape: EncoderShape, size: int, pool: int, surgery: bool = True) -> None:
        self.size, self.pool = size, pool
        self.operates = surgery
        self.passes: dict[int, float] = {}
        self.model = MultiTaskModel(shape, EncoderConfig(pooling="pooler"), TASKS, seed=0)
        self.surgery = Surgery("pcgrad", {}, 0)
        dtype = choose_precision("auto", torch.device("cpu"))
        shared = [p for name, p in self.model.named_parameters() if not name.startswith("heads.")]
        heads = [p for name, p in self.model.named_parameters() if name.startswith("heads.")]
        self.masters = [self._flatten(parameters, dtype) for parameters in (shared, heads)]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)
        self.flats = [master.to(dtype) for master in self.masters]
        for parameters, flat in zip((shared, heads), self.flats, strict=True):
            for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
                parameter.data = view
        rows = len(TASKS) if surgery else 1
        self.gradients_KP = torch.zeros(rows, self.flats[0].numel(), dtype=dtype)
        views = [list(zip(shared, _views(row, shared), strict=True)) for row in self.gradients_KP]
        self.views = [views[min(k, rows - 1)] for k in range(len(TASKS))]
        self.head_gradient = torch.zeros_like(self.flats[1])
        self.head_views = list(zip(heads, _views(self.head_gradient, heads), strict=True))
        self.combined = torch.empty_like(self.masters[0])

    @staticmethod
    def _flatten(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters]).float()

    def __call__(self, number: int) -> None:
        self.gradients_KP.zero_()
        self.head_gradient.zero_()
        started = time.perf_counter()
        for k, (build,) in losses_of(self.model, self.size, self.pool, number).items():
            for parameter, view in (*self.views[k], *self.head_views):
                parameter.grad = view
            build().backward()
        self.passes[number] = time.perf_counter() - started
        if self.operates:
            gram_KK = gram(self.gradients_KP)
            weights_K = self.surgery.weights(gram_KK.float(), number, tuple(range(len(TASKS))))
            square = float(weights_K.double() @ gram_KK @ weights_K.double())
        else:
            weights_K = torch.ones(1)
            square = float(torch.linalg.vector_norm(self.gradients_KP, dtype=torch.float32)) ** 2
        scale = min(1.0, 1.0 / (square + float(self.head_gradient.float().square().sum())) ** 0.5)
        combine(self.gradients_KP, weights_K * scale, out=self.combined)
        self.masters[0].grad = self.combined
        self.masters[1].grad = self.head_gradient.float() * scale
        self.optimizer.step()
        for flat, master in zip(self.flats, self.masters, strict=True):
            flat.copy_(master)


def _views(flat: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
