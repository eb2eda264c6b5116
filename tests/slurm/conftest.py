"""A real two-node Slurm for the session (`slurm/cluster.sh`, as root on Debian), and jobs on it.

`make test-slurm` collects these tests. Elsewhere they are left out, and the summary says so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
WANTED = os.environ.get("MTBERT_SLURM") == "1"

collect_ignore_glob = [] if WANTED else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not WANTED:
        terminalreporter.write_line("tests/slurm left out: they start a Slurm cluster; run them with make test-slurm")


STEPS = 150

CONFIG = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "data": {"generate": {"train": 400, "dev": 60}},
    "encoder": {"shape": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}},
    "schedule": {"batch_size": 8},
    "phases": [{"steps": STEPS}],
    "engine": {"threads": 1, "precision": "fp32"},
    "checkpoint": {"every_steps": 20},
    "run": {"log_every": 1, "evaluate_every": 60},
}
"""A few seconds of training, long enough to be disturbed in the middle; dropout stays on."""


@dataclass
class Cluster:
    lab: Path

    def __call__(self, verb: str, *arguments: str | Path) -> None:
        subprocess.run(
            [ROOT / "slurm" / "cluster.sh", verb, *arguments],
            check=True,
            timeout=300,
            env={**os.environ, "LAB": str(self.lab), "NETWORK": "own"},
            stdout=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    os.environ["SLURM_CONF"] = str(cluster.lab / "slurm.conf")
    cluster("up")
    yield cluster
    cluster("down")
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed; holds tiny.yaml."""
    place = tmp_path_factory.mktemp("place")
    (place / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return place


class Submission:
    """`launch/submit.py` with these arguments, running."""

    running: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, place: Path, *arguments: str | Path) -> None:
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "submit.py", *arguments],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(self.process)

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        """Waits; exit code, stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"not over after {timeout} s\n{out}\n{err}", pytrace=False)
        return self.process.returncode, out, err


@dataclass
class Trained:
    """A run folder."""

    folder: Path

    @property
    def job(self) -> str:
        return str(json.loads((self.folder / "job" / "job.json").read_text())["id"])

    @property
    def restarts(self) -> int:
        return int(re.search(r"Restarts=(\d+)", scontrol("show", "job", "-o", self.job))[1])  # type: ignore[index]

    def step(self) -> int:
        """The last step in the metrics, -1 before the first."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else -1

    def lines(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def weights(self) -> dict[str, bytes]:
        """The final checkpoint, byte by byte: weights and optimizer state of every rank."""
        folder = self.folder / "checkpoints" / f"step-{STEPS:08d}"
        files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
        assert files, f"no final checkpoint in {folder}"
        return files

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        wait_until(lambda: self.step() >= step, timeout, f"step {step}")


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True).stdout


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


def rank_processes(job: str) -> dict[int, int]:
    """Rank → process id, seen from outside the nodes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if variables.get(b"SLURM_JOB_ID") == job.encode() and any(word.endswith(b"start.py") for word in words[:2]):
            found[int(variables[b"SLURM_PROCID"])] = int(folder.name)
    return found


@pytest.fixture(autouse=True)
def nothing_left_over(cluster: Cluster) -> Iterator[None]:
    """A test that failed leaves no job to the next one."""
    yield
    subprocess.run(["scancel", "--user=root", "--full", "--signal=KILL"], check=True)
    for process in Submission.running:
        process.kill()
        process.communicate()
    Submission.running.clear()


Run = Callable[..., tuple[Submission, Trained]]


@pytest.fixture(scope="session")
def start(cluster: Cluster, place: Path) -> Run:
    """`start("name", "--nodes", "2", ...)`: submits tiny.yaml and follows; the submission and its run folder."""

    def start(name: str, *arguments: str) -> tuple[Submission, Trained]:
        base = ["--config", "tiny.yaml", "--set", f"run.name={name}"]
        return Submission(place, *base, *arguments), Trained(place / "runs" / name)

    return start


@pytest.fixture(scope="session")
def undisturbed(start: Run) -> Trained:
    """Two nodes with one rank each, left alone."""
    submission, run = start("undisturbed", "--nodes", "2", "--follow")
    code, _, err = submission.end()
    assert code == 0, err
    assert run.restarts == 0
    return run


def assert_same_course(run: Trained, reference: Trained) -> None:
    """Same weights and optimizer state bit for bit; every step in the metrics, none twice."""
    assert run.weights() == reference.weights()
    steps = [line["step"] for line in run.lines() if "loss/sst" in line]
    assert steps == list(range(STEPS))


USR2 = signal.SIGUSR2
KILL = signal.SIGKILL
