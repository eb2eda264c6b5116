"""Rows out of files: CSV, TSV, JSON lines and Parquet, streamed, with bad rows set aside instead of lost.

A bad *row* (wrong number of fields, a quote that is never closed, broken JSON) is yielded as `Quarantined`; a bad
*file* (missing, another encoding, no such column) is a `UserError`. No tokens and no labels in here.

What tells an unclosed quote from a field with line breaks in it? A comma-separated file that follows RFC 4180 always
reads as it was written: the quoted field is followed over line ends until it closes, and the record counts if it has
the header's number of fields. Only when that fails are the lines after the first looked at one by one: the first of
them at which a whole record begins is the next row, and what came before it is one quarantined row.

Tab-separated files are often written without any quoting (GLUE's are), so there a quote may be a character like any
other. What tells is the tabs: a field with line breaks leaves the record's first and last line short of fields, unless
its text holds tabs as well. Where each line has all of its fields, each is a row, with its quotes.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from mtbert.errors import UserError, to_install

MAX_LINE = 2**24
"""Bytes; a longer line means that this is no text file, and would only fill the memory. Quoted fields: characters."""
csv.field_size_limit(MAX_LINE)  # by default 131,072, which documents have; fields without quotes never meet it
FIRST_ROWS = 64
"""Among so many JSON lines the first good one is looked for, to know the keys."""


@dataclass(frozen=True)
class Quarantined:
    """A row that was set aside: where it begins (1 is the file's first line), why, and its id where it is known."""

    file: str
    line: int
    reason: str
    id: str | None
    raw: str = ""  # its lines as they stand in the file; nobody keeps them for long


class Row(NamedTuple):
    line: int
    values: tuple[Any, ...]  # in the order of the columns asked for; str from delimited files
    id: str | None
    source: str = ""


class Record(NamedTuple):
    """A row with all that it holds."""

    line: int
    values: dict[str, Any]  # column → value; str from delimited files
    characters: int  # that it was read from


class Table(NamedTuple):
    """A file's columns (of JSON lines the keys of the first good row, if it is near) and its rows in order."""

    columns: list[str]
    delimiter: str  # of JSON lines ""
    rows: Iterator[Record | Quarantined]


def read_rows(
    path: Path,
    columns: Sequence[str],
    id_column: str | None = None,
    shown: str | None = None,
    source: str | None = None,
) -> Iterator[Row | Quarantined]:
    """The rows of a file in order, each as the wanted columns; memory does not grow with the file.

    Args:
        columns: names of the columns wanted.
        id_column: column that names a row.
        shown: what messages call the file; default its path.
        source: column that says where a row comes from, which some rows of JSON lines may lack.

    The format follows from the name (.jsonl, .ndjson, .json; .parquet, .pq), all else is tab- or comma-separated by its
    first line (where that has neither, .tsv by tabs), `"` quoting. Lines without a character are no rows, but in a
    file of one column. A row's line
    in Parquet is its number.
    Raises `UserError` for a missing or unreadable file, a missing column, bytes that are not UTF-8, NUL bytes.
    """
    shown = shown or str(path)
    try:
        yield from _read_rows(path, columns, id_column, shown, source)
    except OSError as error:  # of a file or folder of somebody else's
        raise UserError(f"{shown}: {error.strerror or error}") from None


def _read_rows(
    path: Path, columns: Sequence[str], id_column: str | None, shown: str, source: str | None
) -> Iterator[Row | Quarantined]:
    if not path.is_file():
        raise UserError(f"{shown}: {_missing_file(path)}")
    names = [*columns, *(name for name in (id_column, source) if name is not None)]
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        rows = _read_parquet(path, names, shown)
    elif suffix in (".jsonl", ".ndjson", ".json"):
        rows = _read_json_lines(path, names, id_column, source, shown)
    else:
        rows = _read_delimited(path, names, id_column, shown)
    for row in rows:
        if len(names) == len(columns) or isinstance(row, Quarantined):
            yield row
        else:
            told = ["" if value is None else str(value) for value in row.values[len(columns) :]]
            name = told[0] if id_column is not None else None
            yield Row(row.line, row.values[: len(columns)], name, told[-1] if source is not None else "")


def _missing_file(path: Path) -> str:
    if path.exists():
        return "is not a file; name one file"
    if not path.parent.is_dir():
        return f"no such file; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return "no such file" + (f"; did you mean {near[0]}?" if near else f" in {path.parent}")


def _positions(names: Sequence[str], present: Sequence[str], shown: str) -> list[int]:
    """Where the wanted columns are among those present."""
    for name in names:
        if present.count(name) > 1:
            raise UserError(f"{shown} line 1: column {name!r} occurs twice; rename one of them")
        if name not in present:
            near = difflib.get_close_matches(name, present, n=len(present), cutoff=0)
            listed = ", ".join(repr(column) if column else "(unnamed)" for column in near)
            raise UserError(f"{shown}: no column {name!r}; columns present: {listed or 'none'}")
    return [present.index(name) for name in names]


# ------------------------------------------------------------------------------------------------ lines

_BROKEN = re.compile("[\udc00-\udcff]")


class _Lines:
    """The lines of a file with their numbers, and a view of those to come.

    A byte that may not be in a text file (NUL, not UTF-8) stands as the lone surrogate U+DC00 + byte, which no valid
    file can hold, so that the error can name its column once the record is read.
    """

    def __init__(self, file: BinaryIO, shown: str) -> None:
        self._file = file
        self._shown = shown
        self._ahead: deque[str] = deque()
        self._broken: set[int] = set()
        self.number = 1  # of the line that is next

    def peek(self, at: int = 0) -> str | None:
        """The line `at` lines after the next one; None after the end."""
        while len(self._ahead) <= at:
            try:
                raw = self._file.readline(MAX_LINE)
            except OSError as error:
                raise UserError(f"{self._shown}: cannot be read: {error.strerror}") from None
            if not raw:
                return None
            self._ahead.append(self._decode(raw, self.number + len(self._ahead)))
        return self._ahead[at]

    def drop(self, count: int) -> None:
        for _ in range(count):
            self._ahead.popleft()
        self.number += count

    def _decode(self, raw: bytes, number: int) -> str:
        if len(raw) == MAX_LINE:
            raise UserError(f"{self._shown} line {number}: longer than {MAX_LINE:,} bytes; is this a text file?")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        text = raw.decode("utf-8", "surrogateescape")
        if "\0" in text:
            text = text.replace("\0", "\udc00")
        if not text.isascii() and _BROKEN.search(text):
            self._broken.add(number)
        return text

    def refuse_broken(self, count: int, columns: Iterable[tuple[str, Any]]) -> None:
        """Raises `UserError` if one of the next `count` lines holds such a byte.

        Args:
            columns: names and values of the record that the lines make, to name the column.
        """
        if not self._broken:
            return
        for number in range(self.number, self.number + count):
            if number in self._broken:
                found = _BROKEN.search(self._ahead[number - self.number])
                assert found
                byte = ord(found[0]) - 0xDC00
                column = next((n for n, value in columns if isinstance(value, str) and found[0] in value), None)
                where = f"{self._shown} line {number}" + (f", column {column!r}" if column is not None else "")
                what = f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8" if byte else "a NUL byte; remove it"
                raise UserError(f"{where}: {what}")


# ------------------------------------------------------------------------------------------------ CSV and TSV


class _Parsed(NamedTuple):
    fields: list[str]  # empty if the lines are no record
    lines: int  # how many were read
    reason: str  # why they are none


class _Delimited:
    """Splits lines into records; `width` is the header's number of fields."""

    def __init__(self, lines: _Lines, delimiter: str) -> None:
        self._lines = lines
        self.delimiter = delimiter
        field = rf'(?:[^"{delimiter}]*|"[^"]*(?:""[^"]*)*")'
        self._legal = re.compile(rf"{field}(?:{delimiter}{field})*")

    def parse(self, at: int, width: int | None) -> _Parsed:
        """The record that begins `at` lines after the next one."""
        text = self._lines.peek(at)
        assert text is not None
        if '"' not in text:
            return self._checked(text.rstrip("\r\n").split(self.delimiter), 1, width)
        used = 0

        def pull() -> Iterator[str]:
            nonlocal used
            while (line := self._lines.peek(at + used)) is not None:
                used += 1
                yield line

        try:
            fields = next(csv.reader(pull(), delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            return _Parsed([], used, _in_words(str(error), used))
        return self._checked(fields, used, width)

    def _checked(self, fields: list[str], lines: int, width: int | None) -> _Parsed:
        if width is None or len(fields) == width:
            return _Parsed(fields, lines, "")
        reason = f"{len(fields)} field{'s' * (len(fields) != 1)} instead of {width}"
        return _Parsed([], lines, reason + ", or a quote that is opened and not closed" * (lines > 1))

    def whole(self, at: int, width: int) -> bool:
        """Whether a record that leaves no doubt begins there: right width, and quotes only where RFC 4180 has them."""
        parsed = self.parse(at, width)
        if not parsed.fields:
            return False
        text = "".join(self._lines.peek(at + line) or "" for line in range(parsed.lines))
        return self._legal.fullmatch(text.rstrip("\r\n")) is not None

    def unquoted(self, count: int, width: int) -> list[str]:
        """The fields of the next line where it and the rest of `count` show that quotes are characters; else none."""
        if self.delimiter != "\t" or width == 1:
            return []
        for at in range(count):
            text = self._lines.peek(at)
            assert text is not None
            if text.strip("\r\n") and text.count("\t") != width - 1:
                return []
        return (self._lines.peek() or "").rstrip("\r\n").split("\t")


def _in_words(error: str, lines: int) -> str:
    """What the csv module means, for whom its words say nothing."""
    if "field limit" in error:
        return f"a quote is opened and not closed within {MAX_LINE:,} characters"
    if "new-line" in error:
        return "a carriage return outside of quotes"
    if lines > 1 or "unexpected end" in error:
        return "a quote is opened and not closed"
    return "a quote is closed before the field ends; within quotes a quote is written twice"


def _read_delimited(path: Path, names: Sequence[str], id_column: str | None, shown: str) -> Iterator[Row | Quarantined]:
    with path.open("rb") as file:
        lines, table, header = _open_delimited(file, shown)
        wanted = _positions(names, header, shown)
        for row in _records(lines, table, header, id_column, shown):
            yield row if isinstance(row, Quarantined) else Row(row[0], tuple([row[1][at] for at in wanted]), None)


def _open_delimited(file: BinaryIO, shown: str, delimiter: str | None = None) -> tuple[_Lines, _Delimited, list[str]]:
    """The file after its first line, and that line's columns."""
    lines = _Lines(file, shown)
    first = lines.peek()
    if first is None:
        raise UserError(f"{shown}: the file is empty; its first line must name the columns")
    tabs = "\t" in first or ("," not in first and shown.lower().endswith(".tsv"))  # the name where there is one column
    table = _Delimited(lines, delimiter or ("\t" if tabs else ","))
    header, used, reason = table.parse(0, None)
    lines.refuse_broken(used, ())
    if not header:
        raise UserError(f"{shown} line 1: {reason}; the first line must name the columns")
    lines.drop(used)
    return lines, table, header


def _records(
    lines: _Lines, table: _Delimited, header: list[str], id_column: str | None, shown: str
) -> Iterator[tuple[int, list[str]] | Quarantined]:
    """Line and fields of each record."""
    width = len(header)
    while (text := lines.peek()) is not None:
        number = lines.number
        if not text.rstrip("\r\n"):
            lines.drop(1)
            if width == 1:  # the row whose only field is empty
                yield number, [""]
            continue
        parsed = table.parse(0, width)
        lines.refuse_broken(parsed.lines, zip(header, parsed.fields, strict=False))
        if (parsed.lines > 1 or not parsed.fields) and (fields := table.unquoted(parsed.lines, width)):
            parsed = _Parsed(fields, 1, "")
        if parsed.fields:
            lines.drop(parsed.lines)
            yield number, parsed.fields
            continue
        # not lines.drop(parsed.lines): what follows an unclosed quote may be good rows
        taken = next((at for at in range(1, parsed.lines) if table.whole(at, width)), parsed.lines)
        reason = parsed.reason + (f" (lines {number}–{number + taken - 1})" if taken > 1 else "")
        raw = "".join(lines.peek(at) or "" for at in range(taken)).rstrip("\r\n")
        lines.drop(taken)
        yield Quarantined(shown, number, reason, _id_of(text, table, header, id_column), raw)


def _id_of(line: str, table: _Delimited, header: list[str], id_column: str | None) -> str | None:
    """The id in a malformed row, if it comes before the flaw."""
    if id_column is None:
        return None
    before = line.partition('"')[0].rstrip("\r\n").split(table.delimiter)
    at = header.index(id_column)
    whole = len(before) - ('"' in line)  # the field that the first quote is in is not to be trusted
    return before[at] if at < whole else None


def csv_writer(out: TextIO, delimiter: str) -> Any:
    """A `csv.writer` of what is read back here as it was, with a line feed after each row."""
    return csv.writer(_LineFeeds(out), delimiter=delimiter, lineterminator=_LineFeeds.END)


class _LineFeeds:
    """csv.writer is told another end of line: up to Python 3.12 it leaves a carriage return within a field unquoted,
    unless lines end with one."""

    END = "\r\n"

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, line: str) -> None:
        self.out.write(line.removesuffix(self.END) + "\n")


# ------------------------------------------------------------------------------------------------ JSON, Parquet


def _read_json_lines(
    path: Path, names: Sequence[str], id_column: str | None, source: str | None, shown: str
) -> Iterator[Row | Quarantined]:
    needed = names if source is None else names[:-1]
    keys: list[str] = []  # of the first good row
    sourced = source is None
    with path.open("rb") as file:
        for record in _json_records(file, shown):
            if isinstance(record, Quarantined):
                yield record
                continue
            if record.values and not keys:
                keys = list(record.values)
                _positions(needed, keys, shown)
            sourced = sourced or source in record.values
            absent = [name for name in needed if name not in record.values]
            if absent:
                given = record.values.get(id_column) if id_column is not None else None
                yield Quarantined(
                    shown, record.line, f"no key {absent[0]!r}", str(given) if given is not None else None
                )
            else:
                yield Row(record.line, tuple([record.values.get(name) for name in names]), None)
    if keys and not sourced:
        _positions(names, keys, shown)


def _json_records(file: BinaryIO, shown: str) -> Iterator[Record | Quarantined]:
    lines = _Lines(file, shown)
    while (text := lines.peek()) is not None:
        number = lines.number
        reason = ""
        values: Any = {}
        try:
            values = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError) as error:  # ValueError also of a number of 5000 digits
            reason = f"not JSON: {error}"
        else:
            if not isinstance(values, dict):
                reason, values = f"a JSON {type(values).__name__} instead of an object", {}
        lines.refuse_broken(1, values.items())
        lines.drop(1)
        if text.strip():
            yield (
                Quarantined(shown, number, reason, None, text.rstrip("\r\n"))
                if reason
                else Record(number, values, len(text))
            )


def read_table(file: BinaryIO, form: str, shown: str) -> Table:
    """A delimited file or JSON lines with every column, streamed: memory does not grow with the file.

    Args:
        form: jsonl; csv or tsv (by comma or tab); or "": delimited, by the first line as in `read_rows`.

    Raises `UserError` as `read_rows` does, and for a column that occurs twice.
    """
    if form == "jsonl":
        rows = _json_records(file, shown)
        first: list[Record | Quarantined] = []
        keys: list[str] = []
        while not keys and len(first) < FIRST_ROWS and (row := next(rows, None)):
            first.append(row)
            keys = list(row.values) if isinstance(row, Record) else []
        return Table(keys, "", itertools.chain(first, rows))
    lines, table, header = _open_delimited(file, shown, {"csv": ",", "tsv": "\t", "": None}[form])
    _positions(header, header, shown)
    rows = (
        row
        if isinstance(row, Quarantined)
        else Record(row[0], dict(zip(header, row[1], strict=True)), sum(map(len, row[1])))
        for row in _records(lines, table, header, "id" if "id" in header else None, shown)
    )
    return Table(header, table.delimiter, rows)


def unfit(usable: int, malformed: int, first: str) -> str:
    """Why no task is trained on a file with so many rows; empty if one is. `first`: what is wrong with the first."""
    rows = usable + malformed
    if malformed > max(5, rows / 100) or (malformed and not usable):
        return f"{malformed} of {rows} rows are malformed, more than 1 %: is this the right file? The first is {first}"
    return "" if rows else "no rows; a task needs at least one example"


def no_text(value: Any) -> str:
    """Why a row with this as its text is set aside; empty if it is not."""
    if not isinstance(value, str):
        return f"{'nothing' if value is None else type(value).__name__} instead of a text"
    return "" if value.strip() else "the text is empty"


_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


def no_character(text: str) -> str:
    """What only JSON and Parquet can smuggle into a text, NUL and half a surrogate pair, at which training stops; empty
    if there is none."""
    bad = _NO_CHARACTER.search(text)
    return f"the character U+{ord(bad[0]):04X} is no text" if bad else ""


def form_of(path: Path) -> str:
    """What a file's name says of its form, as `read_table` takes it: .csv and .tsv tell nothing, as in `read_rows`.

    Raises `UserError` for Parquet.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        raise UserError(f"{path}: Parquet cannot be read row by row here; give .csv, .tsv or .jsonl")
    return "jsonl" if suffix in (".jsonl", ".ndjson", ".json") else ""


def _read_parquet(path: Path, names: Sequence[str], shown: str) -> Iterator[Row | Quarantined]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{shown}: reading Parquet needs pyarrow: {to_install('parquet')}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _positions(names, table.schema_arrow.names, shown)
            number = 0
            for batch in table.iter_batches(batch_size=4096, columns=list(dict.fromkeys(names))):
                columns = [batch.column(name).to_pylist() for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield Row(number, values, None)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, MemoryError) as error:
        raise UserError(f"{shown}: not a readable Parquet file: {' '.join(str(error).split())}") from None
