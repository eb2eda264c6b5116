"""Small functions with the trainer's signature, for what the launcher does around any of them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.runs import Outcome, Rank

Stop = Callable[[], bool]
Launch = Callable[..., "subprocess.Popen[str]"]


def tell(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    """Every rank writes down where it stands; the first also speaks."""
    import mtbert

    (run / f"seen{rank.rank}").write_text(f"{rank.rank}/{rank.world} {rank.rendezvous} {Path(mtbert.__file__).parent}")
    if not quiet:
        print("terminal" if sys.stdout.isatty() else "no terminal", os.environ["OMP_NUM_THREADS"])
        print("words of rank", rank.rank)
    return Outcome("finished", 7, {"accuracy": 0.5})


def rank_1_fails(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    if rank.rank == 1:
        raise ZeroDivisionError("the flaw in rank 1")
    time.sleep(3600)
    raise AssertionError("nobody ended this rank")


def rank_1_is_killed(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
    raise AssertionError("nobody ended this rank")


def rank_1_is_killed_when_the_disk_is_full(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    if rank.first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file takes a byte
        (run / "full").touch()
        time.sleep(3600)
        raise AssertionError("nobody ended this rank")
    while not (run / "full").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed_inside_a_collective(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    import torch
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=rank.rendezvous, rank=rank.rank, world_size=rank.world)
    dist.all_reduce(torch.ones(1))
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    raise AssertionError("the collective went on without rank 1")


def rank_1_finds_a_mistake(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    if rank.rank == 1:
        raise UserError("train.csv line 3: label 7 is not in 0 … 4")
    time.sleep(3600)
    raise AssertionError("nobody ended this rank")


def until_stopped(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    """Steps until asked to stop; leaves what a save would."""
    step = 0
    while not stop():
        step += 1
        write_atomically(run / f"step{rank.rank}", str(step))  # it is read meanwhile
        time.sleep(0.01)
    (run / f"saved{rank.rank}").write_text(str(step))
    return Outcome("stopped", step, {})


def speaks_until_stopped(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    """For a minute at most: where its test fails, nobody may be left to ask."""
    step = 0
    while not stop() and step < 6000:
        step += 1
        print("step", step)
        time.sleep(0.01)
    (run / f"saved{rank.rank}").write_text(str(step))
    return Outcome("stopped", step, {})


def never_stops(run: Path, rank: Rank, stop: Stop, quiet: bool) -> Outcome:
    (run / f"pid{rank.rank}").write_text(str(os.getpid()))
    time.sleep(3600)
    raise AssertionError("nobody ended this rank")
