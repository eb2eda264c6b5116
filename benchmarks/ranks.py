"""What several ranks cost: numbers on the wire, memory of task gradients, uneven work, communication that shows.

usage: python -m benchmarks.ranks [--world 2] [--json FILE]

Ranks are gloo processes of this machine, one thread each. What is on the wire is counted from the collectives that
torch's profiler sees in a step, the memory from the tensors' sizes. Uneven work is the share of a step in which the
average rank would have nothing to do because another one was given more, if ranks met after every task; computed from
the floating-point operations of real tokens, over 200 steps of the schedule at the real data's lengths. Communication
that shows is the time that a rank's own thread spends in collectives and waiting for those that run beside the
backwards, slower ranks included.
"""

from __future__ import annotations

import cProfile
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as processes

from benchmarks import options
from benchmarks.ours import build_engine, losses_of
from benchmarks.workload import LENGTHS, SHAPES, TASKS, draw, draw_lengths
from mtbert.config import EngineConfig, ScheduleConfig
from mtbert.encoder import EncoderShape
from mtbert.errors import count
from mtbert.flops import encoder_flops
from mtbert.randomness import addressed_rng
from mtbert.ranks import close_ranks, join_ranks
from mtbert.runs import Rank
from mtbert.schedule import Schedule
from mtbert.zero import Stage1

STEPS = 5


def measure(world: int, shape: EncoderShape = SHAPES["minilm"]) -> dict[str, Any]:
    """Of rank 0, everything that was counted; of the schedule, how even its shares are."""
    with tempfile.TemporaryDirectory() as folder:
        context = processes.spawn(_rank, (world, shape, Path(folder)), nprocs=world, join=False)
        assert context is not None
        while not context.join():
            pass
        counted: dict[str, Any] = torch.load(Path(folder) / "counted.pt", weights_only=True)
    return {"world": world, **counted, "uneven_work": uneven_work(world)}


def _rank(number: int, world: int, shape: EncoderShape, folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one GPU has no room for two ranks of NCCL
    rank = Rank(number, world, number, world, f"file://{folder / 'rendezvous'}")
    join_ranks(rank, EngineConfig(threads=1))
    engine = build_engine(shape, rank)
    shared = sum(p.numel() for name, p in engine.model.named_parameters() if not name.startswith("heads."))

    def step(number: int) -> None:
        losses, word_ids = losses_of(engine.model, draw(number, 32, pool=64, alike=True), number, rank)
        engine.step(number, losses, word_ids=word_ids)

    step(0)
    profile = cProfile.Profile()
    started = time.perf_counter()
    with profile:
        for count in range(1, 1 + STEPS):
            step(count)
    seconds = time.perf_counter() - started
    with torch.profiler.profile(record_shapes=True) as events:
        step(1 + STEPS)
    if rank.first:
        counted = draw(1 + STEPS, 32, pool=64, alike=True)
        met = np.unique(np.concatenate([ids for texts in counted.sentences.values() for text in texts for ids in text]))
        unmet = shape.vocab_size - len(met)
        # of words that no rank looks up only weights travel; which they are is a number per word, all-reduced
        expected = (len(TASKS) + 1) * shared - len(TASKS) * unmet * shape.hidden_size + 2 * shape.vocab_size
        sent = numbers_sent([(event.name, event.input_shapes) for event in events.events()], world)
        record = {
            "parameters": shared,
            "sent_per_parameter": sent / shared,
            "sent_expected": expected / shared * (world - 1) / world,
            "sent_with_all_rows": (len(TASKS) + 1) * (world - 1) / world,
            "gradients_per_parameter": engine.gradient_bytes / shared / 4,  # in fp32 numbers
            "seconds": seconds / STEPS,
            "communication_that_shows": _shown(profile) / seconds,
        }
        torch.save(record, folder / "counted.pt")
    close_ranks()


def numbers_sent(events: Sequence[tuple[str, Sequence[Any]]], world: int) -> float:
    """By one rank, of all that was sent among a profile's events: name, shapes of inputs; KeyError on others."""
    others = world - 1
    per_number = {  # of a rank's input
        "gloo:send": 1,
        "gloo:recv": 0,
        "gloo:all_gather": others,
        "gloo:all_reduce": 2 * others / world,  # as a ring
        "gloo:barrier": 0,
    }
    return sum(
        per_number[name] * sum(int(np.prod(shape)) for shape in shapes)
        for name, shapes in events
        if name.startswith("gloo:")
    )


def _shown(profile: cProfile.Profile) -> float:
    """Seconds in torch's collectives (each is called through one wrapper), and in the engine's waits for gradients.

    A profile has no line for a wait itself, which is C++; it is all that its function does but call for sums.
    """
    collectives = waiting = 0.0
    for entry in profile.getstats():
        if isinstance(entry.code, str):
            continue
        if entry.code.co_filename.endswith("c10d_logger.py") and entry.code.co_name == "wrapper":
            collectives += entry.totaltime
        elif entry.code in (Stage1._receive.__code__, Stage1.shards.__code__):
            waiting += entry.inlinetime
    assert collectives and waiting, "torch or the engine calls them otherwise now"
    return collectives + waiting


def uneven_work(world: int, steps: int = 200, examples: int = 8000) -> float:
    lengths = [draw_lengths(task, examples, addressed_rng(0, "ranks", number)) for number, task in enumerate(LENGTHS)]
    schedule = Schedule(ScheduleConfig(), [texts.sum(1) for texts in lengths], [32] * len(lengths), seed=0)
    idle = []
    for step in range(steps):
        work_WK = np.array([_work(schedule, lengths, step, rank, world) for rank in range(world)])
        idle.append(1 - work_WK.mean(0).sum() / work_WK.max(0).sum())
    return float(np.mean(idle))


def _work(schedule: Schedule, lengths: Sequence[np.ndarray], step: int, rank: int, world: int) -> list[float]:
    """A rank's operations for each task of a step."""
    return [
        sum(
            encoder_flops(
                SHAPES["minilm"], torch.from_numpy(lengths[share.task][indices].ravel()), only_first=True, trained=True
            )
            for indices in share.micro_batches
        )
        for share in schedule.shares(step, rank, world)
    ]


def table(result: dict[str, Any]) -> str:
    return (
        f"W = {result['world']}: sent {result['sent_per_parameter']:.3f}·P a step and rank, "
        f"{result['sent_expected']:.3f}·P expected, {result['sent_with_all_rows']:.3f}·P with the rows of all words; "
        f"task gradients {result['gradients_per_parameter']:.2f}·P numbers of fp32; uneven work "
        f"{result['uneven_work']:.1%}; communication that shows {result['communication_that_shows']:.1%} of a step of "
        f"{result['seconds']:.2f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("ranks", __doc__)
    parser.add_argument("--world", type=count, default=2)
    return options.run(parser, lambda o: measure(o.world), table, arguments)


if __name__ == "__main__":
    sys.exit(main())
