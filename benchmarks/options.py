"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtbert.errors import CommandLine, UserError
from mtbert.runs import write_atomically


def count(text: str) -> int:
    """Of something: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def amount(text: str) -> float:
    """Of seconds, gigabytes …: more than 0, and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def parser(module: str, usage: str | None) -> argparse.ArgumentParser:
    return CommandLine(
        f"python -m benchmarks{module and '.' + module}",
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    arguments: Sequence[str] | None,
) -> int:
    """Measure, print the table and, with `--json FILE`, write the record; the exit code. Bad input takes one line."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            check_target(options.json)
        result = measure(options)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(table(result), flush=True)
    if options.json:
        write_record(options.json, result)
    return 0


def check_target(path: Path) -> None:
    """Before minutes of measuring rather than after them."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--json {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def machine() -> dict[str, str | int]:
    """What measured: `cpu`, `cores` and the `python`, and the `gpu` where there is one."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": _cpu(), "cores": os.cpu_count() or 1, "python": platform.python_version(), **gpu}


def commit() -> str:
    """Of the code that is measured, with a + where that is not what was committed; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        code = [":(top)*.py", ":(top)*.yaml"]
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() + "+" * bool(clean.returncode) if not found.returncode else ""


def _cpu() -> str:
    """The processor as Linux names it, with the number formats that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return f"{name} ({', '.join(found) or 'no bf16 products'})"
