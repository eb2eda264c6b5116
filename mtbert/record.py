"""What a run folder tells afterwards: its configuration, its curves, and what it said of every development example.

    N examples, C classes

    predictions/step-00001200.npz    of the newest evaluation and of the best (by the metrics, and on disk): one array
                                     TASK/FIELD per field of `Said`

No torch in here: reading a run is a matter of a moment, on any machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from mtbert.config import Config, TaskConfig
from mtbert.config_files import load_config
from mtbert.errors import UserError
from mtbert.files import read_small, write_atomically, written_aside
from mtbert.runs import check_run

METRICS_FILE = "metrics.jsonl"
PREDICTIONS = "predictions"
MAX_LINE = 2**20  # bytes
MAX_ID = 100
MAX_SAID = 2**31
"""Bytes of predictions unpacked: ten million examples and more. A file of a few kilobytes could hold terabytes."""
BEYOND = 1e100
"""No number that training in fp32 arrives at is larger, and pictures of much larger ones cannot be drawn."""
Which = Literal["best", "latest"]


@dataclass(frozen=True)
class Said:
    """One task's development examples in the order of their file, and what the model said of each."""

    ids_N: NDArray[np.str_]  # of the id column, else the line; `kept_id`
    lines_N: NDArray[np.int64]  # of the file
    tokens_N: NDArray[np.int32]  # what the example costs in the encoder
    labels_N: NDArray[np.float64]
    predictions_N: NDArray[np.float64]
    losses_N: NDArray[np.float64]
    probabilities_NC: NDArray[np.float64]  # no column where the task has none

    def __len__(self) -> int:
        return len(self.labels_N)


def kept_id(id: str) -> str:
    """An example's id as `Said` has it: one of a megabyte would make each of the others as wide."""
    return id if len(id) <= MAX_ID else f"{id[: MAX_ID - 17]}…{hashlib.sha256(id.encode()).hexdigest()[:16]}"


def write_predictions(run_dir: Path, step: int, said: Mapping[str, Said], kept: Container[int]) -> None:
    """Keep what an evaluation after `step` steps said; of earlier evaluations only those after `kept` steps stay."""
    arrays = {f"{task}/{field.name}": getattr(one, field.name) for task, one in said.items() for field in fields(one)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    folder = run_dir / PREDICTIONS
    folder.mkdir(exist_ok=True)
    written = _predictions(folder, step)
    write_atomically(written, buffer.getvalue())
    for path in folder.glob("step-*.npz"):
        if path != written and not (path.stem[5:].isdecimal() and int(path.stem[5:]) in kept):
            path.unlink()


def _predictions(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.npz"


def highest_composite(run_dir: Path) -> tuple[int, float] | None:
    """Steps done at the evaluation with it, the first of equals, and itself; None before there is one."""
    highest = None
    for line in read_lines(run_dir, "metric/composite"):
        score = line.values["metric/composite"]
        if math.isfinite(score) and (highest is None or score > highest[1]):
            highest = line.step + 1, score
    return highest


@dataclass(frozen=True)
class Line:
    """One of `metrics.jsonl`."""

    step: int
    time: float  # seconds since 1970
    values: dict[str, float]  # by tag; not a number where the run met one


def read_lines(run_dir: Path, tag: str = "") -> Iterator[Line]:
    """What a run logged, in order; nothing before it does. The last line may still be in the writing, and is left out.

    Args:
        tag: only lines with it.

    Raises `UserError` for a file that cannot be read, and a line that no training wrote.
    """
    path = run_dir / METRICS_FILE
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n") or tag.encode() not in line:  # else it takes longer to be parsed than to be read
            continue
        try:
            told = _parsed(line)
        except ValueError:
            raise UserError(f"{path} line {number}: not what training wrote; it was damaged") from None
        if not tag or tag in told.values:
            yield told


def keep_lines_before(run_dir: Path, step: int) -> int:
    """Drop what a run logged of this and later steps, and half a line at the end, where its writer was killed.

    Returns how many other lines were damaged, and are dropped as well; one that is far too long counts as several. No
    room on the disk is needed, unless a line stays that comes after one that goes.
    """
    path = run_dir / METRICS_FILE
    damaged = first_bytes = position = 0
    begins_with_all = True
    if not path.exists():
        return 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            stays, broken = _stays(line, step)
            damaged += broken
            if stays:
                begins_with_all &= first_bytes == position
                first_bytes += len(line)
            position += len(line)
    if begins_with_all:
        os.truncate(path, first_bytes)
        return damaged
    with path.open("rb") as file, written_aside(path) as aside, aside.open("wb") as kept:
        while line := file.readline(MAX_LINE):
            if _stays(line, step)[0]:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    return damaged


def _stays(line: bytes, step: int) -> tuple[bool, bool]:
    """Whether it is of an earlier step, and whether it is damaged."""
    try:
        return line.endswith(b"\n") and _parsed(line).step < step, len(line) == MAX_LINE
    except ValueError:
        return False, True


def _parsed(line: bytes) -> Line:
    """Raises `ValueError` for what no training wrote: a disk may have."""
    try:
        record = json.loads(line)
        step, time, broken = int(record.pop("step")), float(record.pop("time")), record.pop("not_finite", {})
        values = {tag: float(broken.get(tag, value)) for tag, value in record.items()}
    except (TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        raise ValueError from None
    if not 0 <= step < 2**53 or any(BEYOND < abs(value) < math.inf for value in values.values()):
        raise ValueError
    return Line(step, time, values)


@dataclass(frozen=True)
class Curve:
    """One tag of `metrics.jsonl`. Not a number where the run met one."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def last(self) -> float:
        return float(self.values[-1])


class Environment(BaseModel):
    """`environment.json`, as `create_run` writes it: what a reader needs to repeat the run."""

    command: list[str] = []  # what the user typed
    directory: str = ""
    mtbert: str = ""
    commit: str | None = None  # of the code, with a + where it was changed since; None outside a checkout
    python: str = ""
    platform: str = ""
    host: str = ""
    cpu: str = ""
    cpus: Annotated[int, Field(lt=2**31)] | None = None
    packages: dict[str, str] = {}


class TaskResult(BaseModel):
    """What a task's score has to beat, by the same metric; None where there is no such thing."""

    trivial: float | None = None
    bag_of_words: float | None = None


class Result(BaseModel):
    """`result.json`: the run is finished."""

    tasks: dict[str, TaskResult] = {}


D = TypeVar("D", Environment, Result)


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read when asked. Raises `UserError` for a folder that `check_run` refuses."""

    folder: Path

    def __post_init__(self) -> None:
        check_run(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def config(self) -> Config:
        return load_config(self.folder / "config.yaml")

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Every tag's curve."""
        points: dict[str, list[tuple[int, float]]] = {}
        for line in read_lines(self.folder):
            for tag, value in line.values.items():
                points.setdefault(tag, []).append((line.step, value))
        return {
            tag: Curve(np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))
            for tag, pairs in points.items()
        }

    @property
    def evaluated(self) -> list[str]:
        """The tasks that have scores."""
        tasks = self.config.tasks.items()
        return [name for name, task in tasks if f"metric/{name}/{task.metric_kind}" in self.curves]

    def scores(self, which: Which) -> tuple[int, dict[str, float]]:
        """Steps done, and the score of each task that is evaluated and the `composite` there. Raises `UserError` before
        the first evaluation.

        best: the evaluation with the highest composite, the first of equals, as training itself chooses it. (Where that
        one's checkpoint could not be saved, the best on disk is an earlier one.)
        """
        composite = self.curves.get("metric/composite")
        if composite is None:
            raise UserError(f"{self.folder}: nothing was evaluated yet; run.evaluate_every says when it is")
        finite_E = np.where(np.isfinite(composite.values), composite.values, -math.inf)
        at = int(finite_E.argmax()) if which == "best" else len(finite_E) - 1
        step = int(composite.steps[at])
        scores = {}
        for name in self.evaluated:
            curve = self.curves[f"metric/{name}/{self.config.tasks[name].metric_kind}"]
            there = curve.values[curve.steps == step]
            if not len(there):
                raise UserError(f"{self.folder / METRICS_FILE}: step {step} lacks the score of {name}; it was damaged")
            scores[name] = float(there[0])
        return step + 1, {**scores, "composite": float(composite.values[at])}

    def said(self, which: Which) -> dict[str, Said]:
        """What the best or the latest evaluation said of every development example, by task."""
        evaluated, (step, _) = self.evaluated, self.scores(which)
        path = _predictions(self.folder / PREDICTIONS, step)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; runs of earlier versions kept no predictions, and --resume of a finished run "
                f"writes none"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > MAX_SAID:
                raise UserError(f"{path}: {unpacked:,} bytes when unpacked; training writes no more than {MAX_SAID:,}")
            with np.load(path, allow_pickle=False) as arrays:
                said = {
                    task: Said(**{field.name: arrays[f"{task}/{field.name}"] for field in fields(Said)})
                    for task in evaluated
                }
        except UserError:
            raise
        except Exception as error:  # zipfile, what unpacks for it, and NumPy's parser raise a dozen classes
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); it was damaged") from None
        for name, one in said.items():
            if not _plausible(one, self.config.tasks[name]):
                raise UserError(f"{path}: what it says of {name} is not what training writes; it was damaged")
        return said

    @cached_property
    def environment(self) -> Environment:
        return self._document("environment.json", Environment) or Environment()

    @cached_property
    def result(self) -> Result | None:
        """None where the run is not finished."""
        return self._document("result.json", Result)

    def _document(self, name: str, kind: type[D]) -> D | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return kind.model_validate_json(read_small(path))
        except ValidationError:
            raise UserError(f"{path}: not what training wrote; it was damaged") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _plausible(said: Said, task: TaskConfig) -> bool:
    """Whether training can have written this, so that no reader need ask: fields of one length and of their kinds,
    text that is text, classes and values that the task has."""
    for field in fields(Said):
        array = getattr(said, field.name)
        kinds = {"ids_N": "U", "lines_N": "i", "tokens_N": "i"}.get(field.name, "fi")
        dimensions = 1 + field.name.endswith("_NC")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.ndim != dimensions:
            return False
        if not 0 < len(array) == len(said.lines_N):
            return False
    codes = np.frombuffer(said.ids_N.astype(said.ids_N.dtype.newbyteorder("=")).tobytes(), np.uint32)
    if ((codes > sys.maxunicode) | ((codes >= 0xD800) & (codes < 0xE000))).any():  # no character, or half of one
        return False
    labels_N, predictions_N = said.labels_N, said.predictions_N
    if task.regression:
        low, high = task.range
        slack = high - low  # far more than rounding, far less than what no picture could show
        near_2N = [(values >= low - slack) & (values <= high + slack) for values in (labels_N, predictions_N)]
        return bool(near_2N[0].all() and (near_2N[1] | np.isnan(predictions_N)).all())
    known = all(np.isin(values, np.arange(task.class_count)).all() for values in (labels_N, predictions_N))
    shares_NC = said.probabilities_NC
    return known and shares_NC.shape[1] in (0, task.class_count) and not ((shares_NC < 0) | (shares_NC > 1.001)).any()


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise UserError(f"{path}: a line of more than {MAX_LINE:,} bytes; it was damaged")
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def settings(config: Config) -> dict[str, Any]:
    """Every key of a configuration that bears on what is learnt, or on which evaluations there are to choose from,
    dotted, with its value; lists as they are."""
    values = config.model_dump(mode="json")
    del values["checkpoint"], values["data"]["cache"], values["engine"]["threads"], values["engine"]["peak_tflops"]
    values["run"] = {"evaluate_every": config.run.evaluate_every}
    return dict(_flat(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


__all__ = [
    "Curve",
    "Environment",
    "Line",
    "Result",
    "RunRecord",
    "Said",
    "TaskResult",
    "Which",
    "highest_composite",
    "keep_lines_before",
    "kept_id",
    "read_lines",
    "settings",
    "write_predictions",
]
