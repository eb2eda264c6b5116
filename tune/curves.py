"""What is read from a trial's run folder: its evaluations, and whose weights it went on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.records import job_folder
from mtbert.record import read_lines

LINEAGE_FILE = "lineage.jsonl"
STARTS_FILE = "starts.jsonl"
"""In the job folder, a line per attempt."""


def evaluations_in(folder: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    """(steps done, scores) of each evaluation in a run folder; None is a score that is not a number."""
    for line in read_lines(folder, "metric/composite"):
        scores = {tag.split("/")[1]: value for tag, value in line.values.items() if tag.startswith("metric/")}
        yield line.step + 1, {name: score if math.isfinite(score) else None for name, score in scores.items()}


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The grafts of a run folder, oldest first: step, trial it went on from, values since then."""
    file = folder / LINEAGE_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def attempts(folder: Path) -> int:
    """How often a trial was started."""
    file = job_folder(folder) / STARTS_FILE
    return len(file.read_text().splitlines()) if file.exists() else 0
