"""Step time on more ranks than this machine has: a model, and its check over a link whose bandwidth is capped.

usage: python -m benchmarks.scaling [--compute S] [--link GBIT] …    predict for 1 … 1,024 ranks
       sudo python -m benchmarks.scaling --check [--link GBIT]       against 1, 2, 4 gloo ranks here (root, Linux)

The model, per step of K tasks on W ranks, each with its own batch (weak scaling):

    backward k takes C/K; task k's gradient then needs P·b·(W−1)/W bytes on the link, sent while backward k+1 runs; two
    buffers, so backward k+2 waits for it. Then surgery, O·P/W seconds for Gram, combination and optimizer, and
    P·b·(W−1)/W bytes to gather the new weights, plus a latency for each collective. Where sockets are fed by the cores
    that compute, as with gloo, each byte costs these h seconds besides, and a backward beside a transfer is that much
    longer; with a network card that reads memory itself h is 0.

Compared with: no overlap; and surgery over whole gradients (every task all-reduced, 2·P·b·(W−1)/W bytes, Gram and
combination over P on every rank).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ours import OPTIMIZER
from benchmarks.workload import SHAPES, TASKS, draw, loss_of
from mtbert.config import EncoderConfig, EngineConfig
from mtbert.engine import Engine, parameter_groups
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.ranks import close_ranks, join_ranks
from mtbert.runs import Rank
from mtbert.surgery import Surgery

WORLDS = tuple(2**exponent for exponent in range(11))
PAYLOAD = 1448 / 1514
"""Of the bytes that a cap counts: a full Ethernet frame without the headers of Ethernet, IP and TCP."""


@dataclass(frozen=True)
class Machine:
    """What the model knows: seconds, bytes, numbers."""

    tasks: int
    parameters: int
    bytes_per_number: int
    compute: float  # seconds of a rank's K forwards and backwards
    finish: float  # seconds of Gram, combination and optimizer over all parameters
    link: float  # bytes per second that a rank can send (and receive at the same time)
    latency: float  # seconds per collective
    host: float = 0.0  # seconds of computing lost per byte sent and received, where the same cores feed the sockets


def sharded(machine: Machine, world: int, overlap: bool = True) -> float:
    """Seconds of a step as the engine does it."""
    travel = _travel(machine, world)
    backward = machine.compute / machine.tasks
    beside = machine.host * _bytes(machine, world)  # what feeding the sockets takes from the backward beside it
    ready = 0.0
    arrived = [0.0] * machine.tasks
    for task in range(machine.tasks):
        if not overlap and task:
            ready = max(ready, arrived[task - 1])
        elif task > 1:
            ready = max(ready, arrived[task - 2])
        ready += backward + (beside if overlap and task else 0.0)
        arrived[task] = max(ready, arrived[task - 1] if task else 0.0) + travel
    agree = machine.latency * (world > 1)
    return max(ready, arrived[-1]) + agree + machine.finish / world + travel


def whole(machine: Machine, world: int) -> float:
    """Seconds of a step that all-reduces every task's gradient and operates on whole ones everywhere."""
    travel = _travel(machine, world)
    return machine.compute + machine.tasks * 2 * travel + machine.finish


def _travel(machine: Machine, world: int) -> float:
    """Seconds for one all-to-all or all-gather of the parameters: as fast as the link, or as the cores can feed it."""
    return _bytes(machine, world) * max(1 / machine.link, machine.host) + machine.latency * (world > 1)


def _bytes(machine: Machine, world: int) -> float:
    """What a rank sends, and receives, in one of them."""
    return (world - 1) / world * machine.parameters * machine.bytes_per_number


def forecast(machine: Machine) -> list[dict[str, float]]:
    return [
        {
            "ranks": world,
            "sharded": sharded(machine, world),
            "no_overlap": sharded(machine, world, overlap=False),
            "whole": whole(machine, world),
            "communication": (machine.tasks + 1) * _travel(machine, world),
        }
        for world in WORLDS
    ]


def table(rows: Sequence[dict[str, float]], machine: Machine) -> str:
    lines = [f"{'ranks':>6} {'a step':>10} {'no overlap':>11} {'whole gradients':>16} {'scaling':>8}"]
    for row in rows:
        efficiency = rows[0]["sharded"] / row["sharded"]
        lines.append(
            f"{row['ranks']:6.0f} {1e3 * row['sharded']:7.0f} ms {1e3 * row['no_overlap']:8.0f} ms "
            f"{1e3 * row['whole']:13.0f} ms {efficiency:8.0%}"
        )
    travel = machine.tasks * _travel(machine, WORLDS[-1])
    needed = machine.tasks * machine.parameters * machine.bytes_per_number / machine.compute
    lines.append(
        f"gradients need {1e3 * travel:.0f} ms on the link, the backwards {1e3 * machine.compute:.0f} ms: "
        f"communication {'overtakes' if travel > machine.compute else 'stays below'} computation; they meet at "
        f"{8e-9 * needed:.2f} Gbit/s"
    )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- the check


def check(gbit: float, shape: str, rounds: int) -> dict[str, Any]:
    """Measured and predicted seconds of a step for 1, 2 and 4 ranks, each behind a link of so many Gbit/s.

    All ranks share this machine's cores, one thread each, and a global batch of 96 examples. What the model is given:
    the seconds of the backwards, measured with as many ranks at work and nothing sent, so that it holds what they
    take from each other; the CPU seconds that a byte costs, measured with nothing computed; and what one rank needs
    to finish a step, times the ranks that share a core. What it is held to: how these overlap.
    """
    cores = os.cpu_count() or 1
    rows, finish = [], 0.0
    for world in (1, 2, 4):
        measured = _run_ranks(world, gbit, shape, rounds)
        crowding = max(1.0, world / cores)
        if world == 1:
            finish = measured["seconds"] - measured["compute"]
        machine = Machine(
            tasks=len(TASKS),
            parameters=measured["shared"],
            bytes_per_number=measured["bytes"],
            compute=measured["compute"],
            finish=finish * crowding,
            link=gbit * 1e9 / 8 * PAYLOAD,
            latency=0.0,
            host=measured["host"] * crowding,
        )
        predicted = sharded(machine, world)
        rows.append(
            {
                "ranks": world,
                "measured": measured["seconds"],
                "predicted": predicted,
                "error": predicted / measured["seconds"] - 1,
                "machine": asdict(machine),
            }
        )
    return {"gbit": gbit, "rows": rows}


def _run_ranks(world: int, gbit: float | None, shape: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _namespaces(world, gbit) as names:
        command = [sys.executable, "-m", "benchmarks.scaling", "--rank-in", folder, "--shape", shape]
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "--rounds", str(rounds), "--rank", str(number), str(world)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            )
            for number, name in enumerate(names)
        ]
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with exit codes {codes}")
        answer: dict[str, Any] = json.loads((Path(folder) / "answer.json").read_text())
        return answer


@contextmanager
def _namespaces(world: int, gbit: float | None) -> Iterator[list[str]]:
    """Network namespaces on one bridge, 10.98.0.1 … on `eth0`; both directions capped."""
    bridge, names = f"mtb{os.getpid() % 10000}", [f"mtbench-{os.getpid()}-{number}" for number in range(world)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            outside = f"{bridge}-{number}"
            ip("netns", "add", name)
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outside, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"10.98.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            if gbit is not None:
                cap = ["root", "tbf", "rate", f"{round(1000 * gbit)}mbit", "burst", "1mb", "latency", "200ms"]
                subprocess.run(["tc", "qdisc", "add", "dev", outside, *cap], check=True)
                subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", *cap], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def _rank(number: int, world: int, folder: Path, shape_name: str, rounds: int) -> None:
    shape = SHAPES[shape_name]
    rank = Rank(number, world, 0, 1, "tcp://10.98.0.1:29871")
    join_ranks(rank, EngineConfig(threads=1))
    model = MultiTaskModel(shape, EncoderConfig(pooling="pooler"), TASKS, seed=0)
    groups = parameter_groups(model, OPTIMIZER, TASKS, shape.layers)
    shared = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("heads."))
    engine = Engine(model, groups, TASKS, EngineConfig(), OPTIMIZER, Surgery("pcgrad", {}, 0), rank)

    def losses(turn: int) -> dict[int, list[Callable[[], torch.Tensor]]]:
        batch = draw(turn % rounds, 32, pool=rounds, alike=True)

        def build(task: str) -> torch.Tensor:
            mine = slice(number, None, world)
            packed = pack([ids for text in batch.sentences[task] for ids in text[mine]])
            return loss_of(task, engine.model(task, packed), batch.labels[task][mine]) / world

        return {k: [partial(build, task)] for k, task in enumerate(TASKS)}

    def backwards(turn: int) -> None:
        for (build,) in losses(turn).values():
            build().backward()

    totals, passes = [], []
    for turn in range(rounds + 2):
        # both see every batch, half of them apart: who comes second with one finds its products prepared
        passes.append(_until_all_are_done(backwards, turn + rounds // 2))
        totals.append(_until_all_are_done(lambda turn: engine.step(turn, losses(turn)), turn))
    record = {
        "seconds": statistics.mean(totals[2:]),
        "compute": statistics.mean(passes[2:]),
        "host": _seconds_per_byte(shared // world * world, engine.dtype),
        "shared": shared,
        "bytes": engine.dtype.itemsize,
    }
    if rank.first:
        (folder / "answer.json").write_text(json.dumps(record))
    close_ranks()


def _until_all_are_done(work: Callable[[int], object], turn: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    work(turn)
    dist.barrier()
    return time.perf_counter() - started


def _seconds_per_byte(numbers: int, dtype: torch.dtype, rounds: int = 5) -> float:
    """CPU seconds of this process, the system's for it included, per byte sent; as many come in meanwhile."""
    if dist.get_world_size() == 1:
        return 0.0
    sent, received = torch.zeros(numbers, dtype=dtype), torch.empty(numbers, dtype=dtype)
    dist.all_to_all_single(received, sent)
    started = time.process_time()
    for _ in range(rounds):
        dist.all_to_all_single(received, sent)
    share = 1 - 1 / dist.get_world_size()
    return (time.process_time() - started) / (rounds * sent.nbytes * share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="of the check")
    parser.add_argument("--compute", type=float, default=0.05, help="seconds of a rank's forwards and backwards")
    parser.add_argument(
        "--finish", type=float, default=0.005, help="seconds of Gram, combination, optimizer on one rank"
    )
    parser.add_argument("--parameters", type=float, default=110e6)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=2, help="per number on the wire")
    parser.add_argument("--link", type=float, help="Gbit/s per rank; default 100, for the check 1")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds per collective")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        _rank(*options.rank, options.rank_in, options.shape, options.rounds)
    elif options.check:
        result = check(options.link or 1.0, options.shape, options.rounds)
        for row in result["rows"]:
            print(
                f"{row['ranks']} rank(s) at {result['gbit']:g} Gbit/s: measured {1e3 * row['measured']:.0f} ms, "
                f"predicted {1e3 * row['predicted']:.0f} ms ({row['error']:+.0%})"
            )
    else:
        machine = Machine(
            options.tasks,
            int(options.parameters),
            options.bytes,
            options.compute,
            options.finish,
            (options.link or 100.0) * 1e9 / 8,
            options.latency,
        )
        print(table(forecast(machine), machine))


if __name__ == "__main__":
    main()
