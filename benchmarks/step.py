"""Seconds per training step: ours against what users have, interleaved in one run, medians.

usage: python benchmarks/step.py [--rounds 12] [--batch 32] [--json FILE]

    ours, pcgrad    the engine through DeepSpeed ZeRO-1, one rank, packed, bf16 where the CPU multiplies it
    ours, sum       the same with a plain sum instead of surgery
    papers, pcgrad  what the four papers ran: transformers BertModel, fp32, padded, PCGrad over full gradients
    autocast, sum   transformers BertModel, bf16 autocast, padded to the longest, no surgery

MiniLM's shape (22.7 M parameters), three tasks of `--batch` examples with the lengths of SST, Quora and STS. Ratios of
one run mean something; absolute numbers of a shared machine do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from mtbert.config import EncoderConfig, EngineConfig, HeadConfig, OptimizerConfig, TaskConfig
from mtbert.encoder import EncoderShape
from mtbert.engine import Engine, close_ranks, join_ranks, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.randomness import addressed_generator, addressed_rng
from mtbert.runs import Rank
from mtbert.surgery import Surgery

SHAPE = EncoderShape(30522, 384, 6, 12, 1536, 512)
PAIR = {"train": "-", "dev": "-", "columns": {"text": ["a", "b"]}, "head": HeadConfig(kind="concat", dropout=0.3)}
TASKS = {
    "sst": TaskConfig(kind="classification", train="-", dev="-", classes=5, head=HeadConfig(dropout=0.3)),
    "para": TaskConfig(kind="pair_classification", **PAIR),
    "sts": TaskConfig(kind="pair_regression", **PAIR),
}
LENGTHS = {"sst": (23, 0.5, 66, 1), "para": (14, 0.45, 80, 2), "sts": (14, 0.45, 60, 2)}
"""Mean, coefficient of variation and longest sequence in tokens, and texts per example, as in the real data."""


@dataclass
class Batch:
    sentences: dict[str, list[list[np.ndarray]]]  # task → texts of the examples: first texts, then second texts
    labels: dict[str, Tensor]


def draw(step: int, size: int, pool: int) -> Batch:
    """A step's examples; `pool` batches are sorted by length together, 1 is a plain random batch."""
    sentences, labels = {}, {}
    for number, (task, (mean, variation, longest, texts)) in enumerate(LENGTHS.items()):
        rng = addressed_rng(0, "benchmark", step // pool, number)
        sigma = np.sqrt(np.log(1 + variation**2))
        lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, (pool * size, texts)).clip(4, longest).astype(int)
        lengths = lengths[np.argsort(lengths.sum(1), kind="stable")][step % pool * size :][:size]
        sentences[task] = [[rng.integers(1000, 30000, n) for n in lengths[:, text]] for text in range(texts)]
        classes = {"sst": 5, "para": 2, "sts": 6}[task]
        labels[task] = torch.from_numpy(rng.integers(0, classes, size))
    return Batch(sentences, labels)


def loss_of(task: str, answers: Tensor, labels: Tensor) -> Tensor:
    if task == "sst":
        return F.cross_entropy(answers, labels)
    if task == "para":
        return F.binary_cross_entropy_with_logits(answers, labels.float())
    return F.mse_loss(answers, labels.float())


# ------------------------------------------------------------------------------------------------------- ours


def ours(method: str, size: int) -> Callable[[int], None]:
    model = MultiTaskModel(SHAPE, EncoderConfig(pooling="pooler"), TASKS, seed=0)
    optimizer = OptimizerConfig(lr=1e-5)
    groups = parameter_groups(model, optimizer, TASKS, SHAPE.layers)
    engine = Engine(model, groups, TASKS, EngineConfig(), optimizer, Surgery(method, {}, 0), Rank())

    def step(number: int) -> None:
        batch = draw(number, size, pool=64)

        def build(task: str, k: int) -> Tensor:
            packed = pack([ids for text in batch.sentences[task] for ids in text])
            generator = addressed_generator(engine.device, 0, "dropout", number, k)
            return loss_of(task, engine.model(task, packed, generator), batch.labels[task])

        engine.step(number, {k: [lambda task=task, k=k: build(task, k)] for k, task in enumerate(TASKS)}, 1.0)

    return step


# ------------------------------------------------------------------------------------------------------ rivals


class Rival(nn.Module):
    """The papers' model: one encoder pass per text, padded to the longest of the batch, pooler, concat heads."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        )
        self.drop = nn.Dropout(0.3)
        self.heads = nn.ModuleDict({"sst": nn.Linear(384, 5), "para": nn.Linear(768, 1), "sts": nn.Linear(768, 1)})

    def loss(self, task: str, texts: list[list[np.ndarray]], labels: Tensor) -> Tensor:
        vectors = [self.drop(self.bert(*padded(text)).pooler_output) for text in texts]
        answers = self.heads[task](torch.cat(vectors, -1)).float()
        return loss_of(task, answers if task == "sst" else answers.squeeze(-1), labels)


def padded(text: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, text))
    ids, mask = np.zeros((len(text), longest), np.int64), np.zeros((len(text), longest), np.int64)
    for row, tokens in enumerate(text):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def rival(surgery: bool, autocast: bool, size: int) -> Callable[[int], None]:
    model = Rival().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    parameters = list(model.parameters())

    def step(number: int) -> None:
        batch = draw(number, size, pool=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [model.loss(task, batch.sentences[task], batch.labels[task]) for task in TASKS]
        optimizer.zero_grad()
        if surgery:
            project(parameters, optimizer, losses, number)
        else:
            torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def project(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[Tensor], step: int) -> None:
    """PCGrad over whole flattened gradients, shared ones averaged, as the papers' package does it."""
    rows, present = [], []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
        present.append(torch.cat([torch.full((p.numel(),), p.grad is not None) for p in parameters]))
    shared = torch.stack(present).all(0)
    rng = addressed_rng(0, "order", step)
    projected = [row.clone() for row in rows]
    for gradient in projected:
        for other in rng.permutation(len(rows)):
            dot = torch.dot(gradient, rows[other])
            if dot < 0:
                gradient -= dot * rows[other] / rows[other].norm() ** 2
    stacked = torch.stack(projected)
    merged = torch.where(shared, stacked.mean(0), stacked.sum(0))
    for parameter, piece in zip(parameters, merged.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    join_ranks(Rank(), EngineConfig())
    contenders = {
        "ours, pcgrad": ours("pcgrad", options.batch),
        "ours, sum": ours("sum", options.batch),
        "papers, pcgrad": rival(surgery=True, autocast=False, size=options.batch),
        "autocast, sum": rival(surgery=False, autocast=True, size=options.batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 2):
        for name, step in contenders.items():
            started = time.perf_counter()
            step(number)
            if number >= 2:  # the first ones allocate
                seconds[name].append(time.perf_counter() - started)
    first = statistics.median(seconds["ours, pcgrad"])
    record = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        record[name] = {
            "seconds": median,
            "examples_per_second": 3 * options.batch / median,
            "times_ours": median / first,
        }
        print(
            f"{name:<16} {1e3 * median:8.0f} ms   {3 * options.batch / median:6.1f} examples/s   {median / first:6.2f}×"
        )
    if options.json:
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rounds": options.rounds, **record}))
    close_ranks()


if __name__ == "__main__":
    main()
