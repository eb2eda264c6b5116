"""Scores on the development sets, sharded over ranks, every example exactly once.

Shapes: N examples of a split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mtbert.heads import MultiTaskModel
from mtbert.losses import predict
from mtbert.metrics import METRICS, composite
from mtbert.runs import Rank
from mtbert.tasks import Task

TOKENS_PER_BATCH = 8192
"""Over all ranks; large enough for full speed, small enough for any device that can train."""


@dataclass(frozen=True)
class Evaluation:
    """One task's result, the same on every rank."""

    task: str
    metric: str
    score: float
    loss: float | None  # mean over the examples; loss mnrl exists only within training batches
    predictions_N: NDArray[np.float64]


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps the weights it gathers here for the next backward
def evaluate(model: MultiTaskModel, task: Task, rank: Rank, device: torch.device) -> Evaluation:
    """Predict a task's development set and score it. Collective: every rank calls it."""
    tokens_N = task.tokens_N("dev")
    # row 0: prediction, 1: loss, 2: how often the example was seen. Each rank fills in its own examples; the sum over
    # ranks is exact because all other ranks hold zeros there.
    answers_3N = torch.zeros(3, len(tokens_N), dtype=torch.float64)
    for batch_indices in _batches(tokens_N):
        # every rank makes the same number of forward passes, were it with no example: ZeRO-3 gathers weights in each
        mine = batch_indices[rank.rank :: rank.world]
        batch = task.batch("dev", mine)
        answers = model(task.name, batch.packed.to(device))
        answers_3N[0, mine] = predict(task.config, answers).double().cpu()
        losses_B = task.example_losses(answers, batch.labels_B.to(device))
        if losses_B is not None:
            answers_3N[1, mine] = losses_B.double().cpu()
        answers_3N[2, mine] += 1
    answers_3N = _sum_over_ranks(answers_3N, device)
    assert bool((answers_3N[2] == 1).all()), "an example was evaluated twice or not at all"
    predictions_N = answers_3N[0].numpy()
    score = METRICS[task.config.metric_kind](predictions_N, task.dataset("dev").labels_N)
    loss = float(answers_3N[1].mean()) if task.config.loss_kind != "mnrl" else None
    return Evaluation(task.name, task.config.metric_kind, score, loss, predictions_N)


def evaluate_all(
    model: MultiTaskModel, tasks: list[Task], rank: Rank, device: torch.device
) -> tuple[list[Evaluation], float]:
    """Every task that has a development set, and the composite score of all these."""
    results = [evaluate(model, task, rank, device) for task in tasks if task.dev is not None]
    return results, composite({result.task: (result.metric, result.score) for result in results})


def _batches(tokens_N: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Examples of like length together, up to a number of tokens."""
    order_N = np.argsort(tokens_N, kind="stable")
    start, load = 0, 0
    for place, index in enumerate(order_N):
        load += int(tokens_N[index])
        if load > TOKENS_PER_BATCH and place > start:
            yield order_N[start:place]
            start, load = place, int(tokens_N[index])
    yield order_N[start:]


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()
