"""Does the suite pass every time? `make test-again TIMES=20`.

    python tests/faults/again.py [--times 20] [--table]

Each time is `make test` as anyone runs it. The record gets a line for every run that came to its end, so that sessions,
and machines, add to the same count; the first failure ends it, for a flaky test is a bug to be understood.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import page  # noqa: E402

from benchmarks.options import machine  # noqa: E402
from mtbert.environment import commit  # noqa: E402
from mtbert.stops import stop_requests  # noqa: E402

RECORD = Path(__file__).with_name("again.jsonl")

Line = dict[str, Any]


def once(command: Sequence[str] = ("make", "test")) -> Line:
    """Runs the suite; its line."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        added = f"{os.environ.get('PYTEST_ADDOPTS', '')} --junit-xml={report}"
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": added})
        with stop_requests(lambda number, _: process.send_signal(number), signal.SIGTERM):
            code = process.wait()
        seconds = time.monotonic() - began
        if not report.exists():
            raise SystemExit(f"{' '.join(command)}: exit code {code}, and no test has run")
        cases = ElementTree.parse(report).findall(".//testcase")
    ended = {case: {child.tag for child in case} for case in cases}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if ended[case] & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in ended.values())
    return {
        "when": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "seconds": round(seconds),
        "passed": len(cases) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
        "code": code,  # not 0 also where a floor of coverage is not reached
    }


def read(record: Path) -> list[Line]:
    return [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else []


def in_a_row(lines: Sequence[Line]) -> list[Line]:
    """The last runs, none of which failed."""
    return list(takewhile(lambda line: line["code"] == 0, reversed(lines)))[::-1]


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    if not lines:
        return f"Not run yet: {RECORD.relative_to(ROOT)} has no line."
    rows = [
        f"| {line['when']} | {line['commit']} | {line['machine']['cpu']} | {line['seconds'] / 60:.0f} "
        f"| {line['passed']:,} | {line['skipped']} | {', '.join(line['failed']) or '–'} |"
        for line in lines
    ]
    head = ["| when | commit | machine | minutes | passed | skipped | failed |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"The last {len(in_a_row(lines))} in a row passed."])


def main() -> int:
    parser = argparse.ArgumentParser(description="The suite, again and again.")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="only write what the record has into the page")
    args = parser.parse_args()
    page.write("test-again", table(read(RECORD)) + "\n")
    for _ in range(0 if args.table else args.times):
        line = once()
        with RECORD.open("a") as file:
            file.write(json.dumps(line) + "\n")
        page.write("test-again", table(read(RECORD)) + "\n")
        if line["code"]:
            print(f"failed: {', '.join(line['failed']) or 'see above'}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
