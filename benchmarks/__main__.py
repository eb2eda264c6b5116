"""The table of docs/performance.md, measured: printed, written there, and JSON beside it.

usage: make bench            (python -m benchmarks [--parts NAME …] [--json FILE])

Takes about 40 minutes on two quiet cores; another process on either core ruins it. Ratios of one run mean something,
absolute numbers of a shared machine do not. Parts on a GPU are left out where there is none. Without names,
`--parts` measures nothing and writes the page's table from what was measured before.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from benchmarks import options
from mtbert.errors import UserError

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START, END = "<!-- measured: `python -m benchmarks` writes what follows -->\n\n", "<!-- end of what is measured -->\n"

PARTS: dict[str, str] = {
    "minilm": "step --shape minilm --rounds 12",
    "base": "step --shape base --rounds 8",
    "growth": "growth",
    "ranks2": "ranks --world 2",
    "ranks4": "ranks --world 4",
    "data": "data --examples 10000000",
    "gpu": "step --shape base --batch 64",
    "gpu128": "step --shape base --batch 64 --length 128",
}
"""The module of each and its options, in a process of its own: none inherits another's memory or threads. Those that
begin with gpu need one, the others see none."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what is aimed at and where in the record it is found."""

    what: str
    path: str
    form: str
    bar: float | None = None
    sign: str = "≤"
    unit: float = 1.0  # what the record's number is divided by

    def line(self, record: dict[str, Any]) -> str:
        aim = "" if self.bar is None else f"{self.sign} {self.form.format(self.bar)}"
        found = reduce(lambda inside, key: (inside or {}).get(key), self.path.split("."), record)
        told = "not measured"
        if found is not None:
            value = found / self.unit
            told = self.form.format(value)
            # a miss that the figures do not show is none: ranks also send a few numbers beside the gradients
            if self.bar is not None and told != self.form.format(self.bar) and (value > self.bar) == (self.sign == "≤"):
                told += " (missed)"
        return f"| {self.what} | {aim} | {told} |"


def _gpu_rows(part: str, lengths: str) -> list[Row]:
    what = f"GPU, BERT-base shape, 64 per task, {lengths}"
    return [
        Row(f"{what}: examples a second", f"{part}.examples_per_second.ours", "{:,.0f}"),
        Row(f"{what}: share of the GEMM peak, forward + backward", f"{part}.model_flops_share", "{:.0%}"),
        Row(f"{what}: surgery on top of one gradient for all tasks", f"{part}.surgery_share", "{:.1%}", 0.05),
        Row(f"{what}: against autocast, padded, the fastest", f"{part}.times_faster.autocast", "{:.1f}×"),
        Row(f"{what}: the same compiled", f"{part}.times_faster.autocast compiled", "{:.1f}×"),
        Row(f"{what}: memory, GiB", f"{part}.memory_bytes.ours", "{:.1f}", unit=2**30),
        Row(f"{what}: memory of autocast, GiB", f"{part}.memory_bytes.autocast sdpa", "{:.1f}", unit=2**30),
    ]


ROWS = [
    Row("against the papers' stack, PCGrad", "minilm.times_faster.papers", "{:.1f}×", 12, "≥"),
    Row(
        "against transformers with bf16 autocast, the faster attention, which does no surgery",
        "minilm.times_faster.autocast",
        "{:.1f}×",
        3.5,
        "≥",
    ),
    Row("the same with the attention it comes with (sdpa)", "minilm.times_faster.autocast sdpa", "{:.1f}×", 3.5, "≥"),
    Row("against TorchJD's autojac, PCGrad", "minilm.times_faster.autojac", "{:.1f}×"),
    Row("surgery on top of one gradient for all tasks, K = 3", "minilm.surgery_share", "{:.1%}", 0.05),
    Row("the same in bare loops", "minilm.surgery_share_bare", "{:.1%}"),
    Row("DeepSpeed against the bare loop", "minilm.deepspeed_share", "{:+.1%}", 0.05),
    Row("share of the GEMM peak, forward + backward, MiniLM shape", "minilm.model_flops_share", "{:.0%}", 0.55, "≥"),
    Row("bf16 GEMM over fp32", "minilm.gemm_peak_over_fp32", "{:.1f}×"),
    Row(
        "BERT-base shape, few batches: against autocast, the faster attention", "base.times_faster.autocast", "{:.1f}×"
    ),
    Row("BERT-base shape: surgery on top of one gradient for all tasks, K = 3", "base.surgery_share", "{:.1%}", 0.05),
    Row("BERT-base shape: the same in bare loops", "base.surgery_share_bare", "{:.1%}"),
    Row("BERT-base shape: DeepSpeed against the bare loop", "base.deepspeed_share", "{:+.1%}", 0.05),
    Row("BERT-base shape: share of the GEMM peak, forward + backward", "base.model_flops_share", "{:.0%}", 0.60, "≥"),
    Row("surgery at K = 16 over K = 4", "growth.growth_16_over_4", "{:.2f}×", 4.5),
    *(
        row
        for world in (2, 4)
        for row in (
            Row(
                f"numbers on the wire per rank and step, W = {world}, counted",
                f"ranks{world}.sent_per_parameter",
                "{:.2f}·P",
                4 * (world - 1) / world,
            ),
            Row(
                f"memory of task gradients per rank in fp32 numbers, W = {world}, counted",
                f"ranks{world}.gradients_per_parameter",
                "{:.2f}·P",
                3 / world + 1,
            ),
            Row(
                f"idle because of unequal lengths, W = {world}, computed",
                f"ranks{world}.uneven_work",
                "{:.1%}",
                0.05,
            ),
            Row(
                f"communication that shows, W = {world}, of a step",
                f"ranks{world}.communication_that_shows",
                "{:.1%}",
            ),
        )
    ),
    Row("waiting for data", "data.waiting_for_data", "{:.2%}", 0.02),
    Row("10 M examples: start-up, without imports, page cache warm, s", "data.start_up_seconds", "{:.1f}", 5),
    Row("10 M examples: peak memory of the process, GB", "data.resident_bytes", "{:.2f}", 1, unit=1e9),
    *_gpu_rows("gpu", "real lengths"),
    *_gpu_rows("gpu128", "128 tokens"),
]


def measure(part: str) -> dict[str, Any]:
    """The part's record; it prints its own table."""
    module, *arguments = PARTS[part].split()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "record.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(answer)]
        hidden = {} if part.startswith("gpu") else {"CUDA_VISIBLE_DEVICES": ""}
        if code := subprocess.run(command, env={**os.environ, **hidden}).returncode:
            raise UserError(f"{part} ended with exit code {code}; what was measured before is kept")
        stamp = {"command": PARTS[part], "when": datetime.date.today().isoformat(), "machine": options.machine()}
        return {**stamp, **json.loads(answer.read_text())}


def block(record: dict[str, Any]) -> str:
    """Markdown: the table of what is aimed at and what came out, when and where, and the seconds of steps."""
    lines = ["| what | bar | measured |", "|---|---|---|", *(row.line(record) for row in ROWS), ""]
    for part in record.values():
        lines.append(f"- `{part['command']}`: {part['when']}, {_where(part)}")
        if "seconds" in part and "batch" in part:
            steps = (f"{contender} {1e3 * seconds:,.0f}" for contender, seconds in part["seconds"].items())
            lines[-1] += f"; milliseconds of a step: {', '.join(steps)}"
    return "\n".join(lines) + "\n"


def _where(part: dict[str, Any]) -> str:
    where = f"{part['machine']['cpu']}, {part['machine']['cores']} cores"
    if "gemm_peak_flops" in part:
        where += f", {part['dtype']} GEMM {part['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s"
    return where


def write_page(record: dict[str, Any]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}{block(record)}{END}{after}", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--json {path}: no JSON ({error}); name another file or remove it") from None
    if not isinstance(record, dict) or not record.keys() <= PARTS.keys():
        raise UserError(f"--json {path}: not what this command writes; name another file or remove it")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options.parser("", __doc__)
    here = [part for part in PARTS if torch.cuda.is_available() or not part.startswith("gpu")]
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=here)
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="only the default one has the page")
    given = parser.parse_args(arguments)
    try:
        options.check_target(given.json)
        record = read_record(given.json)
        if absent := set(given.parts) - set(here):
            raise UserError(f"--parts {' '.join(sorted(absent))}: there is no GPU here")
        for part in given.parts:
            print(f"measuring {part} …", flush=True)
            record[part] = measure(part)
            record = {name: record[name] for name in PARTS if name in record}
            options.write_record(given.json, record)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if given.json.resolve() == RESULTS:
        write_page(record)
    print(block(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
