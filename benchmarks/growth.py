"""What surgery costs as tasks are added, the gradients being there: Gram matrix, weights and combination.

usage: python -m benchmarks.growth [--rounds 9] [--parameters 22700000] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import options
from benchmarks.workload import interleave
from mtbert.engine import combine, gram
from mtbert.errors import count
from mtbert.ranks import choose_precision, local_device
from mtbert.runs import Rank
from mtbert.surgery import Surgery

TASKS = (2, 4, 8, 16)


def measure(rounds: int, parameters: int) -> dict[str, Any]:
    """Median seconds by number of tasks, PCGrad."""
    device = local_device(Rank())
    dtype = choose_precision("auto", device)
    gradients_KP = torch.randn(max(TASKS), parameters, dtype=torch.bfloat16, device=device).to(dtype)
    combined = torch.empty(parameters, device=device)
    surgery = Surgery("pcgrad", {}, 0)

    def operate(tasks: int) -> Callable[[int], None]:
        def step(number: int) -> None:
            gram_KK = gram(gradients_KP[:tasks])
            combine(gradients_KP[:tasks], surgery.weights(gram_KK.float(), number, tuple(range(tasks))), out=combined)

        return step

    seconds = interleave({str(tasks): operate(tasks) for tasks in TASKS}, rounds)
    medians = {tasks: statistics.median(values) for tasks, values in seconds.items()}
    return {"parameters": parameters, "seconds": medians, "growth_16_over_4": medians["16"] / medians["4"]}


def table(result: dict[str, Any]) -> str:
    lines = [f"K = {tasks:>2}: {1e3 * seconds:7.1f} ms" for tasks, seconds in result["seconds"].items()]
    return "\n".join([*lines, f"K = 16 over K = 4: {result['growth_16_over_4']:.2f}×"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("growth", __doc__)
    parser.add_argument("--rounds", type=count, default=9)
    parser.add_argument("--parameters", type=count, default=22_700_000)
    return options.run(parser, lambda o: measure(o.rounds, o.parameters), table, arguments)


if __name__ == "__main__":
    sys.exit(main())
