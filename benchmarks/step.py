"""A whole training step against its rivals, taking turns in one process: means and ratios. On a GPU if there is one.

usage: python -m benchmarks.step [--shape minilm | base] [--rounds 12] [--batch 32] [--length T] [--json FILE]

    ours             PCGrad through DeepSpeed ZeRO-1, one rank, packed, bf16 where the device multiplies it
    ours, plain sum  the same engine with one gradient for all tasks: nothing is known of conflicts
    bare loop        the arithmetic of `ours` without DeepSpeed
    bare sum         the arithmetic of `ours, plain sum` without DeepSpeed
    papers           transformers, fp32, random padded batches, PCGrad over whole gradients: what the four papers ran
    autocast sdpa    transformers, bf16 autocast, padded to the longest of the batch, fused AdamW, no surgery
    autocast eager   the same with transformers' own attention: sdpa is slow on CPUs in bf16 with a mask
    autojac          transformers, fp32, TorchJD's Jacobian and PCGrad

On a GPU also `autocast compiled` (sdpa, torch.compile), and the memory of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch

from benchmarks import options
from benchmarks.ours import CONFIG, BareLoop, through_engine
from benchmarks.rivals import autocast, autojac, papers
from benchmarks.workload import LENGTHS, SHAPES, Batches, gemm_rate, interleave, step_flops, typical
from mtbert.encoder import EncoderShape
from mtbert.errors import count
from mtbert.ranks import choose_precision, close_ranks, join_ranks, local_device
from mtbert.runs import Rank

CLOSER = 3
"""What lies a few per cent apart takes more repeats to tell, and these are quick."""


def measure(shape_name: str, rounds: int, batch: int, length: int | None = None) -> dict[str, Any]:
    """Mean seconds of the contenders, and what follows from them. In one process group of one rank.

    All have the same examples in all, `rounds` batches of them; ours cut by length, as our schedule does it.
    """
    # the papers' stack and autojac keep three padded graphs in fp32: with BERT-base's shape more than 20 GB
    result = compare(SHAPES[shape_name], rounds, batch, length, whole_gradients=shape_name != "base")
    return {"shape": shape_name, **result}


def compare(
    shape: EncoderShape, rounds: int, batch: int, length: int | None = None, whole_gradients: bool = True
) -> dict[str, Any]:
    join_ranks(Rank(), CONFIG)
    device = local_device(Rank())
    dtype = choose_precision("auto", device)
    handed: dict[str, Batches] = {}
    memory: dict[str, int] = {}

    def contender(name: str, build: Callable[[EncoderShape, Batches], Any], alike: bool = False) -> tuple[str, Any]:
        """Built, and on a GPU stepped for what it takes there."""
        handed[name] = Batches(rounds, batch, alike, length)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        step = build(shape, handed[name])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            for number in range(min(2, rounds)):
                step(number)
            memory[name] = torch.cuda.max_memory_allocated() - before
        return name, step

    rates: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}

    def multiply(_: int) -> None:
        for kind, values in rates.items():
            values.append(gemm_rate(kind, device))

    try:
        own = dict(
            [
                contender("ours", through_engine, alike=True),
                contender("ours, plain sum", partial(through_engine, together=True), alike=True),
                contender("bare loop", BareLoop, alike=True),
                contender("bare sum", partial(BareLoop, surgery=False), alike=True),
            ]
        )
        rivals = dict(
            [
                *([contender("papers", papers), contender("autojac", autojac)] if whole_gradients else []),
                contender("autocast sdpa", partial(autocast, attention="sdpa")),
                contender("autocast eager", partial(autocast, attention="eager")),
            ]
        )
        if device.type == "cuda":
            rivals |= [contender("autocast compiled", partial(autocast, attention="sdpa", compiled=True))]
        rivals["gemm"] = multiply
        # ours, which have the same batches, are no neighbours
        mixed = dict(filter(None, chain(*zip_longest(own.items(), rivals.items()))))
        seconds = interleave(mixed, rounds, repeats=2)
        del mixed, rivals, seconds["gemm"]
        bare = own["bare loop"]
        bare.passes.clear()
        close = interleave(own, rounds, repeats=CLOSER)
    finally:
        close_ranks()

    def slower(one: str, other: str) -> float:
        """Median over batches: the ratio of two steps with the same batch is less noisy than that of medians."""
        return statistics.median(a / b - 1 for a, b in zip(close[one], close[other], strict=True))

    tokens = {name: sum(batches.tokens.values()) for name, batches in handed.items()}
    assert len(set(tokens.values())) == 1 and all(len(each.tokens) == rounds for each in handed.values()), tokens
    flops = sum(step_flops(shape, handed["ours"](number)) for number in range(rounds))
    passes = sum(typical(values) for values in bare.passes.values())
    # over all batches: the median of ours, which differ in length, would say nothing of the long ones
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    times = {name: mean / means["ours"] for name, mean in means.items()}
    peak = max(rates[dtype])
    return {
        "batch": batch,
        "length": length,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": {name: total / rounds for name, total in tokens.items()},
        "seconds": means,
        "examples_per_second": {name: len(LENGTHS) * batch / mean for name, mean in means.items()},
        "times_faster": {**times, "autocast": min(value for name, value in times.items() if "autocast" in name)},
        "surgery_share": slower("ours", "ours, plain sum"),
        "surgery_share_bare": slower("bare loop", "bare sum"),
        "deepspeed_share": slower("ours", "bare loop"),
        "gemm_peak_flops": peak,
        "gemm_peak_over_fp32": peak / max(rates[torch.float32]),
        "model_flops_share": flops / passes / peak,
        "memory_bytes": memory,
        # by batch: the first with everyone taking turns, the second ours alone, which the shares are from
        "seconds_by_batch": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
        "seconds_by_batch_close": {name: [round(value, 5) for value in values] for name, values in close.items()},
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':<18} {'ms a step':>10} {'examples/s':>11} {'slower than ours':>17}"]
    for name, seconds in result["seconds"].items():
        rate, factor = result["examples_per_second"][name], result["times_faster"][name]
        taken = f", {result['memory_bytes'][name] / 2**30:.2f} GiB" if result["memory_bytes"] else ""
        lines.append(f"{name:<18} {1e3 * seconds:10.0f} {rate:11.1f} {factor:16.2f}×{taken}")
    lines.append(
        f"surgery {result['surgery_share']:.1%} on top of one gradient for all tasks "
        f"({result['surgery_share_bare']:.1%} in bare loops); DeepSpeed {result['deepspeed_share']:+.1%} "
        f"against the bare loop; forward and backward at {result['model_flops_share']:.0%} of "
        f"{result['gemm_peak_flops'] / 1e9:.0f} GFLOP/s ({result['dtype']} GEMM, {result['gemm_peak_over_fp32']:.1f} "
        f"times fp32; {result['device']}, {result['threads']} threads); {result['tokens']['ours']:.0f} tokens a step"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("step", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=count, default=12, help="batches; everyone has each twice")
    parser.add_argument("--batch", type=count, default=32, help="examples of each task")
    parser.add_argument("--length", type=_length, help="tokens of every text; default: as in the real data")
    torch.manual_seed(0)  # the rivals' weights and dropout
    return options.run(parser, lambda o: measure(o.shape, o.rounds, o.batch, o.length), table, arguments)


def _length(text: str) -> int:
    longest = min(shape.max_positions for shape in SHAPES.values())
    if count(text) > longest:
        raise argparse.ArgumentTypeError(f"{text}: the encoder takes {longest} tokens")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
