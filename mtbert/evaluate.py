"""Scores on the development sets, sharded over ranks, every example exactly once.

Shapes: N examples of a split, C classes, A = 4 + C columns of what is said of an example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mtbert.heads import MultiTaskModel
from mtbert.losses import predict, probabilities
from mtbert.metrics import composite, metric_of
from mtbert.packing import batches_by_length
from mtbert.runs import Rank
from mtbert.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """One task's result, the same on every rank."""

    task: str
    metric: str
    score: float
    loss: float | None  # mean over the examples; loss mnrl exists only within training batches
    predictions_N: NDArray[np.float64]
    losses_N: NDArray[np.float64]  # not a number where there is no loss of one example
    probabilities_NC: NDArray[np.float64]  # no column where the task has none


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps the weights it gathers here for the next backward
def evaluate(model: MultiTaskModel, task: Task, rank: Rank, device: torch.device) -> Evaluation:
    """Predict a task's development set and score it. Collective: every rank calls it."""
    tokens_N = task.tokens_N("dev")
    # column 0: prediction, 1: loss, 2: how often the example was seen, 3: whether its answer is a number, then the
    # probability of each class. Each rank fills in its own examples; the sum over ranks is exact because all other
    # ranks hold zeros there.
    said_NA = torch.zeros(len(tokens_N), 4 + task.config.probability_columns, dtype=torch.float64)
    for batch_indices in batches_by_length(tokens_N):
        # every rank makes the same number of forward passes, were it with no example: ZeRO-3 gathers weights in each
        mine = batch_indices[rank.rank :: rank.world]
        batch = task.batch("dev", mine)
        answers = model(task.name, batch.packed.to(device))
        said_NA[mine, 0] = predict(task.config, answers).double().cpu()
        losses_B = task.example_losses(answers, batch.labels_B.to(device))
        if losses_B is not None:
            said_NA[mine, 1] = losses_B.double().cpu()
        said_NA[mine, 2] += 1
        finite = answers.isfinite()
        said_NA[mine, 3] = (finite.all(dim=1) if finite.ndim > 1 else finite).double().cpu()
        said_NA[mine, 4:] = probabilities(task.config, answers).double().cpu()
    said_NA = _sum_over_ranks(said_NA, device)
    assert bool((said_NA[:, 2] == 1).all()), "an example was evaluated twice or not at all"
    if not task.config.has_example_loss:
        said_NA[:, 1] = torch.nan
    predictions_N, losses_N = said_NA[:, 0].numpy(), said_NA[:, 1].numpy()
    metric = task.config.metric_kind
    score = metric_of(metric, task.config.class_count)(predictions_N, task.dataset("dev").labels_N)
    if not said_NA[:, 3].all():  # of a model that broke: NaN counts as class 0, and a number would hide it
        score = math.nan
    score = _as_the_first_has_it(score, device)
    loss = float(losses_N.mean()) if task.config.has_example_loss else None
    return Evaluation(task.name, metric, score, loss, predictions_N, losses_N, said_NA[:, 4:].numpy())


def every_score(task: Task, result: Evaluation) -> dict[str, float]:
    """By each metric that fits the task's kind, the task's own first; what `evaluate` calls broken is by none."""
    own = {result.metric: result.score}
    labels_N, classes = task.dataset("dev").labels_N, task.config.class_count
    return own | {
        kind: math.nan if math.isnan(result.score) else metric_of(kind, classes)(result.predictions_N, labels_N)
        for kind in task.config.metrics
        if kind not in own
    }


def evaluate_all(
    model: MultiTaskModel, tasks: list[Task], rank: Rank, device: torch.device
) -> tuple[list[Evaluation], float]:
    """Every task that has a development set, and the composite score of all these."""
    results = [evaluate(model, task, rank, device) for task in tasks if task.dev is not None]
    return results, composite({result.task: (result.metric, result.score) for result in results})


def _as_the_first_has_it(score: float, device: torch.device) -> float:
    """Hosts with other CPUs may round otherwise, and whether to save follows from it: that all ranks do, or none."""
    told = torch.tensor(score, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return float(told)


def _sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()
