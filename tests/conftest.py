"""Fixtures every room uses: a generated corpus, the real data where they lie, and real ranks over gloo."""

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
from hypothesis import settings
from torch import distributed as dist

from mtbert import synthetic
from mtbert.runs import Rank

ROOT = Path(__file__).parent.parent

# no deadline: a busy machine is no failure; derandomised: what passed once on a commit passes again
settings.register_profile("mtbert", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mtbert")


class Ranks(Protocol):
    """`ranks(world, function, *args)`: what `function(rank, *args)` returned on each rank, in rank order."""

    def __call__(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]: ...


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated corpus: {sst,quora,sts}-{train,dev}.csv. Shared by the session: only read it."""
    return synthetic.generate(tmp_path_factory.mktemp("corpus"), seed=0, train=200, dev=60)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets, which are not part of the repository."""
    directory = ROOT.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"the real data are absent: {directory} is no folder")
    return directory


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Runs `function(rank: Rank, *args)` on real processes joined over gloo; may be called several times in a test.

    The function lies at the top level of its test module, the arguments and the result can be pickled. The process
    group is up when it starts. A rank that fails, fails the test with its traceback; the others are then killed, as
    they are after `timeout` seconds.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        context = torch.multiprocessing.get_context("spawn")
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

    return run


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
