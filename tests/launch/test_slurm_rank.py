"""One rank as srun starts it, where Slurm answers late, or not, or a signal comes early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from duties import Launch
from fake_slurm import FakeSlurm
from harness import PATIENCE_S

from launch import job, records
from launch.job import Attempt, Place, _interface, _set_variables
from launch.records import ROOT, read_end, read_note, slurm_state
from launch.slurm import standing
from mtbert.config_files import load_config
from mtbert.errors import UserError
from mtbert.runs import Rank

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
    deadline = time.monotonic() + PATIENCE_S
    while not (run / "step0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank.send_signal(signal.SIGUSR2)
    assert rank.wait(PATIENCE_S) == 0
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


@pytest.mark.parametrize(
    ("usable", "variables", "threads"),
    [
        (8, {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound to its own part
        (16, {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "8"}, 8),  # to that of the job
        (1, {"SLURM_CPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}, 1),  # of sbatch; srun knows nothing of it
        (128, {"SLURM_CPUS_ON_NODE": "4"}, 2),  # to nothing, on a node that others share
        (128, {"SLURM_CPUS_ON_NODE": "1"}, 1),
        (16, {}, 8),
        (16, {"SLURM_CPUS_ON_NODE": "4", "OMP_NUM_THREADS": "5"}, 5),
        (16, {"SLURM_CPUS_ON_NODE": "4", "OMP_NUM_THREADS": ""}, 2),
    ],
)
def test_a_rank_runs_as_many_threads_as_it_was_granted_cpus(
    monkeypatch: pytest.MonkeyPatch, usable: int, variables: dict[str, str], threads: int
) -> None:
    """One of two on its node."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)))
    monkeypatch.setattr(os, "environ", variables)
    _set_variables(Place(Rank(0, 2, 0, 2), "here", ("here",), 0, "7"))
    assert variables["OMP_NUM_THREADS"] == str(threads)


def test_ranks_read_each_other_s_presence_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them do, on a file system that all share; one that has not come yet is looked for now and then."""
    opened: list[str] = []
    read = Path.read_text

    def counted(path: Path) -> str:
        if path.parent == run / "job":
            opened.append(path.suffix)
        return read(path)

    monkeypatch.setattr(Path, "read_text", counted)
    monkeypatch.setattr(job, "MEET_S", 0.3)
    attempt = Attempt(run, "token", Place(Rank(0, 4, 0, 2), "node0", ("node0", "node1"), 0, "7"))
    with subprocess.Popen(["sleep", "60"]) as peer:
        for rank, words in enumerate((f"node0 {os.getpid()}", f"node0 {peer.pid}", "node1 1")):
            attempt._presence(rank).write_text(words)
        assert [attempt._dead_peer() for _ in range(50)] == [None] * 50
        assert opened == [".rank0", ".rank1", ".rank2", ".rank3"]
        attempt._presence(3).write_text("node1 2")
        time.sleep(0.3)
        assert [attempt._dead_peer() for _ in range(50)] == [None] * 50
        peer.kill()
    assert attempt._dead_peer() == 1
    attempt._presence(1).unlink()
    assert attempt._dead_peer() is None, "it ended in order"
    assert opened[4:] == [".rank3"]


@pytest.mark.parametrize(
    ("hosts", "node", "expected"),
    [
        (("node1", "no-such-host.invalid"), "0", None),  # a name without an IPv4 address
        (("no-such-host.invalid", "127.0.0.1"), "0", "lo"),  # the first node, whatever it calls itself
        (("127.0.0.1", "no-such-host.invalid"), "1", "lo"),
    ],
)
def test_the_interface_is_that_to_another_node(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...], node: str, expected: str | None
) -> None:
    monkeypatch.setenv("SLURM_NODEID", node)
    assert _interface(Place(Rank(int(node), 2), "login", hosts, 0, "7")) == expected


@pytest.mark.parametrize("chosen", [None, "eth"])
def test_libraries_are_told_the_interface_unless_the_user_did(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """NCCL takes a name for the beginning of one, as lo of lo1, unless it begins with =."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", str(chosen))
        if chosen is None:
            monkeypatch.delenv(f"{library}_SOCKET_IFNAME")
    _set_variables(Place(Rank(), "login", ("login",), 0, None))
    told = [os.environ[f"{library}_SOCKET_IFNAME"] for library in ("GLOO", "NCCL")]
    assert told == ([chosen] * 2 if chosen else ["lo", "=lo"])


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
    job.communicate(timeout=PATIENCE_S)
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
        ([], "runs/mtbert-7"),
        (["runs/mine"], "runs/mine"),
        (["--set", "seed=1"], "runs/mtbert-7 --set seed=1"),
        (["runs/mine", "--set", "seed=1"], "runs/mine --set seed=1"),
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
    environment["CONFIG"] = "my.yaml"
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    run, *rest = made.split()
    assert done.stdout.split()[3:] == [run, "--config", "my.yaml", *rest]


def test_a_plain_job_keeps_its_command_its_script_and_its_code(tmp_path: Path, slurm: FakeSlurm) -> None:
    script = ROOT / "slurm" / "train.sbatch"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    environment = {**os.environ, **VARIABLES, "SLURM_NNODES": "1", "PYTHONPATH": str(ROOT), "CONFIG": QUICKSTART[1]}
    words = ["bash", str(script), "runs/mine", "--set", "seed=3"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    command = json.loads((run / "environment.json").read_text())["command"]
    assert command == ["sbatch", "slurm/train.sbatch", "runs/mine", *QUICKSTART, "--set", "seed=3"]
    assert (run / "job" / "7_submission.sh").read_bytes() == script.read_bytes()
    assert (
        slurm.calls("srun")[-1] == "--kill-on-bad-exit=1 .venv/bin/python runs/mine/code/launch/rank.py train runs/mine"
    )

    (run / "code" / "launch" / "job.py").write_text("raise SystemExit('the copy')")
    rank = [sys.executable, run / "code" / "launch" / "rank.py", "train", run]
    done = subprocess.run(rank, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr == "the copy\n"


def make(run: Path | str, *words: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The first command of the batch script in slurm/, on two nodes."""
    environment = {**os.environ, **VARIABLES, "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "launch.rank", "make", run, *words],
        cwd=place, env={**environment, **variables}, capture_output=True, text=True,
    )  # fmt: skip


QUICKSTART = ("--config", str(ROOT / "configs" / "quickstart.yaml"))


def test_a_plain_job_on_a_run_folder_that_is_there_refuses_what_would_be_ignored(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    """Not so when it is requeued: its batch script says again what it said at first."""
    slurm.does("scontrol", "echo JobState=COMPLETED Restarts=0")
    first = (*QUICKSTART, "--set", "seed=3")
    assert make("runs/7", *first, place=tmp_path).returncode == 0
    run = tmp_path / "runs" / "7"
    before = (run / "config.yaml").read_text()
    for words, told in (
        (QUICKSTART, "error: runs/7: keeps the configuration it has; "),
        (("--set", "seed=4"), "error: --set seed=4: a continued run keeps what it trains; "),
    ):
        done = make("runs/7", *words, place=tmp_path, SLURM_JOB_ID="8")
        assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert (note := read_note(run)) and note.id == "7" and (run / "config.yaml").read_text() == before

    for again in ({"SLURM_RESTART_COUNT": "1"}, {}):
        done = make("runs/7", *first, place=tmp_path, **again)
        assert (done.returncode, done.stderr) == (0, "")
    assert (run / "config.yaml").read_text() == before
    done = make("runs/7", "--set", "checkpoint.keep=9", "data.cache=cache", place=tmp_path, SLURM_JOB_ID="8")
    assert (done.returncode, done.stderr) == (0, "")
    config = load_config(run / "config.yaml")
    assert (config.seed, config.checkpoint.keep, config.data.cache) == (3, 9, str(tmp_path / "cache"))
    assert (note := read_note(run)) and note.id == "8"


def test_a_plain_job_without_a_number_of_ranks_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIABLES, "SLURM_JOB_NUM_NODES", "2")
    words = [sys.executable, "-m", "launch.rank", "make", "runs/mine", *QUICKSTART]
    environment = {**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT)}
    del environment["SLURM_NTASKS"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    told = "error: SLURM_NTASKS: not set in this job; give --ntasks-per-node to sbatch\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("variables", "gpus"), [({}, False), ({"SLURM_JOB_GPUS": "0"}, True), ({"SLURM_GPUS_ON_NODE": "2"}, True)]
)
def test_a_plain_job_is_continued_on_gpus_if_it_has_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], gpus: bool
) -> None:
    for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert make("runs/null", *QUICKSTART, place=tmp_path, **variables).returncode == 0
    run = tmp_path / "runs" / "null"
    assert (note := read_note(run)) and note.gpus == gpus
    assert f"--{'gpus' if gpus else 'ranks'}-per-node 2 " in note.again(run)


def test_a_plain_job_leaves_a_run_alone_that_another_job_is_to_train(tmp_path: Path, slurm: FakeSlurm) -> None:
    assert make("runs/7", *QUICKSTART, place=tmp_path).returncode == 0
    slurm.does("scontrol", "echo JobState=PENDING Restarts=0")
    done = make("runs/7", place=tmp_path, SLURM_JOB_ID="8")
    assert done.returncode == 2
    told = (
        "watch it with: python launch/submit.py --follow runs/7; or end it with: python launch/submit.py cancel runs/7"
    )
    assert done.stderr == f"error: runs/7: job 7 is not over; {told}\n"
    assert (note := read_note(tmp_path / "runs" / "7")) and note.id == "7"
