"""Step time on more ranks than this machine has: a model, and its check over links whose bandwidth is capped.

usage: python -m benchmarks.scaling --compute S --finish S [--link GBIT] …    predict for 1 … 1,024 ranks
       sudo python -m benchmarks.scaling --check [--links GBIT …]             against 1, 2, 4 gloo ranks here

The model, per step of K tasks on W ranks, each with its own batch (weak scaling):

    backward k takes C/K; task k's gradient then needs P·b·(W−1)/W bytes on the link, sent while backward k+1 runs; two
    buffers, so backward k+2 waits for it. Then surgery, O·P/W seconds for Gram, combination and optimizer, and
    P·b·(W−1)/W bytes to gather the new weights. Each exchange and each gathering costs W − 1 messages' latency besides.
    All ranks have links of their own that are equally fast: nodes whose ranks share a network card are not modelled.
    The rows of all words take part, as on GPUs; on CPUs the trainer leaves out those that no rank looks up.

Compared with: no overlap; and surgery over whole gradients (every task all-reduced, 2·P·b·(W−1)/W bytes, Gram and
combination over P on every rank), with and without overlap.

The check takes each part by itself (backwards with nothing sent, Gram to optimizer with nothing sent, gathering with
nothing computed), the bytes of an exchange and the cap of the link; what it holds the model to is the whole step, that
is how these overlap. Of one rank it says nothing but that the parts add up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
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

from benchmarks.options import amount
from benchmarks.ours import OPTIMIZER
from benchmarks.workload import SHAPES, TASKS, draw, loss_of
from mtbert.config import EncoderConfig, EngineConfig
from mtbert.engine import Engine, combine, gram, parameter_groups
from mtbert.errors import CommandLine, count
from mtbert.heads import MultiTaskModel
from mtbert.packing import pack
from mtbert.ranks import close_ranks, join_ranks
from mtbert.runs import Rank
from mtbert.surgery import Surgery
from mtbert.zero import exchange, sum_ranks

WORLDS = tuple(2**exponent for exponent in range(11))
PAYLOAD = 1448 / 1514
"""Of the bytes that a cap counts: a full Ethernet frame without the headers of Ethernet, IP and TCP."""


@dataclass(frozen=True)
class Parts:
    """Seconds of what a step consists of, each by itself."""

    tasks: int
    backward: float  # forward and backward of one task
    exchange: float  # one task's gradient on its way
    finish: float  # sums of what arrived, Gram, combination, optimizer
    gather: float  # the new weights on their way
    feeding: float = 0.0  # what an exchange takes from a backward beside it, where the same cores feed the sockets


def step(parts: Parts, overlap: bool = True) -> float:
    """Seconds of a step: an exchange runs beside the next backward, the backward after that waits for its buffer."""
    ready = 0.0
    arrived = [0.0] * parts.tasks
    for task in range(parts.tasks):
        before = task - 2 if overlap else task - 1
        if before >= 0:
            ready = max(ready, arrived[before])
        ready += parts.backward + (parts.feeding if overlap and task else 0.0)
        arrived[task] = max(ready, arrived[task - 1] if task else 0.0) + parts.exchange
    return arrived[-1] + parts.finish + parts.gather


@dataclass(frozen=True)
class Machine:
    """What a forecast is made from: seconds, bytes, numbers."""

    tasks: int
    parameters: int
    bytes_per_number: int
    compute: float  # seconds of a rank's K forwards and backwards
    finish: float  # seconds of Gram, combination and optimizer over all parameters
    link: float  # bytes per second that a rank can send (and receive at the same time)
    latency: float  # seconds per message

    def parts(self, world: int, sharded: bool = True) -> Parts:
        share = (world - 1) / world
        travel = share * self.parameters * self.bytes_per_number / self.link + self.latency * (world - 1)
        backward = self.compute / self.tasks
        if sharded:
            return Parts(self.tasks, backward, travel, self.finish / world, travel)
        return Parts(self.tasks, backward, 2 * travel, self.finish, 0.0)


def forecast(machine: Machine) -> list[dict[str, float]]:
    rows = []
    for world in WORLDS:
        row: dict[str, float] = {"ranks": world}
        for name, sharded in (("sharded", True), ("whole", False)):
            parts = machine.parts(world, sharded)
            row[name] = step(parts)
            row[f"{name}, no overlap"] = step(parts, overlap=False)
        rows.append(row)
    return rows


WAYS = ("sharded", "sharded, no overlap", "whole", "whole, no overlap")


def table(machine: Machine) -> str:
    rows = forecast(machine)
    lines = [f"{'ranks':>6}" + "".join(f"{way:>22}" for way in WAYS) + f"{'scaling':>9}"]
    for row in rows:
        times = "".join(f"{1e3 * row[way]:19.0f} ms" for way in WAYS)
        lines.append(f"{row['ranks']:6.0f}{times}{rows[0]['sharded'] / row['sharded']:9.0%}")
    for way in WAYS:
        sharded = way.startswith("sharded")
        overtaken = [
            row["ranks"]
            for row in rows
            if row[way] - machine.compute - machine.parts(int(row["ranks"]), sharded).finish > machine.compute
        ]
        told = f"from {overtaken[0]:.0f} ranks on" if overtaken else "nowhere"
        lines.append(f"{way}: communication that shows exceeds computation {told}")
    needed = machine.tasks * machine.parameters * machine.bytes_per_number / machine.compute
    lines.append(f"the backwards hide the exchanges of many ranks behind links of {8e-9 * needed:.2f} Gbit/s or more")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- the check


def check(links: Sequence[float], shape: str, rounds: int) -> list[dict[str, Any]]:
    """Measured and predicted seconds of a step for 1, 2 and 4 ranks behind links of so many Gbit/s.

    All ranks share this machine's cores, one thread each, and a global batch of 96 examples; so the parts are measured
    with as many ranks at work as there are in the step.
    """
    rows = []
    for world in (1, 2, 4):
        for gbit in links if world > 1 else links[-1:]:
            record = _run_ranks(world, gbit, shape, rounds)
            sent = (world - 1) / world * record["shared"] * record["bytes"]
            crowding = max(1.0, world / len(os.sched_getaffinity(0)))
            parts = Parts(
                tasks=len(TASKS),
                backward=record["backwards"] / len(TASKS),
                exchange=sent / (gbit * 1e9 / 8 * PAYLOAD),
                finish=record["finish"],
                gather=record["gather"],
                feeding=record["feeding"] * crowding,
            )
            predicted, measured = step(parts), record["step"]
            row = {"ranks": world, "gbit": gbit, "measured": measured, "predicted": predicted}
            rows.append({**row, "error": predicted / measured - 1, "exchange": record["exchange"], **asdict(parts)})
            print(told(rows[-1]), flush=True)
    return rows


def told(row: dict[str, Any]) -> str:
    return (
        f"{row['ranks']} rank(s) at {row['gbit']:g} Gbit/s: measured {1e3 * row['measured']:.0f} ms, "
        f"predicted {1e3 * row['predicted']:.0f} ms ({row['error']:+.0%}), from backwards of "
        f"{1e3 * row['tasks'] * row['backward']:.0f} and {1e3 * row['finish']:.0f} to finish"
    )


def _run_ranks(world: int, gbit: float, shape: str, rounds: int) -> dict[str, Any]:
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
            while not any(codes := [process.poll() for process in processes]) and None in codes:
                time.sleep(0.1)  # one that dies leaves the others waiting for it
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with exit codes {codes}")
        answer: dict[str, Any] = json.loads((Path(folder) / "answer.json").read_text())
        return answer


_ATTEMPTS = itertools.count()


@contextmanager
def _namespaces(world: int, gbit: float) -> Iterator[list[str]]:
    """Network namespaces on one bridge, 10.98.0.1 … on `eth0`; both directions capped."""
    own = f"{os.getpid() % 10000}-{world}-{next(_ATTEMPTS)}"  # names of a link have 15 characters at most
    bridge, names = f"mtb{own}", [f"mtbench-{own}-{number}" for number in range(world)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("link", "add", bridge, "type", "bridge")
    try:
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            outside = f"m{own}-{number}"
            ip("netns", "add", name)
            ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outside, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"10.98.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
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
    engine = Engine(model, groups, dict.fromkeys(TASKS, 1.0), EngineConfig(), OPTIMIZER, Surgery("pcgrad", {}, 0), rank)

    def losses(turn: int) -> dict[int, list[Callable[[], torch.Tensor]]]:
        batch = draw(turn % rounds, 32, pool=rounds, alike=True)

        def build(task: str) -> torch.Tensor:
            mine = slice(number, None, world)
            packed = pack([ids for text in batch.sentences[task] for ids in text[mine]])
            return loss_of(task, engine.model(task, packed), batch.labels[task][mine]) / world

        return {k: [partial(build, task)] for k, task in enumerate(TASKS)}

    views = _views(engine.model)

    def backwards(turn: int) -> None:
        for (build,) in losses(turn).values():
            for parameter, view in views:  # as the engine does: gradients are there, and zero, before each backward
                view.zero_()
                parameter.grad = view
            build().backward()

    seconds: dict[str, list[float]] = {"step": [], "backwards": [], "finish": []}
    finish = _Finish(shared // world, engine.dtype, world)
    for turn in range(rounds + 2):
        # both see every batch, half of them apart: who comes second with one finds its products prepared
        for name, work in (
            ("backwards", partial(backwards, turn + rounds // 2)),
            ("step", partial(engine.step, turn, losses(turn))),
            ("finish", finish),
        ):
            dist.barrier()
            started = time.perf_counter()
            work()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    record = {name: statistics.mean(values[2:]) for name, values in seconds.items()}
    record |= {"shared": shared, "bytes": engine.dtype.itemsize, **_travel(shared // world, engine.dtype)}
    if rank.first:
        (folder / "answer.json").write_text(json.dumps(record))
    close_ranks()


def _views(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    return [(parameter, torch.zeros_like(parameter)) for parameter in model.parameters()]


class _Finish:
    """What nothing hides, without the gathering: sums of what arrived, Gram, combination, AdamW, rounded weights."""

    def __init__(self, numbers: int, dtype: torch.dtype, world: int) -> None:
        self.sent_WS = torch.zeros(world, numbers, dtype=dtype)
        self.received = torch.zeros(world - 1, numbers, dtype=dtype)
        self.shards_KS = torch.randn(len(TASKS), numbers) * 1e-3
        self.master = torch.zeros(numbers)
        self.master.grad = torch.zeros(numbers)
        self.rounded = torch.zeros(numbers, dtype=dtype)
        self.optimizer = torch.optim.AdamW([self.master], lr=1e-5, fused=True)

    def __call__(self) -> None:
        if len(self.received):
            for shard in self.shards_KS:
                sum_ranks(self.received, self.sent_WS.unbind(), shard)
        gram(self.shards_KS)
        assert self.master.grad is not None
        combine(self.shards_KS, torch.ones(len(TASKS)), out=self.master.grad)
        self.optimizer.step()
        self.rounded.copy_(self.master)


def _travel(numbers: int, dtype: torch.dtype, rounds: int = 4) -> dict[str, float]:
    """Seconds of an exchange and a gathering with nothing computed, and CPU seconds of an exchange."""
    world = dist.get_world_size()
    if world == 1:
        return dict.fromkeys(("exchange", "gather", "feeding"), 0.0)
    sent_WS = torch.zeros(world, numbers, dtype=dtype)
    received = torch.zeros(world - 1, numbers, dtype=dtype)

    def swap() -> None:
        for work in exchange(received, sent_WS.unbind()):
            work.wait()

    found = {}
    for name, work in (
        ("exchange", swap),
        ("gather", lambda: dist.all_gather_into_tensor(sent_WS.view(-1), received[0])),
    ):
        work()
        dist.barrier()
        started, busy = time.perf_counter(), time.process_time()
        for _ in range(rounds):
            work()
        found[name] = (time.perf_counter() - started) / rounds
        if name == "exchange":
            found["feeding"] = (time.process_time() - busy) / rounds
    return found


def main() -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute", type=amount, help="seconds of a rank's forwards and backwards, all tasks")
    parser.add_argument("--finish", type=amount, help="seconds of Gram, combination, optimizer on one rank")
    parser.add_argument("--parameters", type=amount, default=22.7e6)
    parser.add_argument("--tasks", type=count, default=3)
    parser.add_argument("--bytes", type=int, choices=(2, 4), default=2, help="per number on the wire")
    parser.add_argument("--link", type=amount, default=100.0, help="Gbit/s per rank")
    parser.add_argument("--latency", type=amount, default=20e-6, help="seconds per message")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--links", type=amount, nargs="+", default=[0.25, 1.0, 4.0], help="Gbit/s, of the check")
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="of the check")
    parser.add_argument("--rounds", type=count, default=12, help="of the check")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        _rank(*options.rank, options.rank_in, options.shape, options.rounds)
    elif options.check:
        if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
            parser.error("--check caps links between network namespaces: it needs root, and ip and tc (iproute2)")
        check(options.links, options.shape, options.rounds)
    elif options.compute and options.finish:
        print(
            table(
                Machine(
                    options.tasks,
                    int(options.parameters),
                    options.bytes,
                    options.compute,
                    options.finish,
                    options.link * 1e9 / 8,
                    options.latency,
                )
            )
        )
    else:
        parser.error("--compute and --finish: what one rank needs (--check tells it for this machine)")


if __name__ == "__main__":
    main()
