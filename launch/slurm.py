"""Jobs on a Slurm cluster: the batch script, its submission, and following, listing and cancelling.

submitit writes the script and submits it. How a job stands is asked of slurmctld (`scontrol`), which needs no
accounting and is right about requeued jobs, where `sacct` says NODE_FAIL for a job that will go on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from launch.job import BATCH_STARTED, COME_S, KILLED_RESTARTS, Job
from launch.records import (
    ASK_EVERY_S,
    End,
    JobNote,
    Lock,
    complaint,
    job_folder,
    last_end,
    log_path,
    outside_of_any_job,
    read_end,
    read_note,
    slurm_fields,
    snapshot_code,
    stop_path,
    submit_command,
    writable_by_me_alone,
)
from launch.show import Tail, Unwatched, launcher_logs, report, tell
from mtbert.errors import UserError
from mtbert.files import alive
from mtbert.stops import STOPPED, UNREAD

GRACE_S = 90
"""Seconds before the time limit at which ranks are asked to save, unless told; half the limit where that is shorter."""

LOOK = r"""
# every node must see the run folder: a new file in it, for a node may have an old copy of its own;
# one that has just come back may refuse a step, which is no answer
mark="$run/job/$job-${SLURM_RESTART_COUNT:-0}.mark"
: >"$mark"
for wait in 1 5 10 20 0; do
    # --overlap: or the next step may find these CPUs still taken, and asks again only a minute later
    srun --overlap --nodes=$nodes --ntasks=$nodes --ntasks-per-node=1 bash -c 'test -e "$0" || {
        echo "error: $(hostname) does not see $1; put run.dir on a file system that all nodes share" >&2
        exit 2
    }' "$mark" "$run"
    case $? in 0) break ;; 2) rm -f "$mark"; exit 2 ;; *) sleep $wait ;; esac
done
rm -f "$mark"
"""

RESTART = r"""
# a rank was killed, or its node: start again from the last checkpoint
killed="$run/job/$job.killed" attempt=${SLURM_RESTART_COUNT:-0}
[ $code -gt 128 ] || exit $code
# slurmctld may be restarting
for wait in 1 5 10 20 0; do
    case $(scontrol show job -o $job 2>&1) in
        *JobState=RUNNING*)
            # one line per attempt since the last new checkpoint; a rank that was left may have written this one's
            find "$run/checkpoints" -name 'step-*' -newer "$killed" 2>/dev/null | grep -q . && rm "$killed"
            grep -qsx $attempt "$killed" || echo $attempt >>"$killed" || break
            [ $(wc -l <"$killed") -le $limit ] || break
            scontrol requeue $job && sleep 60 && break
            ;;
        *JobState=* | *"Invalid job id"*) break ;;
    esac
    sleep $wait
done
exit $code"""

POLL_S = 0.2
OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"
)  # fmt: skip


def parameters(args: argparse.Namespace, name: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Arguments of submitit's batch script."""
    limit_min = None if args.time is None else minutes(args.time)
    grace = args.grace or GRACE_S
    return {
        "job_name": name,
        "nodes": args.nodes,
        "ntasks_per_node": args.gpus_per_node or args.ranks_per_node or 1,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_rank,
        "time": limit_min,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "exclude": args.exclude,
        "mem": args.mem,
        "wckey": None,
        "signal_delay_s": grace if limit_min is None else min(grace, limit_min * 30),
        "additional_parameters": {"requeue": True, **_extra(args.slurm)},
        # without it the other ranks of a dead one would wait in a collective for torch's time-out
        "srun_args": ["--kill-on-bad-exit=1"]
        # srun does not take it over from the batch script
        + ([f"--cpus-per-task={args.cpus_per_rank}"] if args.cpus_per_rank else []),
        "setup": [
            "unset SLURM_EXPORT_ENV",  # a site's --export=NONE is for sbatch; srun would follow it
            # what was typed, and no profile of the site's, says how many threads
            *([f"export OMP_NUM_THREADS={args.cpus_per_rank}"] if args.cpus_per_rank else []),
            f"export {BATCH_STARTED}=$(date +%s.%N)",
            f"runs=({' '.join(shlex.quote(str(run.resolve())) for run in runs)})",
            "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
            # an array's own id stands for all of its tasks
            "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
            "job=${job:-$SLURM_JOB_ID}",
            f"nodes={args.nodes}",
            *LOOK.splitlines(),
        ],
        "teardown": ["code=$?", f"limit={KILLED_RESTARTS}", *RESTART.splitlines()],
    }


def script(args: argparse.Namespace, name: str, folder: Path, runs: Sequence[Path]) -> str:
    """The batch script `submit_jobs` would hand to sbatch; several runs make it an array."""
    command = f"{_python(args, folder)} -u -m submitit.core._submit {shlex.quote(str(job_folder(folder).resolve()))}"
    array = {"map_count": len(runs)} if len(runs) > 1 else {}
    text: str = _make_sbatch_string(
        command=command, folder=job_folder(folder).resolve(), **parameters(args, name, runs), **array
    )
    return text


def submit_jobs(args: argparse.Namespace, name: str, folder: Path, runs: Sequence[Path]) -> list[JobNote]:
    """One job per run folder, as a Slurm array when there are several; returns what their folders are to note.

    Raises `UserError` with sbatch's complaint.
    """
    snapshot_code(folder)
    executor = submitit.SlurmExecutor(job_folder(folder), python=_python(args, folder))
    executor.update_parameters(**parameters(args, name, runs))
    jobs = [Job(run.resolve(), secrets.token_hex(4)) for run in runs]
    try:
        # submitit prints the complaint and raises it as well
        with writable_by_me_alone(), outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):
            submitted = executor.submit_array(jobs)
    except FailedJobError as error:
        told = complaint(str(error))
        raise UserError(f"sbatch refused the job: {told} (--local trains on this machine instead)") from None
    ranks = args.gpus_per_node or args.ranks_per_node or 1
    return [
        JobNote("slurm", handle.job_id, job.token, "", args.nodes, ranks, bool(args.gpus_per_node))
        for job, handle in zip(jobs, submitted, strict=True)
    ]


def _python(args: argparse.Namespace, folder: Path) -> str:
    """What starts a rank. One that asked for no GPU sees none, though its node may show them to everyone; srun would
    show those of an exclusive node again, so they are hidden inside of it."""
    words = [] if args.gpus_per_node or any(map(GPUS.match, args.slurm)) else ["env", "CUDA_VISIBLE_DEVICES="]
    return shlex.join([*words, sys.executable, str(folder.resolve() / "code" / "launch" / "start.py")])


GPUS = re.compile(r"(--)?(gpus|(gres|tres)\S*=.*(gpu|mps|shard))")
"""Options of sbatch that ask for GPUs, or parts of them."""


def _extra(words: Sequence[str]) -> dict[str, Any]:
    pairs = [word.partition("=") for word in words]
    return {key.removeprefix("--").replace("-", "_"): value if equals else True for key, equals, value in pairs}


def minutes(text: str) -> int:
    """Slurm's notations of a time limit (90, 90:00, 1:30:00, 1-12, 1-12:30, 1-12:30:00) in minutes, rounded up."""
    if re.fullmatch(r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}", text):
        days, dash, clock = text.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if dash:
            hours, mins, secs = [*parts, 0, 0][:3]
        else:
            hours, mins, secs = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        total_s = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + secs
        if total_s:
            return -(-total_s // 60)
    raise UserError(f"--time {text}: not a time limit; give minutes (90), H:MM:SS (1:30:00) or D-HH (1-12)")


# ---------------------------------------------------------------------------------- watching and ending


@dataclass(frozen=True)
class Standing:
    """What slurmctld says of a job; state UNKNOWN when it has forgotten the job."""

    state: str
    nodes: str = ""
    reason: str = ""
    restarts: str = "0"


SILENT = Standing("SILENT")


def standing(job: str) -> Standing:
    """Raises `UserError` when Slurm does not answer."""
    fields = slurm_fields(job)
    if "JobState" not in fields:
        return Standing("UNKNOWN")
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return Standing(fields["JobState"], nodes, fields.get("Reason", ""), fields.get("Restarts", "0"))


def follow(run: Path, note: JobNote, start: int | None) -> int:
    """Shows rank 0's log, as `Tail` does, until the job is over, through requeues; returns the job's exit code.

    Ctrl-C, or the loss of whoever reads that, ends the whole command: the job goes on.
    """
    tail = Tail(log_path(run), start)
    told = ""
    over = 0
    try:
        while True:
            try:
                now = standing(note.id)
                words = _words(note, now)
            except UserError as error:  # the job does not mind
                now, words = SILENT, f"{error}; waiting for it"
            if words != told:
                tell(words)
                told = words
            # a failed node ends a job for a moment before it is queued again
            over = over + 1 if now.state in (*OVER, "UNKNOWN") else 0
            for _ in range(int(ASK_EVERY_S / POLL_S)):
                tail.copy()
                time.sleep(POLL_S)
            if over == 2:
                break
    except KeyboardInterrupt:
        print(
            f"\njob {note.id} goes on; watch it again: {submit_command('--follow', run)}; "
            f"end it: {submit_command('cancel', run)}",
            file=sys.stderr,
        )
        sys.exit(STOPPED)
    except Unwatched:
        sys.exit(UNREAD)
    end = _end(run, note, now)
    if end and end.status == "finished" and now.state in ("COMPLETED", "UNKNOWN"):
        return 0
    if now.state == "CANCELLED":
        print(f"job {note.id} was cancelled; continue with: {note.again(run)}")
        return STOPPED
    said = "" if now.state == "UNKNOWN" else f" (Slurm says {now.state})"
    if end is None and not launcher_logs(run, note) and not log_path(run).exists():
        tell(f"error: the first node could not write to {run}{said}; put run.dir on a file system that all nodes share")
        return 1
    if end and end.status == "stopped" and now.state != "COMPLETED":
        end = None
    return report(run, note, end, said)


def _end(run: Path, note: JobNote, now: Standing) -> End | None:
    """How a job ended: its last attempt, which may have left no word, where Slurm still knows which that is."""
    return last_end(run, note.token) if now.state == "UNKNOWN" else read_end(run, f"{note.token}-{now.restarts}")


def _words(note: JobNote, now: Standing) -> str:
    again = f", restart {now.restarts}" if now.restarts != "0" else ""
    detail = f" on {now.nodes}" if now.state == "RUNNING" else f" ({now.reason})" if now.state == "PENDING" else ""
    return f"job {note.id}: {now.state.lower()}{detail}{again}"


def not_over(run: Path, note: JobNote) -> bool:
    """Whether a job waits, runs or will run again."""
    if note.cluster == "local":
        return _lives(run, note)
    return standing(note.id).state not in (*OVER, "UNKNOWN")


def cancel(run: Path, note: JobNote) -> str:
    """Asks a job to save and end. Returns what was done, in words. Raises `UserError` with scancel's complaint."""
    if note.cluster == "local":
        if not _lives(run, note):
            return f"local job {note.id} is over"
        try:
            stop_path(run, note.token).touch()
        except OSError as error:
            raise UserError(f"cancel {run}: cannot be written to: {error.strerror}") from None
        return f"asked local job {note.id} to save and stop"
    try:
        done = subprocess.run(["scancel", note.id], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"cancel {run}: no scancel here; cancel job {note.id} where Slurm is") from None
    if done.returncode:
        raise UserError(f"cancel {run}: {complaint(done.stderr) or f'scancel failed, exit code {done.returncode}'}")
    return f"cancelled job {note.id}; its ranks save if they can within the cluster's KillWait"


def _lives(run: Path, note: JobNote) -> bool:
    """Whether a local job runs. Until its ranks have the lock, or left an end, its process speaks for them."""
    if Lock(run, "-").held_by(note.token):
        return True
    # not for long: after a restart the number may be another process's
    age_s = time.time() - (job_folder(run) / "job.json").stat().st_mtime
    begun = note.host == socket.gethostname() and alive(int(note.id)) and last_end(run, note.token) is None
    return begun and age_s < COME_S


def standings(runs: Sequence[Path]) -> list[tuple[str, ...]]:
    """The rows of the table `status` prints: run, job, state, step."""
    silence: UserError | None = None

    def ask(job: str) -> Standing:
        nonlocal silence
        if silence is None:  # else every row would wait for an answer as long as the first
            try:
                return standing(job)
            except UserError as error:
                silence = error
        raise silence

    return [_row(run, ask) for run in runs]


def _row(run: Path, ask: Callable[[str], Standing]) -> tuple[str, ...]:
    try:
        note = read_note(run)
    except UserError:
        return str(run), "-", "damaged", "-"
    if note is None:
        return str(run), "-", "no job", "-"
    end = last_end(run, note.token)
    step = "-" if end is None or end.step is None else str(end.step)
    if note.cluster == "slurm":
        try:
            now = ask(note.id)
        except UserError as error:
            return str(run), f"slurm {note.id}", f"unknown: {error}", step
        if now.state not in (*OVER, "UNKNOWN"):
            return str(run), f"slurm {note.id}", _words(note, now).partition(": ")[2], step
        end = _end(run, note, now)
    if note.cluster == "local" and _lives(run, note):
        return str(run), f"local {note.id}", "running", "-"
    return str(run), f"{note.cluster} {note.id}", end.status if end else "killed", step
