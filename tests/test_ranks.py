"""The processes of a run, and the harness that the distributed tests stand on: it must join, return, tell and kill."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Ranks
from torch import distributed as dist

from mtbert.config import EngineConfig
from mtbert.errors import UserError
from mtbert.ranks import close_ranks, in_turn, join_ranks, local_device
from mtbert.runs import Rank

pytestmark = pytest.mark.ranks


def total(rank: Rank, scale: float) -> tuple[int, float, int, int]:
    value = torch.tensor(scale * (rank.rank + 1))
    dist.all_reduce(value)
    return rank.rank, value.item(), torch.get_num_threads(), os.getpid()


def fail_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        raise RuntimeError("rank 1 has had enough")
    dist.barrier()


def hang(rank: Rank) -> None:
    time.sleep(600)


def test_ranks_talk_and_return_in_order(ranks: Ranks) -> None:
    results = ranks(3, total, 2.0)
    assert [result[:3] for result in results] == [(0, 12.0, 1), (1, 12.0, 1), (2, 12.0, 1)]
    assert len({os.getpid(), *(pid for *_, pid in results)}) == 4


def test_a_failing_rank_is_told_and_the_others_end(ranks: Ranks) -> None:
    """What is told is an exit code, not that time ran out."""
    with pytest.raises(pytest.fail.Exception, match=r"(?s)by rank: .*1: 1\}.*rank 1:.*rank 1 has had enough"):
        ranks(2, fail_on_one)
    assert not multiprocessing.active_children()


def test_time_runs_out(ranks: Ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"after 2 s these ranks were still running .*: \[0, 1\]"):
        ranks(2, hang, timeout=2)
    assert not multiprocessing.active_children()


def test_ranks_meet_in_a_folder_of_any_name(tmp_path: Path) -> None:
    """# and ? would end the path of an address."""
    place = tmp_path / "lr#1 50%25?" / "rendezvous"
    place.parent.mkdir()
    threads = torch.get_num_threads()
    join_ranks(Rank(rendezvous=f"file://{place}"), EngineConfig(threads=threads))
    try:
        assert place.exists()
    finally:
        close_ranks()


@pytest.mark.parametrize(
    ("environment", "configured", "expected"),
    [(None, None, Rank().cores), ("3", None, 3), ("3,2", None, 3), ("3", 5, 5), ("many", None, Rank().cores)],
)
def test_threads_are_those_configured_or_those_of_openmp_or_the_rank_s_cores(
    environment: str | None, configured: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    try:
        join_ranks(Rank(), EngineConfig(threads=configured))
        assert torch.get_num_threads() == expected
    finally:
        close_ranks()
        torch.set_num_threads(before)


def _leave() -> None:
    """The harness's group, once all are in it: gloo fails where a peer goes while another still connects."""
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "4"}, "Slurm gave 4 GPU(s) to this job, but torch "),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, "CUDA_VISIBLE_DEVICES names 1,0, but torch "),
        ({"CUDA_VISIBLE_DEVICES": "MIG-41b35"}, "CUDA_VISIBLE_DEVICES names MIG-41b35, but torch "),
    ],
)
def test_gpus_that_were_promised_and_cannot_be_used_are_a_mistake(
    variables: dict[str, str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks may have theirs: on a CPU this one would let them wait."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if told is None:
        assert local_device(Rank()) == torch.device("cpu")
        return
    with pytest.raises(UserError) as raised:
        local_device(Rank())
    assert str(raised.value).startswith(told) and "\n" not in str(raised.value)


def test_a_rank_s_gpu_is_its_own_or_the_one_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, index in ((4, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert local_device(Rank(3, 4, 3, 4)) == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r": 4 ranks, and only 2 GPUs are visible; one rank per GPU$"):
        local_device(Rank(3, 4, 3, 4))


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [3]), ("gloo", None)])
def test_the_last_barrier_says_on_which_gpu(
    backend: str, devices: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL warns otherwise."""
    met: list[object] = []
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda device_ids=None: met.append(device_ids))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: met.append("left"))
    close_ranks()
    assert met == [devices, "left"]


def slow_first(rank: Rank, rendezvous: str) -> str:
    _leave()
    join_ranks(replace(rank, rendezvous=rendezvous), EngineConfig(threads=1), timeout_s=10)

    def make() -> str:
        time.sleep(13 if rank.first else 0)
        return f"built by {rank.rank}"

    return in_turn(rank, make)


def left_before_an_engine(rank: Rank, folder: Path) -> bool:
    """DeepSpeed is imported, for ranks are forked from a server that has, but nothing was made with it."""
    _leave()
    join_ranks(replace(rank, rendezvous=f"file://{folder / 'first'}"), EngineConfig(threads=1))
    close_ranks()
    closed = not dist.is_initialized()
    join_ranks(replace(rank, rendezvous=f"file://{folder / 'second'}"), EngineConfig(threads=1))  # the harness ends it
    return closed and "deepspeed" in sys.modules


def test_a_run_that_ends_before_its_engine_leaves_no_group(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, left_before_an_engine, tmp_path) == [True, True]


def test_ranks_wait_longer_than_a_collective_for_the_first_one_s_data(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, slow_first, f"file://{tmp_path}/rendezvous") == ["built by 0", "built by 1"]
