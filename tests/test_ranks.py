"""The harness that the distributed tests stand on: it must join, return, tell and kill."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from harness import Ranks
from torch import distributed as dist

from mtbert.config import EngineConfig
from mtbert.ranks import close_ranks, join_ranks
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
