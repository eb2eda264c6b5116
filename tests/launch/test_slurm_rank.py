"""One rank as srun starts it, where Slurm answers late, or not, or a signal comes early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from duties import Launch
from fake_slurm import FakeSlurm

from launch import records
from launch.records import ROOT, read_end, slurm_state
from launch.slurm import standing
from mtbert.errors import UserError

DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
import duties
from launch.job import Job
Job(Path(sys.argv[1]), "token", train=getattr(duties, sys.argv[2]))()
"""

VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "localhost",
}

RESTARTING = """
fail() { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
times=$(grep -c "^$1 $2" "$0.calls")
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") [ $times -gt 1 ] || fail; echo JobState=RUNNING ;;
    requeue*) [ $times -gt 1 ] || fail ;;
esac"""
"""scontrol while slurmctld restarts: it fails once for every question."""


def test_a_stopped_task_of_an_array_goes_back_into_the_queue_alone_and_while_slurmctld_restarts(
    run: Path, slurm: FakeSlurm
) -> None:
    """The id of one task is also that of the whole array."""
    slurm.does("scontrol", RESTARTING)
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    words = [sys.executable, "-c", DRIVER, run, "until_stopped"]
    rank = subprocess.Popen(words, env={**os.environ, **VARIABLES, **array})
    deadline = time.monotonic() + 20
    while not (run / "step0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank.send_signal(signal.SIGUSR2)
    assert rank.wait(60) == 0
    assert [call for call in slurm.calls("scontrol") if "hostnames" not in call] == [
        "show job -o 7_0",
        "show job -o 7_0",
        "requeue 7_0",
        "show job -o 7_0",
        "requeue 7_0",
    ]
    assert (end := read_end(run, "token-0")) and end.status == "stopped"
    assert (run / "logs" / "rank0.err").read_text() == ""
    assert not (run / "job" / "lock").exists()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1", "slurm_load_jobs error: Unable to contact"),
        ("exec sleep 9", "timed out"),
    ],
)
def test_a_slurm_that_does_not_answer(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, body: str, complaint: str
) -> None:
    monkeypatch.setattr(records, "PATIENCE_S", 0.3)
    monkeypatch.setattr(records, "ASK_EVERY_S", 0.1)
    slurm.does("scontrol", body)
    assert slurm_state("7") == "UNKNOWN"
    with pytest.raises(UserError, match=f"Slurm does not answer: .*{complaint}"):
        standing("7")
    slurm.does("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert standing("7").state == "UNKNOWN"
    assert len(slurm.calls("scontrol")) > 1


SIGNALLED = """
import os, sys
class Signalled:
    def find_spec(self, name, path=None, target=None):
        if name == "launch.job" and sys.argv[0].endswith(("start.py", "rank.py")):
            os.kill(os.getpid(), int(os.environ["EARLY"]))
sys.meta_path.insert(0, Signalled())
"""
"""A sitecustomize that sends a rank a signal in the middle of its imports."""


@pytest.fixture(params=[signal.SIGUSR2, signal.SIGTERM])
def early_signal(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("EARLY", str(int(request.param)))


@pytest.mark.usefixtures("early_signal")
def test_a_signal_during_the_imports_stops_the_job_when_it_has_begun(launch: Launch, run: Path) -> None:
    job = launch("until_stopped")
    job.communicate(timeout=60)
    assert job.returncode == 130
    assert (run / "saved0").exists() and (run / "saved1").exists()


@pytest.mark.usefixtures("early_signal")
def test_a_signal_during_the_imports_of_a_plain_batch_script(run: Path, slurm: FakeSlurm, tmp_path: Path) -> None:
    """Ours to see is that the rank lives on: it finds no configuration in its run folder, a mistake."""
    slurm.does("scontrol", "echo localhost")
    words = [sys.executable, "-m", "launch.rank", "train", run]
    done = subprocess.run(words, env={**os.environ, **VARIABLES}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2), done.stderr
    assert read_end(run, "sbatch7-0") is not None


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ([], "runs/mtbert-7 --config configs/quickstart.yaml"),
        (["runs/mine"], "runs/mine --config configs/quickstart.yaml"),
        (["--set", "seed=1"], "runs/mtbert-7 --config configs/quickstart.yaml --set seed=1"),
        (["runs/mine", "--set", "seed=1"], "runs/mine --config configs/quickstart.yaml --set seed=1"),
    ],
)
def test_the_batch_script_takes_options_for_no_run_folder(tmp_path: Path, words: list[str], made: str) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    python.chmod(0o755)
    script = ["bash", str(ROOT / "slurm" / "train.sbatch"), *words]
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, f"-m launch.rank make {made}\n"), done.stderr
