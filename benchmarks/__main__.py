"""Everything that docs/performance.md says, measured: one table, and JSON beside it.

usage: make bench            (python -m benchmarks --json FILE)

Takes about half an hour on two quiet cores; another process on either core ruins it. Ratios of one run mean something,
absolute numbers of a shared machine do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtbert.runs import write_atomically

PARTS: dict[str, list[str]] = {
    "minilm": ["step", "minilm", "12", "32"],
    "base": ["step", "base", "4", "32"],
    "growth": ["growth", "9", "22700000"],
    "ranks2": ["ranks", "2"],
    "ranks4": ["ranks", "4"],
    "data": ["data", "10000000"],
}
"""Each part runs in a process of its own, so that none inherits another's memory or threads."""


def measure(part: str, progress: Callable[[str], None]) -> Any:
    module, *arguments = PARTS[part]
    progress(f"measuring {part} …")
    code = (
        f"import json, sys; from benchmarks import {module} as m; "
        "values = [int(a) if a.isdigit() else a for a in sys.argv[1:]]; "
        "result = m.measure(*values); print(m.table(result)); print(json.dumps(result))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    *told, record = done.stdout.strip().splitlines()
    progress("\n".join(told))
    return json.loads(record)


def bars(results: dict[str, Any]) -> str:
    """The table of what is aimed at and what came out, Markdown."""
    rows: list[tuple[str, str, str]] = []
    for name, shape, aim in (("minilm", "MiniLM shape", "≥ 55 %"), ("base", "BERT-base shape", "≥ 60 %")):
        if name not in results:
            continue
        result = results[name]
        if name == "minilm":
            faster = result["times_faster"]
            rows += [
                ("against the papers' stack, PCGrad", "≥ 12×", f"{faster['papers']:.1f}×"),
                (
                    "against transformers with bf16 autocast, which does no surgery",
                    "≥ 3.5×",
                    f"{faster['autocast']:.1f}×",
                ),
                ("against TorchJD's autojac, PCGrad", "", f"{faster['autojac']:.1f}×"),
                ("surgery on top of a plain sum, K = 3", "≤ 5 %", f"{result['surgery_share']:.1%}"),
                (
                    "surgery with task gradients and Gram matrix, on top of one gradient for all, bare loops",
                    "",
                    f"{result['surgery_and_its_measurements']:.1%}",
                ),
                ("DeepSpeed against the bare loop", "≤ 5 %", f"{result['deepspeed_share']:+.1%}"),
            ]
        else:
            rows.append((f"{shape}: against autocast", "", f"{result['times_faster']['autocast']:.1f}×"))
            rows.append((f"{shape}: surgery on top of a plain sum", "", f"{result['surgery_share']:.1%}"))
        rows.append((f"share of the GEMM peak, forward + backward, {shape}", aim, f"{result['model_flops_share']:.0%}"))
    if "growth" in results:
        rows.append(("surgery at K = 16 over K = 4", "≤ 4.5×", f"{results['growth']['growth_16_over_4']:.2f}×"))
    for name in ("ranks2", "ranks4"):
        if name in results:
            result = results[name]
            world, shared = result["world"], result["shared"]
            expected = f"{result['sent_expected'] / shared:.2f}·P"
            rows += [
                (f"numbers on the wire per rank and step, W = {world}", expected, f"{result['sent'] / shared:.2f}·P"),
                (
                    f"memory of task gradients, W = {world}, in fp32 numbers",
                    f"{3 / world + 1:.2f}·P",
                    f"{result['gradient_bytes'] / shared / 4:.2f}·P",
                ),
                (f"idle because of unequal lengths, W = {world}", "≤ 5 %", f"{result['uneven_work']:.1%}"),
                (f"waiting for gradients, W = {world}", "", f"{result['waiting']:.1%} of a step"),
            ]
    if "data" in results:
        data = results["data"]
        rows += [
            ("waiting for data", "≤ 2 %", f"{data['waiting_for_data']:.2%}"),
            (f"{data['examples']:,} examples: start-up", "≤ 5 s", f"{data['start_up_seconds']:.1f} s"),
            (f"{data['examples']:,} examples: memory", "≤ 1 GB", f"{data['resident_bytes'] / 1e9:.2f} GB"),
        ]
    lines = ["| what | bar | measured |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {bar} | {value} |" for what, bar, value in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks") / "results.json")
    options = parser.parse_args()
    record = json.loads(options.json.read_text()) if options.json.is_file() else {}
    for part in options.parts:
        record[part] = measure(part, lambda text: print(text, flush=True))
        record["when"] = datetime.date.today().isoformat()
        record["machine"] = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
        write_atomically(options.json, json.dumps(record, indent=1) + "\n")
    print(bars(record))


def _cpu() -> str:
    """The processor as Linux names it, with the number formats that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return f"{name} ({', '.join(found) or 'no bf16 products'})"


if __name__ == "__main__":
    main()
