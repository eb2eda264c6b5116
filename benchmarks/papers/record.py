"""benchmarks/papers.jsonl: what the page needs of every finished run, a line of JSON each, and of the search C7.

A record is of one encoder and one set of files, known by their content: its lines may come from many machines, and
which recipe a line stands for is decided by its configuration, not by its name. Rows whose configurations are equal
share one line. Lines are sorted, and so are their keys: two sessions' additions merge as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.papers.rows import PLACES, ROOT, ROWS, Recipe, key
from mtbert.config import Config
from mtbert.config_files import config_of
from mtbert.errors import UserError
from mtbert.files import read_small, write_atomically
from mtbert.record import Curve

RECORD = ROOT / "benchmarks" / "papers.jsonl"
SEARCH = "C7"
DIGITS = 4
"""Of a curve's numbers."""
Table = dict[str, list[int | float | None]]
"""Curves, as `compact` makes them."""


class Line(BaseModel):
    """What lines have in common: from what, where and when."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    row: str
    seed: int
    config: dict[str, Any]  # as `portable` makes it
    files: dict[str, str]  # SHA-256 of every file that was read, by its name
    encoder: str  # its name and size, for a reader
    when: str  # the day it was recorded
    machine: dict[str, str | int]
    commit: str

    @cached_property
    def as_config(self) -> Config:
        """Keys that came later have their defaults. Raises `UserError` for one that this version cannot read."""
        return config_of(self.config, where=f"{self.row} seed {self.seed}")

    @cached_property
    def key(self) -> str | None:
        """As a recipe's; None where this version cannot read it."""
        try:
            return key(self.as_config)
        except UserError:
            return None


class Entry(Line):
    """A finished run."""

    sizes: dict[str, tuple[int, int]]  # of every task, rows for training and development
    scores: dict[str, float]  # by task, on the development set after the last step
    steps: int
    seconds: float  # wall time
    precision: str
    alike: dict[str, float] = {}  # per task that ranks on a threshold: share of the logged steps with a loss ≥ ln B
    curves: Table | None = None


class Search(Line):
    """The search for C6's learning rate and dropout."""

    row: Literal["C7"]
    lr: float
    dropout: float
    composite: float
    trials: int  # done


@dataclass(frozen=True)
class Record:
    path: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Whoever reads in order to write holds this."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self.path}.lock"):
            yield

    def lines(self) -> list[Line]:
        """All of it. Raises `UserError` for a damaged line and for two of one run, as a merge may leave them."""
        if not self.path.exists():
            return []
        found: dict[tuple[str, int], Line] = {}
        for number, text in enumerate(read_small(self.path).splitlines(), 1):
            where = f"{self.path} line {number}"
            try:
                line = parse(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: {complaint(error)}; restore it with git, or remove the line") from None
            if (line.row, line.seed) in found:
                raise UserError(f"{where}: {line.row} seed {line.seed} for the second time; keep one of the two")
            found[line.row, line.seed] = line
        return list(found.values())

    def entries(self) -> list[Entry]:
        return [line for line in self.lines() if isinstance(line, Entry)]

    def put(self, line: Line) -> None:
        """Add a line, in place of the one with its row and seed if there is one.

        Raises `UserError`, and writes nothing, where the record's other lines are of other files.
        """
        with self.locked():
            others = [each for each in self.lines() if (each.row, each.seed) != (line.row, line.seed)]
            self.refuse_others(line.files, others)
            lines = sorted([*others, line], key=_place)
            write_atomically(self.path, "".join(f"{dumped(each)}\n" for each in lines))

    def refuse_others(self, files: Mapping[str, str], lines: Iterable[Line]) -> None:
        """Raises `UserError` where one of these files is not the one that a line's run has read."""
        for line in lines:
            for name in sorted(files.keys() & line.files.keys()):
                if files[name] != line.files[name]:
                    raise UserError(
                        f"{name}: is not the one that {line.row} seed {line.seed} of {self.path} was run with (SHA-256 "
                        f"{files[name][:12]}…, there {line.files[name][:12]}…); give that one, or another --record"
                    )


def parse(text: bytes) -> Line:
    """Raises `ValueError` where that is no line of a record."""
    values = json.loads(text)
    model = Search if isinstance(values, dict) and values.get("row") == SEARCH else Entry
    return model.model_validate_json(text)


def complaint(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"no JSON ({' '.join(str(error).split())})"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"


def dumped(line: Line) -> str:
    return json.dumps(line.model_dump(mode="json", exclude_defaults=True), sort_keys=True, ensure_ascii=False)


def _place(line: Line) -> tuple[int, str, int]:
    names = [row.name for row in ROWS]
    return names.index(line.row) if line.row in names else len(names), line.row, line.seed


def portable(config: Config) -> dict[str, Any]:
    """What a line keeps of a configuration: all that `identity` looks at, a name for each path, and `run.log_every`."""
    values = config.model_dump(
        mode="json", exclude={"checkpoint": True, "data": {"cache"}, "engine": {"threads"}, "run": True}
    )
    for dotted, name in PLACES.items():
        section, inside = dotted.split(".")
        if values[section][inside]:
            values[section][inside] = name
    return {**values, "run": {"evaluate_every": config.run.evaluate_every, "log_every": config.run.log_every}}


def matched(lines: Iterable[Line], wanted: Sequence[Recipe]) -> dict[tuple[str, int], Entry]:
    """By row and seed of those recipes that have one: the entry of a run with that very configuration."""
    by_key = {line.key: line for line in lines if isinstance(line, Entry)}
    return {(recipe.row.name, recipe.seed): by_key[recipe.key] for recipe in wanted if recipe.key in by_key}


def outdated(lines: Iterable[Line], wanted: Sequence[Recipe]) -> list[Entry]:
    """Entries that no recipe has any use for: theirs has changed since."""
    keys = {recipe.key for recipe in wanted}
    return [line for line in lines if isinstance(line, Entry) and line.key not in keys]


# -------------------------------------------------------------------------------------------------------- curves


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def compact(curves: Mapping[str, Curve], wanted: Callable[[str], bool], at: str) -> Table | None:
    """Curves as columns of one table, null where a tag has no finite value: `step` and the tags that are `wanted`, at
    the steps at which one whose tag begins with `at` has a point. None where none has.
    """
    steps = sorted({step for tag, curve in curves.items() if tag.startswith(at) for step in curve.steps.tolist()})
    if not steps:
        return None
    table: Table = {"step": list(steps)}
    for tag, curve in curves.items():
        if wanted(tag):
            pairs = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
            points = {step: rounded(value) for step, value in pairs if np.isfinite(value)}
            table[tag] = [points.get(step) for step in steps]
    return table


def unpacked(table: Table) -> dict[str, Curve]:
    """The curves that `compact` made a table of."""
    curves = {}
    for tag, values in table.items():
        points = [(step, value) for step, value in zip(table["step"], values, strict=True) if value is not None]
        if tag != "step" and points:
            steps, found = zip(*points, strict=True)
            curves[tag] = Curve(np.array(steps, np.int64), np.array(found, np.float64))
    return curves
