"""How long a trial trains: every trial sees the same number of examples, whatever its σ, batch sizes and schedule.

An epoch of σ steps is no measure for a comparison: twice the σ would be twice the training. So the phases of each
trial are stretched or cut to the same number of examples, and evaluations lie at the same numbers of examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from mtbert.building import build, methods_of
from mtbert.config import Config
from mtbert.errors import UserError
from mtbert.phases import Phase, plan
from mtbert.tasks import Task
from tune.space import check_countable


def own_examples(config: Config) -> int:
    """Examples that a configuration would train on by itself, all tasks together."""
    return _seen(config, build(config).tasks)[-1]


def of_equal_length(config: Config, examples: int, evaluations: int) -> tuple[Config, dict[int, int]]:
    """`config` with phases in steps, as many as it takes to see `examples`, and as many evaluations.

    The phases keep their shares. Builds the model and opens the data, so that what does not fit together shows here.

    Returns: the configuration, and for each step after which it is evaluated the examples seen by then.

    Raises `UserError` when there are fewer steps than phases or evaluations, when they cannot be cut into as many
    evaluations, when no number of steps comes within a step of `examples`, and as `check_countable`
    and `methods_of`.
    """
    check_countable(config)
    methods_of(config)
    tasks = build(config).tasks
    seen = _seen(config, tasks)
    phases = plan(config, [task.tokens_N("train") for task in tasks])
    # where steps are alike the guess is the answer; where they differ, or change with the length, it is near
    guess = max(1, -(-examples * len(seen) // seen[-1]))
    steps = _fewest_steps(lambda steps: _seen(_stretched(config, phases, steps), tasks)[-1] >= examples, guess)
    config = _stretched(config, phases, steps)
    if min(phase.steps or 0 for phase in config.phases) < 1 or steps < evaluations:
        raise UserError(
            f"--examples {examples}: only {steps} steps, for {len(phases)} phase(s) and {evaluations} evaluation(s)"
        )
    seen = _seen(config, tasks)
    step = max(np.diff([0, *seen]))
    if seen[-1] - examples >= step:
        raise UserError(
            f"--examples {examples}: {steps} steps see {seen[-1]} and one less too few, for this schedule changes "
            f"with its length; ask for {seen[-1]}"
        )
    every = -(-steps // evaluations)
    ends = [*range(every, steps, every), steps]
    if len(ends) != evaluations:
        raise UserError(
            f"--evaluations {evaluations}: {steps} steps fall into {len(ends)} equal parts, not {evaluations}; "
            f"use fewer --evaluations or more --examples"
        )
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"evaluate_every": every}),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": every}),
        }
    )
    return config, {end: seen[end - 1] for end in ends}


def _fewest_steps(enough: Callable[[int], bool], guess: int) -> int:
    """Steps that are enough where one less is not: from the guess in growing strides, then by bisection."""
    low, high, stride = guess - 1, guess, 1
    while not enough(high):
        low, high, stride = high, high + stride, 2 * stride
    while low and enough(low):
        low, high, stride = max(0, low - stride), low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _stretched(config: Config, phases: Sequence[Phase], steps: int) -> Config:
    """With phases of so many steps together, each with the share that it has in `phases`."""
    ends = [round((phase.last + 1) * steps / (phases[-1].last + 1)) for phase in phases]
    lengths = np.diff([0, *ends]).tolist()
    updated = [
        phase.config.model_copy(update={"epochs": None, "steps": length})
        for phase, length in zip(phases, lengths, strict=True)
    ]
    return config.model_copy(update={"phases": updated})


def _seen(config: Config, tasks: Sequence[Task]) -> list[int]:
    """Examples seen after each step."""
    sizes = [
        sum(len(phase.schedule.global_batch(task, ordinal)) for task, ordinal in phase.schedule.batches_at(place))
        for phase in plan(config, [task.tokens_N("train") for task in tasks])
        for place in range(phase.offset, phase.offset + phase.steps)
    ]
    return list(itertools.accumulate(sizes))
