"""A real Slurm for the session (`slurm/cluster.sh`, as root on Debian), and jobs on it.

`make test-slurm` collects these tests. Elsewhere they are left out, and the summary says so.

A test mostly waits for its jobs, so all tests run at the same time, in threads, on the one cluster. Each takes the
`bench` and its parameters, nothing else. What ends nodes or links uses a pair of nodes of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import yaml

from mtbert.config_files import load_config

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WANTED = os.environ.get("MTBERT_SLURM") == "1"

collect_ignore_glob = [] if WANTED else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not WANTED:
        terminalreporter.write_line("tests/slurm left out: they start a Slurm cluster; run them with make test-slurm")


AT_ONCE = 4
"""Tests at the same time."""

PATIENCE = 400
"""Seconds until what should come has hung, on a machine that is slow and has other tests to do."""

T = TypeVar("T")
NONE = SimpleNamespace(params={})

PAIRS = 5
"""Pairs of nodes; the first is for everybody (partition main), each of the others for one test (partition rough)."""

STEPS = 150

TASKS = ("sst", "para", "sts")

CONFIG = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "data": {"generate": {"train": 400, "dev": 60}},
    "encoder": {"shape": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}, "dropout": 0.1},
    "tasks": {task: {"head": {"dropout": 0.1}} for task in TASKS},
    "schedule": {"batch_size": 8},
    "phases": [{"steps": STEPS}],
    "engine": {"threads": 1, "precision": "fp32"},
    "checkpoint": {"every_steps": 20},
    "run": {"log_every": 1, "evaluate_every": 60},
}
"""A few seconds of training, long enough to be disturbed in the middle; with dropout, whose random numbers a resumed
run must draw as before."""


def write_config(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    config = load_config(path)
    assert config.encoder.dropout and all(task.head.dropout for task in config.tasks.values())


@dataclass(frozen=True)
class Cluster:
    lab: Path
    nodes: int = 2

    def __call__(self, verb: str, *arguments: str | Path) -> None:
        # CPUs for all jobs of all tests at once: none waits in the queue for another test's
        settings = {"NODES": str(self.nodes), "CPUS": "32", "NETWORK": "own", "ACCOUNTING": "yes"}
        subprocess.run(
            [ROOT / "slurm" / "cluster.sh", verb, *arguments],
            check=True,
            timeout=300,
            env={**os.environ, **settings, "LAB": str(self.lab)},
            stdout=subprocess.DEVNULL,
        )


class Submission:
    """`launch/submit.py` with these arguments, running."""

    def __init__(self, place: Path, *arguments: str | Path, path: str | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "submit.py", *arguments],
            cwd=place,
            env={**os.environ, "PATH": path or os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Waits; exit code, stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"not over after {timeout} s\n{out}\n{err}") from None
        return self.process.returncode, out, err


@dataclass(frozen=True)
class Trained:
    """A run folder."""

    folder: Path

    @property
    def job(self) -> str:
        return str(json.loads((self.folder / "job" / "job.json").read_text())["id"])

    @property
    def world(self) -> int:
        note = json.loads((self.folder / "job" / "job.json").read_text())
        return int(note["nodes"] * note["ranks_per_node"])

    @property
    def restarts(self) -> int:
        return int(re.search(r"Restarts=(\d+)", scontrol("show", "job", "-o", self.job))[1])  # type: ignore[index]

    def log(self) -> str:
        path = self.folder / "logs" / "rank0.log"
        return path.read_text() if path.exists() else ""

    def step(self) -> int:
        """The last step in the metrics, -1 before the first."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else -1

    def lines(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def trained_steps(self) -> list[int]:
        return [int(line["step"]) for line in self.lines() if "loss/sst" in line]

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def weights(self) -> dict[str, bytes]:
        """The final checkpoint, byte by byte: weights and optimizer state of every rank."""
        folder = self.checkpoints()[-1]
        assert folder.name == f"step-{STEPS:08d}"
        files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
        assert files, f"no shards in {folder}"
        return files

    def ranks(self) -> dict[int, int]:
        """Rank → process id, seen from outside the nodes."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if not any(word.endswith((b"launch/start.py", b"launch/rank.py")) for word in words[:3]):
                    continue
                variables = dict(line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0"))
                task = b"%s_%s" % tuple(variables.get(b"SLURM_ARRAY_" + name, b"") for name in (b"JOB_ID", b"TASK_ID"))
                if self.job.encode() in (task, variables.get(b"SLURM_JOB_ID")):
                    found[int(variables[b"SLURM_PROCID"])] = int(folder.name)
        return found

    @contextmanager
    def held(self, condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> Iterator[dict[int, int]]:
        """Stops the clock of the ranks (SIGSTOP) at a moment when `condition` holds, so that what is done to them
        happens then, however busy this machine is. Gives the ranks' process ids."""
        deadline = time.monotonic() + timeout
        # a run that is continued has steps before it has ranks
        wait_until(lambda: self.step() >= 0 and len(self.ranks()) == self.world, timeout, "the first step of all ranks")
        pids = self.ranks()
        while True:
            send(signal.SIGSTOP, pids)
            if condition():
                break
            send(signal.SIGCONT, pids)
            assert time.monotonic() < deadline, f"{what} never came"
            assert self.step() < STEPS - 1, f"{what} never came in this run"
            time.sleep(0.003)
        try:
            yield pids
        finally:
            send(signal.SIGCONT, pids)

    def held_at(self, step: int) -> AbstractContextManager[dict[int, int]]:
        return self.held(lambda: self.step() >= step, f"step {step}")


def send(number: signal.Signals, pids: dict[int, int]) -> None:
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"scontrol {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


class Bench:
    """The cluster, a folder in which commands are typed (it holds tiny.yaml), and the runs made there.

    Attributes:
        small: a folder of 12 MB on a file system of its own, seen by all nodes.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.small = place / "small"
        self.small.mkdir()
        # before there are nodes: they would not see it afterwards
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", self.small], check=True)
        write_config(place / "tiny.yaml")
        self.cluster = Cluster(place / "lab", 2 * PAIRS)
        os.environ["SLURM_CONF"] = str(self.cluster.lab / "slurm.conf")
        try:
            self.cluster("up")
        except BaseException:
            subprocess.run(["umount", self.small], check=False)
            raise
        scontrol("update", "PartitionName=main", "Nodes=node[1-2]")
        rough = "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
        scontrol("create", "PartitionName=rough", f"Nodes=node[3-{2 * PAIRS}]", *rough.split())
        self._pairs = iter(range(1, PAIRS))
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._lock = threading.Lock()
        self._mine = threading.local()

    def down(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.cluster("down")
        subprocess.run(["umount", "--lazy", self.small], check=True)
        del os.environ["SLURM_CONF"]

    def type(self, *arguments: str | Path, path: str | None = None) -> Submission:
        """`launch/submit.py` with these arguments; `path`: where it and its job find programs."""
        submission = Submission(self.place, *arguments, path=path)
        self._mine.submissions.append(submission)
        return submission

    def start(self, name: str, *arguments: str | Path, path: str | None = None) -> tuple[Submission, Trained]:
        """Submits tiny.yaml as a run of this name and follows it."""
        run = Trained(self.place / "runs" / name)
        self._mine.runs.append(run)
        base = ["--config", "tiny.yaml", "--nodes", "2", "--follow", "--set", f"run.name={name}"]
        return self.type(*base, *arguments, path=path), run

    def pair(self) -> tuple[list[str], tuple[str, str]]:
        """Two nodes that no other test uses: how to ask for them, and their names."""
        with self._lock:
            first = 2 * next(self._pairs) + 1
        words = ["--partition", "rough", "--slurm", "exclusive", f"nodelist=node[{first}-{first + 1}]"]
        return words, (f"node{first}", f"node{first + 1}")

    @property
    def undisturbed(self) -> Trained:
        """Two nodes with one rank each, left alone."""
        return self._undisturbed.result()

    def _leave_alone(self) -> Trained:
        submission, run = self.start("undisturbed")
        code, _, err = submission.end()
        assert code == 0, err
        assert run.restarts == 0
        return run

    def begin(self, items: Sequence[pytest.Function]) -> None:
        """Starts these tests; `result` waits for one of them."""
        self._undisturbed: Future[Trained] = self._pool.submit(self._alone, self._leave_alone)
        self._results = {
            item.nodeid: self._pool.submit(self._alone, item.obj, self, **getattr(item, "callspec", NONE).params)
            for item in items
        }

    def result(self, item: pytest.Function) -> None:
        self._results[item.nodeid].result()

    def _alone(self, work: Callable[..., T], *arguments: object, **parameters: object) -> T:
        """In a thread of the pool; what fails leaves no job to the others."""
        self._mine.submissions, self._mine.runs = [], []
        try:
            return work(*arguments, **parameters)
        finally:
            for submission in self._mine.submissions:
                submission.process.kill()
                submission.process.communicate()
            for run in self._mine.runs:
                with suppress(FileNotFoundError):
                    subprocess.run(["scancel", "--full", "--signal=KILL", run.job], check=False, capture_output=True)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("slurm"))
    try:
        bench.begin([item for item in request.session.items if isinstance(item, pytest.Function)])
        yield bench
    finally:
        bench.down()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """The test has begun with all the others; what is left to do is to wait for it."""
    pyfuncitem.funcargs["bench"].result(pyfuncitem)
    return True


def finish(submission: Submission, run: Trained, reference: Trained) -> str:
    """Waits for a disturbed job; it must have started again and ended like the reference. Returns what was told."""
    code, out, err = submission.end()
    assert code == 0, f"{out}\n{err}"
    assert run.restarts >= 1, "the disturbance did not reach the job"
    assert_same_course(run, reference)
    return out + err


def assert_same_course(run: Trained, reference: Trained) -> None:
    """Same weights and optimizer state bit for bit; every step in the metrics, none twice."""
    assert run.weights() == reference.weights()
    assert run.trained_steps() == list(range(STEPS))
