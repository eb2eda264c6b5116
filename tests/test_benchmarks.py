"""What benchmarks compute rather than time; that contenders compute what is said of them; what is told of results."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Ranks
from torch import nn

from benchmarks import __main__ as bench
from benchmarks import data, growth, options, ours, ranks, step, using
from benchmarks.ranks import numbers_sent, uneven_work
from benchmarks.rivals import project
from benchmarks.scaling import WORLDS, Machine
from benchmarks.scaling import step as seconds_of
from benchmarks.scaling import table as forecast
from benchmarks.workload import LENGTHS, Batches, draw, interleave, typical
from mtbert.encoder import EncoderShape
from mtbert.randomness import addressed_rng
from mtbert.runs import Rank
from mtbert.surgery import pcgrad_vectors

MACHINE = Machine(tasks=3, parameters=10**8, bytes_per_number=2, compute=0.3, finish=0.01, link=1e10, latency=0.0)


def sharded(machine: Machine, world: int, overlap: bool = True) -> float:
    return seconds_of(machine.parts(world), overlap)


def test_the_model_of_a_step() -> None:
    assert sharded(MACHINE, 1) == pytest.approx(MACHINE.compute + MACHINE.finish)
    endless = dataclasses.replace(MACHINE, link=float("inf"))
    for world in WORLDS:
        assert sharded(endless, world) == pytest.approx(MACHINE.compute + MACHINE.finish / world)
        whole = seconds_of(MACHINE.parts(world, sharded=False))
        assert sharded(MACHINE, world) <= sharded(MACHINE, world, overlap=False)
        assert sharded(MACHINE, world) <= whole + 1e-9
    # two ranks: a gradient needs 10 ms on the link and a backward 100, so only the last one shows, and the gathering
    assert sharded(MACHINE, 2) == pytest.approx(0.3 + 0.01 + 0.01 / 2 + 0.01)
    assert sharded(MACHINE, 2, overlap=False) == pytest.approx(0.3 + 3 * 0.01 + 0.01 / 2 + 0.01)
    # two of the three exchanges run beside a backward, which is longer for feeding them
    fed = dataclasses.replace(MACHINE.parts(2), feeding=0.002)
    assert seconds_of(fed) == pytest.approx(sharded(MACHINE, 2) + 2 * 0.002)
    # a link so slow that it never rests: the first backward, three gradients, the gathering
    slow = dataclasses.replace(MACHINE, link=1e8)
    assert sharded(slow, 2) == pytest.approx(0.1 + 3 * 1.0 + 0.01 / 2 + 1.0)
    # 1,023 messages for each of three exchanges, two of which are hidden, and the gathering
    far = dataclasses.replace(endless, latency=1e-5)
    assert sharded(far, 1024) == pytest.approx(0.3 + 0.01 / 1024 + 2 * 1023e-5)


def test_the_forecast_says_where_communication_overtakes() -> None:
    told = forecast(dataclasses.replace(MACHINE, link=3.4e9)).splitlines()
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
    assert capsys.readouterr().err.startswith(f"python -m benchmarks.using: {tmp_path}: no run folder")


# ---------------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize(("contenders", "rounds"), [(3, 5), (4, 12), (7, 8), (9, 12)])
def test_contenders_get_every_number_and_none_comes_back_soon(contenders: int, rounds: int) -> None:
    taken: list[tuple[int, int]] = []

    def take(name: int, number: int) -> None:
        taken.append((name, number))

    seconds = interleave({str(n): partial(take, n) for n in range(contenders)}, rounds, repeats=2, warm=1)
    turns = [taken[first : first + contenders] for first in range(0, len(taken), contenders)]
    assert len(turns) == 1 + 2 * rounds and all(len(values) == rounds for values in seconds.values())
    assert len({tuple(name for name, _ in turn) for turn in turns}) > 1, "the order changes"
    for name in range(contenders):
        assert sorted(number for turn in turns[1:] for who, number in turn if who == name) == sorted(
            [*range(rounds)] * 2
        )
    for number in range(rounds):
        uses = [at for at, turn in enumerate(turns) if number in (given for _, given in turn)]
        assert min(np.diff(uses)) >= rounds // contenders
    assert typical([3.0, 1.0]) == 1.0 and typical([1.0, 9.0, 2.0]) == 2.0, "no hiccup counts"


TINY = EncoderShape(30522, 16, 2, 2, 32, 512)


def test_a_step_of_everyone() -> None:
    """As it is on a GPU, but for the memory and the compiled one, which are told there only."""
    told = step.compare(TINY, rounds=9, batch=4)
    assert set(told["seconds"]) == {
        *("ours", "ours, plain sum", "bare loop", "bare sum"),
        *("papers", "autojac", "autocast sdpa", "autocast eager"),
    }
    expected = sum(draw(number, 4, 9, alike=True).tokens for number in range(9)) / 9
    assert told["tokens"] == dict.fromkeys(told["seconds"], expected)
    factors = told["times_faster"]
    assert factors["autocast"] == min(factors["autocast sdpa"], factors["autocast eager"])
    assert {len(values) for values in told["seconds_by_batch"].values()} == {9}
    assert set(told["seconds_by_batch_close"]) == {"ours", "ours, plain sum", "bare loop", "bare sum"}
    assert f"{expected:.0f} tokens a step" in step.table(told)


def _masters(rank: Rank, surgery: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of the engine and of the bare loop after two steps: by name."""
    batches = Batches(2, 4, alike=True)
    engine = ours.build_engine(TINY, rank, together=not surgery)
    loop = ours.BareLoop(TINY, batches, surgery=surgery)
    for number in range(2):
        losses, word_ids = ours.losses_of(engine.model, batches(number), number, rank)
        engine.step(number, losses if surgery else {0: [*chain(*losses.values())]}, word_ids=word_ids)
        loop(number)
    through_engine: dict[str, torch.Tensor] = {}
    for span, values in engine.state():
        through_engine[span.name] = values["master"].clone()
    bare: dict[str, torch.Tensor] = {}
    named = dict(loop.model.named_parameters())
    for group, master in zip(loop.groups, loop.masters, strict=True):
        pieces = master.split([named[name].numel() for name in group.names])
        bare |= dict(zip(group.names, pieces, strict=True))
    return through_engine, bare


@pytest.mark.ranks
@pytest.mark.parametrize("surgery", [True, False])
def test_the_bare_loop_computes_what_the_engine_does(ranks: Ranks, surgery: bool) -> None:
    [(through_engine, bare)] = ranks(1, _masters, surgery)
    assert through_engine.keys() == bare.keys()
    start = dict(ours.build_model(TINY).named_parameters())
    for name, values in bare.items():
        moved = (values - start[name].detach().flatten()).abs().max()
        assert moved > 0 and (values - through_engine[name]).abs().max() < 0.01 * moved, name


def test_the_papers_projection_is_pcgrad() -> None:
    """On gradients that conflict, heads included: those of one task are summed, what is shared is averaged."""
    shared, heads = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0))), nn.ParameterList()
    heads.extend(nn.Parameter(torch.ones(2)) for _ in range(3))
    rng = addressed_rng(0, "test")
    targets = torch.from_numpy(rng.normal(size=(3, 5))).float()
    targets[2] = -targets[0] - targets[1]
    parameters = [shared, *heads]
    losses = [(shared @ target) * head.sum() for target, head in zip(targets, heads, strict=True)]
    project(parameters, torch.optim.SGD(parameters, 1.0), losses, step=4)
    rows = torch.zeros(3, 11)
    for k, target in enumerate(targets):
        rows[k, :5] = 2 * target
        rows[k, 5 + 2 * k :][:2] = shared.detach() @ target
    orders_rng = addressed_rng(0, "order", 4)
    orders = [orders_rng.permutation(3).tolist() for _ in range(3)]
    mean, total = (pcgrad_vectors(rows, orders, reduction) for reduction in ("mean", "sum"))
    assert not torch.allclose(mean[:5], rows.mean(0)[:5], atol=1e-3), "nothing conflicted"
    assert shared.grad is not None
    torch.testing.assert_close(shared.grad, mean[:5])
    torch.testing.assert_close(torch.cat([head.grad for head in heads if head.grad is not None]), total[5:])


# --------------------------------------------------------------------------------------------------- ranks


def test_what_ranks_send_is_counted_whatever_it_is() -> None:
    events = [("aten::mm", [[9, 9]]), ("gloo:send", [[600]]), ("gloo:recv", [[600]]), ("gloo:all_gather", [[100]])]
    assert numbers_sent([*events, ("gloo:all_reduce", [[8]])], 4) == 600 + 300 + 12
    with pytest.raises(KeyError, match="gloo:broadcast"):
        numbers_sent([*events, ("gloo:broadcast", [[8]])], 4)


@pytest.mark.ranks
def test_two_ranks_send_each_gradient_once_and_the_weights() -> None:
    told = ranks.measure(2, TINY)
    assert told["sent_per_parameter"] == pytest.approx(told["sent_expected"], rel=0.01)
    assert 0 < told["communication_that_shows"] < 1
    assert "W = 2" in ranks.table(told)


# -------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def ballast() -> np.ndarray:
    """What this process holds, and a process started by it does not."""
    return np.ones(10**8)


def test_what_many_examples_cost_at_start(ballast: np.ndarray) -> None:
    told = data.start_up(2000)
    assert told["examples"] == 2000
    assert 2**26 < told["resident_bytes"] < ballast.nbytes, "bytes, of a process that has imported torch"


def test_the_memory_of_predictions_is_theirs(ballast: np.ndarray, trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("id,sentence\n1,a river\n")
    assert 2**26 < using._memory(str(trained_run), "sst", tmp_path / "few.csv") < ballast.nbytes


# --------------------------------------------------------------------------------------------- what is told


def test_the_page_has_what_was_measured() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    _, start, rest = page.partition(bench.START)
    told, end, _ = rest.partition(bench.END)
    assert start and end and told == bench.block(bench.read_record(bench.RESULTS))


def test_a_row_is_missed_met_or_not_measured() -> None:
    stamp = {"command": "growth", "when": "2030-01-01", "machine": {"cpu": "C", "cores": 2, "python": "3"}}
    record = {
        "minilm": {**stamp, "times_faster": {"papers": 11.9, "autocast": 3.6}, "surgery_share": 0.07},
        "ranks2": {**stamp, "sent_per_parameter": 2.0004},
        "data": {**stamp, "resident_bytes": 0.9e9},
    }
    lines = dict(line[2:].split(" | ", 1) for line in bench.block(record).splitlines() if line.startswith("| "))
    assert lines["against the papers' stack, PCGrad"] == "≥ 12.0× | 11.9× (missed) |"
    faster = next(rest for what, rest in lines.items() if "bf16 autocast" in what)
    assert faster == "≥ 3.5× | 3.6× |"
    assert lines["surgery on top of one gradient for all tasks, K = 3"] == "≤ 5.0% | 7.0% (missed) |"
    assert lines["numbers on the wire per rank and step, W = 2, counted"] == "≤ 2.00·P | 2.00·P |"
    assert lines["10 M examples: peak memory of the process, GB"] == "≤ 1.00 | 0.90 |"
    assert lines["surgery at K = 16 over K = 4"] == "≤ 4.50× | not measured |"
    assert "- `growth`: 2030-01-01, C, 2 cores" in bench.block(record)
    assert len(lines) == len(bench.ROWS) + 1, "every row has a name of its own"


def test_a_part_is_stamped_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "results.json"
    before = {"data": {"command": "c", "when": "2001-01-01", "machine": {"cpu": "C", "cores": 1}, "examples": 5}}
    target.write_text(json.dumps(before))
    monkeypatch.setitem(bench.PARTS, "growth", "growth --rounds 4 --parameters 1000")
    assert bench.main(["--parts", "growth", "--json", str(target)]) == 0
    after = bench.read_record(target)
    assert after["data"] == before["data"] and after["growth"]["when"] > "2025"
    assert after["growth"]["parameters"] == 1000 and after["growth"]["command"] == bench.PARTS["growth"]
    monkeypatch.setitem(bench.PARTS, "growth", "growth --rounds 1")
    assert bench.main(["--parts", "growth", "--json", str(target)]) == 2
    assert bench.read_record(target) == after, "what was measured before is kept"


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ""])
def test_a_count_is_one_or_more(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(["--rounds", text])
    assert "is not a number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_an_amount_is_positive(text: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        using.main(["serve", "RUN", "FILE", "--task", "sst", "--seconds", text])
    assert options.amount("0.5") == 0.5


def test_what_cannot_be_measured_is_told_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line() -> str:
        return capsys.readouterr().err.strip()

    assert growth.main(["--json", str(tmp_path / "none" / "x.json")]) == 2
    assert line() == f"python -m benchmarks.growth: --json {tmp_path}/none/x.json: its folder does not exist"
    assert growth.main(["--rounds", "3", "--parameters", "10"]) == 2
    assert line().endswith("--rounds 3: takes 4 or more, one for each of 2, 4, 8, 16")
    assert data.main(["--examples", "31"]) == 2
    assert line() == "python -m benchmarks.data: --examples 31: takes a batch of 32 or more"
    broken = tmp_path / "broken.json"
    for text in ("{", "[]", '{"other": 1}'):
        broken.write_text(text)
        assert bench.main(["--parts", "growth", "--json", str(broken)]) == 2
        told = line()
        assert told.startswith(f"python -m benchmarks: --json {broken}: no") and "\n" not in told
    if not torch.cuda.is_available():
        assert bench.main(["--parts", "gpu", "--json", str(tmp_path / "x.json")]) == 2
        assert line() == "python -m benchmarks: --parts gpu: there is no GPU here"


def test_using_tells_what_is_missing(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.csv"

    def told(what: str, *more: str) -> str:
        assert using.main([what, str(trained_run), str(file), "--task", "sst", *more]) == 2
        return capsys.readouterr().err.strip().removeprefix("python -m benchmarks.using: ")

    assert told("predict").startswith(f"{file}: no such file")
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["id", "text"], ["1", "a river"]])
    assert told("serve").startswith(f"{file}: no column 'sentence'; columns present")
    file.write_text("id,sentence\n")
    assert told("predict") == f"{file}: no row"
    file.write_text("id,sentence\n1,a river\n")
    monkeypatch.setattr(sys, "executable", "false")
    assert told("serve", "--clients", "1", "--seconds", "1") == "the service did not start: exit code 1"
