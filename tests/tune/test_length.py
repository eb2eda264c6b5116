"""Trials see the same number of examples, whatever their configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtbert.building import build
from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.errors import UserError
from mtbert.phases import Phase, plan
from tune.length import of_equal_length, own_examples

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def configured(cache: Path, *overrides: str) -> Config:
    small = "data.generate={seed: 0, train: 200, dev: 60}"
    shape = "encoder.shape={hidden_size: 16, layers: 1, heads: 1, intermediate_size: 16, max_positions: 64}"
    return load_config(
        ROOT / "configs" / "quickstart.yaml", [small, shape, f"data.cache={cache}", "phases=[{epochs: 3}]", *overrides]
    )


def planned(config: Config) -> list[Phase]:
    return plan(config, [task.tokens_N("train") for task in build(config).tasks])


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.length=20"],
        ["schedule.length=300", "schedule.batch_size=8"],
        ["schedule.kind=sampled", "schedule.alpha=1", "schedule.anneal=0.8", "schedule.length=30"],
        ["schedule.kind=sequential"],
        ["schedule.length=unbalanced", "tasks.sst.batch_size=5"],
        ["phases=[{epochs: 1, trainable: heads}, {epochs: 3}]"],
    ],
    ids=" ".join,
)
def test_examples_are_those_asked_for(cache: Path, overrides: list[str]) -> None:
    config, seen = of_equal_length(configured(cache, *overrides), 3000, 4)
    phases = planned(config)
    steps = phases[-1].last + 1
    per_step = [
        sum(share.examples for share in phase.schedule.shares(phase.schedule_step(step), 0, 1))
        for phase in phases
        for step in range(phase.first, phase.last + 1)
    ]
    assert sum(per_step) - per_step[-1] < 3000 <= sum(per_step)
    every = config.run.evaluate_every
    assert list(seen) == [*range(every, steps, every), steps] and len(seen) == 4  # type: ignore[arg-type]
    assert list(seen.values()) == [sum(per_step[:step]) for step in seen]
    for number, examples in enumerate(seen.values(), 1):
        assert examples >= number * 750
        if "unbalanced" not in " ".join(overrides):  # whose first steps are larger than its last
            assert examples - number * 750 <= number * max(per_step)


@pytest.mark.parametrize(
    ("overrides", "examples"),
    [
        (["schedule.kind=sequential", "tasks.sst.batch_size=4", "tasks.sts.batch_size=100"], 3000),
        (["schedule.kind=sequential", "tasks.sst.batch_size=2", "tasks.sts.batch_size=200"], 1001),
        (["schedule.length=unbalanced", "tasks.sst.batch_size=2", "tasks.sts.batch_size=100"], 2500),
        (
            [
                *["schedule.kind=sampled", "schedule.alpha=1", "schedule.anneal=0.8", "schedule.length=30"],
                *["tasks.sst.batch_size=4", "tasks.sts.batch_size=100"],
            ],
            3000,
        ),
        (["phases=[{epochs: 1, tasks: [sst]}, {epochs: 1}]", "tasks.sst.batch_size=4"], 3000),
    ],
    ids=str,
)
def test_steps_of_different_sizes_see_the_examples_to_a_step(cache: Path, overrides: list[str], examples: int) -> None:
    config, seen = of_equal_length(configured(cache, *overrides), examples, 2)
    schedules = [(phase.schedule, phase.offset + step) for phase in planned(config) for step in range(phase.steps)]
    per_step = [sum(share.examples for share in schedule.shares(step, 0, 1)) for schedule, step in schedules]
    assert sum(per_step) == list(seen.values())[-1]
    assert examples <= sum(per_step) < examples + max(per_step)


def test_phases_keep_their_shares(cache: Path) -> None:
    config, _ = of_equal_length(configured(cache, "phases=[{epochs: 1, trainable: heads}, {epochs: 3}]"), 6000, 4)
    first, second = (phase.steps for phase in config.phases)
    assert first and second and abs(second - 3 * first) <= 3
    assert [phase.trainable for phase in config.phases] == ["heads", "all"]


def test_at_equal_examples_sigma_changes_nothing_in_round_robin(cache: Path) -> None:
    """What `docs/search.md` says of σ: the same examples in the same steps at the same rates."""
    short, long = (of_equal_length(configured(cache, f"schedule.length={sigma}"), 3000, 4) for sigma in (7, 400))
    assert short[1] == long[1]
    assert short[0].phases == long[0].phases
    schedules = [planned(config)[0].schedule for config, _ in (short, long)]
    for step in range(max(short[1])):
        one, other = (schedule.shares(step, 0, 2) for schedule in schedules)
        assert [share.task for share in one] == [share.task for share in other]
        for mine, yours in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine.micro_batches[0], yours.micro_batches[0])


def test_what_a_configuration_sees_by_itself(cache: Path) -> None:
    assert own_examples(configured(cache)) == 3 * 3 * 200


def test_too_few_examples_are_refused(cache: Path) -> None:
    with pytest.raises(UserError, match=r"--examples 200: only 3 steps, for 1 phase\(s\) and 4 evaluation\(s\)"):
        of_equal_length(configured(cache), 200, 4)


def test_steps_that_fall_into_other_parts_are_refused(cache: Path) -> None:
    """17 steps in parts of 3 are 6, in parts of 2 they are 9."""
    with pytest.raises(UserError, match=r"--evaluations 8: 17 steps fall into 6 equal parts, not 8; use fewer --eval"):
        of_equal_length(configured(cache, "schedule.batch_size=50"), 17 * 150, 8)


def test_adaptive_sampling_is_counted_only_where_batches_are_alike(cache: Path) -> None:
    """What it draws depends on scores, which nobody knows before."""
    adaptive = "schedule.kind=adaptive"
    _, seen = of_equal_length(configured(cache, adaptive), 3000, 4)
    assert max(seen.values()) >= 3000
    with pytest.raises(UserError, match=r"schedule.kind adaptive: .* give the tasks one batch_size, not 8, 32, 32"):
        of_equal_length(configured(cache, adaptive, "tasks.sst.batch_size=8"), 3000, 4)
