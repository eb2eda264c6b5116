"""A job of two ranks on this machine: how it is seen, how it ends, how it is stopped."""

from __future__ import annotations

import errno
import math
import os
import pty
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DRIVER
from duties import Launch
from harness import PATIENCE_S

from launch import job, local
from launch.job import Attempt, Place
from launch.records import (
    ROOT,
    End,
    EndRecord,
    JobNote,
    Lock,
    job_folder,
    last_end,
    make_job_folder,
    read_end,
    read_note,
    snapshot_code,
    writable_by_me_alone,
    write_note,
)
from mtbert.errors import UserError
from mtbert.files import HOST
from mtbert.runs import Rank
from mtbert.stops import ECHO_S


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_two_ranks_see_each_other_and_import_the_snapshot(launch: Launch, run: Path) -> None:
    job = launch("tell")
    out, err = job.communicate(timeout=PATIENCE_S)
    assert (job.returncode, err) == (0, "")
    seen = [(run / f"seen{rank}").read_text().split() for rank in range(2)]
    assert [words[0] for words in seen] == ["0/2", "1/2"]
    assert seen[0][1] == seen[1][1] and seen[0][1].startswith("file://")
    assert {words[2] for words in seen} == {str(run / "code" / "mtbert")}
    lines = out.splitlines()
    assert lines[0].startswith("no terminal")
    assert lines[1] == "words of rank 0"
    assert len(lines) == 2
    assert not (run / "job" / "lock").exists()


@pytest.mark.parametrize("duty", ["rank_1_fails", "rank_1_is_killed", "killed_inside_a_collective"])
def test_one_lost_rank_ends_the_job_and_is_named(launch: Launch, run: Path, duty: str) -> None:
    job = launch(duty)
    _, err = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 1
    assert err.startswith("rank 1 on ")
    if duty == "rank_1_fails":
        assert err.count("Traceback") == 1
        *_, cause, advice = err.splitlines()
        assert cause == "ZeroDivisionError: the flaw in rank 1"
        assert advice.startswith("continue with: ") and advice.endswith(f" --resume {run}")
    else:
        assert err.splitlines()[1] == "rank 1 was killed"


def test_a_lost_rank_ends_the_job_also_when_the_disk_is_full(launch: Launch) -> None:
    job = launch("rank_1_is_killed_when_the_disk_is_full")
    _, err = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 1
    assert err.startswith("error: the job was killed; ")


def test_a_users_mistake_found_in_a_rank_is_one_line(launch: Launch) -> None:
    job = launch("rank_1_finds_a_mistake")
    out, err = job.communicate(timeout=PATIENCE_S)
    assert (job.returncode, out) == (2, "")
    assert err == "error: train.csv line 3: label 7 is not in 0 … 4\n"


def test_a_mistake_found_after_a_save_can_be_continued(launch: Launch, run: Path) -> None:
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    job = launch("rank_1_finds_a_mistake")
    _, err = job.communicate(timeout=PATIENCE_S)
    mistake, advice = err.splitlines()
    assert job.returncode == 2 and mistake.startswith("error: train.csv line 3: ")
    assert advice.startswith("continue with: ") and advice.endswith(f" --resume {run}")


def test_ctrl_c_saves_on_every_rank(launch: Launch, run: Path) -> None:
    job = launch("until_stopped")
    wait_for(run / "step0")
    wait_for(run / "step1")
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 130
    assert "saving and stopping" in err
    step = (run / "saved0").read_text()
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped at step {step}; continue with: python launch/submit.py --nodes 2 ")
    assert last.endswith(f" --resume {run}")
    assert (run / "saved1").exists()


def test_timeout_and_make_pass_one_request_on_and_all_is_saved(launch: Launch, run: Path) -> None:
    """Both signal those below them, and `timeout` its whole group as well: the submitter gets TERM twice."""
    job = launch("until_stopped", by_make=True)
    wait_for(run / "step0")
    wait_for(run / "step1")
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=PATIENCE_S)
    step = (run / "saved0").read_text()
    assert f"stopped at step {step}; continue with: " in out, err
    assert (run / "saved1").exists()


def test_a_signal_that_reaches_one_rank_only_sets_its_flag(launch: Launch, run: Path) -> None:
    """That the others follow is the trainer's agreement; the launcher must not end anyone."""
    job = launch("until_stopped")
    wait_for(run / "step1")
    presence = next((run / "job").glob("*.rank1"))
    os.kill(int(presence.read_text().split()[1]), signal.SIGUSR2)
    wait_for(run / "saved1")
    assert job.poll() is None and not (run / "saved0").exists()
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=PATIENCE_S)
    assert (run / "saved0").exists()


def test_a_second_ctrl_c_kills(launch: Launch, run: Path) -> None:
    job = launch("never_stops")
    wait_for(run / "pid0")
    wait_for(run / "pid1")
    job.send_signal(signal.SIGINT)
    assert job.stderr and [job.stderr.readline() for _ in range(2)][1].startswith("saving and stopping")
    time.sleep(ECHO_S)
    assert job.poll() is None
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 130, err
    assert out.startswith("stopped without another save; the last is step-00000003; continue with: ")
    deadline = time.monotonic() + PATIENCE_S
    while not all(gone(int((run / f"pid{rank}").read_text())) for rank in range(2)):
        assert time.monotonic() < deadline, "ranks outlived the second Ctrl-C"
        time.sleep(0.05)


def test_a_submitter_that_dies_leaves_the_job_running(launch: Launch, run: Path) -> None:
    job = launch("until_stopped")
    wait_for(run / "step1")
    job.kill()
    job.wait()
    later = int((run / "step1").read_text()) + 100  # a second of steps, in which the ranks look for each other often
    deadline = time.monotonic() + PATIENCE_S
    while int((run / "step1").read_text()) < later:
        assert time.monotonic() < deadline, "the ranks ended with the submitter"
        time.sleep(0.02)
    token = next((run / "job").glob("*.rank1")).name.split("-")[0]
    (run / "job" / f"{token}.stop").touch()
    job.communicate(timeout=PATIENCE_S)  # the ranks held our end of its pipes too
    assert (run / "saved0").exists() and (run / "saved1").exists()


def test_rank_0_draws_for_the_terminal_that_shows_it(run: Path, tmp_path: Path) -> None:
    """With a terminal behind the submitter, rank 0 sees one as well, and what it draws arrives unchanged."""
    outer, inner = pty.openpty()
    here = Path(__file__).parent
    driver = (
        f"import sys; sys.path[:0] = [{str(here.parent.parent)!r}, {str(here)!r}]\n"
        "from pathlib import Path; import cloudpickle, duties; from launch.local import run_here\n"
        "cloudpickle.register_pickle_by_value(duties)\n"
        "run_here(Path(sys.argv[1]), 1, 1, train=duties.tell)"
    )
    job = subprocess.Popen([sys.executable, "-c", driver, str(run)], stdout=inner, stdin=inner, cwd=tmp_path)
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 4096):
            shown += chunk
    except OSError:  # EIO: the other end is closed
        pass
    os.close(outer)
    assert job.wait(timeout=PATIENCE_S) == 0
    assert shown.startswith(b"terminal ")


def test_a_reader_who_has_enough_asks_for_a_stop(launch: Launch, run: Path) -> None:
    """As `| head` does."""
    job = launch("speaks_until_stopped")
    assert job.stdout and job.stderr and job.stdout.readline() == "step 1\n"
    job.stdout.close()
    with job.stderr as errors:
        err = errors.read()
    assert job.wait(PATIENCE_S) == 130, err
    lost, asked = [line for line in err.splitlines() if line]
    assert lost.startswith("nobody reads the output any more; continue with: ") and lost.endswith(f"--resume {run}")
    assert asked.startswith("saving and stopping")
    assert (run / "saved0").exists() and (run / "saved1").exists()


def test_output_that_finds_no_room_stops_nobody(run: Path, tmp_path: Path) -> None:
    """It is in the run folder, too."""
    driver = DRIVER.format(root=str(ROOT), here=str(Path(__file__).parent))
    with Path("/dev/full").open("wb") as full:
        job = subprocess.run(
            [sys.executable, "-c", driver, run, "tell"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (job.returncode, job.stderr) == (0, "")


@pytest.mark.parametrize("its_own", [True, False])
def test_a_terminal_that_is_closed_asks_for_a_stop(run: Path, tmp_path: Path, its_own: bool) -> None:
    """Whether it also sends SIGHUP, as to its own session, or only takes nothing any more."""
    outer, inner = pty.openpty()
    session = "os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n" if its_own else ""
    driver = "import fcntl, os, termios\n" + session + DRIVER.format(root=str(ROOT), here=str(Path(__file__).parent))
    words = [sys.executable, "-c", driver, str(run), "speaks_until_stopped"]
    job = subprocess.Popen(words, stdin=inner, stdout=inner, stderr=inner, cwd=tmp_path)
    os.close(inner)
    while b"step" not in os.read(outer, 4096):
        pass
    os.close(outer)
    assert job.wait(PATIENCE_S) == 130
    assert (run / "saved0").exists() and (run / "saved1").exists()


def test_two_jobs_on_one_folder_the_second_refuses(launch: Launch, run: Path) -> None:
    first = launch("until_stopped")
    wait_for(run / "step0")
    second = launch("until_stopped")
    _, err = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2
    assert err.count("\n") == 1 and "another job is using this run folder" in err
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130


def test_a_lock_left_by_a_dead_process_is_taken_over(run: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = Lock(run, "old-0")
    old.owner.pid = dead.pid
    old.acquire()
    Lock(run, "new-0").acquire()
    assert "new-0" in (job_folder(run) / "lock").read_text()


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"process_space": 1}])
def test_a_lock_on_another_host_is_stale_when_untouched(run: Path, where: dict[str, Any]) -> None:
    """Or in another container, which may have this one's name: no process of it is to be seen from here."""
    elsewhere = Lock(run, "old-0")
    elsewhere.owner = replace(elsewhere.owner, pid=2**22 + 1, **where)
    elsewhere.acquire()
    assert (holder := Lock(run, "new-0").holder()) and elsewhere.owner.host in holder
    long_ago = time.time() - 120
    os.utime(elsewhere.path, (long_ago, long_ago))
    assert Lock(run, "new-0").holder() is None


def test_of_two_that_find_a_left_lock_one_takes_it_over(run: Path) -> None:
    """The other had judged it as well, before the first did."""
    (job_folder(run) / "lock").write_text("junk")
    os.utime(job_folder(run) / "lock", (0, 0))
    first = Lock(run, "a-0")
    first.owner.host = "a"

    class Slow(Lock):
        def check(self) -> None:
            super().check()
            if not first.is_mine():
                first.acquire()

    with pytest.raises(UserError, match="another job is using this run folder"):
        Slow(run, "b-0").acquire()
    assert first.is_mine()
    assert [path.name for path in job_folder(run).iterdir()] == ["lock"]


def test_who_holds_the_lock_clears_up_after_killed_processes(launch: Launch, run: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / "predictions").mkdir()
    names = [".launch.json", "job/.job.json", "predictions/.step-00000003.npz"]
    for pid in (dead.pid, os.getpid()):
        for name in names:
            (run / f"{name}.{HOST}.{pid}.tmp").touch()
    out, err = launch("tell").communicate(timeout=PATIENCE_S)
    left = {str(path.relative_to(run)) for path in run.rglob(".*.tmp")}
    assert left == {f"{name}.{HOST}.{os.getpid()}.tmp" for name in names}, out + err


DAMAGED = {
    "cut": b'{"attempt": "old-0", "host": ',
    "empty": b"",
    "no object": b"[1]",
    "of other things": b'{"nodes": 2}',
    "of other types": b'{"attempt": 1, "host": "a", "pid": "7", "slurm_job": null}',
    "a process that cannot be": b'{"attempt": "old-0", "host": "a", "pid": 99999999999, "slurm_job": null}',
    "an option for a job": b'{"attempt": "old-0", "host": "a", "pid": 7, "slurm_job": "--me"}',
    "bytes": b"\xff\xfe",
    "a number of 5000 digits": b'{"pid": ' + b"7" * 5000 + b"}",
    "nested": b"[" * 2**17,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_lock_goes_by_its_age(run: Path, kind: str) -> None:
    path = job_folder(run) / "lock"
    path.write_bytes(DAMAGED[kind])
    assert "a lock that names nobody" in (Lock(run, "new-0").holder() or "")
    long_ago = time.time() - 120
    os.utime(path, (long_ago, long_ago))
    Lock(run, "new-0").acquire()
    assert "new-0" in path.read_text()


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_notes_are_one_line(run: Path, kind: str) -> None:
    for name in ("job.json", "token-0.end.json", "token-ten.end.json"):
        (job_folder(run) / name).write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=r"job\.json: not what a launcher wrote; it was damaged") as error:
        read_note(run)
    assert "\n" not in str(error.value)
    end = last_end(run, "token")
    assert (
        end
        and end.status == "failed"
        and end.message.endswith("token-0.end.json: not what a rank wrote; it was damaged")
    )


def test_notes_come_back_as_they_were(run: Path) -> None:
    note = JobNote("slurm", "17_3", "sbatch17", "", 2, 4, True)
    write_note(run, note)
    assert read_note(run) == note
    end = End("stopped", 1, "node.a", 7, {"a": 1.5, "b": math.inf}, "said\nso")
    record, late = (EndRecord(run, "token-2", host, 1) for host in ("node.a", "node.b"))
    assert record.write(end) and not record.write(replace(end, step=8)) and not late.write(end)
    other = EndRecord(run, "token-10", "node.a", 1)
    other.write(replace(end, step=None))
    for each in (record, late, other):
        each.close()
    assert not other.write(end)
    assert read_end(run, "token-2") == end and last_end(run, "token") == replace(end, step=None)
    assert {path.name for path in job_folder(run).iterdir()} == {"job.json", "token-2.end.json", "token-10.end.json"}


def test_the_command_that_continues_a_run_can_be_pasted() -> None:
    run = Path("runs/my run; it's 1")
    command = JobNote("slurm", "7", "ab12", "", 2, 4, gpus=True).again(run)
    assert shlex.split(command)[2:] == ["--nodes", "2", "--gpus-per-node", "4", "--resume", str(run)]


def test_an_end_is_told_where_no_file_can_be_opened_and_no_room_is_left(run: Path) -> None:
    """What it needs it has from the start; of a message that is longer the end is kept."""
    record = EndRecord(run, "token-0", "node", 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_FSIZE)
    message = "".join(f"line {number}\n" for number in range(5000)) + "OSError: [Errno 24] Too many open files"
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[0][1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (EndRecord.ROOM, limits[1][1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            (run / "other").open("w")
        assert record.write(End("failed", 0, "node", message=message))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits[1])
    record.close()
    end = read_end(run, "token-0")
    assert end and end.status == "failed" and len(end.message) > EndRecord.ROOM // 2 and message.endswith(end.message)


def started_by_submitit(run: Path) -> subprocess.CompletedProcess[str]:
    """Job 1, as its controller would start it."""
    variables = {"EXECUTOR": "local", "LOCAL_JOB_ID": "1", "LOCAL_GLOBALID": "0"}
    start = [sys.executable, ROOT / "launch" / "start.py", "-u", "-m", "submitit.core._submit", job_folder(run)]
    environment = {**os.environ, **{f"SUBMITIT_{name}": value for name, value in variables.items()}}
    return subprocess.run(start, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("name", ["", "1_submitted.pkl"])
def test_a_pickle_that_others_may_have_written_is_not_opened(run: Path, tmp_path: Path, name: str) -> None:
    """It would leave a file behind."""
    bomb = b"cos\nsystem\n(S'touch " + bytes(tmp_path / "opened") + b"'\ntR."
    pickled = job_folder(run) / "1_submitted.pkl"
    pickled.write_bytes(bomb)
    pickled.chmod(0o600)
    (job_folder(run) / name).chmod(0o770)
    done = started_by_submitit(run)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {job_folder(run) / name}: others than user {os.geteuid()} can write to it")
    assert not (tmp_path / "opened").exists()


def test_neither_an_old_pickle_nor_what_lies_in_the_working_directory_is_minded(launch: Launch, run: Path) -> None:
    (job_folder(run) / "2_submitted.pkl").touch()
    (job_folder(run) / "2_submitted.pkl").chmod(0o664)  # as by `chmod -R g+w`
    for name in ("submitit", "shlex", "cloudpickle") if sys.version_info >= (3, 11) else ():
        (run / f"{name}.py").write_text("raise SystemExit('not me')\n")
    job = launch("tell", cwd=run)
    assert job.communicate(timeout=PATIENCE_S)[1] == "" and job.returncode == 0


def test_a_rank_that_does_not_start_is_not_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine; of a step of Slurm's the others are killed by srun."""
    monkeypatch.setattr(job, "COME_S", 0.0)
    here, slurm, apart = (
        Attempt(run, "t", Place(Rank(0, 2, 0, 2), "h", hosts, 0, id))
        for hosts, id in ((("h",), None), (("h",), "7"), (("h", "g"), None))
    )
    here._presence(0).write_text(f"h {os.getpid()}")
    assert [attempt._dead_peer() for attempt in (here, slurm, apart)] == [1, None, None]
    here._presence(1).write_text(f"h {os.getpid()}")
    here._meet_at = -math.inf
    assert here._dead_peer() is None


def test_a_rank_that_finds_no_room_at_its_start_says_so(tmp_path: Path) -> None:
    """No record is left of that; what it does to signals is for a process of its own."""
    code = """if True:
        import sys
        from pathlib import Path
        from launch.job import Attempt, Place, Rank
        print(Attempt(Path(sys.argv[1]), "t", Place(Rank(), "h", ("h",), 0, None)).run_to_end(None))
    """
    words = [sys.executable, "-c", code, tmp_path / "away"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    told = f"error: {tmp_path / 'away'}: cannot be written to: No such file or directory\n"
    assert (done.stdout, done.stderr) == ("mistake\n", told)


def test_a_job_that_cannot_be_noted_is_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    def refuse(run: Path, note: JobNote) -> None:
        pids.append(int(note.id))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "write_note", refuse)
    with pytest.raises(UserError, match="cannot be written to: No space left on device"):
        local.run_here(run, 1, 1, begun=lambda: pytest.fail("it may still be taken back"))
    assert gone(pids[0])


def test_a_run_taken_out_of_its_array_gets_code_of_its_own(run: Path) -> None:
    (run / "code").symlink_to(Path("..") / "code")
    assert (snapshot_code(run) / "launch" / "start.py").is_file() and not (run / "code").is_symlink()


def test_nobody_else_may_write_into_a_job_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_folder(run).chmod(0o777)
    make_job_folder(run)
    assert job_folder(run).stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        make_job_folder(run)


def test_a_project_that_hands_write_permission_on_does_not_to_a_job(tmp_path: Path) -> None:
    """A default ACL counts instead of the umask."""
    everyone, entries = 0xFFFFFFFF, [(1, 7), (4, 7), (0x10, 7), (0x20, 5)]  # user, group, mask: rwx; other: r-x
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry, everyone) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"{tmp_path}: no ACLs on this file system ({error.strerror})")
    run = tmp_path / "run"
    run.mkdir()
    make_job_folder(run)
    pickled = job_folder(run) / "1_submitted.pkl"
    with writable_by_me_alone():
        pickled.touch()
    assert job_folder(run).stat().st_mode & 0o022 == 0 == pickled.stat().st_mode & 0o022
    pickled.chmod(0o664)  # as where nobody can take that away
    done = started_by_submitit(run)
    assert done.returncode == 2 and "its folder hands write permission on (an ACL?)" in done.stderr


def test_two_ranks_on_one_gpu_are_no_lost_peer() -> None:
    """Another start would find the same."""
    from launch.job import _peer_lost

    DistBackendError = type("DistBackendError", (type("DistError", (RuntimeError,), {}),), {})
    assert _peer_lost(DistBackendError("NCCL error: remote process exited"))
    assert not _peer_lost(DistBackendError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"))


def test_a_failure_for_want_of_memory_says_so() -> None:
    """oneDNN alone does not; seen in a soak. CUDA does, and not what to do."""
    from launch.job import _explained

    assert "cannot allocate memory" in _explained("RuntimeError: could not create a primitive\n")
    full = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    told = "a step does not fit on the GPU: lower schedule.batch_size, or raise engine.accumulation\n"
    assert _explained(full) == full + told
    assert _explained("ValueError: x\n") == "ValueError: x\n"
