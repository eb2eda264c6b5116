"""A training step of ours: through the engine, and the same arithmetic in a bare loop without DeepSpeed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from benchmarks.workload import TASKS, Batch, Batches, finish, loss_of
from mtbert.config import EncoderConfig, EngineConfig, OptimizerConfig
from mtbert.encoder import EncoderShape
from mtbert.engine import Engine, combine, gram, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.randomness import addressed_generator
from mtbert.ranks import choose_precision, local_device
from mtbert.runs import Rank
from mtbert.surgery import Surgery
from mtbert.word_gradients import WordGradients

OPTIMIZER = OptimizerConfig(lr=1e-5)
CONFIG = EngineConfig()


def build_model(shape: EncoderShape) -> MultiTaskModel:
    return MultiTaskModel(shape, EncoderConfig(pooling="pooler"), TASKS, seed=0)


def build_engine(shape: EncoderShape, rank: Rank, together: bool = False) -> Engine:
    """The engine with PCGrad. `together`: all tasks are one to it, of which it makes one gradient."""
    model = build_model(shape)
    groups = parameter_groups(model, OPTIMIZER, TASKS, shape.layers)
    weights = dict.fromkeys(TASKS, 1.0)
    if together:
        weights = {"all": 1.0}
        groups = [replace(group, users=("all",)) if group.task else group for group in groups]
    return Engine(model, groups, weights, CONFIG, OPTIMIZER, Surgery("pcgrad", {}, 0), rank)


Losses = dict[int, list[Callable[[], Tensor]]]


def losses_of(model: MultiTaskModel, batch: Batch, number: int, rank: Rank) -> tuple[Losses, Tensor | None]:
    """The step's losses on this rank, one micro-batch of each task: every W-th example, over the global batch; and,
    where the trainer tells the engine, the words that they look up."""
    device, blocks = local_device(rank), model.encoder.reads_blocks
    mine = slice(rank.rank, None, rank.world)
    parts = {task: pack([ids for text in batch.sentences[task] for ids in text[mine]]) for task in TASKS}
    moved = {task: packed.to(device, blocks) for task, packed in parts.items()}  # before the first loss, as the trainer
    labels = {task: batch.labels[task][mine].to(device, non_blocking=True) for task in TASKS}

    def build(task: str, k: int) -> Tensor:
        generator = addressed_generator(device, 0, "dropout", number, rank.rank, k)
        return loss_of(task, model(task, moved[task], generator), labels[task]) / rank.world

    word_ids = torch.cat([packed.ids_T for packed in parts.values()]) if device.type == "cpu" else None
    return {k: [partial(build, task, k)] for k, task in enumerate(TASKS)}, word_ids


def through_engine(shape: EncoderShape, batches: Batches, together: bool = False) -> Callable[[int], object]:
    engine = build_engine(shape, Rank(), together)

    def step(number: int) -> None:
        losses, word_ids = losses_of(engine.model, batches(number), number, Rank())
        engine.step(number, {0: [*chain.from_iterable(losses.values())]} if together else losses, word_ids=word_ids)

    return step


class BareLoop:
    """What `Engine.step` computes, without DeepSpeed: flat gradients, Gram, combination, a fused AdamW on fp32 masters.

    What it takes tells what DeepSpeed adds; `passes` has the seconds of its forwards and backwards alone, by number.
    Without `surgery` all tasks accumulate into one gradient, as whoever knows nothing of surgery would do: what that
    saves is what surgery costs in all, its measurements included.
    """

    def __init__(self, shape: EncoderShape, batches: Batches, surgery: bool = True) -> None:
        self.batches, self.operates = batches, surgery
        self.passes: dict[int, list[float]] = defaultdict(list)
        self.surgery = Surgery("pcgrad", {}, 0)
        device = local_device(Rank())
        dtype = choose_precision("auto", device)
        self.model = build_model(shape).to(device)
        self.groups = parameter_groups(self.model, OPTIMIZER, TASKS, shape.layers)
        named = dict(self.model.named_parameters())
        members = [[named[name] for name in group.names] for group in self.groups]
        self.masters = [torch.cat([p.detach().float().flatten() for p in parameters]) for parameters in members]
        options = [
            {"params": [master], "lr": group.lr, "weight_decay": group.weight_decay}
            for master, group in zip(self.masters, self.groups, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(options, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)
        self.flats = [master.to(dtype) for master in self.masters]
        for parameters, flat in zip(members, self.flats, strict=True):
            for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
                parameter.data = view
        self.dense = sum(group.task is None for group in self.groups) - 1  # groups before the table of words
        shared, heads = [*chain(*members[: self.dense])], [*chain(*members[self.dense + 1 :])]
        rows = len(TASKS) if surgery else 1
        self.gradients_KP = torch.zeros(rows, sum(p.numel() for p in shared), dtype=dtype, device=device)
        self.views = [list(zip(shared, _views(row, shared), strict=True)) for row in self.gradients_KP]
        self.word_gradients = WordGradients(self.model.encoder.words, self.flats[self.dense].numel(), dtype)
        self.head_gradient = torch.zeros(sum(p.numel() for p in heads), dtype=dtype, device=device)
        self.head_views = list(zip(heads, _views(self.head_gradient, heads), strict=True))
        self.combined = torch.empty(self.gradients_KP.shape[1] + self.word_gradients.columns, device=device)

    def __call__(self, number: int) -> None:
        self.gradients_KP.zero_()
        self.head_gradient.zero_()
        losses, word_ids = losses_of(self.model, self.batches(number), number, Rank())
        self.word_gradients.begin(len(self.views), word_ids)
        started = time.perf_counter()
        together = losses.values() if self.operates else [[*chain.from_iterable(losses.values())]]
        for place, builds in enumerate(together):
            for parameter, view in (*self.views[place], *self.head_views):
                parameter.grad = view
            with self.word_gradients.collected(place):
                for build in builds:
                    build().backward()
        finish()
        self.passes[number].append(time.perf_counter() - started)
        pieces = [self.gradients_KP, self.word_gradients.finished()]
        if self.operates:
            gram_KK = sum(gram(piece) for piece in pieces).cpu()
            weights_K = self.surgery.weights(gram_KK.float(), number, tuple(range(len(TASKS))))
            square = float(weights_K.double() @ gram_KK @ weights_K.double())
        else:
            weights_K = torch.ones(1)
            square = sum(float(torch.linalg.vector_norm(piece, dtype=torch.float32)) ** 2 for piece in pieces)
        norm = (square + float(self.head_gradient.double().square().sum())) ** 0.5
        scale = min(1.0, CONFIG.clip_norm / norm) if CONFIG.clip_norm else 1.0
        widths = [piece.shape[1] for piece in pieces]
        dense, rows = self.combined[: sum(widths)].split(widths)
        for piece, out in zip(pieces, (dense, rows), strict=True):
            combine(piece, weights_K * scale, out=out)
        sizes = [len(master) for master in self.masters]
        head_gradients = (self.head_gradient.float() * scale).split(sizes[self.dense + 1 :])
        gradients = [*dense.split(sizes[: self.dense]), self.word_gradients.spread(rows), *head_gradients]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        for flat, master in zip(self.flats, self.masters, strict=True):
            flat.copy_(master)


def _views(flat: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
