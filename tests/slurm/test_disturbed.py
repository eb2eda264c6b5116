"""Jobs that are preempted, requeued, killed or cut off end by themselves with the weights of an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable

import pytest
from conftest import KILL, STEPS, USR2, Cluster, Run, Trained, assert_same_course, rank_processes, scontrol, wait_until


def finish(submission_and_run: tuple, reference: Trained, timeout: float = 240) -> str:
    """Waits for the disturbed job; it must have started again and ended like the reference. Returns what was told."""
    submission, run = submission_and_run
    code, out, err = submission.end(timeout)
    assert code == 0, f"{out}\n{err}"
    assert run.restarts >= 1, "the disturbance did not reach the job"
    assert_same_course(run, reference)
    return out + err


def asked_to_stop(run: Trained) -> None:
    subprocess.run(["scancel", "--signal=USR2", run.job], check=True)


def asked_twice(run: Trained) -> None:
    asked_to_stop(run)
    time.sleep(random.random() / 10)
    asked_to_stop(run)


def asked_on_one_rank(run: Trained) -> None:
    os.kill(rank_processes(run.job)[1], USR2)


def requeued_by_hand(run: Trained) -> None:
    scontrol("requeue", run.job)


def killed_on_one_rank(run: Trained) -> None:
    os.kill(rank_processes(run.job)[1], KILL)


@pytest.mark.parametrize(
    "disturb", [asked_to_stop, asked_twice, asked_on_one_rank, requeued_by_hand, killed_on_one_rank]
)
def test_a_disturbed_job_ends_as_if_nothing_had_happened(
    disturb: Callable[[Trained], None], start: Run, undisturbed: Trained
) -> None:
    job = start(disturb.__name__, "--nodes", "2", "--follow")
    job[1].wait_for_step(45)
    disturb(job[1])
    told = finish(job, undisturbed)
    if disturb.__name__.startswith("asked"):
        assert "back into the queue" in told


def test_a_stop_during_evaluation(start: Run, undisturbed: Trained) -> None:
    job = start("evaluating", "--nodes", "2", "--follow")
    job[1].wait_for_step(59)  # logged right before the evaluation after step 60
    asked_to_stop(job[1])
    finish(job, undisturbed)


def test_preemption_by_a_more_urgent_job(start: Run, undisturbed: Trained) -> None:
    job = start("preempted", "--nodes", "2", "--partition", "main", "--slurm", "exclusive", "--follow")
    job[1].wait_for_step(45)
    urgent = subprocess.run(
        ["sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null"]
    )
    assert urgent.returncode == 0
    finish(job, undisturbed)


def test_a_job_at_its_time_limit_goes_on_until_it_is_done(start: Run, cluster: Cluster, place: object) -> None:
    """One minute, of which the last half is for saving: too little for these steps, so it takes several turns."""
    submission, run = start("limited", "--nodes", "2", "--time", "1", "--follow", "--set", "phases=[{steps: 1500}]")
    code, out, err = submission.end(timeout=600)
    assert code == 0, f"{out}\n{err}"
    assert run.restarts >= 1
    steps = [line["step"] for line in run.lines() if "loss/sst" in line]
    assert steps == list(range(1500))


def test_a_power_cut(start: Run, cluster: Cluster, undisturbed: Trained) -> None:
    job = start("power", "--nodes", "2", "--follow")
    job[1].wait_for_step(45)
    cluster("crash", "node2")
    wait_until(lambda: "JobState=RUNNING" not in scontrol("show", "job", "-o", job[1].job), 90, "the end of the job")
    cluster("revive", "node2")
    finish(job, undisturbed)


def test_a_power_cut_so_short_that_slurm_does_not_notice(start: Run, cluster: Cluster, undisturbed: Trained) -> None:
    job = start("blink", "--nodes", "2", "--follow")
    job[1].wait_for_step(45)
    cluster("crash", "node2")
    cluster("revive", "node2")
    finish(job, undisturbed)


def test_a_link_cut_for_40_seconds(start: Run, cluster: Cluster, undisturbed: Trained) -> None:
    job = start("link", "--nodes", "2", "--follow")
    job[1].wait_for_step(45)
    cluster("cut", "node2")
    time.sleep(40)
    cluster("join", "node2")
    code, out, err = job[0].end()
    assert code == 0, f"{out}\n{err}"
    assert_same_course(job[1], undisturbed)


def test_a_submitter_that_dies_and_another_that_takes_over(start: Run, place: object, undisturbed: Trained) -> None:
    from conftest import Submission

    submission, run = start("orphan", "--nodes", "2", "--follow")
    run.wait_for_step(10)
    submission.process.kill()
    submission.process.communicate()
    code, out, _ = Submission(place, "--follow", run.folder).end()  # type: ignore[arg-type]
    assert code == 0
    assert f"{STEPS}/{STEPS}" in out
    assert_same_course(run, undisturbed)
