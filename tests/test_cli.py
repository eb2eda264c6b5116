"""The command line as a user meets it: in processes of its own, from the outside."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import PATIENCE_S

from launch.submit import main as submit
from launch.submit import parser as submit_parser
from mtbert import __version__
from mtbert.cli import _parser, _stop_on_signals, main
from mtbert.config_files import load_config
from mtbert.lock import RunLock
from mtbert.manifest import find_checkpoint
from mtbert.stops import ECHO_S
from tune.search import parser as tune_parser

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = [
    "data.generate.train=40",
    "data.generate.dev=12",
    "encoder.shape.hidden_size=8",
    "encoder.shape.layers=1",
    "encoder.shape.heads=2",
    "encoder.shape.intermediate_size=8",
    "phases=[{steps: 2}]",
    "schedule.batch_size=4",
    "engine.threads=1",
]
HEAVY = (
    *("torch", "deepspeed", "numpy", "tokenizers", "sklearn", "ray", "submitit", "tensorboard", "matplotlib"),
    *("fastapi", "onnx"),
)


def mtbert(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mtbert", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE_S
    )


def imported(*arguments: str) -> set[str]:
    """The heavy packages that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "mtbert", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    modules = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "mtbert.config" in modules
    return {module for module in HEAVY if module in modules}


# ------------------------------------------------------------------------------------------- at once


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--set", "optimiser.lr=3"],
        ["train", "--config", "nowhere.yaml"],
        ["train", "--resume", "nowhere"],
        ["evaluate", "nowhere"],
        ["compare", "nowhere"],
        ["report", "nowhere"],
        ["predict", "nowhere", "--task", "sst"],
        ["serve", "--help"],
        ["data", "check"],
        ["checkpoint", "prune", "nowhere", "--keep", "1"],
        ["show-config"],
        ["show-config", "--schema"],
        ["show-config", "--reference"],
    ],
    ids=" ".join,
)
def test_help_configuration_and_typos_come_without_torch(arguments: list[str]) -> None:
    assert imported(*arguments) == set()


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    done = mtbert("--help")
    assert done.returncode == 0
    for command in (
        *("train", "evaluate", "compare", "report", "show-config"),
        *("predict", "embed", "export", "serve", "data", "checkpoint"),
    ):
        assert command in done.stdout
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and f"usage: python -m mtbert {command}" in capsys.readouterr().out


SURFACE = {
    "mtbert train": "--config --set --resume --quiet --json",
    "mtbert evaluate": "RUN --checkpoint --task --file --json",
    "mtbert compare": "RUN --checkpoint --resamples --html --json",
    "mtbert report": "RUN --checkpoint --output",
    "mtbert predict": "RUN --checkpoint --precision FILE --task --out --text --format --submission",
    "mtbert embed": "RUN --checkpoint --precision FILE --out --text --format",
    "mtbert export": "RUN --checkpoint DIR --onnx",
    "mtbert serve": "RUN --checkpoint --precision --host --port --max-body --max-batch --max-text",
    "mtbert checkpoint list": "RUN --json",
    "mtbert checkpoint verify": "RUN --json",
    "mtbert checkpoint prune": "RUN --keep",
    "mtbert data check": "FILE --text --label --config --set --json",
    "mtbert data fetch": "DIR --task",
    "mtbert show-config": "--config --set --schema --reference",
    "launch/submit.py": "verb runs --config --set --resume --array --nodes --ranks-per-node --gpus-per-node --local "
    "--partition --time --grace --account --qos --constraint --exclude --mem --cpus-per-rank --slurm --dry-run "
    "--follow",
    "tune": "--config --set --space --trials --examples --metric --resume --scheduler --evaluations --reduction "
    "--sampler --seed --name --storage --ranks-per-trial --cpus-per-rank --gpus-per-rank --concurrent --cluster "
    "--nodes --cpus-per-node --slurm --address --dashboard",
}
"""What scripts and people type: a line that goes from here, or changes, breaks theirs."""


def surface(parser: argparse.ArgumentParser, name: str) -> dict[str, str]:
    """Every command's positional arguments and options, in the order in which it has them."""
    told, below = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                below |= surface(inner, f"{name} {verb}")
        elif not isinstance(action, argparse._HelpAction):
            told += action.option_strings or [str(action.metavar or action.dest)]
    return ({name: " ".join(told)} if told else {}) | below


def test_an_option_is_renamed_or_removed_on_purpose() -> None:
    parsers = {"mtbert": _parser(), "launch/submit.py": submit_parser(), "tune": tune_parser()}
    found = {name: told for prog, parser in parsers.items() for name, told in surface(parser, prog).items()}
    assert found == SURFACE


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--set", "optimiser.lr=3"], r"optimiser: unknown key; did you mean 'optimizer'\?"),
        (["show-config", "--set", "seed=x"], r"seed: input should be a valid integer"),
        (["train", "--config", "nowhere.yaml"], r"nowhere\.yaml: cannot be read: No such file"),
        (["train", "--resume", "nowhere"], r"nowhere: no run folder \(it holds no config\.yaml\); give one that"),
        (["train", "--resume", "r", "--set", "seed=1"], r"--resume: a run continues with the configuration in its"),
        (["evaluate", "nowhere"], r"nowhere: no run folder"),
        (["evaluate", "nowhere", "--file", "f"], r"--task says whose examples --file holds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"mtbert: .*{told}.*\n", printed.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--reference"], []], ids=["more than is buffered", "less"])
def test_a_stdout_that_takes_nothing(options: list[str]) -> None:
    command = [sys.executable, "-m", "mtbert", "show-config", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (2, "mtbert: stdout: cannot be written: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=-1, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], env=environment, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "who closes it wants to see nothing"


def test_closed_streams(trained_run: Path) -> None:
    command = [sys.executable, "-m", "mtbert", "predict", str(trained_run), "-", "--task", "sst", "--format", "jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    row = '{"sentence": "good"}\n'
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], env=environment, input=row, stdout=-1, text=True)
    assert done.returncode == 0 and list(map(json.loads, done.stdout.splitlines())), "nothing of stderr among answers"
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], env=environment, stdout=-1, stderr=-1, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "mtbert: 0 rows, 0 a second\n")


def test_a_terminal_without_utf_8(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "caf\\u00e9"}\n{"text": "b", "label": "\\ud800"}\n')
    command = [sys.executable, "-m", "mtbert", "data", "check", str(tmp_path / "rows.jsonl")]
    for encoding, shown in (("ascii", r"caf\xe9"), ("utf-8", "café")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        for more in ([], ["--json"]):
            done = subprocess.run([*command, *more], env=environment, capture_output=True, encoding="utf-8")
            assert (done.returncode, done.stderr) == (0, "")
            if more:
                assert json.loads(done.stdout)["files"][0]["labels"] == {"café": 1, "\ud800": 1}
            else:
                assert f"  labels      {shown}: 1  \\ud800: 1\n" in done.stdout


def test_json_holds_no_nan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Which a model that broke scores."""
    from mtbert import trainer
    from mtbert.evaluate import Evaluation

    nothing = np.full((1, 1), math.nan)
    broken = Evaluation("sts", "pearson", math.nan, math.inf, nothing[0], nothing[0], nothing)
    monkeypatch.setattr(trainer, "evaluate_run", lambda folder, which, quiet: (3, [broken], math.nan))
    (tmp_path / "config.yaml").touch()
    assert main(["evaluate", str(tmp_path), "--json"]) == 0
    told = {"step": 3, "composite": None, "tasks": {"sts": {"metric": "pearson", "score": None, "loss": None}}}
    assert json.loads(capsys.readouterr().out) == told


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--stet", "a=1"], ["evaluate"]], ids=str)
def test_a_command_line_that_is_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("python -m mtbert") and ": error: " in told and told.count("\n") == 1


# ------------------------------------------------------------------------------------------- show-config


def test_show_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--set", "seed=3", "tasks.sts=null", "--set", "run.name='1e5'"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    shown = load_config(path)
    assert shown == load_config(QUICKSTART, ["seed=3", "tasks.sts=null", "run.name='1e5'"])
    assert shown.seed == 3 and list(shown.tasks) == ["sst", "para"]  # both --set count
    assert main(["show-config", "--config", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()


def test_show_config_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--schema"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("}\n")
    assert json.loads(out)["title"] == "Config"


# ------------------------------------------------------------------------------------------- a whole run


def test_train_then_evaluate(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"base": str(QUICKSTART), "data": {"cache": str(tmp_path / "cache")}}))
    trained = mtbert("train", "--config", "mine.yaml", "--set", *TINY, "run.name=first", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "first"
    assert "run folder: runs/first" in trained.stdout
    result = json.loads((run / "result.json").read_text())
    assert json.loads((run / "environment.json").read_text())["command"][1:4] == ["train", "--config", "mine.yaml"]

    evaluated = mtbert("evaluate", "runs/first", "--checkpoint", "latest", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    [line] = evaluated.stdout.splitlines()
    scores = json.loads(line)
    assert scores["step"] == result["step"] == 2
    assert list(scores["tasks"]) == ["sst", "para", "sts"]
    assert 0 <= scores["composite"] <= 1
    for name, task in scores["tasks"].items():
        assert task["metric"] == result["tasks"][name]["metric"]
        assert task["score"] == pytest.approx(result["tasks"][name]["score"], abs=1e-6)
        assert task["loss"] > 0

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = mtbert("train", "--config", "mine.yaml", "--set", *TINY, "run.name=first", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert re.fullmatch(r"mtbert: run\.name first: runs/first exists already; .*\n", again.stderr)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """On two ranks of this machine."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mtbert"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_torchrun_s_processes_are_the_ranks_of_one_run(tmp_path: Path) -> None:
    settings = ["--set", *TINY, f"data.cache={tmp_path}"]
    trained = torchrun("train", "--json", *settings, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    [run] = (tmp_path / "runs").iterdir()
    [line] = trained.stdout.splitlines()
    assert json.loads(line)["run"] == f"runs/{run.name}"
    assert json.loads((run / "launch.json").read_text())["ranks"] == 2
    assert find_checkpoint(run, "latest").world == 2
    assert not (run / "job" / "lock").exists()

    (tmp_path / "runs" / "taken").mkdir()
    refused = torchrun("train", "--json", *settings, "run.name=taken", cwd=tmp_path)
    told = "mtbert: run.name taken: runs/taken exists already; "
    assert refused.returncode == 1 and told in refused.stderr, refused.stderr


def test_half_of_what_torchrun_sets_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    assert main(["train", "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mtbert: WORLD_SIZE is 2, but ") and told.count("\n") == 1


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, f"engine.threads={torch.get_num_threads()}", f"data.cache={tmp_path}", "run.log_every=1"]
    steps = ["phases=[{steps: 60}]", "run.evaluate_every=60", "run.name=first run"]

    def interrupt() -> None:
        lines = tmp_path / "runs" / "first run" / "metrics.jsonl"
        until = time.monotonic() + PATIENCE_S
        while not lines.exists() or len(lines.read_text().splitlines()) < 5:
            time.sleep(0.002)
            if time.monotonic() > until:
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["train", "--quiet", "--set", *tiny, *steps]) == 130
    thread.join()
    printed = capsys.readouterr()
    assert printed.out == ""
    told = re.search(r"^stopped after step (\d+); continue with: python -m mtbert (.*)$", printed.err, re.MULTILINE)
    assert told and 5 <= int(told[1]) < 60
    assert (tmp_path / "runs" / "first run" / "checkpoints" / f"step-{int(told[1]):08d}").is_dir()

    assert main([*shlex.split(told[2]), "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert (record["run"], record["status"], record["step"]) == ("runs/first run", "finished", 60)
    result = json.loads((tmp_path / "runs" / "first run" / "result.json").read_text())
    assert record["scores"] == {name: task["score"] for name, task in result["tasks"].items()}
    steps_logged = [json.loads(line)["step"] for line in Path("runs/first run/metrics.jsonl").read_text().splitlines()]
    assert steps_logged == [*range(60), 59]  # and the evaluation's


def test_an_error_after_a_checkpoint_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, f"engine.threads={torch.get_num_threads()}", f"data.cache={tmp_path}", "run.evaluate_every=60"]
    nan = ["phases=[{steps: 60}]", "optimizer={lr: 1e30, head_lr: 1e30, warmup: 0}", "run.name=first run"]
    error = r"mtbert: .*not finite, 10 steps in a row; .*\n"
    assert main(["train", "--quiet", "--set", *tiny, *nan]) == 2
    assert re.fullmatch(error, capsys.readouterr().err)  # there is nothing to go on from

    nan[-1] = "run.name=second run"
    assert main(["train", "--quiet", "--set", *tiny, *nan, "checkpoint.every_steps=1"]) == 2
    told = re.fullmatch(rf"continue with: python -m mtbert (train --resume .*)\n{error}", capsys.readouterr().err)
    assert told
    assert main([*shlex.split(told[1]), "--quiet"]) == 2
    assert capsys.readouterr().err == told[0]


WITH_A_BUG = """
import sys
from mtbert import cli, trainer
stepping = trainer._Run._step
trainer._Run._step = lambda run, step, *rest, **more: stepping(run, step, *rest, **more) if step < 3 else 1 / 0
cli.main(sys.argv[1:])
"""
"""A trainer that fails at its fourth step."""


def test_a_bug_after_a_checkpoint_has_its_traceback_and_says_how_to_go_on(tmp_path: Path) -> None:
    settings = [*TINY, f"data.cache={tmp_path}", "phases=[{steps: 4}]", "checkpoint.every_steps=1", "run.name=one"]
    command = [sys.executable, "-c", WITH_A_BUG, "train", "--quiet", "--set", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("continue with: python -m mtbert train --resume runs/one\n")
    assert "Traceback" in done.stderr and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with _stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        assert "again: at once" in capfd.readouterr().err
        time.sleep(ECHO_S)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_folder_takes_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, f"engine.threads={torch.get_num_threads()}", f"data.cache={tmp_path}"]
    assert main(["train", "--quiet", "--set", *tiny, "phases=[{steps: 2}]", "run.name=one"]) == 0
    assert not Path("runs/one/job/lock").exists()
    before = {path: path.read_bytes() for path in Path("runs/one").rglob("*") if path.is_file()}
    with RunLock(Path("runs/one"), "other-0").held():
        assert main(["train", "--quiet", "--resume", "runs/one"]) == 2
        assert submit(["--local", "--resume", "runs/one"]) == 2
    assert capsys.readouterr().err.count(f"is using this run folder (process {os.getpid()} on ") == 2
    assert {path: path.read_bytes() for path in Path("runs/one").rglob("*") if path.is_file()} == before


def test_a_run_that_cannot_start_leaves_its_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["run.name=first", "encoder.shape={layers: 1}", "encoder.tokenizer=t.json"]
    overrides.append(f"engine.threads={torch.get_num_threads()}")  # of this process, which runs on after the test
    assert main(["train", "--config", str(ROOT / "configs" / "cs224n.yaml"), "--set", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"mtbert: \S*/t\.json: no such file; .*\n", printed.err)
    assert list((tmp_path / "runs").iterdir()) == []
    assert not torch.distributed.is_initialized()


def test_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", __version__)
