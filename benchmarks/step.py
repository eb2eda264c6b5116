"""A whole training step against its rivals, all taking turns in one process: means and ratios.

usage: python -m benchmarks.step [--shape minilm | base] [--rounds 12] [--batch 32]

    ours        PCGrad through DeepSpeed ZeRO-1, one rank, packed, bf16 where the CPU multiplies it
    ours, sum   the same with a plain sum instead of surgery
    bare loop   the arithmetic of `ours` without DeepSpeed
    bare sum    the same with one gradient for all tasks: no Gram matrix, no combination, nothing known of conflicts
    papers      transformers, fp32, random padded batches, PCGrad over whole gradients: what the four papers ran
    autocast    transformers, bf16 autocast, padded to the longest of the batch, no surgery
    autojac     transformers, fp32, TorchJD's Jacobian and PCGrad
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.ours import BareLoop, engine
from benchmarks.rivals import autocast, autojac, papers
from benchmarks.workload import SHAPES, draw, gemm_rate, interleave, step_flops
from mtbert.config import EngineConfig
from mtbert.ranks import choose_precision, close_ranks, join_ranks
from mtbert.runs import Rank

CLOSER = 4
"""So many times the rounds for what differs by little."""


def measure(shape_name: str, rounds: int, batch: int) -> dict[str, Any]:
    """Mean seconds of the contenders, and what follows from them. In one process group of one rank.

    All have the same examples in all, `rounds` batches of them; ours cut by length, as our schedule does it.
    """
    shape = SHAPES[shape_name]
    join_ranks(Rank(), EngineConfig())
    try:
        bare = BareLoop(shape, batch, rounds)
        dtype = choose_precision("auto", torch.device("cpu"))
        peaks: list[float] = []
        own = {
            "ours": engine(shape, "pcgrad", batch, rounds),
            "ours, sum": engine(shape, "sum", batch, rounds),
            "bare loop": bare,
            "bare sum": BareLoop(shape, batch, rounds, surgery=False),
        }
        rivals = {"gemm": lambda _: peaks.append(gemm_rate(dtype)), "autocast": autocast(shape, batch, rounds)}
        if shape_name != "base":  # these keep three padded graphs in fp32: with BERT-base's shape more than 20 GB
            rivals |= {"papers": papers(shape, batch, rounds), "autojac": autojac(shape, batch, rounds)}
        seconds = interleave(own | rivals, rounds)
        del rivals
        # what lies a few per cent apart takes more rounds to tell, and these are quick
        close = interleave(own, CLOSER * rounds)
    finally:
        close_ranks()
    del seconds["gemm"]

    def slower(one: str, other: str) -> float:
        """Median over batches: the ratio of two steps with the same batch is less noisy than that of medians."""
        return statistics.median(a / b - 1 for a, b in zip(close[one], close[other], strict=True))

    flops = sum(step_flops(shape, draw(number, batch, rounds, alike=True)) for number in bare.passes)
    # over all batches: the median of ours, which differ in length, would say nothing of the long ones
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    peak = max(peaks)
    return {
        "shape": shape_name,
        "batch": batch,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": means,
        "examples_per_second": {name: 3 * batch / mean for name, mean in means.items()},
        "times_faster": {name: mean / means["ours"] for name, mean in means.items()},
        "surgery_share": slower("ours", "ours, sum"),
        "surgery_and_its_measurements": slower("bare loop", "bare sum"),
        "deepspeed_share": slower("ours", "bare loop"),
        "gemm_peak_flops": peak,
        "model_flops_share": flops / sum(bare.passes.values()) / peak,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':<10} {'ms a step':>10} {'examples/s':>11} {'slower than ours':>17}"]
    for name, seconds in result["seconds"].items():
        rate, factor = result["examples_per_second"][name], result["times_faster"][name]
        lines.append(f"{name:<10} {1e3 * seconds:10.0f} {rate:11.1f} {factor:16.2f}×")
    lines.append(
        f"surgery {result['surgery_share']:.1%} on top of the plain sum, "
        f"{result['surgery_and_its_measurements']:.1%} with all that it needs (bare loops); "
        f"DeepSpeed {result['deepspeed_share']:+.1%} "
        f"against the bare loop; forward and backward at {result['model_flops_share']:.0%} of "
        f"{result['gemm_peak_flops'] / 1e9:.0f} GFLOP/s ({result['dtype']} GEMM, {result['threads']} threads)"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    print(table(measure(options.shape, options.rounds, options.batch)))


if __name__ == "__main__":
    main()
