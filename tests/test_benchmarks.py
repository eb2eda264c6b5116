"""What benchmarks compute rather than time: work in a step, the model of a step on many ranks, how even shares are."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from benchmarks import data, using
from benchmarks.ranks import uneven_work
from benchmarks.scaling import WORLDS, Machine, step, table
from benchmarks.workload import LENGTHS, draw, interleave

MACHINE = Machine(tasks=3, parameters=10**8, bytes_per_number=2, compute=0.3, finish=0.01, link=1e10, latency=0.0)


def sharded(machine: Machine, world: int, overlap: bool = True) -> float:
    return step(machine.parts(world), overlap)


def test_the_model_of_a_step() -> None:
    assert sharded(MACHINE, 1) == pytest.approx(MACHINE.compute + MACHINE.finish)
    endless = dataclasses.replace(MACHINE, link=float("inf"))
    for world in WORLDS:
        assert sharded(endless, world) == pytest.approx(MACHINE.compute + MACHINE.finish / world)
        whole = step(MACHINE.parts(world, sharded=False))
        assert sharded(MACHINE, world) <= sharded(MACHINE, world, overlap=False)
        assert sharded(MACHINE, world) <= whole + 1e-9
    # two ranks: a gradient needs 10 ms on the link and a backward 100, so only the last one shows, and the gathering
    assert sharded(MACHINE, 2) == pytest.approx(0.3 + 0.01 + 0.01 / 2 + 0.01)
    assert sharded(MACHINE, 2, overlap=False) == pytest.approx(0.3 + 3 * 0.01 + 0.01 / 2 + 0.01)
    # two of the three exchanges run beside a backward, which is longer for feeding them
    fed = dataclasses.replace(MACHINE.parts(2), feeding=0.002)
    assert step(fed) == pytest.approx(sharded(MACHINE, 2) + 2 * 0.002)
    # a link so slow that it never rests: the first backward, three gradients, the gathering
    slow = dataclasses.replace(MACHINE, link=1e8)
    assert sharded(slow, 2) == pytest.approx(0.1 + 3 * 1.0 + 0.01 / 2 + 1.0)
    # 1,023 messages for each of three exchanges, two of which are hidden, and the gathering
    far = dataclasses.replace(endless, latency=1e-5)
    assert sharded(far, 1024) == pytest.approx(0.3 + 0.01 / 1024 + 2 * 1023e-5)


def test_the_forecast_says_where_communication_overtakes() -> None:
    told = table(dataclasses.replace(MACHINE, link=3.4e9)).splitlines()
    assert len(told) == 1 + len(WORLDS) + 5 and told[1].split()[0] == "1" and told[len(WORLDS)].split()[0] == "1024"
    assert "sharded: communication that shows exceeds computation nowhere" in told
    # three all-reduces of 2 · 200 MB · 7/8 each: 309 ms, after 300 ms of backwards
    assert "whole, no overlap: communication that shows exceeds computation from 8 ranks on" in told


def test_contenders_have_the_same_examples_in_all() -> None:
    """Ours by length and in random order, the others' at random: nobody's first batches are its shortest."""

    def lengths(step: int, alike: bool) -> dict[str, list[tuple[int, ...]]]:
        batch = draw(step, 8, 16, alike)
        columns = {task: [[len(ids) for ids in text] for text in batch.sentences[task]] for task in LENGTHS}
        return {task: list(zip(*column, strict=True)) for task, column in columns.items()}

    ours, theirs = [lengths(step, True) for step in range(16)], [lengths(step, False) for step in range(16)]
    for task in LENGTHS:
        assert sorted(chain(*(batch[task] for batch in ours))) == sorted(chain(*(batch[task] for batch in theirs)))
        tokens = [sum(map(sum, batch[task])) for batch in ours]
        assert max(tokens) > 2 * min(tokens), "examples of like length come together"
        assert tokens != sorted(tokens)
    assert len({tuple(batch["sst"]) for batch in ours}) == 16


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_get_equal_work(world: int) -> None:
    """In operations, attention's squares included; the schedule balances tokens."""
    assert uneven_work(world, steps=50) < 0.05


def test_a_run_that_is_none_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert using.main(["predict", str(tmp_path), "FILE", "--task", "sst"]) == 2
    assert capsys.readouterr().err.startswith(f"using: {tmp_path}: no run folder")


def test_contenders_get_the_same_numbers_and_never_one_that_another_of_the_round_had() -> None:
    rounds: list[dict[str, int]] = []

    def take(name: str, number: int) -> None:
        if not rounds or name in rounds[-1]:
            rounds.append({})
        rounds[-1][name] = number

    names = ("ours", "theirs", "nobody's")
    seconds = interleave({name: partial(take, name) for name in names}, 5, warm=1)
    assert len(rounds) == 6 and all(len(set(each.values())) == 3 for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    for name in names:
        assert sorted(each[name] for each in rounds[1:]) == list(range(5)) and min(seconds[name]) > 0


def test_what_many_examples_cost_at_start() -> None:
    told = data.start_up(2000)
    assert told["examples"] == 2000 and told["start_up_seconds"] > 0
    assert told["resident_bytes"] > 2**26, "bytes, of a process that has imported torch"
