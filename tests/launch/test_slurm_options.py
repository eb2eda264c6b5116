"""What of the Slurm side needs no cluster: time limits and the batch script."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from harness import PATIENCE_S

from launch.job import KILLED_RESTARTS, Attempt, Place
from launch.records import ROOT
from launch.slurm import minutes, script
from launch.submit import parser
from mtbert.errors import UserError
from mtbert.runs import Rank


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:00", 90), ("0:30", 1), ("1:30:00", 90), ("1:30:01", 91), ("1-0", 1440), ("1-12:30", 2190)],
)
def test_time_limits_are_slurms(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["soon", "", "0", "1h", "-5", "1:2:3:4", "1.5"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a time limit"):
        minutes(text)


def test_the_script_asks_for_what_was_typed(tmp_path: Path) -> None:
    words = "--nodes 2 --gpus-per-node 4 --partition gpu --time 1:00 --qos long --mem 64G --slurm reservation=mine"
    text = script(parser().parse_args(words.split()), "mtbert-x", tmp_path, [tmp_path])
    for line in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "partition=gpu", "time=1", "qos=long", "mem=64G"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --reservation=mine\n" in text
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal=USR2@30\n" in text, "half of a limit that is shorter than the usual notice"
    assert "wckey" not in text and "account" not in text
    text = script(parser().parse_args(["--time", "60", "--grace", "600"]), "mtbert-x", tmp_path, [tmp_path])
    assert "#SBATCH --signal=USR2@600\n" in text


def test_cpus_that_were_typed_are_the_threads_whatever_a_profile_says(tmp_path: Path) -> None:
    text = script(parser().parse_args(["--cpus-per-rank", "6"]), "mtbert-x", tmp_path, [tmp_path])
    assert "#SBATCH --cpus-per-task=6\n" in text and " --cpus-per-task=6 " in text
    assert "export OMP_NUM_THREADS=6\n" in text
    assert "OMP_NUM_THREADS" not in script(parser().parse_args([]), "mtbert-x", tmp_path, [tmp_path])


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ("", True),
        ("--ranks-per-node 2 --slurm exclusive", True),
        ("--gpus-per-node 2", False),
        ("--slurm gpus=4", False),
        ("--ranks-per-node 2 --slurm mem=0 gres=gpu:a100:2", False),
        ("--slurm tres-per-task=gres/gpu:1", False),
    ],
)
def test_ranks_that_asked_for_no_gpu_see_none(words: str, hidden: bool, tmp_path: Path) -> None:
    """Many clusters show all of a node's to every job, and an exclusive one is given them unasked."""
    text = script(parser().parse_args(words.split()), "mtbert-x", tmp_path, [tmp_path])
    assert (" env CUDA_VISIBLE_DEVICES= " in text) == hidden


def test_a_path_with_a_space_survives_the_script(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "one"
    text = script(parser().parse_args(["--nodes", "2"]), "mtbert-one", folder, [folder])
    assert f"'{folder}/code/launch/start.py'" in text


@pytest.fixture
def array(tmp_path: Path) -> list[Path]:
    """The run folders of an array of two."""
    runs = [tmp_path / "array" / f"seed={seed}" for seed in (0, 1)]
    for run in runs:
        (run / "job").mkdir(parents=True)
        (run / "checkpoints").mkdir()
    return runs


def run_script(runs: list[Path], attempt: int) -> subprocess.CompletedProcess[str]:
    """The batch script as the second task of array 7, which slurmd would run with the id of the whole array."""
    text = script(parser().parse_args(["--nodes", "2"]), "mtbert-array", runs[0].parent, runs)
    task = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    variables = {**os.environ, **task, "SLURM_RESTART_COUNT": str(attempt)}
    return subprocess.run(["bash"], input=text, env=variables, capture_output=True, text=True, timeout=PATIENCE_S)


KILLED = "case $* in *--overlap*) exit 0 ;; *) exit 137 ;; esac"
"""srun when all nodes see the run folder and a rank is killed."""


def test_restarts_without_a_new_checkpoint_are_counted_once_whoever_asks_for_them(
    array: list[Path], slurm: FakeSlurm
) -> None:
    """The rank that is left does in one attempt, the batch script in the next, both in the one after."""
    slurm.does("srun", KILLED)
    slurm.does("sleep", "exit 0")
    slurm.does("scontrol", "[ $1 = requeue ] || echo JobState=RUNNING")

    def lose(attempt: int) -> bool:
        """Whether the job goes back into the queue."""
        before = len(requeues())
        if attempt % 3 != 1:
            Attempt(array[1], "token", Place(Rank(), "here", ("here",), attempt, "7_1"))._restart()
        if attempt % 3 != 0:
            assert run_script(array, attempt).returncode == 137
        return len(requeues()) > before

    def requeues() -> list[str]:
        return [call for call in slurm.calls("scontrol") if call.startswith("requeue")]

    assert [lose(attempt) for attempt in range(8)] == [True] * KILLED_RESTARTS + [False] * 3
    (array[0] / "checkpoints" / "step-00000001").mkdir()
    assert not lose(8), "a checkpoint of another task"
    (array[1] / "checkpoints" / "step-00000001").mkdir()
    assert lose(9)
    assert set(requeues()) == {"requeue 7_1"}


def test_the_batch_script_asks_again_while_slurmctld_restarts_and_leaves_a_cancelled_job_alone(
    array: list[Path], slurm: FakeSlurm
) -> None:
    slurm.does("srun", KILLED)
    slurm.does("sleep", "exit 0")
    slurm.does("scontrol", "[ $(wc -l <$0.calls) -gt 2 ] || exit 1; echo JobState=RUNNING")
    run_script(array, 0)
    assert slurm.calls("scontrol") == [*["show job -o 7_1"] * 3, "requeue 7_1"]
    slurm.does("scontrol", "echo JobState=COMPLETING")
    run_script(array, 1)
    assert slurm.calls("scontrol")[4:] == ["show job -o 7_1"]


def test_ranks_get_the_environment_of_the_batch_script_also_where_that_got_none(
    array: list[Path], slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at sites with SBATCH_EXPORT=NONE, which srun would follow."""
    slurm.does("srun", "echo ${SLURM_EXPORT_ENV-ALL} >>$0.export")
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")
    run_script(array, 0)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    (tmp_path / "runs" / "mine" / "job").mkdir(parents=True)
    plain = ["bash", ROOT / "slurm" / "train.sbatch", "runs/mine"]
    subprocess.run(plain, cwd=tmp_path, env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, check=True)
    assert (slurm.place / "srun.export").read_text() == "ALL\n" * 4


def test_a_node_with_an_old_copy_of_the_run_folder_is_found_out(array: list[Path], slurm: FakeSlurm) -> None:
    run = array[1]
    copy = run.parent.with_name("copy")
    copy.symlink_to(run.parent)
    # srun whose node has the array's folder elsewhere
    there = f"shared={run.parent} mine={copy}"
    slurm.does("srun", there + '; while [[ $1 == -* ]]; do shift; done; "${@//$shared/$mine}"')
    assert "does not see" not in run_script(array, 0).stderr
    copy.unlink()
    (copy / run.name / "code" / "launch").mkdir(parents=True)
    (copy / run.name / "code" / "launch" / "start.py").touch()
    (copy / run.name / "job").mkdir()
    done = run_script(array, 0)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "put run.dir on a file system that all nodes share" in done.stderr
    assert list((run / "job").iterdir()) == []
