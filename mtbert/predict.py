"""A trained run on files of any size: rows in, the same rows with answers out, and sentence vectors.

    rows ──window──▶ tokenise ──▶ length-sorted packed batches ──▶ answers in the rows' order ──▶ rows out

Memory holds one window. A row that cannot be answered (malformed, no text in it) keeps its place, with the reason in
the column `error`; it is never dropped.

Shapes: N rows, D width of the encoder.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from mtbert.config import TaskConfig
from mtbert.errors import UserError, to_install
from mtbert.files import user_path, written_aside
from mtbert.readers import Quarantined, Record, Table, csv_writer, form_of, read_table
from mtbert.token_cache import judge
from mtbert.trained import Trained

WINDOW_ROWS, WINDOW_CHARACTERS = 4096, 2**21
ADDED = ["prediction", "score", "probability", "error"]
"""Columns of the output, after those of the input."""
SHOWN_TROUBLES = 5

_SUBMISSION = {
    "classification": ("Predicted_Sentiment", "d"),
    "pair_classification": ("Predicted_Is_Paraphrase", ".1f"),
    "pair_regression": ("Predicted_Similiary", ""),  # the course's spelling
}


@dataclass
class Report:
    """What became of a file's rows."""

    rows: int = 0
    seconds: float = 0.0
    unanswered: int = 0
    troubles: list[str] = field(default_factory=list)  # the first few

    def trouble(self, shown: str, line: int, reason: str) -> None:
        self.unanswered += 1
        if len(self.troubles) < SHOWN_TROUBLES:
            self.troubles.append(f"{shown} line {line}: {reason}")


Answer = tuple[int | float | str, float, float | None]
"""Prediction (class number, or name where the task has names; or value), score, probability of the predicted class."""


class Answered(NamedTuple):
    """A row and what was said of it: an `Answer` or a vector, or the error that stands in its place."""

    row: Record | Quarantined
    answer: Any
    error: str


# ------------------------------------------------------------------------------------------------ predict


def predict_file(
    run: Trained,
    task: str,
    source: str,
    target: str,
    text: Sequence[str] | None = None,
    form: str = "",
    submission: bool = False,
) -> Report:
    """Answer every row of `source` (a path, or - for stdin) into `target` (likewise), in the form of the source.

    Args:
        text: the text columns; default those that the task was trained with.
        form: csv, tsv or jsonl; default by the file's name and first line.
        submission: the CS224N default project's format instead: id and prediction; of every row, or of none.

    A target file is written aside and renamed when it is whole. Raises `UserError` naming file, line and column, and
    the `OSError` of a write to stdout.
    """
    config = run.task(task)
    columns = _text_columns(config, text)
    _refuse_source(source, target)
    with opened_source(source, form) as table, opened_target(target) as out:
        sink = _submission_sink(config, table, out, source) if submission else _row_sink(table, out, source)

        def write(answered: list[Answered]) -> None:
            sink(answered)
            out.flush()  # who reads from a pipe need not wait for the end

        return _stream(
            table,
            columns,
            shown_name(source),
            lambda texts: answer_texts(run, task, texts),
            write,
        )


def _text_columns(task: TaskConfig, text: Sequence[str] | None) -> list[str]:
    if text is not None and len(text) != len(task.columns.text):
        raise UserError(f"--text: the task takes {len(task.columns.text)} text column(s), not {len(text)}")
    return list(text or task.columns.text)


def answer_texts(run: Trained, task: str, texts: Sequence[Sequence[str]]) -> list[Answer | None]:
    """One per example; None where there is no wordpiece in a text."""
    examples = run.tokenise(texts)
    answers = run.answer(task, examples)
    label_of = run.task(task).label_of
    found = zip(
        answers.predictions_N.tolist(), answers.scores_N.tolist(), answers.probabilities_N.tolist(), strict=True
    )
    return [
        (label_of(prediction), score, None if math.isnan(probability) else probability) if lengths.all() else None
        for lengths, (prediction, score, probability) in zip(examples.lengths_NS, found, strict=True)
    ]


def _row_sink(table: Table, out: TextIO, source: str) -> Callable[[Iterable[Answered]], None]:
    if table.delimiter:
        _refuse_taken(table.columns, "column", shown_name(source))
        writer = csv_writer(out, table.delimiter)
        writer.writerow([*table.columns, *ADDED])

        def write(answered: Iterable[Answered]) -> None:
            writer.writerows(
                [*_fields(row, table.columns), *(answer or ("",) * 3), _with_raw(row, error)]
                for row, answer, error in answered
            )

        return write

    def write_json(answered: Iterable[Answered]) -> None:
        for row, answer, error in answered:
            if isinstance(row, Record):
                _refuse_taken(row.values, "key", f"{shown_name(source)} line {row.line}")
            values: dict[str, Any] = dict(row.values) if isinstance(row, Record) else {"line": row.line}
            values |= zip(ADDED, (*(answer or (None,) * 3), _with_raw(row, error) or None), strict=True)
            out.write(json.dumps(values, ensure_ascii=False) + "\n")

    return write_json


def _refuse_taken(names: Container[str], what: str, where: str) -> None:
    if taken := [name for name in ADDED if name in names]:
        raise UserError(f"{where}: has a {what} {taken[0]!r} already; rename it first")


def _fields(row: Record | Quarantined, columns: list[str]) -> list[str]:
    """A row as it was; of a malformed one only the id is known."""
    if isinstance(row, Record):
        return list(row.values.values())
    return [row.id or "" if name == "id" else "" for name in columns]


def _with_raw(row: Record | Quarantined, error: str) -> str:
    """A malformed row has no columns that it could come back in."""
    return f"{error}: {row.raw}" if isinstance(row, Quarantined) else error


def _submission_sink(task: TaskConfig, table: Table, out: TextIO, source: str) -> Callable[[Iterable[Answered]], None]:
    """As `evaluation.py` of the course's starter code writes it, spaces included."""
    if task.kind not in _SUBMISSION:
        raise UserError(f"--submission: the course has no task of kind {task.kind}")
    if not isinstance(task.classes, int):
        raise UserError("--submission: the course's classes are numbers, and this task's have names")
    column = task.columns.id or "id"
    if table.columns and column not in table.columns:
        raise UserError(f"{shown_name(source)}: no column {column!r}, which a submission needs")
    title, spec = _SUBMISSION[task.kind]
    out.write(f"id \t {title} \n")

    def write(answered: Iterable[Answered]) -> None:
        for row, answer, error in answered:
            name = row.values.get(column) if isinstance(row, Record) else row.id
            if error or name in (None, ""):
                raise UserError(
                    f"{shown_name(source)} line {row.line}: {error or f'{column!r} is empty'}; "
                    "a submission needs the id and an answer of every row"
                )
            out.write(f"{name} , {answer[0]:{spec}} \n")

    return write


# ------------------------------------------------------------------------------------------------ embed


def embed_file(run: Trained, source: str, target: Path, text: str | None = None, form: str = "") -> Report:
    """Sentence vectors of a text column as `target`: .npy (N, D) float32, or .parquet with id, text, vector, error.

    Row n of the .npy belongs to row n of the file; where a row has no usable text its vector is NaN (in Parquet null).
    """
    if target.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out {target}: vectors go into a .npy or a .parquet file")
    _refuse_source(source, str(target))
    with opened_source(source, form) as table, told_target(target) as aside:
        columns = [text or _only_text(table, shown_name(source))]
        writer = (
            _Npy(aside, run.shape.hidden_size)
            if target.suffix == ".npy"
            else _Parquet(aside, columns[0], run.shape.hidden_size)
        )
        with writer:
            return _stream(table, columns, shown_name(source), lambda texts: embed_texts(run, texts), writer.add)


def _only_text(table: Table, shown: str) -> str:
    if not table.columns:  # no good row among the first JSON lines
        return "sentence"
    for name in ("sentence", "text"):
        if name in table.columns:
            return name
    if len(table.columns) == 1:
        return table.columns[0]
    raise UserError(f"{shown}: which column is the text? --text NAME; columns present: {', '.join(table.columns)}")


def embed_texts(run: Trained, texts: Sequence[Sequence[str]]) -> list[NDArray[np.float32] | None]:
    examples = run.tokenise(texts)
    vectors_ND = run.embed(examples)
    return [vector if length else None for vector, length in zip(vectors_ND, examples.lengths_NS[:, 0], strict=True)]


class _Npy:
    """Appends vectors; the number of rows goes into the header at the end, which NumPy leaves room for."""

    def __init__(self, path: Path, width: int) -> None:
        self.width, self.rows = width, 0
        self.file = path.open("wb")

    def __enter__(self) -> _Npy:
        self._header()
        return self

    def _header(self) -> None:
        self.file.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.width)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, answered: Iterable[Answered]) -> None:
        nothing = np.full(self.width, np.nan, np.float32)
        vectors = [nothing if vector is None else vector for _, vector, _ in answered]
        self.file.write(np.asarray(vectors, "<f4").tobytes())
        self.rows += len(vectors)

    def __exit__(self, *_: object) -> None:
        self._header()
        self.file.close()


class _Parquet:
    def __init__(self, path: Path, column: str, width: int) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"--out: writing Parquet needs pyarrow: {to_install('parquet')}") from None
        self.arrow, self.column = pyarrow, column
        text, vector = pyarrow.string(), pyarrow.list_(pyarrow.float32(), width)
        self.schema = pyarrow.schema([("id", text), ("text", text), ("vector", vector), ("error", text)])
        self.writer = pyarrow.parquet.ParquetWriter(path, self.schema)

    def __enter__(self) -> _Parquet:
        return self

    def add(self, answered: Iterable[Answered]) -> None:
        rows = []
        for row, vector, error in answered:
            values = row.values if isinstance(row, Record) else {"id": row.id}
            name, text = values.get("id"), values.get(self.column) if not error else None
            if name is not None:  # half a surrogate pair, which JSON lets in, is no text to Parquet
                name = str(name).encode(errors="backslashreplace").decode()
            rows.append({"id": name, "text": text, "vector": vector, "error": error or None})
        self.writer.write_table(self.arrow.Table.from_pylist(rows, self.schema))

    def __exit__(self, *_: object) -> None:
        self.writer.close()


# ------------------------------------------------------------------------------------------------ streaming


def _stream(
    table: Table,
    columns: list[str],
    shown: str,
    answer: Callable[[list[list[str]]], Sequence[Any]],
    write: Callable[[list[Answered]], None],
) -> Report:
    """Window after window: `answer` gets the texts of the rows that have them, `write` all rows in order."""
    if table.columns:
        for column in columns:
            if column not in table.columns:
                raise UserError(
                    f"{shown}: no column {column!r}; columns present: {', '.join(map(repr, table.columns))}; "
                    "--text names the right one"
                )
    report, started = Report(), time.monotonic()
    for window in _windows(table.rows):
        errors = [_why_not(row, columns) for row in window]
        texts = [
            [row.values[c] for c in columns]
            for row, why in zip(window, errors, strict=True)
            if not why and isinstance(row, Record)
        ]
        found = iter(answer(texts))
        answered = []
        for row, error in zip(window, errors, strict=True):
            result = None if error else next(found)
            why = error or ("nothing in the text is a wordpiece" if result is None else "")
            if why:
                report.trouble(shown, row.line, why)
            answered.append(Answered(row, result, why))
        write(answered)
        report.rows += len(window)
    report.seconds = time.monotonic() - started
    return report


def _windows(rows: Iterator[Record | Quarantined]) -> Iterator[list[Record | Quarantined]]:
    window: list[Record | Quarantined] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += row.characters if isinstance(row, Record) else len(row.raw)
        if len(window) == WINDOW_ROWS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _why_not(row: Record | Quarantined, columns: list[str]) -> str:
    """Why a row cannot be answered; empty if it can."""
    if isinstance(row, Quarantined):
        return row.reason
    for column in columns:
        if column not in row.values:
            return f"no key {column!r}"
    return judge([row.values[column] for column in columns], columns).why


# ------------------------------------------------------------------------------------------------ files


def shown_name(source: str) -> str:
    return "stdin" if source == "-" else source


def _refuse_source(source: str, target: str) -> None:
    """Raises `UserError` where the answers would take the place of what they are answers to."""
    path = user_path(target)
    with suppress(OSError, io.UnsupportedOperation):  # which whoever opens them tells; a stdin that is no file
        if target == "-" or not path.is_file():
            return
        read = os.fstat(sys.stdin.fileno()) if source == "-" else user_path(source).stat()  # `- < FILE`
        if os.path.samestat(read, path.stat()):
            raise UserError(f"--out {target}: is the file that is read; name another")


@contextmanager
def opened_source(source: str, form: str) -> Iterator[Table]:
    if source == "-":
        yield read_table(sys.stdin.buffer, form, "stdin")
        return
    path = user_path(source)
    form = form or form_of(path)
    try:
        file: BinaryIO = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file:
        yield read_table(file, form, source)


@contextmanager
def opened_target(target: str) -> Iterator[TextIO]:
    """stdout, or a file that is there when it is whole; half a surrogate pair comes out as JSON's escape for it."""
    if target == "-":
        out = io.TextIOWrapper(sys.stdout.buffer, "utf-8", "backslashreplace", newline="", write_through=False)
        try:
            yield out
            out.flush()
        finally:
            out.detach()
        return
    with (
        told_target(Path(target)) as aside,
        aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as out_file,
    ):
        yield out_file


@contextmanager
def told_target(target: Path) -> Iterator[Path]:
    """`written_aside`, for --out: what goes wrong there is a `UserError`."""
    target = user_path(target)
    try:
        if target.is_dir() or not target.parent.is_dir():
            raise UserError(f"--out {target}: {'is a folder' if target.is_dir() else 'its folder does not exist'}")
        with written_aside(target) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"--out {target}: {error.strerror or error}") from None
