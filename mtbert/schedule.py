"""Which tasks train at step s, on which examples, on which rank: arithmetic, not state.

    (config, seed, step, rank, world) → shares

Nothing here remembers anything but caches, so resuming is "continue at step s", and continuing on another number of
ranks is the same function with another `world`. The global batch of a step does not depend on `world`.

Terms: a *pass* is one way through a task's dataset, cut into batches; a batch's *ordinal* counts on over the passes;
an *epoch* is a number of steps (`steps_per_epoch`), the same for all tasks. Legend: N examples, K tasks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mtbert.config import ScheduleConfig
from mtbert.randomness import addressed_rng

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one rank does for one task in one step."""

    task: int
    micro_batches: tuple[Indices, ...]  # example indices; possibly empty when the batch has fewer examples than ranks
    examples: int  # in the global batch: the loss is a sum over the share divided by this


class Schedule:
    """The task schedule over `epochs` epochs.

    Args:
        tokens_N: per task, what each example costs in tokens.
        batch_sizes: per task, examples in a global batch.
        epochs: total number, over which `anneal` runs.
        tasks: the numbers of these tasks in the run, by which shares name them; default 0 … K-1.
        earlier: per task, how many schedules before this one in the run have it: each draws anew; default none.

    Of kind `adaptive` it is a function of its `history` besides, which `adapt` writes and a checkpoint keeps.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        tokens_N: Sequence[NDArray[np.integer]],
        batch_sizes: Sequence[int],
        seed: int,
        epochs: int = 1,
        tasks: Sequence[int] | None = None,
        earlier: Sequence[int] | None = None,
    ) -> None:
        assert len(tokens_N) == len(batch_sizes) and all(len(tokens) for tokens in tokens_N)
        self.tasks = list(range(len(tokens_N)) if tasks is None else tasks)
        self._earlier = [0] * len(tokens_N) if earlier is None else list(earlier)
        self.history: list[tuple[int, list[float]]] = []  # from this step on, these probabilities of the tasks
        self._course: list[NDArray[np.int64]] = []  # adaptive: batches drawn per task before each step
        self.config = config
        self.tokens_N = tokens_N
        self.seed = seed
        self.epochs = epochs
        self.batches_per_pass = [-(-len(tokens) // size) for tokens, size in zip(tokens_N, batch_sizes, strict=True)]
        self.steps_per_epoch = self._steps_per_epoch()
        # the current pass of every task is read at every step, and once more at the border of two passes
        self._pass = lru_cache(maxsize=2 * len(tokens_N))(self._cut_pass)
        self._draws = lru_cache(maxsize=4)(self._draw_epoch)
        self._drawn = [np.zeros(len(tokens_N), np.int64)]  # batches drawn per task before each epoch

    def _steps_per_epoch(self) -> int:
        batches = self.batches_per_pass
        if self.config.kind == "sequential":
            return sum(batches)
        if isinstance(self.config.length, int):
            return self.config.length
        steps = min(batches) if self.config.length == "shortest" else max(batches)
        if self.config.kind in ("sampled", "adaptive"):  # as many batches as round robin, in other shares
            return -(-steps * len(batches) // self.config.tasks_per_step)
        return steps

    # ------------------------------------------------------------------------------ which tasks, which batches

    def batches_at(self, step: int) -> list[tuple[int, int]]:
        """(place of the task among `tasks`, ordinal) of every batch of a step, tasks ascending."""
        if self.config.kind == "adaptive":
            return self._adaptive(step)
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.config.kind == "sequential":
            return [self._sequential(epoch, place)]
        if self.config.kind == "sampled":
            return self._sampled(epoch, place)
        if self.config.length == "unbalanced":
            return [
                (task, epoch * batches + place) for task, batches in enumerate(self.batches_per_pass) if place < batches
            ]
        return [(task, step) for task in range(len(self.batches_per_pass))]

    def _sequential(self, epoch: int, place: int) -> tuple[int, int]:
        for task, batches in enumerate(self.batches_per_pass):
            if place < batches:
                return task, epoch * batches + place
            place -= batches
        raise AssertionError("place lies outside the epoch")

    def _sampled(self, epoch: int, place: int) -> list[tuple[int, int]]:
        while len(self._drawn) <= epoch:
            before = self._draws(len(self._drawn) - 1)
            counts = np.bincount(before.ravel(), minlength=len(self.tokens_N))
            self._drawn.append(self._drawn[-1] + counts)
        draws = self._draws(epoch)
        drawn = self._drawn[epoch] + np.bincount(draws[:place].ravel(), minlength=len(self.tokens_N))
        return _numbered(draws[place], drawn)

    # ------------------------------------------------------------------------------ the task that lags

    def adapt(self, step: int, scores: Sequence[float], targets: Sequence[float]) -> None:
        """From `step` on draw a task the more often, the lower its score lies under its target.

        p ∝ 1 / (min(1, score / target)^α + ε), from the task weights of Jean, Firat and Johnson 2019 ("Adaptive
        Scheduling for Multi-Task Learning", explicit schedules), who take a task's score when trained alone as its
        target. ε = 0.1 bounds the weights to between 0.9 and 10; a score under 0 or that is no number counts as 0.
        Until it is called the first time, tasks are drawn alike.
        """
        assert self.config.kind == "adaptive" and (not self.history or self.history[-1][0] < step)
        reached_K = np.clip(np.nan_to_num(np.array(scores) / np.array(targets)), 0, 1)
        weights_K = 1 / (reached_K**self.config.alpha + 0.1)
        self.history.append((step, (weights_K / weights_K.sum()).tolist()))
        del self._course[step + 1 :]

    def _adaptive(self, step: int) -> list[tuple[int, int]]:
        tasks = len(self.tokens_N)
        if not self._course:
            self._course.append(np.zeros(tasks, np.int64))
        while len(self._course) <= step:
            self._course.append(self._course[-1] + np.bincount(self._draw_step(len(self._course) - 1), minlength=tasks))
        return _numbered(self._draw_step(step), self._course[step].copy())

    def _draw_step(self, step: int) -> NDArray[np.int64]:
        chances = next((each for first, each in reversed(self.history) if first <= step), None)
        rng = addressed_rng(self.seed, "adaptive tasks", step, *_unless_0(max(self._earlier)))
        return rng.choice(len(self.tokens_N), size=self.config.tasks_per_step, p=chances)

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Tasks drawn in one epoch, (steps, tasks_per_step), with p ∝ N^α.

        α falls by `anneal` from the first to the last epoch (Stickland and Murray 2019, "BERT and PALs", §4.1).
        """
        progress = min(epoch / (self.epochs - 1), 1.0) if self.epochs > 1 else 0.0
        alpha = self.config.alpha - self.config.anneal * progress
        weights_K = np.array([len(tokens) for tokens in self.tokens_N], np.float64) ** alpha
        rng = addressed_rng(self.seed, "tasks", epoch, *_unless_0(max(self._earlier)))
        size = (self.steps_per_epoch, self.config.tasks_per_step)
        return rng.choice(len(weights_K), size=size, p=weights_K / weights_K.sum())

    # ------------------------------------------------------------------------------------- which examples

    def global_batch(self, task: int, ordinal: int) -> Indices:
        """Examples of a task's batch; the batches of a pass hold every example exactly once."""
        number, place = divmod(ordinal, self.batches_per_pass[task])
        order_N, bounds, places = self._pass(task, number)
        cut = places[place]
        return order_N[bounds[cut] : bounds[cut + 1]].astype(np.int64)

    def _cut_pass(self, task: int, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Order of the examples in a pass, the borders of its batches, and the order of these.

        Shuffled, then sorted by length within buckets of `config.bucket` batches, then the batches shuffled: a
        batch holds examples of like length, which wastes little in attention and balances ranks, and the pass
        is still random. Batch sizes differ by one at most, so no batch is a small remainder.
        """
        tokens_N, batches = self.tokens_N[task], self.batches_per_pass[task]
        rng = addressed_rng(self.seed, "pass", self.tasks[task], number, *_unless_0(self._earlier[task]))
        order_N = np.arange(len(tokens_N), dtype=np.int32)  # a dataset may have millions: no copy, and half the bytes
        rng.shuffle(order_N)
        bounds = np.arange(batches + 1) * len(tokens_N) // batches
        for first in range(0, batches, self.config.bucket):
            low, high = bounds[first], bounds[min(first + self.config.bucket, batches)]
            inside = order_N[low:high]
            order_N[low:high] = inside[np.argsort(tokens_N[inside], kind="stable")]
        return order_N, bounds, np.arange(batches) if self.config.bucket == 1 else rng.permutation(batches)

    # ---------------------------------------------------------------------------------------- which rank

    def shares(self, step: int, rank: int, world: int, accumulation: int = 1) -> list[Share]:
        """What `rank` of `world` does at `step`: the same tasks on every rank, equal tokens as near as they go."""
        batches: dict[int, list[Indices]] = {}
        for task, ordinal in self.batches_at(step):
            batches.setdefault(task, []).append(self.global_batch(task, ordinal))
        load = [0] * world  # carried from task to task, so that what one leaves uneven the next evens out
        shares = []
        for task, drawn in batches.items():
            batch = np.concatenate(drawn)
            mine = _balance(batch, self.tokens_N[task], load)[rank]
            micro_batches = _balance(mine, self.tokens_N[task], [0] * accumulation)
            shares.append(Share(self.tasks[task], tuple(micro_batches), len(batch)))
        return shares

    def passes_at(self, step: int) -> dict[int, float]:
        """How many times each task of the step has been through its data after it."""
        return {
            self.tasks[task]: (ordinal + 1) / self.batches_per_pass[task] for task, ordinal in self.batches_at(step)
        }


def _unless_0(number: int) -> list[int]:
    """Of an address: runs from before there was this number go on as they began."""
    return [number] if number else []


def _numbered(draws: NDArray[np.int64], drawn: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The drawn tasks with the ordinals of their batches; `drawn` before the step is counted on."""
    batches = []
    for task in sorted(draws.tolist()):
        batches.append((task, int(drawn[task])))
        drawn[task] += 1
    return batches


def _balance(batch: Indices, tokens_N: NDArray[np.integer], load: list[int]) -> list[Indices]:
    """Split a batch over parts: longest example first, each to the part with the least load (updated in place)."""
    if len(load) == 1:
        return [batch]
    costs = tokens_N[batch]
    heap = [(tokens, part) for part, tokens in enumerate(load)]
    heapq.heapify(heap)
    owner = np.empty(len(batch), np.int64)
    for place in np.argsort(-costs, kind="stable"):
        tokens, part = heap[0]
        owner[place] = part
        heapq.heapreplace(heap, (tokens + int(costs[place]), part))
    for tokens, part in heap:
        load[part] = tokens
    return [batch[owner == part] for part in range(len(load))]
