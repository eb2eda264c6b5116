"""Whole runs on the generated corpus: killed and resumed, stopped and continued on other numbers of ranks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import signal
import time
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import yaml
from harness import PATIENCE_S, forking_context
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtbert import checkpoint, token_cache, tracking, trainer
from mtbert.building import build
from mtbert.checkpoint import Checkpointer, _Reader, load_weights
from mtbert.config import CheckpointConfig, Config, OptimizerConfig, PhaseConfig
from mtbert.config_files import config_of, load_config, to_yaml
from mtbert.encoder import WordEmbedding
from mtbert.engine import Engine, StepResult
from mtbert.environment import cpu
from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.manifest import find_checkpoint, folder_of, open_checkpoint, sealed
from mtbert.metrics import METRICS
from mtbert.record import RunRecord, Said
from mtbert.runs import Rank, create_run
from mtbert.trainer import evaluate_run, train
from mtbert.zero import Span

STEPS = 12
TINY = {
    "encoder": {"shape": {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32, "max_positions": 64}},
    "phases": [{"name": "all", "steps": 8}, {"name": "probe", "steps": 4, "trainable": "heads"}],
    "schedule": {"batch_size": 8, "bucket": 4},
    "optimizer": {"lr": 1e-2, "ema": 0.7},
    "run": {"log_every": 1, "evaluate_every": 5},
    "checkpoint": {"every_steps": 2},
    "engine": {"precision": "fp32", "threads": 1},
}


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """The quick start, made tiny; dropout on."""
    quick = yaml.safe_load((Path(__file__).parent.parent / "configs" / "quickstart.yaml").read_text())
    from mtbert.synthetic import train_tokenizer

    tokenizer = train_tokenizer([path.read_text() for path in sorted(corpus.glob("*-train.csv"))], tmp_path / "t.json")
    values = {
        **quick,
        **TINY,
        "data": {"dir": str(corpus), "cache": str(tmp_path / "cache")},
        "encoder": {**TINY["encoder"], "tokenizer": str(tokenizer), "pooling": "mean", "dropout": 0.1},
        "run": {**TINY["run"], "dir": str(tmp_path / "runs")},
    }
    return Config.model_validate(values)


def started(
    run_dir: Path, world: int, stop_after: int | None = None, dies_before: int | None = None
) -> list[BaseProcess]:
    """The run on `world` real ranks; `stop_after`: the last rank, and only that one, asks to stop once so far;
    `dies_before`: the first rank kills itself before that step, whatever its threads are at."""
    context = forking_context()
    rendezvous = f"file://{run_dir}/rendezvous-{time.monotonic_ns()}"
    ranks = [Rank(rank, world, rank, world, rendezvous if world > 1 else "") for rank in range(world)]
    processes = [context.Process(target=_rank, args=(run_dir, rank, stop_after, dies_before)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def _rank(run_dir: Path, rank: Rank, stop_after: int | None, dies_before: int | None) -> None:
    steps = itertools.count()

    def stop() -> bool:
        if next(steps) == dies_before and rank.first:
            os.kill(os.getpid(), signal.SIGKILL)
        lines = run_dir / "metrics.jsonl"
        wanted = stop_after is not None and rank.rank == rank.world - 1 and lines.exists()
        return wanted and any(json.loads(line)["step"] >= stop_after for line in lines.read_text().splitlines())

    outcome = train(run_dir, rank, stop, quiet=True)
    if rank.first:
        (run_dir / "outcome.json").write_text(json.dumps([outcome.status, outcome.step]))


def finished(run_dir: Path, world: int, stop_after: int | None = None) -> tuple[str, int]:
    for process in started(run_dir, world, stop_after):
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    status, step = json.loads((run_dir / "outcome.json").read_text())
    return status, step


def new_run(config: Config, name: str) -> Path:
    return create_run(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), None, [])


def digests(run_dir: Path) -> dict[str, str]:
    return {name: file.sha256 for name, file in find_checkpoint(run_dir, "latest").manifest.files.items()}


def weights(config: Config, run_dir: Path) -> dict[str, torch.Tensor]:
    shapes = {name: parameter.shape for name, parameter in build(config).model.named_parameters()}
    return load_weights(find_checkpoint(run_dir, "latest"), shapes)


def logged(run_dir: Path, timing: tuple[str, ...] = ("time", "speed/", "memory/")) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in line.items() if not tag.startswith(timing)} for line in lines]


def equal(some: dict[str, Said], others: dict[str, Said]) -> bool:
    return some.keys() == others.keys() and all(
        np.array_equal(getattr(some[task], field.name), getattr(others[task], field.name))
        for task in some
        for field in fields(Said)
    )


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "zero", "log_every", "kill_at"), [(1, 1, 3, 5), (2, 1, 1, 4), (2, 3, 1, 7)])
def test_killed_and_resumed_ends_with_the_same_bits(
    config: Config, world: int, zero: int, log_every: int, kill_at: int
) -> None:
    """And with the same log, also where a line sums up steps from before and after a save (every second step), and
    where the kill comes right after a save was begun, before step 4."""
    engine, run = {"zero": zero}, {"log_every": log_every}
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update=engine), "run": config.run.model_copy(update=run)}
    )
    undisturbed = new_run(config, "undisturbed")
    assert finished(undisturbed, world) == ("finished", STEPS)
    killed = new_run(config, "killed")
    processes = started(killed, world, dies_before=kill_at)
    processes[0].join(PATIENCE_S)
    assert processes[0].exitcode == -signal.SIGKILL
    for process in processes[1:]:  # without the first one they get no further
        process.kill()
        process.join()
    assert finished(killed, world) == ("finished", STEPS)
    assert digests(killed) == digests(undisturbed)
    assert logged(killed) == logged(undisturbed)
    for which in ("best", "latest"):
        assert equal(RunRecord(killed).said(which), RunRecord(undisturbed).said(which))


@pytest.mark.ranks
def test_stopped_and_continued_on_other_numbers_of_ranks(config: Config) -> None:
    """Dropout draws differ from rank to rank, so it is off. Saved on 2 ranks, goes on with 1, then with 4."""
    config = Config.model_validate(
        {
            **config.model_dump(),
            "encoder": {**config.encoder.model_dump(), "dropout": 0},
            "optimizer": {"lr": 1e-3, "head_lr": 1e-3, "eps": 1e-4, "ema": 0.7},  # eps: see test_engine.py
        }
    )
    straight, moved = new_run(config, "straight"), new_run(config, "moved")
    finished(straight, 2)
    status, first = finished(moved, 2, stop_after=2)
    assert status == "stopped" and 3 <= first < STEPS
    status, second = finished(moved, 1, stop_after=first + 1)
    assert status == "stopped" and first < second < STEPS
    assert finished(moved, 4) == ("finished", STEPS)
    expected, found = weights(config, straight), weights(config, moved)
    worst = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    assert worst < 1e-5
    assert [line["step"] for line in logged(moved)] == [line["step"] for line in logged(straight)]


def test_a_probing_phase_leaves_the_encoder_alone(config: Config) -> None:
    optimizer = OptimizerConfig(lr=1e-2)  # no average, which would go on towards the frozen weights
    config = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=2, keep=9), "optimizer": optimizer})
    run = new_run(config, "probe")
    train(run, Rank(), quiet=True)
    shapes = {name: parameter.shape for name, parameter in build(config).model.named_parameters()}
    before = load_weights(open_checkpoint(run / "checkpoints" / "step-00000008"), shapes)
    after = load_weights(find_checkpoint(run, "latest"), shapes)
    moved = {name for name in shapes if not torch.equal(before[name], after[name])}
    assert moved == {name for name in shapes if name.startswith("heads.")}


def test_scores_are_those_of_the_averaged_weights(config: Config) -> None:
    """While training and from the checkpoint, where the weights after the last step lie as well."""
    run = new_run(config, "average")
    train(run, Rank(), quiet=True)
    recorded = json.loads((run / "result.json").read_text())["tasks"]
    _, results, _ = evaluate_run(run, "latest")
    assert [result.score for result in results] == [recorded[result.task]["score"] for result in results]
    checkpoint = find_checkpoint(run, "latest")
    assert checkpoint.manifest.averaged_steps == STEPS
    with _Reader(checkpoint) as reader:
        last = reader.span(Span("encoder.words.weight", 0, 160, 0), "master")
    assert not torch.equal(weights(config, run)["encoder.words.weight"].flatten()[:160], last)


@pytest.mark.parametrize("quiet", [False, True])
def test_tokenising_that_takes_long_is_told(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(token_cache, "TOLD_AFTER_S", -1.0)
    monkeypatch.setattr(token_cache, "TOLD_EVERY_S", -1.0)
    monkeypatch.setattr(tracking, "PLAIN_LINE_EVERY_S", -1.0)
    train(new_run(config.model_copy(update={"phases": [PhaseConfig(steps=1)]}), "told"), Rank(), quiet=quiet)
    told = re.findall(r"^tokenising .*/(\S+)\.csv: 0 rows$", capsys.readouterr().out, re.MULTILINE)
    files = [f"{task}-{split}" for task in ("ids-sst", "quora", "sts") for split in ("train", "dev")]
    assert told == ([] if quiet else files)


def test_classes_with_names_train_as_numbers_do(config: Config, corpus: Path, tmp_path: Path) -> None:
    """The same weights to the bit, the same scores."""
    folder = tmp_path / "named"
    folder.mkdir()
    for file in corpus.glob("*.csv"):
        header, *rows = file.read_text().splitlines()
        if "sst" in file.name:
            rows = [f"{row.rpartition(chr(9))[0]}\tclass {row.rpartition(chr(9))[2]}" for row in rows]
        (folder / file.name).write_text("\n".join([header, *rows]) + "\n")
    task = config.tasks["sst"].model_copy(update={"classes": [f"class {number}" for number in range(5)]})
    data = config.data.model_copy(update={"dir": str(folder)})
    phases = [PhaseConfig(steps=3)]
    short = config.model_copy(update={"phases": phases})
    named = short.model_copy(update={"tasks": {**config.tasks, "sst": task}, "data": data})
    runs = [new_run(short, "numbers"), new_run(named, "names")]
    for run in runs:
        train(run, Rank(), quiet=True)
    assert digests(runs[0]) == digests(runs[1])
    assert (runs[0] / "result.json").read_text() == (runs[1] / "result.json").read_text()
    assert equal(RunRecord(runs[0]).said("latest"), RunRecord(runs[1]).said("latest"))


def test_run_leaves_a_complete_record(config: Config) -> None:
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"peak_tflops": 0.5})})
    run = new_run(config, "record")
    outcome = train(run, Rank(), quiet=True)
    assert outcome.status == "finished" and set(outcome.metrics) == {"sst", "para", "sts"}
    result = json.loads((run / "result.json").read_text())
    assert set(result["tasks"]["sst"]) == {"metric", "score", "trivial", "bag_of_words"}
    tags = set().union(*logged(run, timing=()))
    for tag in (
        *["loss/sst", "metric/sts/pearson", "metric/composite", "learning_rate/encoder", "learning_rate/sst"],
        *["gradient/cosine/sst~para", "gradient/weight/sst", "gradient/norm/para", "gradient/conflict_rate"],
        *["speed/model_tflops", "speed/mfu", "memory/peak_gib", "passes/sst"],
    ):
        assert tag in tags, tag
    line = logged(run, timing=())[0]
    assert line["speed/mfu"] == pytest.approx(line["speed/model_tflops"] / 0.5)
    assert 0.05 < line["memory/peak_gib"] < 50
    assert load_config(run / "config.yaml") == config.model_copy(
        update={"run": config.run.model_copy(update={"name": "record"})}
    )
    assert len(list((run / "checkpoints").glob("step-*"))) <= config.checkpoint.keep + 1

    record, tasks = RunRecord(run), {task.name: task for task in build(config).tasks}
    step, scores = record.scores("latest")
    assert step == STEPS and scores["sst"] == result["tasks"]["sst"]["score"] == outcome.metrics["sst"]
    for name, said in record.said("latest").items():
        dev, metric = tasks[name].dev, METRICS[tasks[name].config.metric_kind]
        assert said.ids_N.tolist() == list(dev.ids) and said.lines_N.tolist() == dev.lines_N.tolist()
        assert said.labels_N.tolist() == dev.labels_N.tolist()
        assert metric(said.predictions_N, said.labels_N) == scores[name]

    shown = EventAccumulator(str(run)).Reload()
    assert set(shown.Tags()["images"]) == {
        *["sst/confusion", "sst/reliability", "para/confusion", "para/reliability", "sts/scatter", "gradient/cosines"],
    }
    assert {"config/text_summary", "command/text_summary", "environment/text_summary"} <= set(shown.Tags()["tensors"])


def test_steps_of_one_task_give_surgery_nothing_to_do(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """And count as no agreement: a rate of 0 would look like one."""
    for draws in (1, 2):
        sampled = config_of(
            config.model_dump(mode="json"), ["schedule.kind=sampled", f"schedule.tasks_per_step={draws}"]
        )
        run = new_run(sampled, f"draws{draws}")
        train(run, Rank())
        assert ("surgery pcgrad has nothing to do in steps of one task" in capsys.readouterr().out) == (draws == 1)
        for line in logged(run):
            alone = sum(tag.startswith("gradient/weight/") for tag in line) == 1
            assert not (alone and "gradient/conflict_rate" in line)
        assert any("gradient/conflict_rate" in line for line in logged(run)) == (draws == 2)


def test_what_will_do_nothing_is_told_at_the_start(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    mnrl = "tasks.sts.mnrl={threshold: label, start: 4.5, rise: 1}"
    same = [f"tasks.sst.dev={config.tasks['sst'].train}", "encoder.max_length=9999"]
    sequential = ["schedule={kind: sequential}", "phases=[{steps: 500}]", "weighting.method=dwa", mnrl, *same]
    run = new_run(config_of(config.model_dump(mode="json"), sequential), "sequential")
    train(run, Rank(), lambda: True)
    told = capsys.readouterr().out
    assert "note: weighting dwa has nothing to do in steps of one task; schedule.kind round_robin has all" in told
    assert f"note: tasks.sst is scored on what it is trained on, {config.tasks['sst'].train}" in told
    assert re.search(r"encoder\.max_length 9999: texts are cut at the \d+ tokens that this encoder takes", told)
    assert re.search(r"note: sts: mnrl's threshold rises to \d+\.5, above 5: no pair is a positive then", told)


def test_an_adaptive_run_goes_by_its_scores_and_resumes_alike(config: Config) -> None:
    """Stopped between two evaluations, after the first of which other chances hold."""
    targets = {"sst": 0.01, "para": 0.02}  # so that sts is drawn nearly always
    settings = [f"schedule.targets={json.dumps(targets)}", "schedule.kind=adaptive", "run.evaluate_every=4"]
    adaptive = config_of(config.model_dump(mode="json"), settings)
    straight, resumed = new_run(adaptive, "straight"), new_run(adaptive, "resumed")
    train(straight, Rank(), quiet=True)
    polls = iter(range(STEPS))
    assert train(resumed, Rank(), lambda: next(polls) == 4, quiet=True).step == 5
    train(resumed, Rank(), quiet=True)
    assert digests(resumed) == digests(straight) and logged(resumed) == logged(straight)
    lines = logged(straight)
    for step in (3, 7, 11):
        said = {tag: value for line in lines if line["step"] == step for tag, value in line.items()}
        scores = [said["metric/sst/accuracy"] / 0.01, said["metric/para/accuracy"] / 0.02, said["metric/sts/pearson"]]
        weights = 1 / (np.clip(scores, 0, 1) ** adaptive.schedule.alpha + 0.1)
        found = [said[f"sampling/{name}"] for name in targets | {"sts": 1.0}]
        assert found == pytest.approx((weights / weights.sum()).tolist())
        assert found[2] > 0.5


def test_a_damaged_checkpoint_is_passed_over(config: Config) -> None:
    run = new_run(config, "damaged")
    train(run, Rank(), quiet=True)
    newest, older = sorted((run / "checkpoints").glob("step-*"), reverse=True)[:2]
    shard = next(newest.glob("rank-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        open_checkpoint(newest)
    expected = digests_of(older)
    outcome = train(run, Rank(), quiet=True)  # goes on from the older one
    assert outcome.status == "finished" and digests_of(older) == expected
    open_checkpoint(newest)


def test_where_no_checkpoint_can_be_read_nothing_is_begun_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives nothing back for a moment, for one."""
    run = new_run(config, "unreadable")
    polls = iter(range(STEPS))
    train(run, Rank(), lambda: next(polls) == 5, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    opened = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "manifest.json" and path.parent.name.startswith("step-"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        with pytest.raises(
            UserError, match=r"manifest\.json: cannot be read: Input/output error; no checkpoint there is"
        ):
            train(run, Rank(), quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(run, Rank(), quiet=True).status == "finished"


class Transfers(TorchFunctionMode):
    """Writes down t for a tensor that is moved without waiting, b for a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), words: Any = None) -> Any:
        words = words or {}
        self.seen += "t" * words.get("non_blocking", False) + "b" * (function is torch.Tensor.backward)
        return function(*arguments, **words)


def test_a_step_s_batches_are_on_the_device_before_its_first_loss(config: Config) -> None:
    """A copy would wait for the kernels that are queued before it: the host could not run ahead."""
    config = config.model_copy(update={"phases": [config.phases[0].model_copy(update={"steps": 1})]})
    with Transfers() as transfers:
        assert train(new_run(config, "moved"), Rank(), quiet=True).status == "finished"
    assert re.fullmatch(r"t+b{3}t*", transfers.seen), transfers.seen


def test_a_step_is_told_of_the_words_that_it_looks_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then do the rows of all others stay out of it."""
    told: list[set[int]] = []
    met: list[set[int]] = []
    step, forward = Engine.step, WordEmbedding.forward

    def watched_step(engine: Engine, *arguments: Any, word_ids: Tensor, **options: Any) -> StepResult:
        told.append(set(word_ids.tolist()))
        met.append(set())
        return step(engine, *arguments, word_ids=word_ids, **options)

    def watched_forward(table: WordEmbedding, ids_T: Tensor) -> Tensor:
        if table.narrowed is not None:
            met[-1].update(ids_T.tolist())
        return forward(table, ids_T)

    monkeypatch.setattr(Engine, "step", watched_step)
    monkeypatch.setattr(WordEmbedding, "forward", watched_forward)
    config = config.model_copy(update={"phases": [config.phases[0].model_copy(update={"steps": 3})]})
    assert train(new_run(config, "told"), Rank(), quiet=True).status == "finished"
    assert told == met and len(told) == 3 and all(told)


def test_nobody_draws_from_a_global_generator(config: Config) -> None:
    """Trained, evaluated, drawn, saved and resumed: the generators of torch, NumPy and Python are where they were."""
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"deterministic": True})})
    run = new_run(config, "draws")
    polls = iter(range(STEPS))
    assert train(run, Rank(), lambda: next(polls) == 5, quiet=True).status == "stopped"
    assert train(run, Rank(), quiet=True).status == "finished"
    assert torch.equal(before[0], torch.get_rng_state()), "torch"
    assert before[1] == repr(np.random.get_state()), "NumPy"  # noqa: NPY002
    assert before[2] == random.getstate(), "random"


def test_a_save_that_fails_is_told_and_tried_again(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where the folder of checkpoints belongs, until step 7: as good as a full disk. Nothing but the retry
    saves before the evaluation after step 10."""
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.0)
    config = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=6, keep=9)})
    run = new_run(config, "full")
    blocker = run / "checkpoints"
    blocker.write_text("")
    steps = iter(range(STEPS))

    def stop() -> bool:
        if next(steps) == 7:
            blocker.unlink()
        time.sleep(0.1)  # for the thread, on a busy machine
        return False

    assert train(run, Rank(), stop).status == "finished"
    out = capsys.readouterr().out
    assert "step 6 could not be saved: " in out and "training goes on, and saving is tried again" in out
    saved = [int(folder.name.removeprefix("step-")) for folder in sorted(blocker.glob("step-*"))]
    assert f"step {saved[0]} is saved" in out
    assert 7 <= saved[0] < 10 and saved[-1] == STEPS
    best = find_checkpoint(run, "best")
    assert best.step in saved, "the best so far is one that could be saved"


def test_the_log_has_a_line_now_and_then_whatever_was_asked(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "LONGEST_WINDOW", 5)
    run = new_run(config.model_copy(update={"run": config.run.model_copy(update={"log_every": 10**9})}), "seldom")
    train(run, Rank(), quiet=True)
    assert RunRecord(run).curves["loss/sst"].steps.tolist() == [4, 9, 11]


def test_predictions_of_the_best_stay_until_a_better_one_is_saved(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed meanwhile goes back to the old one; where it cannot be saved both stay, for good."""
    scores, evaluate, complete = iter((0.5, 0.7, 0.4, 0.3)), trainer.evaluate_all, Checkpointer._complete

    def evaluated(*arguments: Any) -> Any:
        return evaluate(*arguments)[0], next(scores)

    def not_the_better(self: Checkpointer, aside: Path, target: Path, *rest: Any) -> None:
        if target.name == "step-00000006":
            raise OSError("No space left on device")
        complete(self, aside, target, *rest)

    monkeypatch.setattr(trainer, "evaluate_all", evaluated)
    monkeypatch.setattr(Checkpointer, "_complete", not_the_better)
    config = config.model_copy(update={"run": config.run.model_copy(update={"evaluate_every": 3})})
    run = new_run(config, "better")
    train(run, Rank(), quiet=True)
    assert STEPS == 12 and sorted(path.name[5:-4] for path in (run / "predictions").iterdir()) == [
        f"{step:08d}" for step in (3, 6, 12)
    ]
    assert find_checkpoint(run, "best").step == 3 and RunRecord(run).scores("best")[0] == 6
    assert RunRecord(run).said("best").keys() == {"sst", "para", "sts"}


@pytest.mark.parametrize("name", ["encoder", "launch.json"])
def test_a_disk_that_is_full_at_the_start(
    name: str, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, content: Any) -> None:
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content)

    run = new_run(config, "full")
    for module in ("trainer", "trained", "pretrained"):
        monkeypatch.setattr(f"mtbert.{module}.write_atomically", refuse)
    if name == "encoder":
        with pytest.raises(UserError, match=f"^{run}: cannot be written to: No space left on device$"):
            train(run, Rank())
    else:
        assert train(run, Rank()).status == "finished"
        assert "times of the start were not kept: No space left on device" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(run, Rank()).status == "finished"


def test_a_run_whose_last_save_fails_says_so(config: Config) -> None:
    run = new_run(config, "no-room")
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match=f"step {STEPS} could not be saved: .*File exists"):
        train(run, Rank(), quiet=True)


def test_cosines_are_kept_as_sums(config: Config) -> None:
    """However many steps lie between evaluations; and a run whose checkpoint has every one of them goes on alike."""
    run = config.run.model_copy(update={"evaluate_every": STEPS})
    config = config.model_copy(update={"run": run, "checkpoint": CheckpointConfig(every_steps=2, keep=9)})
    straight, earlier = new_run(config, "straight"), new_run(config, "earlier")
    train(straight, Rank(), quiet=True)
    polls = iter(range(STEPS))
    assert train(earlier, Rank(), lambda: next(polls) == 3, quiet=True).step == 4
    manifest = folder_of(earlier, 4) / "manifest.json"
    values = json.loads(manifest.read_text())
    pairs = [pair[:2] for pair in values["course"].pop("cosine_sums")]
    lines = logged(earlier)
    cosines = [[one, other, [line[f"gradient/cosine/{one}~{other}"] for line in lines]] for one, other in pairs]
    manifest.write_text(sealed({**values, "course": {**values["course"], "cosines": cosines}}))
    train(earlier, Rank(), quiet=True)
    for step, count in ((6, 6), (8, 8), (10, 8)):  # from 8 on the encoder rests
        expected, found = (open_checkpoint(folder_of(each, step)).manifest.course for each in (straight, earlier))
        assert found.cosine_sums == expected.cosine_sums
        assert [each[-1] for each in found.cosine_sums] == [count] * 3


def test_training_goes_on_while_a_save_is_written(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes its time until two more steps are done; what is saved is the state of the step it was asked at."""
    config = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=3, keep=9)})
    config = config.model_copy(update={"run": config.run.model_copy(update={"evaluate_every": STEPS})})
    quick = new_run(config, "quick")
    train(quick, Rank(), quiet=True)
    slow = new_run(config, "slow")
    write, polls = checkpoint._save, list[None]()

    def slow_write(tensors: dict[str, torch.Tensor], path: Path) -> Any:
        wanted, deadline = len(polls) + 2, time.monotonic() + PATIENCE_S
        while len(polls) < wanted and path.parent.name != f".step-{STEPS:08d}.tmp":
            assert time.monotonic() < deadline, "training waits for the disk"
            time.sleep(0.001)
        return write(tensors, path)

    def stop() -> bool:
        polls.append(None)
        return False

    monkeypatch.setattr(checkpoint, "_save", slow_write)
    train(slow, Rank(), stop, quiet=True)
    for folder in (quick / "checkpoints").glob("step-*"):
        assert digests_of(folder) == digests_of(slow / "checkpoints" / folder.name)


def test_a_newer_checkpoint_is_not_passed_over(config: Config) -> None:
    run = new_run(config, "newer")
    train(run, Rank(), quiet=True)
    manifest = max((run / "checkpoints").glob("step-*")) / "manifest.json"
    manifest.write_text(sealed({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99 is from a newer mtbert"):
        train(run, Rank(), quiet=True)


def test_the_start_is_measured(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(config, "start")
    train(run, Rank())
    launch = json.loads((run / "launch.json").read_text())
    assert list(launch["seconds"]) == ["rendezvous", "data", "build", "first step"] and launch["step"] == 0
    assert (launch["ranks"], launch["device"]) == (1, cpu())
    assert launch["total"] == pytest.approx(sum(launch["seconds"].values()), abs=0.01)
    assert f"first step after {launch['total']:.1f} s: rendezvous " in capsys.readouterr().out


def digests_of(folder: Path) -> dict[str, str]:
    return {name: file.sha256 for name, file in open_checkpoint(folder).manifest.files.items()}


def test_losses_that_are_not_finite_end_the_run_with_a_clear_message(config: Config) -> None:
    config = config.model_copy(update={"optimizer": OptimizerConfig(lr=1e30, head_lr=1e30, warmup=0)})
    config = config.model_copy(update={"phases": [PhaseConfig(steps=30)]})
    run = new_run(config, "nan")
    with pytest.raises(UserError, match=r"not finite, 10 steps in a row; lower optimizer\.lr"):
        train(run, Rank(), quiet=True)
    skipped = [line for line in logged(run) if line.get("skipped_steps")]
    assert skipped and not any(tag.startswith("gradient/cosine/") for line in skipped for tag in line)


def test_groups_of_parameters_may_change_between_attempts(config: Config) -> None:
    """AdamW goes on counting where it was, the encoder's steps and the heads'; not so in a checkpoint of before groups
    were named, nor in one that counts no group's."""
    config = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=10, keep=9)})
    run = new_run(config, "groups")
    polls = iter(range(STEPS))
    assert train(run, Rank(), lambda: next(polls) == 9, quiet=True).step == 10
    optimizer = config.optimizer.model_copy(update={"layer_decay": 0.5, "weight_decay": 0.0})
    (run / "config.yaml").write_text(to_yaml(config.model_copy(update={"optimizer": optimizer})))
    manifest = folder_of(run, 10) / "manifest.json"
    whole = manifest.read_text()
    values = json.loads(whole)
    for change in ({"adam_parts": []}, {"adam_steps": []}, {"adam_steps": values["adam_steps"][:-1]}):
        manifest.write_text(sealed({**values, **change}))
        with pytest.raises(UserError, match=r"AdamW's step counts do not fit .* optimizer\.layer_decay"):
            train(run, Rank(), quiet=True)
    manifest.write_text(whole)
    train(run, Rank(), quiet=True)
    last = open_checkpoint(folder_of(run, STEPS)).manifest
    assert last.adam_parts != values["adam_parts"]
    taken = set(zip(last.adam_parts, last.adam_steps, strict=True))
    assert taken == {("encoder", 8), ("sst", STEPS), ("para", STEPS)}  # sts has no parameters of its own


def test_checkpoint_of_another_model_is_refused(config: Config) -> None:
    run = new_run(config, "other")
    train(run, Rank(), quiet=True)
    shape = config.encoder.shape.model_copy(update={"hidden_size": 8})
    wider = config.model_copy(update={"encoder": config.encoder.model_copy(update={"shape": shape})})
    (run / "config.yaml").write_text(to_yaml(wider))
    with pytest.raises(UserError, match="belongs to another configuration"):
        train(run, Rank(), quiet=True)
