"""Jobs that are preempted, requeued, killed or cut off end by themselves with the weights of an undisturbed run.

Those that wait longest come first.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, STEPS, Bench, Trained, assert_same_course, finish, scontrol, send, wait_until

from mtbert.files import alive


def test_a_job_at_its_time_limit_goes_on_until_it_is_done(bench: Bench) -> None:
    """Three minutes, of which the second half is for saving; the ranks stand still until they are asked to.

    The first half is long enough to start on a busy machine: a job that is asked before it stands still is already on
    its way back into the queue.
    """
    submission, run = bench.start("limited", "--time", "3")
    with run.held_at(5) as pids:
        wait_until(lambda: all(map(asked, pids.values())), 200, "the signal before the time limit")
    finish(submission, run, bench.undisturbed)


def asked(pid: int) -> bool:
    """Whether this rank, which stands still, has been sent USR2. Where Slurm wakes it for that, it saves and goes."""
    try:
        pending = Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(int(pending, 16) >> (signal.SIGUSR2 - 1) & 1)


def test_a_link_cut_for_40_seconds(bench: Bench) -> None:
    rough, (_, second) = bench.pair()
    submission, run = bench.start("link", *rough)
    with run.held_at(45):
        bench.cluster("cut", second)
    time.sleep(40)
    bench.cluster("join", second)
    code, out, err = submission.end()
    assert code == 0, f"{out}\n{err}"
    assert_same_course(run, bench.undisturbed)


def test_a_power_cut(bench: Bench) -> None:
    rough, (_, second) = bench.pair()
    submission, run = bench.start("power", *rough)
    with run.held_at(45):
        bench.cluster("crash", second)
        wait_until(lambda: "JobState=RUNNING" not in scontrol("show", "job", "-o", run.job), 90, "the job's end")
    bench.cluster("revive", second)
    finish(submission, run, bench.undisturbed)


def test_preemption_by_a_more_urgent_job(bench: Bench) -> None:
    rough, nodes = bench.pair()
    submission, run = bench.start("preempted", *rough)
    with run.held_at(45) as pids:
        urgent = ["--partition=urgent", f"--nodelist={','.join(nodes)}", "--nodes=2", "--exclusive"]
        there = subprocess.Popen(["sbatch", "--wait", *urgent, "--wrap=true", "--output=/dev/null"])
        wait_until(lambda: all(map(asked, pids.values())), 60, "the preemption")
    assert there.wait(PATIENCE) == 0
    finish(submission, run, bench.undisturbed)


def asked_to_stop(run: Trained, pids: dict[int, int]) -> None:
    subprocess.run(["scancel", "--signal=USR2", run.job], check=True)


def asked_on_one_rank(run: Trained, pids: dict[int, int]) -> None:
    os.kill(pids[1], signal.SIGUSR2)


def requeued_by_hand(run: Trained, pids: dict[int, int]) -> None:
    scontrol("requeue", run.job)


def killed_on_one_rank(run: Trained, pids: dict[int, int]) -> None:
    os.kill(pids[1], signal.SIGKILL)


@pytest.mark.parametrize("disturb", [asked_on_one_rank, requeued_by_hand, killed_on_one_rank])
def test_a_disturbed_job_ends_as_if_nothing_had_happened(
    bench: Bench, disturb: Callable[[Trained, dict[int, int]], None]
) -> None:
    submission, run = bench.start(disturb.__name__)
    with run.held_at(45) as pids:
        disturb(run, pids)
    told = finish(submission, run, bench.undisturbed)
    if disturb.__name__.startswith("asked"):
        assert "back into the queue" in told


def test_a_second_signal_while_the_first_one_is_obeyed(bench: Bench) -> None:
    """It comes when the save has begun, or the requeue, which here takes too long to be missed."""
    submission, run = bench.start("twice", path=slow_scontrol(bench, 3))
    with run.held_at(45) as pids:
        asked_to_stop(run, pids)
        with run.held(lambda: saving(run) or not alive(pids[1]), "the save"):
            assert alive(pids[0]), "the ranks were gone before the second signal"
            send(signal.SIGUSR2, pids)
    finish(submission, run, bench.undisturbed)


def slow_scontrol(bench: Bench, seconds: int) -> str:
    """A PATH in which scontrol takes its time."""
    slow = bench.place / f"slow{seconds}" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep {seconds}\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    return f"{slow.parent}:{os.environ['PATH']}"


def saving(run: Trained) -> bool:
    return any(run.folder.glob("checkpoints/.step-*.tmp"))


def test_a_signal_inside_a_collective(bench: Bench) -> None:
    """Rank 0 waits for rank 1, which stands still, when the signal reaches it."""
    submission, run = bench.start("collective")
    with run.held_at(45) as pids:
        os.kill(pids[0], signal.SIGCONT)
        wait_until(lambda: waiting(pids[0]), 60, "rank 0's wait for rank 1")
        os.kill(pids[0], signal.SIGUSR2)
    finish(submission, run, bench.undisturbed)


def waiting(pid: int) -> bool:
    """Whether a process uses no processor time for half a second: all its threads wait."""
    used = []
    for _ in range(2):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used.append(int(fields[11]) + int(fields[12]))
        time.sleep(0.5)
    return used[0] == used[1]


def test_a_signal_during_evaluation(bench: Bench) -> None:
    def evaluating() -> bool:
        lines = run.lines()
        return lines[-1]["step"] in (59, 119) and "metric/composite" not in lines[-1]

    submission, run = bench.start("evaluating")
    with run.held(evaluating, "an evaluation") as pids:
        asked_to_stop(run, pids)
    finish(submission, run, bench.undisturbed)


def test_a_signal_inside_a_save(bench: Bench) -> None:
    submission, run = bench.start("saving")
    with run.held(lambda: saving(run), "a save") as pids:
        asked_to_stop(run, pids)
    finish(submission, run, bench.undisturbed)


def test_killed_inside_a_save(bench: Bench) -> None:
    submission, run = bench.start("save-killed")
    with run.held(lambda: run.step() > 21 and saving(run), "a save") as pids:
        os.kill(pids[0], signal.SIGKILL)
    finish(submission, run, bench.undisturbed)
    assert not list(run.folder.glob("checkpoints/.step-*"))


def test_a_power_cut_so_short_that_slurm_does_not_notice(bench: Bench) -> None:
    """The rank that is left must put the job back into the queue before it goes, also where scontrol takes its time."""
    rough, (_, second) = bench.pair()
    submission, run = bench.start("blink", *rough, path=slow_scontrol(bench, 1))
    with run.held_at(45):
        bench.cluster("crash", second)
        bench.cluster("revive", second)
    finish(submission, run, bench.undisturbed)


def test_a_submitter_that_dies_and_another_that_takes_over(bench: Bench) -> None:
    submission, run = bench.start("orphan")
    with run.held_at(10):
        submission.process.kill()
        submission.process.communicate()
        another = bench.type("--follow", run.folder)
    code, out, _ = another.end()
    assert code == 0
    assert f"{STEPS}/{STEPS}" in out
    assert_same_course(run, bench.undisturbed)


def test_a_full_disk(bench: Bench) -> None:
    """A save that finds no room leaves the one before it; the run goes on, and saves when there is room again."""
    submission, run = bench.start("full", f"run.dir={bench.small}")
    run = Trained(bench.small / "full")
    filler = bench.small / "filler"
    with run.held_at(25):
        before = {path: path.read_bytes() for path in run.checkpoints()[-1].iterdir()}
        fill(filler, leave=100_000)
    wait_until(lambda: "No space left on device" in run.log(), 120, "the message")
    with run.held(lambda: True, "now"):
        assert {path: path.read_bytes() for path in run.checkpoints()[-1].iterdir()} == before
        filler.unlink()
    code, out, err = submission.end()
    assert code == 0, f"{out}\n{err}"
    assert "could not be saved: No space left on device; training goes on, and saving is tried again" in out
    assert " is saved\n" in out
    assert_same_course(run, bench.undisturbed)


def fill(path: Path, leave: int) -> None:
    room = os.statvfs(path.parent)
    path.write_bytes(b"0" * (room.f_bavail * room.f_frsize - leave))


def test_damaged_checkpoints_are_passed_over(bench: Bench) -> None:
    """The newest one has a flipped bit, the one before it is cut short; the third is good."""
    submission, run = bench.start("damaged", "checkpoint.keep=3")
    with run.held_at(75):
        subprocess.run(["scancel", "--full", "--signal=KILL", run.job], check=True)
    submission.end()
    *_, good, cut, flipped = run.checkpoints()
    shard = flipped / "rank-1-of-2.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.truncate(cut / "rank-0-of-2.safetensors", 1000)
    code, out, err = bench.type("--nodes", "2", "--resume", run.folder, "--follow").end()
    assert code == 0, f"{out}\n{err}"
    assert f"checkpoint passed over: {flipped}/rank-1-of-2.safetensors: its checksum" in out
    assert f"checkpoint passed over: {cut}/rank-0-of-2.safetensors: 1000 bytes instead of" in out
    assert f"continuing after step {int(good.name[5:])}\n" in out
    assert_same_course(run, bench.undisturbed)
