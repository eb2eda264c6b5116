"""How long a trial trains: every trial sees the same number of examples, whatever its σ, batch sizes and schedule.

An epoch of σ steps is no measure for a comparison: twice the σ would be twice the training. So the phases of each
trial are stretched or cut to the same number of examples, and evaluations lie at the same numbers of examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mtbert.config import Config
from mtbert.errors import UserError
from mtbert.phases import plan
from mtbert.tasks import Task
from mtbert.trainer import build

ROUNDS = 8
"""Phases and annealing depend on the length, and so on themselves; two or three rounds settle it."""


def own_examples(config: Config) -> int:
    """Examples that a configuration would train on by itself, all tasks together."""
    return _seen(config, build(config).tasks)[-1]


def of_equal_length(config: Config, examples: int, evaluations: int) -> tuple[Config, dict[int, int]]:
    """`config` with phases in steps, as many as it takes to see `examples`, and as many evaluations.

    The phases keep their shares. Builds the model and opens the data, so that what does not fit together shows here.

    Returns: the configuration, and for each step after which it is evaluated the examples seen by then.

    Raises `UserError` when there are fewer steps than phases or evaluations.
    """
    tasks = build(config).tasks
    for _ in range(ROUNDS):
        seen = _seen(config, tasks)
        before = [0, *seen][-2]
        if before < examples <= seen[-1]:
            break
        # the last step over the aim is kept: where steps are alike this is their number in the first round
        steps = max(1, -(-examples * len(seen) // seen[-1]))
        phases = plan(config, [task.tokens_N("train") for task in tasks])
        lengths = np.diff([0, *(round((phase.last + 1) * steps / len(seen)) for phase in phases)]).tolist()
        if min(lengths) < 1 or steps < evaluations:
            raise UserError(
                f"--examples {examples}: only {steps} steps, for {len(phases)} phase(s) and {evaluations} evaluation(s)"
            )
        if steps == len(seen):  # the estimate rests where steps differ in size; the last phase takes the rest
            lengths[-1] += 1 if seen[-1] < examples else -1
        updated = [
            phase.config.model_copy(update={"epochs": None, "steps": length})
            for phase, length in zip(phases, lengths, strict=True)
        ]
        config = config.model_copy(update={"phases": updated})
    seen = _seen(config, tasks)
    steps = len(seen)
    every = -(-steps // evaluations)
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"evaluate_every": every}),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": every}),
        }
    )
    ends = [*range(every, steps, every), steps]
    return config, {end: seen[end - 1] for end in ends}


def _seen(config: Config, tasks: Sequence[Task]) -> list[int]:
    """Examples seen after each step."""
    sizes = [
        sum(len(phase.schedule.global_batch(task, ordinal)) for task, ordinal in phase.schedule.batches_at(place))
        for phase in plan(config, [task.tokens_N("train") for task in tasks])
        for place in range(phase.offset, phase.offset + phase.steps)
    ]
    return list(itertools.accumulate(sizes))
