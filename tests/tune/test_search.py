"""Whole searches through the command line: Ray, ranks, death and return; and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from harness import PATIENCE_S

from mtbert.config_files import load_config, to_yaml
from mtbert.errors import UserError, to_install
from mtbert.record import METRICS_FILE
from mtbert.yaml_files import inline_yaml
from tune.search import (
    Settings,
    _gpus_per_node,
    _only_search,
    again,
    check_place,
    main,
    new_settings,
    parser,
    read_settings,
    write_settings,
)
from tune.space import load_space

ROOT = Path(__file__).parent.parent.parent

TINY = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "data": {"generate": {"train": 200, "dev": 60}},
    "encoder": {"shape": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64}, "dropout": 0.1},
    "engine": {"precision": "fp32"},
    "run": {"log_every": 1},
}
BAD, GOOD, WORSE, ABSURD = 1e-6, 5e-3, 1e-7, 1e30
"""Learning rates: hardly learning; learning; not at all; overflowing."""
SPACE = {
    "parameters": {
        "optimizer.lr": {"choice": [BAD, GOOD, WORSE, ABSURD]},
        "weights": {"simplex": 3, "keys": ["tasks.*.weight"]},
        "schedule.length": {"logint": [10, 100]},
    },
    "starts": [{"optimizer.lr": rate} for rate in (BAD, GOOD, WORSE, ABSURD)],
}


class Place:
    """A folder in which searches are started as from a shell, with a folder for temporary files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = Path(tempfile.mkdtemp(prefix="s"))  # a short name: the paths of sockets have 107 characters at most
        tiny = {**TINY, "data": {"generate": {"train": 200, "dev": 60}, "cache": str(folder / "cache")}}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
        (folder / "parameters.yaml").write_text(yaml.safe_dump({"parameters": SPACE["parameters"]}))
        (folder / "space.yaml").write_text(yaml.safe_dump({"base": "parameters.yaml", "starts": SPACE["starts"]}))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tune", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group of its own, as a shell's job
        )

    def new(self, name: str, trials: int) -> subprocess.Popen[str]:
        return self.start(
            *["--config", "tiny.yaml", "--space", "space.yaml", "--name", name, "--trials", str(trials)],
            *["--examples", "1500", "--evaluations", "4", "--concurrent", "1", "--ranks-per-trial", "2"],
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def assert_all_gone(self, processes: set[int]) -> None:
        """Of a search that has ended: these processes, and every temporary file."""
        deadline = time.monotonic() + PATIENCE_S
        while left := [*map(command, filter(alive, processes)), *map(str, self.tmp.iterdir())]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("search"))
    yield place
    shutil.rmtree(place.tmp)


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A search that nobody disturbed: only read it."""
    out = ended(place.new("whole", 4))
    assert "every trial trains on 1,500 examples" in out
    place.assert_all_gone(set())
    return place.run("whole")


def ended(process: subprocess.Popen[str], code: int = 0, timeout: float = 600) -> str:
    """Waits for the end of a search; what it printed."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"not over after {timeout} s\n{out}\n{err}", pytrace=False)
    assert (process.returncode, err) == (code, ""), f"{out}\n{err}"
    return out


def wait_for(happened: Callable[[], bool], what: str, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(pid: int) -> str:
    """Nothing when it has just ended."""
    try:
        return " ".join(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split())
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """Process ids."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def ranks_in(pids: set[int]) -> set[int]:
    return {pid for pid in pids if "launch/child.py" in command(pid)}


def steps(run: Path) -> int:
    return len((run / METRICS_FILE).read_text().splitlines()) if (run / METRICS_FILE).exists() else 0


def curve(run: Path) -> list[dict[str, Any]]:
    """What a run's metrics say of its training, without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith(("speed/", "memory/"))} for line in lines
    ]


def outcome(search: Path) -> list[tuple[str, Any, dict[int, float], list[dict[str, Any]] | None]]:
    """Of every trial: state, values, scores; its curve, unless it was stopped, a moment after the last score."""
    study = optuna.load_study(study_name=search.name, storage=f"sqlite:///{search}/study.db")
    return [
        (
            trial.state.name,
            trial.user_attrs["values"],
            trial.intermediate_values,
            curve(search / "trials" / f"{trial.number:04d}") if trial.state.name == "COMPLETE" else None,
        )
        for trial in study.trials
    ]


@pytest.mark.ranks
def test_what_a_search_leaves(place: Place, whole: Path) -> None:
    """The second trial learns, the third is stopped early, the fourth breaks and is recorded with the reason."""
    study = optuna.load_study(study_name="whole", storage=f"sqlite:///{whole}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert [len(trial.intermediate_values) for trial in study.trials] == [4, 4, 1, 0]
    assert re.match(r"score of .*composite.* is not a number after \d+ examples", study.trials[3].user_attrs["error"])
    assert [path.parent.name for path in whole.glob("trials/*/checkpoints")] == ["0001"]
    tokenised = [path.stat().st_mtime for path in place.folder.glob("cache/tokens/*/manifest.json")]
    assert len(tokenised) == 6 and max(tokenised) < (whole / "trials" / "0000" / "config.yaml").stat().st_mtime
    report = (whole / "report.md").read_text()
    for words in ("trains on 1,500 examples", "equal numbers of examples", "Best: trial 1", "sigma.png", "## σ"):
        assert words in report
    for picture in ("progress", "curves", "parallel", "sigma", "values"):
        assert (whole / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ranks
def test_best_yaml_trains_to_the_same_curve(place: Place, whole: Path) -> None:
    words = ["--local", "--ranks-per-node", "2", "--config", str(whole / "best.yaml"), "--set", "run.name=again"]
    again = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "submit.py"), *words], cwd=place.folder, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert curve(place.run("again")) == outcome(whole)[1][3]


@pytest.mark.ranks
def test_a_search_that_was_stopped_and_killed_ends_as_an_undisturbed_one(place: Place, whole: Path) -> None:
    """Ctrl-C in the first trial, kill -9 of the driver in the second, kill -9 of a rank and TERM in the third."""
    search = place.run("cut")
    trials = [search / "trials" / f"{number:04d}" for number in range(3)]

    driver = place.new("cut", 3)
    wait_for(lambda: steps(trials[0]) > 0, "trial 0")
    processes = descendants(driver.pid)
    assert len(ranks_in(processes)) == 2
    os.killpg(driver.pid, signal.SIGINT)
    assert f"stopped; continue with: python -m tune --resume {search}" in ended(driver, 130)
    place.assert_all_gone(processes)

    driver = place.start("--resume", "runs/cut")
    wait_for(lambda: any(trials[1].glob("checkpoints/step-*")), "trial 1")
    first = curve(trials[0])
    processes = descendants(driver.pid)
    driver.kill()
    driver.communicate()
    place.assert_all_gone(processes)

    driver = place.start("--resume", "runs/cut")
    rank = trials[2] / "job" / "trial-0.rank1"  # its host and process id, before it trains
    wait_for(lambda: rank.exists() and " " in rank.read_text(), "trial 2")
    processes = descendants(driver.pid)
    os.kill(int(rank.read_text().split()[1]), signal.SIGKILL)
    starts = trials[2] / "job" / "starts.jsonl"
    wait_for(lambda: len(starts.read_text().splitlines()) == 2, "another start of trial 2")
    processes |= descendants(driver.pid)
    driver.terminate()
    ended(driver, 130)
    place.assert_all_gone(processes)

    ended(place.start("--resume", "runs/cut"))
    assert curve(trials[0]) == first, "a finished trial was trained again"
    assert outcome(search) == outcome(whole)[:3]
    best = [(each / "best.yaml").read_text().split("\n", 2)[2] for each in (search, whole)]
    assert best[0] == best[1]
    place.assert_all_gone(set())


@pytest.mark.ranks
def test_a_population_outlives_a_broken_member_and_a_stop(place: Place) -> None:
    """Who hardly learns goes on from the weights and values of who does, and is judged by what it does from there."""
    search = place.run("population")
    driver = place.start(
        *["--config", "tiny.yaml", "--space", "space.yaml", "--name", "population", "--trials", "4"],
        *["--examples", "1500", "--evaluations", "4", "--scheduler", "pbt"],
    )
    wait_for(lambda: any(search.glob("trials/*/lineage.jsonl")), "one member takes over another")
    driver.send_signal(signal.SIGINT)
    ended(driver, 130)
    ended(place.start("--resume", "runs/population"))
    study = optuna.load_study(study_name="population", storage=f"sqlite:///{search}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    assert "is not a number" in study.trials[3].user_attrs["error"]
    heirs = [trial for trial in study.trials if "lineage" in trial.user_attrs]
    assert heirs
    for trial in heirs:
        folder = search / "trials" / f"{trial.number:04d}"
        last = trial.user_attrs["lineage"][-1]
        assert trial.user_attrs["values"] == last["values"]
        assert load_config(folder / "config.yaml").optimizer.lr == last["values"]["optimizer.lr"]
    for trial in study.trials[:3]:
        folder = search / "trials" / f"{trial.number:04d}"
        steps_done = [line["step"] for line in curve(folder) if "loss/sst" in line]
        assert steps_done == list(range(len(steps_done)))
        assert trial.value == [line for line in curve(folder) if "metric/composite" in line][-1]["metric/composite"]
    place.assert_all_gone(set())


@pytest.mark.ranks
def test_a_search_whose_reader_has_enough_writes_what_it_has(place: Place) -> None:
    driver = place.new("unread", 3)
    assert driver.stdout is not None and driver.stderr is not None
    with driver.stdout as out:
        out.readline()
    with driver.stderr as errors:
        assert (errors.read(), driver.wait(PATIENCE_S)) == ("", 141)
    assert (place.run("unread") / "report.md").exists()
    place.assert_all_gone(set())


@pytest.mark.ranks
def test_several_metrics_leave_a_front(place: Place) -> None:
    """Of tasks that are named as the fields of a trial's reports are."""
    tasks = load_config(TINY["base"]).model_dump(mode="json", exclude_none=True)["tasks"]
    given = {"error": tasks["sst"], "sst": None, "done": tasks["sts"], "sts": None}
    ended(
        place.start(
            *["--config", "tiny.yaml", "--space", "space.yaml", "--name", "front", "--trials", "2"],
            *["--examples", "600", "--evaluations", "1", "--metric", "error", "done"],
            *["--set", *(f"tasks.{name}={inline_yaml(task)}" for name, task in given.items())],
        )
    )
    study = optuna.load_study(study_name="front", storage=f"sqlite:///{place.run('front')}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    fronts = {f"{trial.number:04d}.yaml" for trial in study.best_trials}
    assert fronts and {path.name for path in place.run("front").glob("pareto/*")} == fronts


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--ranks-per-trial", "999"],
            r"--ranks-per-trial 999: a trial needs 999 × 1 CPU; this machine has \d+ CPU, room",
        ),
        (["--ranks-per-trial", "2", "--gpus-per-rank", "0.5"], "only one rank per trial can do with part of a GPU"),
        (["--gpus-per-rank", "2"], "--gpus-per-rank 2: a rank computes on one GPU"),
        (["--gpus-per-rank", "1"], "--gpus-per-rank 1: a trial needs 1 × 1 CPU and 1 × 1 GPU"),
        (["--cpus-per-rank", "999"], "--cpus-per-rank 999: a trial needs 1 × 999 CPU; this machine has"),
        (["--metric", "accuracy"], "--metric accuracy: no trial reports it; valid: composite, sst, para, sts"),
        (
            [
                *["--space", str(ROOT / "configs/search/c7.yaml"), "--metric", "pairs", "--set"],
                "tasks.pairs={kind: triplets, train: t.csv, columns: {text: [a, b, c]}, head: {kind: cosine}}",
            ],
            "--metric pairs: no trial reports it",
        ),
        (["--metric", "sst", "sts", "--scheduler", "asha"], "--scheduler asha: needs one metric to judge by, not 2"),
        (["--scheduler", "pbt", "--trials", "3"], "a population of at least 4, not --trials 3"),
        (["--space", str(ROOT / "configs/search/c7.yaml"), "--trials", "7"], "the stages of the space have 6 trials"),
        (["--nodes", "2"], "--nodes: of which cluster"),
        (["--resume", "nowhere"], "--resume nowhere: no search folder"),
        (["--config", "nothing.yaml"], "nothing.yaml: cannot be read: No such file"),
        (
            ["--name", "../elsewhere"],
            r"^error: --name ../elsewhere: run.name: expected a name that stays inside of run.dir",
        ),
        (["--set", "optimizer.lrr=3"], "did you mean 'lr'"),
        (["--seed", "-1"], r"--seed: '-1' is not a number from 0 to 9223372036854775807"),
        (["--seed", str(2**63)], "is not a number from 0"),
        (["--trials", str(2**31)], "--trials: '2147483648' is not a number from 1 to 2147483647"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(words)
    except SystemExit as end:  # the parser's
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and "error: " in err and err.count("\n") == 1
    assert re.search(complaint, err)
    assert not list(tmp_path.iterdir())


DROPPING = {
    "tasks.para": {
        "choice": [None, load_config(TINY["base"]).model_dump(mode="json", exclude_none=True)["tasks"]["para"]]
    }
}


@pytest.mark.parametrize(
    ("parameters", "words", "complaint"),
    [
        (
            {"surgery": {"choice": [{"method": "sum"}, {"method": "pcgrad", "options": {"reduktion": "mean"}}]}},
            [],
            r"reduktion.*\(tried with \{surgery: \{method: pcgrad",
        ),
        (DROPPING, [], "--metric composite: needs the same tasks in all trials, and para is not .*; judge by .* sst,"),
        (DROPPING, ["--metric", "sst", "sts"], "--metric sst sts: needs the same tasks in all trials, and para is not"),
        (DROPPING, ["--metric", "para"], "--metric para: needs .* para is not .*; judge by --metric sst, "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_space_that_cannot_be_searched_is_one_line_and_leaves_nothing(
    parameters: dict[str, Any],
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"parameters": parameters}))
    assert main(["--space", "space.yaml", "--set", f"data.cache={tmp_path}/cache", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(complaint, err)
    assert not (tmp_path / "runs").exists()


def words_of_a_tiny_search(folder: Path, *words: str) -> list[str]:
    """With a space that does not vary much; `folder` is where it leaves its data."""
    (folder / "lr.yaml").write_text("parameters: {optimizer.lr: {uniform: [0.001, 0.01]}}")
    small = [f"data.cache={folder}/cache", "data.generate={train: 100, dev: 30}", f"run.dir={folder}/runs"]
    return ["--space", str(folder / "lr.yaml"), "--name", "mine", "--evaluations", "4", *words, "--set", *small]


def refusing_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("words", "option"), [(["--set", "a=b"], "--set"), (["--metric", "sst"], "--metric"), (["--seed", "0"], "--seed")]
)
def test_what_a_resume_does_not_take_is_named_as_typed(
    words: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert main(["--resume", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err == f"error: --resume: a search goes on as it began; leave out {option}\n"


def settings_of(*words: str) -> Settings:
    config = load_config(TINY["base"], [word for word in words if word.startswith("run.")])
    space = load_space(ROOT / "configs" / "search" / "default.yaml", config)
    return new_settings(parser().parse_args([word for word in words if not word.startswith("run.")]), config, space)


def test_a_search_is_called_as_its_configuration() -> None:
    assert settings_of("run.name=mine").name == "mine"
    assert settings_of("run.name=mine", "--name", "yours").name == "yours"


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("sqlite:///studies/own.db", "sqlite:///{}/studies/own.db"),
        ("sqlite:////tmp/own.db", "sqlite:////tmp/own.db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_a_storage_is_found_again_from_anywhere(
    typed: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_of("--storage", typed).storage == kept.format(tmp_path)


def test_a_search_on_a_cluster_is_continued_there() -> None:
    words = ["--resume", "x", "--address", "host:1", "--nodes", "2"]
    told = "python -m tune --resume '/a b' --cluster slurm --nodes 2"
    assert again(parser().parse_args(words), Path("/a b")) == told
    words += ["--cpus-per-node", "8", "--slurm=--gpus-per-node=2", "--slurm", "comment=two words"]
    assert again(parser().parse_args(words), Path("/a b")) == (
        f"{told} --cpus-per-node 8 --slurm gpus-per-node=2 'comment=two words'"
    )
    assert again(parser().parse_args([]), Path("/a/b")) == "python -m tune --resume /a/b"


def test_a_search_that_sbatch_refuses_leaves_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing_sbatch(tmp_path, monkeypatch)
    storage = f"sqlite:///{tmp_path}/studies.db"
    for _ in range(2):
        assert main(words_of_a_tiny_search(tmp_path, "--cluster", "slurm", "--storage", storage)) == 2
        assert capsys.readouterr().err == "error: sbatch refused the search: no such partition\n"
        assert not (tmp_path / "runs" / "mine").exists()
    assert optuna.get_all_study_names(storage) == []


@pytest.mark.parametrize("where", ["snapshot_code", "open_study"])
def test_ctrl_c_before_a_search_has_begun_takes_it_back(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tune.search.{where}", pressed)
    assert main(words_of_a_tiny_search(tmp_path)) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "runs" / "mine").exists()


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ([], 0),
        (["gpus-per-node=4"], 4),
        (["--gpus-per-node=a100:4"], 4),
        (["partition=big", "gres=gpu"], 1),
        (["gres=gpu:2"], 2),
        (["gres=gpu:a100:2,shard:8"], 2),
        (["gres=gpu:a100"], 1),
    ],
)
def test_gpus_of_a_node_are_read_as_sbatch_reads_them(options: list[str], gpus: int) -> None:
    assert _gpus_per_node(options) == gpus


def test_gpus_of_a_kind_without_a_number() -> None:
    with pytest.raises(UserError, match="how many"):
        _gpus_per_node(["gpus-per-node=a100"])


def test_a_search_without_its_extra_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune.search.find_spec", lambda name: None)
    assert main([]) == 2
    assert capsys.readouterr().err == f"error: a search needs ray: {to_install('tune')} (`make search` does it)\n"
    assert not list(tmp_path.iterdir())


SETTINGS = {
    "source": "q",
    "trials": 6,
    "examples": 900,
    "evaluations": 2,
    "metrics": ["composite"],
    "scheduler": "asha",
    "reduction": 3,
    "sampler": "tpe",
    "seed": 0,
    "ranks": 1,
    "cpus": 1,
    "gpus": 0.0,
    "concurrent": None,
    "storage": "",
    "name": "n",
}


@pytest.mark.parametrize(
    ("visible", "words", "told"),
    [
        ("0,1", [], "2 GPU(s) stay idle; --gpus-per-rank 1 would use them\n"),
        ("0,1", ["--gpus-per-rank", "0"], ""),
        ("0,1", ["--gpus-per-rank", "0.5"], ""),
        ("", [], ""),
    ],
)
def test_gpus_that_stay_idle_are_told(
    visible: str, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = parser().parse_args(words)
    check_place(args, Settings(**{**SETTINGS, "gpus": args.gpus_per_rank or 0.0}))
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"source": ["q"]}, "source: Input should be a valid string; not what a search wrote"),
        ({"trials": 0}, "trials: Input should be greater than or equal to 1"),
        ({"metrics": []}, "metrics: List should have at least 1 item"),
        ({"scheduler": "x"}, "scheduler: Input should be 'asha', 'pbt' or 'none'"),
    ],
)
def test_settings_that_no_search_wrote(
    tmp_path: Path, changed: dict[str, Any], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({**SETTINGS, **changed}))
    assert main(["--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"search.yaml: {complaint}" in err and err.count("\n") == 1


@pytest.mark.parametrize(("storage", "mode"), [("postgresql://me:geheim@host/db", 0o600), ("sqlite:////x.db", 0o644)])
def test_settings_with_a_password_are_the_users_alone(tmp_path: Path, storage: str, mode: int) -> None:
    before = os.umask(0o022)
    try:
        write_settings(tmp_path, Settings(**{**SETTINGS, "storage": storage}))
    finally:
        os.umask(before)
    assert (tmp_path / "search.yaml").stat().st_mode & 0o777 == mode
    assert read_settings(tmp_path).storage == storage


@pytest.mark.parametrize(
    ("gone", "overrides"),
    [
        ("data.dir", ["data.generate=null", "encoder.tokenizer=vocab.txt"]),
        ("encoder.pretrained", ["encoder.shape=null"]),
    ],
)
def test_a_resume_whose_data_or_weights_are_gone_leaves_the_search_as_it_was(
    gone: str,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    base = load_config(TINY["base"], [*overrides, f"data.cache={tmp_path}/cache", f"{gone}={tmp_path}/gone"])
    (tmp_path / "base.yaml").write_text(to_yaml(base))
    (tmp_path / "space.yaml").write_text("parameters: {optimizer.lr: {uniform: [0.001, 0.01]}}")
    written = yaml.safe_dump(SETTINGS)
    (tmp_path / "search.yaml").write_text(written)
    assert main(["--resume", str(tmp_path), "--trials", "10"]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/gone" in err and err.count("\n") == 1
    assert (tmp_path / "search.yaml").read_text() == written


def test_stages_cannot_be_asked_for_more_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(to_yaml(load_config(ROOT / "configs" / "quickstart.yaml")))
    shutil.copyfile(ROOT / "configs" / "search" / "c7.yaml", tmp_path / "space.yaml")
    written = yaml.safe_dump(SETTINGS, default_flow_style=True, width=1000)
    (tmp_path / "search.yaml").write_text(written)
    assert main(["--resume", str(tmp_path), "--trials", "10"]) == 2
    assert capsys.readouterr().err == "error: --trials 10: the stages of the space have 6 trials\n"
    assert (tmp_path / "search.yaml").read_text() == written


def test_a_search_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written to: Is a directory$"), _only_search(tmp_path):
        pytest.fail("it is not locked")
