"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtbert.environment import cpu
from mtbert.errors import CommandLine, UserError
from mtbert.files import write_atomically


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
    return {"cpu": cpu(), "cores": os.cpu_count() or 1, "python": platform.python_version(), **gpu}
