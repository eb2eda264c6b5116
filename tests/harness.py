"""Real ranks over gloo: processes that join, work, leave their result in a file, and never outlive their test.

A module of its own because the child processes import it by name, and there are several conftest.py.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.multiprocessing
from torch import distributed as dist

from mtbert.runs import Rank

PATIENCE_S = 900.0
"""How long a test waits for what must come: far more than a busy machine takes, less than torch waits for a rank."""


class Ranks(Protocol):
    """`ranks(world, function, *args)`: what `function(rank, *args)` returned on each rank, in rank order."""

    def __call__(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE_S
    ) -> list[Any]: ...


def forking_context() -> Any:
    """Processes forked from a server that has imported everything: spawned, each rank would import for five seconds.

    TorchJD is there for another reason: while a rank imports it, the garbage collector may end a DeepSpeed engine whose
    destructor imports as well, and on that Python 3.11's import lock raises KeyError (CPython gh-106176).
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchjd.aggregation", "mtbert.trainer", "deepspeed"])
    return context


def run_ranks(
    folder: Path, world: int, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE_S
) -> list[Any]:
    """What `function(rank: Rank, *args)` returned on each of `world` processes, in rank order.

    They talk through files in `folder`, which is empty. If one of them fails, the test does.
    """
    context = forking_context()
    processes = [context.Process(target=_rank, args=(rank, world, folder, function, args)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        trouble = _wait(processes, timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if trouble:
        told = "\n".join(path.read_text() for path in sorted(folder.glob("*.traceback")))
        pytest.fail(f"{trouble}\n{told}", pytrace=False)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]


def _wait(processes: list[BaseProcess], timeout: float) -> str:
    """Waits until all have ended well (returns "") or one has failed or time is up (returns what happened)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if failed := {rank: code for rank, code in enumerate(codes) if code}:
            return f"exit codes by rank: {failed}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.02)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    return f"after {timeout:g} s these ranks were still running and were killed: {late}"


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """One process: joins the group, calls the function, leaves its result or its traceback in a file."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        result = function(Rank(rank, world, rank, world, rendezvous), *args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
        # without the barrier some gloo runs abort while they end
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.traceback").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
