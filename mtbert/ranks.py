"""The processes of a run: their group, their device and threads, and the precision they agree on."""

from __future__ import annotations

import datetime
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mtbert.config import EngineConfig
from mtbert.errors import UserError
from mtbert.runs import Rank, visible_gpus
from mtbert.zero import leave_group

T = TypeVar("T")


def local_device(rank: Rank) -> torch.device:
    """This rank's GPU; the CPU where there is none, or none is meant for us.

    Raises `UserError` where the environment promises GPUs that torch cannot use, or there are fewer than ranks: a rank
    that went to its CPU meanwhile would leave the others waiting in NCCL.
    """
    if not torch.cuda.is_available():
        if promise := _gpus_promised():
            raise UserError(
                f"{promise}, but torch {torch.__version__} on {socket.gethostname()} can use none: mend the driver "
                "there, install a torch built for its CUDA, or leave the GPUs out (CUDA_VISIBLE_DEVICES=)"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # a scheduler may show every rank its own GPU, or its slice of one, alone
    index = 0 if count == 1 else rank.local_rank
    if index >= count:
        raise UserError(
            f"{socket.gethostname()}: {rank.local_world} ranks, and only {count} GPUs are visible; one rank per GPU"
        )
    return torch.device("cuda", index)


def _gpus_promised() -> str:
    """What says that this process has GPUs; "" where nothing does, or they are hidden from it."""
    visible = visible_gpus()
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES names {','.join(visible)}" if visible else ""
    number = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    return "" if number in ("", "0") else f"Slurm gave {number} GPU(s) to this job"


def set_threads(rank: Rank, threads: int | None = None) -> None:
    """As many, else as the environment says, else this rank's part of the cores."""
    torch.set_num_threads(threads or _threads_told() or rank.cores)


def join_ranks(rank: Rank, config: EngineConfig, timeout_s: float = 1800) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and set the number of threads.

    Raises `UserError` where this rank's GPU cannot be used.
    """
    device = local_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.deterministic:  # torch then refuses what it cannot compute so; cuBLAS reads the variable when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    set_threads(rank, config.threads)
    place = rank.rendezvous
    if not place:
        assert rank.world == 1, "several ranks need a rendezvous"
        store: Any = {"store": dist.HashStore()}  # type: ignore[attr-defined]
    elif place.startswith("file://"):  # as an init method it would end at a # or ? in the path
        file = dist.FileStore(place.removeprefix("file://"), rank.world)  # type: ignore[attr-defined]
        file.set_timeout(datetime.timedelta(seconds=timeout_s))
        store = {"store": file}
    else:
        store = {"init_method": place}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank.rank,
        world_size=rank.world,
        timeout=datetime.timedelta(seconds=timeout_s),
        **store,
    )


@contextmanager
def told_by_first(rank: Rank, work: Callable[[], str]) -> Iterator[str]:
    """What `work` returns on the first rank, on all of them; they have not joined yet, and may during the block.

    A `UserError` of it is raised on every rank.
    """
    # where the first rank serves it, this store must be there until `join_ranks` has opened it again
    store, _, _ = next(rendezvous(rank.rendezvous, rank.rank, rank.world))
    if rank.first:
        try:
            store.set("mtbert/told", "+" + work())
        except UserError as error:
            store.set("mtbert/told", "-" + str(error))
    told = store.get("mtbert/told").decode()
    if told[0] == "-":
        raise UserError(told[1:])
    yield told[1:]


def patient_group() -> dist.ProcessGroup:
    """All ranks, with a time-out of a week: for what one may do for hours while the others wait, as a first download.

    Collective. A rank that dies ends the wait all the same: gloo loses its connection, and the watch sees it.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(weeks=1))
    return group


def _threads_told() -> int:
    """As the environment has it for every program on OpenMP; 0 where it says nothing."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isdecimal() else 0


def close_ranks() -> None:
    """Ends the process group after everyone is done; without the barrier gloo aborts at teardown now and then."""
    # NCCL's barrier is a kernel, and warns if it must guess on which GPU
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    leave_group()


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what tensors took at most, elsewhere the process as a whole, its libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # a process started by a large one begins with that one's ru_maxrss (Linux keeps it over vfork and exec)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it (elsewhere it is emulated, and slower than fp32), fp32 elsewhere."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def lowest_common(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bf16 only if every rank has chosen it: the nodes of a partition may differ."""
    fast = torch.tensor(float(dtype == torch.bfloat16), device=device)
    dist.all_reduce(fast, dist.ReduceOp.MIN)
    return torch.bfloat16 if fast else torch.float32


def in_turn(rank: Rank, make: Callable[[], T]) -> T:
    """`make()`, on each host's first rank before the others, which find the caches filled. Collective.

    A `UserError` of one rank is raised on all.
    """
    made: list[T] = []
    trouble = None
    group = patient_group()
    for turn in (True, False):
        if (rank.local_rank == 0) == turn:
            try:
                made.append(make())
            except UserError as error:
                trouble = str(error)
        troubles: list[str | None] = [None] * rank.world
        dist.all_gather_object(troubles, trouble, group=group)
        if any(troubles):
            raise UserError(next(text for text in troubles if text))
    return made[0]
