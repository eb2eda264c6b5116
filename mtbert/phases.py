"""Phases: which schedule, tasks, parts and learning rates hold at step s of a run. Arithmetic, like the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtbert.config import Config, Milestones, OptimizerConfig, PhaseConfig
from mtbert.schedule import Schedule


@dataclass(frozen=True)
class Phase:
    """A stretch of a run. Phases that train the same tasks go on with the same schedule where they left it; others
    begin a pass through the data of each of their tasks, in an order of its own."""

    config: PhaseConfig
    first: int
    last: int  # included
    schedule: Schedule
    offset: int  # steps of its schedule that earlier phases have taken
    epochs_before: float  # of the run, at its first step

    @property
    def steps(self) -> int:
        return self.last - self.first + 1

    def schedule_step(self, step: int) -> int:
        return step - self.first + self.offset

    def epoch(self, step: int) -> int:
        """Epochs of the run that are over at a step."""
        return math.floor(self.epochs_before + (step - self.first) / self.schedule.steps_per_epoch + 1e-9)

    def ends_epoch(self, step: int) -> bool:
        return (self.schedule_step(step) + 1) % self.schedule.steps_per_epoch == 0

    def rate_factor(self, step: int, optimizer: OptimizerConfig) -> float:
        """What every learning rate is multiplied by at a step of the run: warm-up, then the decay.

        Warm-up, linear and cosine run over the phase; milestones count the epochs of the run.
        """
        share = optimizer.warmup if self.config.warmup is None else self.config.warmup
        decay = self.config.decay or optimizer.decay
        warmup, place = round(share * self.steps), step - self.first
        fallen = 1.0
        if isinstance(decay, Milestones):
            fallen = decay.gamma ** sum(milestone <= self.epoch(step) for milestone in decay.milestones)
        if place < warmup:
            return fallen * (place + 1) / warmup
        progress = (place - warmup) / max(self.steps - warmup, 1)
        if decay == "linear":
            return 1.0 - progress
        return float(0.5 * (1 + np.cos(np.pi * progress))) if decay == "cosine" else fallen


def plan(config: Config, tokens_N: Sequence[NDArray[np.integer]]) -> list[Phase]:
    """The phases of a run; `tokens_N`: per task, what each training example costs in tokens."""
    names = list(config.tasks)
    sizes = [task.batch_size or config.schedule.batch_size for task in config.tasks.values()]
    trained = [tuple(number for number, name in enumerate(names) if name in (p.tasks or names)) for p in config.phases]

    def schedule(tasks: tuple[int, ...], epochs: int = 1) -> Schedule:
        tokens = [tokens_N[task] for task in tasks]
        before = list(dict.fromkeys(trained[: trained.index(tasks)]))
        earlier = [sum(task in others for others in before) for task in tasks]
        return Schedule(config.schedule, tokens, [sizes[task] for task in tasks], config.seed, epochs, tasks, earlier)

    lengths = {tasks: schedule(tasks).steps_per_epoch for tasks in trained}
    steps = [
        phase.steps or (phase.epochs or 0) * lengths[tasks] for phase, tasks in zip(config.phases, trained, strict=True)
    ]
    totals = {tasks: sum(s for s, t in zip(steps, trained, strict=True) if t == tasks) for tasks in trained}
    schedules = {tasks: schedule(tasks, -(-total // lengths[tasks])) for tasks, total in totals.items()}
    phases: list[Phase] = []
    first, epochs, taken = 0, 0.0, dict.fromkeys(schedules, 0)
    for phase, tasks, count in zip(config.phases, trained, steps, strict=True):
        phases.append(Phase(phase, first, first + count - 1, schedules[tasks], taken[tasks], epochs))
        first, epochs = first + count, epochs + count / lengths[tasks]
        taken[tasks] += count
    return phases
