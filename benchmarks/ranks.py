"""What several ranks cost: numbers on the wire, memory of task gradients, uneven work, waiting for gradients.

usage: python -m benchmarks.ranks [--worlds 2 4]

Ranks are gloo processes of this machine, one thread each. Wire and memory are counted, not timed. Uneven work is the
share of a step in which the average rank has nothing to do because another one was given more (in floating-point
operations of its real tokens, over 200 steps of the schedule at the real data's lengths). Waiting is the time a rank
spends in `wait()` for task gradients that did not arrive during the following backward.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from benchmarks.ours import OPTIMIZER
from benchmarks.workload import LENGTHS, SHAPES, TASKS, draw, draw_lengths, loss_of
from mtbert.config import EncoderConfig, EngineConfig, ScheduleConfig
from mtbert.engine import Engine, parameter_groups
from mtbert.flops import encoder_flops
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.randomness import addressed_rng
from mtbert.ranks import close_ranks, join_ranks
from mtbert.runs import Rank
from mtbert.schedule import Schedule
from mtbert.surgery import Surgery

STEPS = 5


def measure(world: int) -> dict[str, Any]:
    """Of rank 0, everything that was counted; of the schedule, how even its shares are."""
    with tempfile.TemporaryDirectory() as folder:
        context = processes.spawn(_rank, (world, Path(folder)), nprocs=world, join=False)
        assert context is not None
        while not context.join():
            pass
        counted: dict[str, Any] = torch.load(Path(folder) / "counted.pt", weights_only=True)
    return {"world": world, **counted, "uneven_work": uneven_work(world)}


def _rank(number: int, world: int, folder: Path) -> None:
    rank = Rank(number, world, number, world, f"file://{folder / 'rendezvous'}")
    shape = SHAPES["minilm"]
    join_ranks(rank, EngineConfig(threads=1))
    model = MultiTaskModel(shape, EncoderConfig(pooling="pooler"), TASKS, seed=0)
    groups = parameter_groups(model, OPTIMIZER, TASKS, shape.layers)
    shared = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("heads."))
    engine = Engine(model, groups, TASKS, EngineConfig(), OPTIMIZER, Surgery("pcgrad", {}, 0), rank)

    def step(step: int) -> None:
        batch = draw(step, 32, pool=64, alike=True)

        def build(task: str) -> torch.Tensor:
            mine = slice(number, None, world)
            packed = pack([ids for text in batch.sentences[task] for ids in text[mine]])
            return loss_of(task, engine.model(task, packed), batch.labels[task][mine]) / world

        losses = {k: [lambda task=task: build(task)] for k, task in enumerate(TASKS)}
        engine.step(step, losses)  # type: ignore[arg-type]

    step(0)
    waiting = _Waiting()
    started = time.perf_counter()
    for count in range(1, 1 + STEPS):
        step(count)
    seconds = time.perf_counter() - started
    waiting.close()
    with torch.profiler.profile(record_shapes=True) as profile:
        step(1 + STEPS)
    given = dict.fromkeys(("alltoall_base_", "_allgather_base_"), 0)
    for event in profile.events():
        kind = event.name.removeprefix("c10d::")
        if kind in given:
            given[kind] += max((int(np.prod(shape)) for shape in event.input_shapes if shape), default=0)
    if rank.first:
        record = {
            "shared": shared,
            # both collectives send (W − 1)/W of what they are given
            "sent": sum(given.values()) * (world - 1) / world,
            "sent_expected": (len(TASKS) + 1) * shared * (world - 1) / world,
            "gradient_bytes": engine.gradient_bytes,
            "seconds": seconds / STEPS,
            "waiting": waiting.seconds / seconds,
        }
        torch.save(record, folder / "counted.pt")
    close_ranks()


class _Waiting:
    """Adds up the seconds spent waiting for asynchronous all-to-alls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.collective = dist.all_to_all_single
        dist.all_to_all_single = self._call

    def close(self) -> None:
        dist.all_to_all_single = self.collective

    def _call(self, *args: Any, **options: Any) -> Any:
        work = self.collective(*args, **options)
        return _Timed(work, self) if work is not None else None


class _Timed:
    def __init__(self, work: Any, total: _Waiting) -> None:
        self.work, self.total = work, total

    def wait(self) -> None:
        started = time.perf_counter()
        self.work.wait()
        self.total.seconds += time.perf_counter() - started


def uneven_work(world: int, steps: int = 200, examples: int = 8000) -> float:
    lengths = [draw_lengths(task, examples, addressed_rng(0, "ranks", number)) for number, task in enumerate(LENGTHS)]
    schedule = Schedule(ScheduleConfig(), [texts.sum(1) for texts in lengths], [32] * len(lengths), seed=0)
    idle = []
    for step in range(steps):
        work = [_work(schedule, lengths, step, rank, world) for rank in range(world)]
        idle.append(1 - np.mean(work) / max(work))
    return float(np.mean(idle))


def _work(schedule: Schedule, lengths: Sequence[np.ndarray], step: int, rank: int, world: int) -> float:
    shares = schedule.shares(step, rank, world)
    return sum(
        encoder_flops(
            SHAPES["minilm"], torch.from_numpy(lengths[share.task][indices].ravel()), only_first=True, trained=True
        )
        for share in shares
        for indices in share.micro_batches
    )


def table(result: dict[str, Any]) -> str:
    shared = result["shared"]
    return (
        f"W = {result['world']}: sent {result['sent'] / shared:.3f}·P a step and rank, (K+1)·P·(W−1)/W is "
        f"{result['sent_expected'] / shared:.3f}·P; task gradients {result['gradient_bytes'] / shared:.2f} bytes·P; "
        f"uneven work {result['uneven_work']:.1%}; "
        f"waiting for gradients {result['waiting']:.1%} of a step of {result['seconds']:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    for world in parser.parse_args().worlds:
        print(table(measure(world)), flush=True)


if __name__ == "__main__":
    main()
