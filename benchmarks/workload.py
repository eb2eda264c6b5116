"""What every benchmark works on: two shapes, batches with the lengths of the real data, and how much work they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtbert.config import HeadConfig, TaskConfig
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.flops import encoder_flops
from mtbert.randomness import addressed_rng

SHAPES = {
    "minilm": EncoderShape(30522, 384, 6, 12, 1536, 512),
    "base": EncoderShape(30522, 768, 12, 12, 3072, 512),
}
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

    @property
    def tokens(self) -> int:
        return sum(len(text) for columns in self.sentences.values() for texts in columns for text in texts)


class Batches:
    """A contender's batches by number, drawn beforehand, and the tokens of those it has asked for."""

    def __init__(self, pool: int, size: int, alike: bool, length: int | None = None) -> None:
        self._drawn = [draw(number, size, pool, alike, length) for number in range(pool)]
        self.tokens: dict[int, int] = {}

    def __call__(self, number: int) -> Batch:
        batch = self._drawn[number]
        self.tokens[number] = batch.tokens
        return batch


def draw(step: int, size: int, pool: int, alike: bool, length: int | None = None) -> Batch:
    """A step's examples. Every `pool` steps have the same ones in all, whether `alike` or not.

    `alike`: as our schedule cuts them, examples of like length together, the batches in random order. Else at random.
    `length`: tokens of every text; by default as in the real data.
    """
    sentences, labels = {}, {}
    for number, (task, (_, _, _, texts)) in enumerate(LENGTHS.items()):
        rng = addressed_rng(0, "benchmark", step // pool, number)
        lengths = draw_lengths(task, pool * size, rng)
        if length is not None:
            lengths[:] = length
        place = step % pool
        if alike:
            lengths = lengths[np.argsort(lengths.sum(1), kind="stable")]
            place = rng.permutation(pool)[place]
        lengths = lengths[place * size :][:size]
        rng = addressed_rng(0, "benchmark", step // pool, number, place)
        sentences[task] = [[rng.integers(1000, 30000, n) for n in lengths[:, text]] for text in range(texts)]
        classes = {"sst": 5, "para": 2, "sts": 6}[task]
        labels[task] = torch.from_numpy(rng.integers(0, classes, size))
    return Batch(sentences, labels)


def draw_lengths(task: str, examples: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each text, (examples, texts)."""
    mean, variation, longest, texts = LENGTHS[task]
    sigma = np.sqrt(np.log(1 + variation**2))
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, (examples, texts)).clip(4, longest).astype(int)


def loss_of(task: str, answers: Tensor, labels: Tensor) -> Tensor:
    if task == "sst":
        return F.cross_entropy(answers, labels)
    if task == "para":
        return F.binary_cross_entropy_with_logits(answers, labels.float())
    return F.mse_loss(answers, labels.float())


def step_flops(shape: EncoderShape, batch: Batch) -> float:
    """Of the forwards and backwards of sentence vectors from [CLS], real tokens only."""
    return sum(
        encoder_flops(shape, torch.tensor([len(text) for text in texts]), only_first=True, trained=True)
        for columns in batch.sentences.values()
        for texts in columns
    )


def gemm_rate(dtype: torch.dtype, device: torch.device | None = None) -> float:
    """Floating-point operations per second of one large matrix product: what a step's rate is measured against."""
    size = 8192 if device is not None and device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    finish()
    started = time.perf_counter()
    a @ b
    finish()
    return 2 * size**3 / (time.perf_counter() - started)


def finish() -> None:
    """Wait for the GPU, where one is at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(
    contenders: Mapping[str, Callable[[int], object]], rounds: int, repeats: int = 1, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds by contender and number (of a batch); they take turns, so that what disturbs the machine disturbs all.

    Everyone gets every number `repeats` times, of which the median counts (of two the lesser), as a hiccup of a shared
    machine is no part of the step. The order within a turn changes, and no number comes back for rounds / contenders
    turns: oneDNN prepares a product of a new size, and who soon comes after another with the same batch would find
    that done.
    """
    names = list(contenders)
    if rounds < len(names):
        raise UserError(f"--rounds {rounds}: takes {len(names)} or more, one for each of {', '.join(names)}")
    taken: dict[str, list[list[float]]] = {name: [[] for _ in range(rounds)] for name in names}
    for turn in range(-warm, repeats * rounds):  # those before 0 allocate
        for index in np.random.default_rng((0, turn + warm)).permutation(len(names)).tolist():
            number = (turn + index * rounds // len(names)) % rounds
            finish()
            started = time.perf_counter()
            contenders[names[index]](number)
            finish()
            if turn >= 0:
                taken[names[index]][number].append(time.perf_counter() - started)
    return {name: [typical(values) for values in numbers] for name, numbers in taken.items()}


def typical(seconds: list[float]) -> float:
    return min(seconds) if len(seconds) == 2 else statistics.median(seconds)
