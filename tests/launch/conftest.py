"""Runs duties through the launcher in a process of its own, the way a user's shell would."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from duties import Launch
from fake_slurm import FakeSlurm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

DRIVER = """
import sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import cloudpickle, duties
from launch.local import run_here
from launch.show import report
cloudpickle.register_pickle_by_value(duties)
run = Path(sys.argv[1])
note, end = run_here(run, 2, 1, train=getattr(duties, sys.argv[2]))
sys.exit(report(run, note, end))
"""


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite may itself run in a job of Slurm's; what a test wants of one it sets."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_", "MTBERT_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """First in the PATH of the test and of what it starts."""
    slurm = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{slurm.place}:{os.environ['PATH']}")
    return slurm


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "job").mkdir(parents=True)
    return run


@pytest.fixture
def launch(run: Path) -> Iterator[Launch]:
    """`launch("tell")`: two ranks of that duty in the folder `run`, output captured; perhaps as `timeout 3600 make`.

    Of a test that fails no process is left.
    """
    started: list[subprocess.Popen[str]] = []

    def start(duty: str, by_make: bool = False, cwd: Path = run.parent) -> subprocess.Popen[str]:
        driver = run.parent / "driver.py"
        driver.write_text(DRIVER.format(root=str(ROOT), here=str(HERE)))
        command = [sys.executable, str(driver), str(run), duty]
        if by_make:
            makefile = run.parent / "Makefile"
            makefile.write_text(f"all:\n\t@{shlex.join(command)}\n")
            command = ["timeout", "3600", "make", "-f", str(makefile)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd))
        return started[-1]

    yield start
    left = [job for job in started if job.poll() is None]
    for job in left:
        job.kill()
    for presence in (run / "job").glob("*.rank*") if left else ():  # each rank that lives has one
        with contextlib.suppress(ProcessLookupError, ValueError, IndexError):
            os.kill(int(presence.read_text().split()[1]), signal.SIGKILL)
