"""Runs a job on this machine through submitit's local executor and shows rank 0 live."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import submitit

from launch.job import Job, Train
from launch.records import (
    End,
    JobNote,
    job_folder,
    last_end,
    log_path,
    snapshot_code,
    stop_path,
    writable_by_me_alone,
    write_note,
    writing_to,
)
from launch.show import Tail, Unwatched, length, show, tell
from mtbert.errors import UserError
from mtbert.runs import visible_gpus
from mtbert.stops import stop_requests

POLL_S = 0.05
DRIVER_S = 60.0
"""How long nvidia-smi may take to list the GPUs; it hangs where the driver does."""
YEAR_MIN = 60 * 24 * 365
SHOW_CURSOR = b"\x1b[?25h"


def run_here(
    run: Path,
    nodes: int,
    ranks_per_node: int,
    gpus: int = 0,
    train: Train | None = None,
    begun: Callable[[], object] = lambda: None,
) -> tuple[JobNote, End | None]:
    """Starts nodes × ranks_per_node processes on this machine and shows rank 0's output until they have ended.

    Ctrl-C, or the loss of whoever reads that, asks them to save and stop; a second Ctrl-C kills them.

    Args:
        begun: called when the job is there; what goes wrong before may be taken back.

    Returns: the job and how it ended; None when no rank could say (they were killed).

    Raises `UserError` where the run folder cannot be written to.
    """
    token = secrets.token_hex(4)
    terminal = shutil.get_terminal_size()
    shown = (terminal.lines, terminal.columns) if sys.stdout.isatty() else None
    start = f"{shlex.quote(sys.executable)} {shlex.quote(str(snapshot_code(run)))}/launch/start.py"
    executor = submitit.LocalExecutor(job_folder(run), python=f"env -u PYTHONSAFEPATH {start}")
    world = nodes * ranks_per_node
    executor.update_parameters(
        tasks_per_node=world, gpus_per_node=gpus, visible_gpus=gpu_numbers(gpus), timeout_min=YEAR_MIN
    )
    tail = Tail(log_path(run), length(log_path(run)))
    interrupts: list[signal.Signals] = []
    with stop_requests(lambda number, _: interrupts.append(number), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # inherited: the Ctrl-C of a terminal reaches children too, and would end them
        with writable_by_me_alone(), _interrupts_ignored(), _safe_path(), writing_to(run):
            job = executor.submit(Job(run.resolve(), token, shown, train))
        note = JobNote("local", job.job_id, token, socket.gethostname(), nodes, ranks_per_node, gpus > 0)
        try:
            with writing_to(run):
                write_note(run, note)
        except BaseException:
            end_at_once(job)
            raise
        begun()
        while not job.done():
            try:
                tail.copy()
            except Unwatched:
                tell(f"\nnobody reads the output any more; continue with: {note.again(run)}")
                if not interrupts:
                    signal.raise_signal(signal.SIGTERM)  # with the SIGHUP of a closed terminal it is one request
            if interrupts and not stop_path(run, token).exists():
                stop_path(run, token).touch()
                tell("\nsaving and stopping; Ctrl-C again ends it at once")
            if len(interrupts) > 1:
                end_at_once(job)
            time.sleep(POLL_S)
    with contextlib.suppress(Unwatched):
        tail.copy()
        if shown:
            show(SHOW_CURSOR)
    for suffix in ("rendezvous", "stop"):  # torch leaves the file in which the ranks met
        (job_folder(run) / f"{token}.{suffix}").unlink(missing_ok=True)
    end = last_end(run, token)
    if end is None and interrupts:
        end = End("stopped", 0, socket.gethostname())
    return note, end


def gpus_here() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves us, without importing torch."""
    if (visible := visible_gpus()) is not None:
        return len(visible)
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=DRIVER_S)
    except subprocess.TimeoutExpired:
        print(f"nvidia-smi does not answer within {DRIVER_S:g} s, so no GPU is used", file=sys.stderr)
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def gpu_numbers(gpus: int) -> tuple[int, ...]:
    """Those that a job which wants `gpus` may take, as CUDA_VISIBLE_DEVICES has them; where it is unset none, and
    submitit counts from 0. Raises `UserError` for names that are no numbers: submitit takes no others.
    """
    visible = visible_gpus()
    if not gpus or visible is None:
        return ()
    if wrong := [name for name in visible if not name.isdecimal()]:
        raise UserError(f"CUDA_VISIBLE_DEVICES: {wrong[0]}: local jobs need device numbers, such as 0,1")
    return tuple(int(name) for name in visible)


def end_at_once(job: submitit.LocalJob[None]) -> None:
    """Kills the controller; the ranks see it gone and follow."""
    job._process.kill()
    job._process.wait()


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """submitit starts its controller by `python -m`, which would import what lies in the working directory. (Python
    3.10 does all the same.) Not for the ranks: start.py of a run folder counts on its entry in the path."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
