"""What is summed up between two lines of the log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtbert.data import Batch
from mtbert.engine import StepResult
from mtbert.schedule import Share


class Window:
    def __init__(self, names: Sequence[str], peak: float | None) -> None:
        self.names = names
        self.peak = peak  # FLOP/s of a rank's device, where known
        self.losses: dict[str, float] = {}  # the last means known of every task
        self._open()

    def _open(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.counts = dict.fromkeys(("seconds", "waited", "flops", "examples", "tokens", "padded", "skipped"), 0.0)

    def add(
        self,
        shares: Sequence[Share],
        batches: Sequence[Sequence[Batch]],
        result: StepResult,
        waited: float,
        seconds: float,
        flops: float,
    ) -> None:
        """`seconds` a step took, `waited` of them for its data; evaluations and saves count for neither."""
        packed = [batch.packed for of_task in batches for batch in of_task]
        new = {
            "seconds": seconds,
            "waited": waited,
            "flops": flops,
            "examples": sum(share.examples for share in shares),
            "tokens": sum(each.tokens for each in packed),
            "padded": sum(each.padded for each in packed),
            "skipped": result.skipped,
        }
        for name, value in new.items():
            self.counts[name] += value
        for task, loss in zip(result.tasks, result.losses_K.tolist(), strict=True):
            self.sums.setdefault(self.names[task], []).append(loss)

    def close(self, world: int) -> dict[str, float]:
        count = self.counts
        seconds = max(count["seconds"], 1e-9)
        self.losses |= {name: float(np.mean(values)) for name, values in self.sums.items()}
        values = {
            "speed/examples_per_second": count["examples"] / seconds,
            # this rank's tokens; the schedule gives every rank the same number to within a few per cent
            "speed/tokens_per_second": world * count["tokens"] / seconds,
            "speed/model_tflops": count["flops"] / seconds / 1e12,  # of this rank; `encoder_flops` says what is counted
            "speed/padding_avoided": 1 - count["tokens"] / max(count["padded"], 1),
            "speed/waiting_for_data": count["waited"] / seconds,
            "skipped_steps": count["skipped"],
        }
        if self.peak:
            values["speed/mfu"] = count["flops"] / seconds / self.peak
        self._open()
        return values
