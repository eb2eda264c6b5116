"""The schedule is a pure function; every example once per pass; every rank the same work; the laws of each kind."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtbert.config import ScheduleConfig
from mtbert.schedule import Schedule, Share

KINDS: list[dict[str, Any]] = [
    {},
    {"length": "shortest"},
    {"length": 7},
    {"length": "unbalanced"},
    {"kind": "sequential"},
    {"kind": "sampled"},
    {"kind": "sampled", "alpha": 0.5, "anneal": 0.5, "tasks_per_step": 3},
    {"kind": "adaptive", "tasks_per_step": 2},
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything a schedule is made from, so that it can be made twice."""

    options: dict[str, Any]
    tokens: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    seed: int
    epochs: int = 2

    def schedule(self) -> Schedule:
        tokens = [np.array(lengths) for lengths in self.tokens]
        return Schedule(ScheduleConfig(**self.options), tokens, self.sizes, self.seed, self.epochs)


LENGTHS = st.lists(st.integers(3, 40), min_size=1, max_size=30).map(tuple)
CASES = st.builds(
    lambda options, bucket, tasks, seed: Case(
        {**options, "bucket": bucket}, tuple(t for t, _ in tasks), tuple(size for _, size in tasks), seed
    ),
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.lists(st.tuples(LENGTHS, st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(0, 2**40),
)
STEPS = st.integers(0, 60)


def as_lists(shares: list[Share]) -> list[tuple[int, list[list[int]], int]]:
    return [(share.task, [micro.tolist() for micro in share.micro_batches], share.examples) for share in shares]


def examples(shares: list[Share]) -> dict[int, list[int]]:
    """Per task, the examples of a rank's shares."""
    return {share.task: np.concatenate(share.micro_batches).tolist() for share in shares}


def passes(schedule: Schedule, batches: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """What the batches hold, by (task, pass)."""
    held: dict[tuple[int, int], list[int]] = {}
    for task, ordinal in batches:
        number = ordinal // schedule.batches_per_pass[task]
        held.setdefault((task, number), []).extend(schedule.global_batch(task, ordinal).tolist())
    return held


# ------------------------------------------------------------------------------------------ what always holds


@given(CASES, st.lists(STEPS, min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_is_a_pure_function_of_step_rank_and_world(case: Case, steps: list[int], world: int, accumulation: int) -> None:
    """Asked in any order, any number of times, after any history: so resuming anywhere equals the straight run."""
    straight = case.schedule()
    before = {
        (step, rank): as_lists(straight.shares(step, rank, world, accumulation))
        for step in range(max(steps) + 1)
        for rank in range(world)
    }
    resumed = case.schedule()
    for step, rank in itertools.product(steps, reversed(range(world))):
        assert as_lists(resumed.shares(step, rank, world, accumulation)) == before[step, rank]


@given(CASES, STEPS, st.integers(1, 5), st.integers(1, 3))
def test_global_batch_depends_neither_on_world_nor_on_accumulation(
    case: Case, step: int, world: int, accumulation: int
) -> None:
    schedule = case.schedule()
    whole = schedule.shares(step, 0, 1)
    shares = [schedule.shares(step, rank, world, accumulation) for rank in range(world)]
    for mine in shares:
        assert [(share.task, share.examples) for share in mine] == [(share.task, share.examples) for share in whole]
        assert all(len(share.micro_batches) == accumulation for share in mine)
    for task, indices in examples(whole).items():
        assert len(indices) == next(share.examples for share in whole if share.task == task)
        assert sorted(index for mine in shares for index in examples(mine)[task]) == sorted(indices)


@given(CASES)
def test_every_example_is_in_exactly_one_batch_of_a_pass_and_batches_are_as_large_as_each_other(case: Case) -> None:
    schedule = case.schedule()
    for task, batches in enumerate(schedule.batches_per_pass):
        for number in range(3):
            held = [schedule.global_batch(task, number * batches + place) for place in range(batches)]
            assert sorted(np.concatenate(held).tolist()) == list(range(len(case.tokens[task])))
            sizes = [len(batch) for batch in held]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= case.sizes[task]


@given(CASES, st.integers(1, 3))
def test_a_run_goes_through_a_task_s_batches_in_order_and_skips_none(case: Case, world: int) -> None:
    """So each completed pass holds every example once, over all ranks; and the passes are those of the batches."""
    schedule = case.schedule()
    steps = range(min(3 * schedule.steps_per_epoch, 60))
    drawn = [batch for step in steps for batch in schedule.batches_at(step)]
    for task in range(len(case.tokens)):
        ordinals = [ordinal for k, ordinal in drawn if k == task]
        assert ordinals == list(range(len(ordinals)))
    seen: dict[int, list[int]] = {}
    for step, rank in itertools.product(steps, range(world)):
        for task, indices in examples(schedule.shares(step, rank, world)).items():
            seen.setdefault(task, []).extend(indices)
    held = passes(schedule, drawn)
    for task, indices in seen.items():
        assert Counter(indices) == Counter(index for (k, _), batch in held.items() if k == task for index in batch)


@given(CASES, STEPS)
def test_tasks_ascend_and_each_comes_once(case: Case, step: int) -> None:
    tasks = [share.task for share in case.schedule().shares(step, 0, 2)]
    assert tasks == sorted(set(tasks))
    assert tasks


def test_tasks_go_by_their_numbers_in_the_run() -> None:
    """In shares, in what is told of passes, and in what addresses the shuffle."""
    tokens = [np.arange(10) + 3 for _ in range(2)]
    some = Schedule(ScheduleConfig(), tokens, [4, 4], seed=1, tasks=[2, 5])
    assert [share.task for share in some.shares(0, 0, 1)] == [2, 5]
    assert some.passes_at(3) == {2: 4 / 3, 5: 4 / 3}, "three batches are a pass"
    every = Schedule(ScheduleConfig(), tokens * 3, [4] * 6, seed=1)
    for place, task in enumerate((2, 5)):
        for ordinal in range(6):
            assert some.global_batch(place, ordinal).tolist() == every.global_batch(task, ordinal).tolist()


def test_every_task_has_examples_and_a_batch_size() -> None:
    for tokens, sizes in (([[5], []], [1, 1]), ([[5]], [1, 1])):
        with pytest.raises(AssertionError):
            Schedule(ScheduleConfig(), [np.array(each, np.int64) for each in tokens], sizes, seed=0)


def test_more_ranks_than_examples_leaves_empty_shares() -> None:
    schedule = Case({}, ((5, 6, 7, 8),), (2,), seed=0).schedule()
    shares = [schedule.shares(0, rank, 4, 2)[0] for rank in range(4)]
    counts = [sum(len(micro) for micro in share.micro_batches) for share in shares]
    assert sorted(counts) == [0, 0, 1, 1]
    assert all(share.examples == 2 and len(share.micro_batches) == 2 for share in shares)
    assert all(micro.dtype == np.int64 for share in shares for micro in share.micro_batches)  # an empty one too


def test_seeds_tasks_and_passes_shuffle_independently() -> None:
    tokens = (tuple([9] * 40),) * 2
    one, other = (Case({"bucket": 1}, tokens, (40, 40), seed).schedule() for seed in (0, 1))
    orders = [tuple(s.global_batch(task, n).tolist()) for s in (one, other) for task in range(2) for n in range(2)]
    assert len(set(orders)) == len(orders)


# ------------------------------------------------------------------------------------------ tokens


def realistic() -> list[NDArray[np.int64]]:
    """Token counts like those of SST, Quora pairs and STS pairs: log-normal, clipped at what occurs there."""
    rng = np.random.default_rng(0)
    shapes = [(3.0, 0.5, 8544, 4, 80), (3.3, 0.45, 20000, 6, 335), (3.2, 0.45, 6040, 6, 125)]
    return [
        np.clip(rng.lognormal(mean, spread, count), low, high).astype(np.int64)
        for mean, spread, count, low, high in shapes
    ]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_get_the_same_number_of_tokens_to_within_five_per_cent(options: dict[str, Any], world: int) -> None:
    """The exception: one task in a step, whose examples are all of one length, and three ranks for 31 of them."""
    tokens = realistic()
    schedule = Schedule(ScheduleConfig(**options), tokens, [32] * 3, seed=0, epochs=3)
    indivisible = 0
    steps = sorted({round(step) for step in np.linspace(0, schedule.steps_per_epoch - 1, 200)})
    for step in steps:
        shares = [schedule.shares(step, rank, world) for rank in range(world)]
        costs = [[tokens[share.task][share.micro_batches[0]] for share in mine] for mine in shares]
        loads = [sum(int(part.sum()) for part in mine) for mine in costs]
        if max(loads) / np.mean(loads) - 1 > 0.05:
            assert len(shares[0]) == 1 and world == 3, f"step {step}: {loads}"
            assert max(loads) - min(loads) <= max(part.max() for mine in costs for part in mine), (
                f"step {step}: {loads}"
            )
            indivisible += 1
    assert indivisible <= 0.02 * len(steps)


def test_examples_of_one_length_are_dealt_out_in_turn() -> None:
    """Whatever this machine's sort does with equals. An even number of each length, so that one ends where it began."""
    tokens = tuple(5 + example % 3 for example in range(90))
    schedule = Case({}, (tokens,), (90,), seed=0).schedule()
    batch = schedule.global_batch(0, 0).tolist()
    dealt = [[each for each in batch if tokens[each] == length] for length in (5, 6, 7)]
    for rank in range(2):
        [share] = schedule.shares(0, rank, 2)
        assert share.micro_batches[0].tolist() == [each for alike in dealt for each in alike[rank::2]]


def test_within_a_bucket_equals_stay_as_they_were_shuffled() -> None:
    mixed = tuple(5 + example % 2 for example in range(100))
    shuffled = Case({}, ((5,) * 100,), (100,), seed=4).schedule().global_batch(0, 0).tolist()
    expected = sorted(shuffled, key=lambda example: mixed[example])
    assert Case({}, (mixed,), (100,), seed=4).schedule().global_batch(0, 0).tolist() == expected
    assert shuffled != sorted(shuffled)


def test_the_order_of_a_pass_takes_four_bytes_an_example() -> None:
    order_N, _, _ = Case({}, ((5,) * 1000,), (10,), seed=0).schedule()._cut_pass(0, 0)
    assert order_N.nbytes == 4000


def test_what_one_task_leaves_uneven_the_next_evens_out() -> None:
    """31 examples of one length give three ranks 11, 10 and 10; three such tasks give each of them 31."""
    schedule = Case({}, ((7,) * 31,) * 3, (31,) * 3, seed=0).schedule()
    for rank in range(3):
        assert sum(len(share.micro_batches[0]) for share in schedule.shares(0, rank, 3)) == 31


def test_micro_batches_are_balanced_too() -> None:
    tokens = realistic()
    schedule = Schedule(ScheduleConfig(), tokens, [64] * 3, seed=0)
    for step in range(20):
        for share in schedule.shares(step, 1, 2, accumulation=4):
            loads = [tokens[share.task][micro].sum() for micro in share.micro_batches]
            assert max(loads) / np.mean(loads) - 1 < 0.1


def padding(bucket: int) -> float:
    """Share of a padded batch that would be padding, over one pass."""
    tokens = realistic()[:1]
    schedule = Schedule(ScheduleConfig(bucket=bucket), tokens, [32], seed=0)
    batches = [tokens[0][schedule.global_batch(0, ordinal)] for ordinal in range(schedule.batches_per_pass[0])]
    return 1 - float(sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches))


def test_buckets_avoid_padding_and_leave_the_pass_random() -> None:
    assert padding(1) > 0.5
    assert padding(16) < 0.15
    assert padding(64) < padding(16)
    tokens = realistic()[:1]
    schedule = Schedule(ScheduleConfig(), tokens, [32], seed=0)
    means = [tokens[0][schedule.global_batch(0, ordinal)].mean() for ordinal in range(schedule.batches_per_pass[0])]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2  # long batches do not follow long ones


# ------------------------------------------------------------------------------------------ the kinds

UNEVEN = ((5,) * 40, (5,) * 12, (5,) * 21)  # 10, 3 and 6 batches of 4


def uneven(**options: Any) -> Schedule:
    return Case(options, UNEVEN, (4, 4, 4), seed=3).schedule()


@pytest.mark.parametrize(("length", "steps"), [("shortest", 3), ("longest", 10), (8, 8), (25, 25)])
def test_round_robin_has_every_task_in_every_step(length: str | int, steps: int) -> None:
    schedule = uneven(length=length)
    assert schedule.steps_per_epoch == steps
    for step in range(2 * steps):  # the data run on from epoch to epoch, and start again where they end
        assert schedule.batches_at(step) == [(0, step), (1, step), (2, step)]


def test_unbalanced_leaves_a_task_out_once_its_data_have_ended() -> None:
    schedule = uneven(length="unbalanced")
    assert schedule.steps_per_epoch == 10
    tasks = [[task for task, _ in schedule.batches_at(step)] for step in range(20)]
    assert tasks == 2 * (3 * [[0, 1, 2]] + 3 * [[0, 2]] + 4 * [[0]])
    epoch = [batch for step in range(10, 20) for batch in schedule.batches_at(step)]
    assert {key: sorted(held) for key, held in passes(schedule, epoch).items()} == {
        (task, 1): list(range(len(lengths))) for task, lengths in enumerate(UNEVEN)
    }


def test_sequential_takes_one_dataset_after_another() -> None:
    schedule = uneven(kind="sequential")
    assert schedule.steps_per_epoch == 19
    tasks = [task for step in range(38) for task, _ in schedule.batches_at(step)]
    assert tasks == 2 * ([0] * 10 + [1] * 3 + [2] * 6)
    assert schedule.batches_at(19 + 10) == [(1, 3)]


@pytest.mark.parametrize(("per_step", "length", "steps"), [(1, "longest", 30), (4, "shortest", 3), (2, 9, 9)])
def test_drawn_tasks_have_as_many_batches_as_round_robin(per_step: int, length: str | int, steps: int) -> None:
    for kind in ("sampled", "adaptive"):
        schedule = uneven(kind=kind, length=length, tasks_per_step=per_step)
        assert schedule.steps_per_epoch == steps
        assert all(len(schedule.batches_at(step)) == per_step for step in range(steps))


def frequencies(schedule: Schedule, epoch: int) -> NDArray[np.float64]:
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    tasks = [task for step in steps for task, _ in schedule.batches_at(step)]
    return np.bincount(tasks, minlength=len(schedule.tokens_N)) / len(tasks)


def power(alpha: float) -> NDArray[np.float64]:
    weights = np.array([len(lengths) for lengths in UNEVEN]) ** alpha
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_sampled_tasks_are_as_frequent_as_n_to_the_alpha(alpha: float) -> None:
    schedule = uneven(kind="sampled", alpha=alpha, length=5000)
    np.testing.assert_allclose(frequencies(schedule, 0), power(alpha), atol=0.02)  # 3 standard errors of 5000 draws


def test_annealing_takes_alpha_down_in_equal_parts_and_no_further() -> None:
    config = ScheduleConfig(kind="sampled", alpha=1.0, anneal=0.8, length=4000)
    schedule = Schedule(config, [np.array(lengths) for lengths in UNEVEN], [4, 4, 4], seed=5, epochs=3)
    for epoch, alpha in [(0, 1.0), (1, 0.6), (2, 0.2), (3, 0.2)]:
        np.testing.assert_allclose(frequencies(schedule, epoch), power(alpha), atol=0.025)


def test_two_epochs_are_the_first_and_the_last() -> None:
    config = ScheduleConfig(kind="sampled", alpha=1.0, anneal=0.8, length=5000)
    schedule = Schedule(config, [np.array(lengths) for lengths in UNEVEN], [4, 4, 4], seed=3, epochs=2)
    for epoch, alpha in ((0, 1.0), (1, 0.2)):
        np.testing.assert_allclose(frequencies(schedule, epoch), power(alpha), atol=0.02)


def test_one_epoch_has_no_end_to_anneal_to() -> None:
    config = ScheduleConfig(kind="sampled", alpha=1.0, anneal=0.8, length=5000)
    schedule = Schedule(config, [np.array(lengths) for lengths in UNEVEN], [4, 4, 4], seed=3)
    for epoch in range(2):
        np.testing.assert_allclose(frequencies(schedule, epoch), power(1.0), atol=0.02)


def adaptive(alpha: float = 2.0) -> Schedule:
    config = ScheduleConfig(kind="adaptive", alpha=alpha, length=4000)
    return Schedule(config, [np.full(count, 5) for count in (50, 90, 70)], [5] * 3, seed=3)


def test_the_task_that_lags_is_drawn_more_often() -> None:
    """p ∝ 1 / (min(1, score / target)^α + 0.1); what is above its target lags no more than what is at it."""
    schedule = adaptive()
    schedule.adapt(2000, scores=[0.25, 0.9, -0.3], targets=[0.5, 0.8, 1.0])
    chances = np.array([1 / 0.35, 1 / 1.1, 1 / 0.1])
    assert schedule.history == [(2000, pytest.approx(chances / chances.sum()))]
    for steps, expected in ((range(2000), np.full(3, 1 / 3)), (range(2000, 4000), chances / chances.sum())):
        tasks = [schedule.batches_at(step)[0][0] for step in steps]
        np.testing.assert_allclose(np.bincount(tasks, minlength=3) / 2000, expected, atol=0.03)
    assert adaptive(alpha=0.0).batches_at(7) == adaptive().batches_at(7)


def test_an_adaptive_schedule_goes_on_from_its_history_and_skips_no_batch() -> None:
    straight, resumed = adaptive(), adaptive()
    said = []
    for step in range(90):
        if step in (30, 60):
            straight.adapt(step, scores=[0.1 * step / 30, 0.5, float("nan")], targets=[1.0] * 3)
        said.append(straight.batches_at(step))
    resumed.history = list(straight.history)
    assert [resumed.batches_at(step) for step in (89, 40, 3)] == [said[step] for step in (89, 40, 3)]
    for task in range(3):
        ordinals = [ordinal for batches in said for k, ordinal in batches if k == task]
        assert ordinals == list(range(len(ordinals)))


@pytest.mark.parametrize("step", [0, 1, 7])
def test_what_was_looked_at_ahead_does_not_stay(step: int) -> None:
    asked, fresh = adaptive(), adaptive()
    asked.batches_at(step + 20)
    for schedule in (asked, fresh):
        schedule.adapt(step, scores=[0.1, 1.0, 1.0], targets=[1.0] * 3)
    for ahead in range(step, step + 20):
        assert asked.batches_at(ahead) == fresh.batches_at(ahead)


def test_a_score_counts_from_its_step_on() -> None:
    drawn = []
    for step in range(1, 40):
        now, before, never = adaptive(), adaptive(), adaptive()
        now.adapt(step, scores=[0.0, 1.0, 1.0], targets=[1.0] * 3)
        before.adapt(step - 1, scores=[0.0, 1.0, 1.0], targets=[1.0] * 3)
        drawn.append([schedule.batches_at(step)[0][0] for schedule in (now, before, never)])
    assert all(now == before for now, before, _ in drawn)
    assert any(now != never for now, _, never in drawn)


def test_only_an_adaptive_schedule_adapts_and_goes_forwards() -> None:
    schedule = adaptive()
    schedule.adapt(5, scores=[0.1] * 3, targets=[1.0] * 3)
    for wrong in (lambda: schedule.adapt(5, [0.1] * 3, [1.0] * 3), lambda: uneven().adapt(5, [0.1] * 3, [1.0] * 3)):
        with pytest.raises(AssertionError):
            wrong()


def test_two_draws_of_one_task_in_a_step_are_one_share_of_both_batches() -> None:
    schedule = Case({"kind": "sampled", "tasks_per_step": 3}, ((5,) * 12,), (4,), seed=0).schedule()
    [share] = schedule.shares(0, 0, 1)
    assert share.examples == 12
    assert sorted(share.micro_batches[0].tolist()) == list(range(12))


# ------------------------------------------------------------------------------------------ golden

GOLDEN = [
    (0, [2, 7, 9], [0, 1, 2]),
    (1, [6, 8, 10], [3, 4, 5]),
    (2, [0, 1], [3, 4, 5]),
]
"""(step, examples of task 0, of task 1): after a change here a checkpoint no longer continues its run."""


def test_the_order_of_examples_is_frozen() -> None:
    schedule = Case({"bucket": 2}, (tuple(range(3, 14)), tuple(range(3, 9))), (3, 3), seed=7).schedule()
    found = [
        (step, *(sorted(indices) for indices in examples(schedule.shares(step, 0, 1)).values())) for step in range(3)
    ]
    assert found == GOLDEN


GOLDEN_DRAWS = {
    "sampled": [0, 0, 2, 0, 0, 0, 2, 1, 1, 0, 1, 1],
    "adaptive": [1, 2, 1, 2, 0, 1, 2, 1, 2, 1, 2, 0],
    "a pass": [6, 9, 1, 0, 7, 5, 11, 3, 10, 8, 4, 2],
}
"""The tasks of the first steps, and a pass without buckets; for the same reason."""


def test_draws_are_frozen() -> None:
    config = {"tasks_per_step": 1, "length": 40, "alpha": 0.5}
    found = {
        kind: [uneven(kind=kind, **config).batches_at(step)[0][0] for step in range(12)]
        for kind in ("sampled", "adaptive")
    }
    found["a pass"] = [example for place in range(3) for example in uneven(bucket=1).global_batch(1, place)]
    assert found == GOLDEN_DRAWS
