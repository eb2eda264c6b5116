"""The write side of the token cache: a file's examples as flat arrays in a folder named after what they depend on.

    N examples, S texts of an example (1 to 3)

A folder is written aside and renamed when it is whole, so that a reader sees all of it or nothing; `manifest.json`,
written last, has the length and the checksum of every array, and its own. `data.py` maps the arrays back into memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import filelock
import numpy as np
from tokenizers import Tokenizer

from mtbert.config import TaskConfig
from mtbert.errors import UserError
from mtbert.files import folder_made_aside, write_atomically
from mtbert.manifest import sha256
from mtbert.readers import Quarantined, Row, no_character, no_text, read_rows, unfit

T = TypeVar("T")
Progress = Callable[[str, int], None]
"""Called with what the file is called and its rows done."""
TOLD_AFTER_S, TOLD_EVERY_S = 2.0, 0.5
FORMAT = 2
"""Goes up whenever the same file would give other arrays."""
MAX_QUARANTINED = 100_000
CHUNK_ROWS, CHUNK_CHARACTERS = 8192, 2**21


def ensure(
    cache: Path,
    path: Path,
    shown: str,
    task: TaskConfig,
    tokenizer: Tokenizer,
    progress: Progress | None,
    source: str | None = None,
) -> Path:
    """The folder with the arrays of a task's file, made if it is not there whole. Arguments as in `load_dataset`.

    Args:
        source: column that the file must have as well, for reports.
    """
    before = _identity(path)
    content = _content_hash(path, cache)
    folder = cache / _key(task, path, tokenizer, content, source)
    if not intact(folder):
        # the other ranks of this host wait, and then find it; another user of the cache may have to lock it, too
        with filelock.FileLock(f"{folder}.lock", mode=0o666):
            if not intact(folder):
                rows = _of_one_file(path, before, content, shown, read_rows(path, *wanted_columns(task), shown, source))
                _tokenise(folder, rows, task, shown, tokenizer, progress)
    return folder


def _identity(path: Path) -> list[str | int] | None:
    """What changes with a file's content: where it lies, inode, size, times. None where there is no such file."""
    try:
        stat = path.stat()
        return [str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    except OSError:
        return None


def _of_one_file(
    path: Path, before: list[str | int] | None, content: str, shown: str, rows: Iterable[T]
) -> Iterator[T]:
    """Raises `UserError` in the end where the file is no longer the one whose hash names the folder."""
    yield from rows
    if _identity(path) != before and sha256(path) != content:  # else its mode was changed, or a link to it made
        raise UserError(f"{shown}: changed while it was read; start again when it is whole")


def wanted_columns(task: TaskConfig) -> tuple[list[str], str | None]:
    """Text columns and label column (triplets have none), and the id column."""
    label = [task.columns.label] if task.kind != "triplets" else []
    return [*task.columns.text, *label], task.columns.id


def _key(task: TaskConfig, path: Path, tokenizer: Tokenizer, content: str, source: str | None) -> str:
    """Hash of everything that the cached arrays depend on."""
    labels = list(task.range) if task.regression else task.classes
    parts = [FORMAT, path.suffix.lower(), *wanted_columns(task), source, task.kind, labels, tokenizer.to_str()]
    return hashlib.sha256(f"{content}{json.dumps(parts)}".encode()).hexdigest()


def _content_hash(path: Path, cache: Path) -> str:
    """SHA-256 of a file; of a file seen before and not touched since (inode, size, times), the one it had then.

    A file changed less than two seconds ago is hashed anew: it may change again within the clock's resolution.
    """
    try:
        if not path.is_file():
            return ""  # read_rows says what is wrong
        stat = path.stat()
        path.open("rb").close()
    except OSError:
        return ""
    identity = _identity(path)
    seen = cache / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.seen"
    if seen.is_file() and re.fullmatch(rb"[0-9a-f]{64}", known := seen.read_bytes()):  # else it was damaged
        return known.decode()
    try:
        digest = sha256(path)
    except OSError:
        return ""
    if time.time() - max(stat.st_mtime, stat.st_ctime) > 2:
        write_atomically(seen, digest)
    return digest


def intact(folder: Path) -> bool:
    """Whether every array is there in the length and with the checksum that the manifest, written last, gives it.

    Not where that is from before it had a checksum of its own.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("checksum") != zlib.crc32(json.dumps(manifest).encode()):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items()) and all(
            _checksum(folder / name) == checksum for name, checksum in manifest["checksums"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _checksum(path: Path) -> int:
    """CRC-32: against a bad disk, not against people, and several GB/s."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


class Judged(NamedTuple):
    why: str  # the row is of no use; empty if it is of use
    stops: bool = False  # training does not set such a row aside but stops
    label: float = 1.0  # as it is learnt; of triplets, whose match is to be ranked first, too


def judge(
    values: Sequence[Any], texts: Sequence[str], label: str | None = None, task: TaskConfig | None = None
) -> Judged:
    """What a row is good for: to be learnt from, to be looked at (`datasets`), to be answered (`predict`).

    Args:
        values: of the columns `texts`, then of `label` if there is one.
        task: that the label must be of; without one any will do.
    """
    number = 1.0
    if label is not None:
        if values[-1] is None or not str(values[-1]).strip():
            return Judged(f"column {label!r}: no label")
        try:
            number = task.number_of(values[-1]) if task else number
        except ValueError as error:
            return Judged(f"column {label!r}: {error}", stops=True)
    for column, text in zip(texts, values, strict=False):
        if why := no_text(text):
            return Judged(f"column {column!r}: {why}")
    for column, text in zip(texts, values, strict=False):
        if why := no_character(text):
            return Judged(f"column {column!r}: {why}; remove it", stops=True)
    return Judged("", label=number)


class _Example(NamedTuple):
    line: int
    label: float
    texts: tuple[str, ...]
    id: str


def _tokenise(
    folder: Path,
    rows: Iterable[Row | Quarantined],
    task: TaskConfig,
    shown: str,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> None:
    """Write the arrays of `rows` aside and rename them to `folder`, replacing one that is damaged."""
    with folder_made_aside(folder, intact) as new, _Writer(new, task, shown, tokenizer) as writer:
        start = told = time.monotonic()
        for done, row in enumerate(rows):
            writer.add(row)
            if (
                progress
                and done % 256 == 0
                and (now := time.monotonic()) > max(start + TOLD_AFTER_S, told + TOLD_EVERY_S)
            ):
                progress(shown, done)
                told = now
        writer.finish()


class _Writer:
    """Appends examples to the arrays of a cache folder; quarantines what cannot be learnt from."""

    def __init__(self, folder: Path, task: TaskConfig, shown: str, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._task = task
        self._label = next(iter(wanted_columns(task)[0][task.texts :]), None)  # its column; triplets have none
        self._shown = shown
        self._tokenizer = tokenizer
        self._token_dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
        self._files: dict[str, BinaryIO] = {}
        self._checksums: dict[str, int] = {}
        self._ends = {"token_starts": 0, "text_starts": 0, "id_starts": 0}
        self._chunk: list[_Example] = []
        self._characters = 0
        self._examples = 0
        self._quarantined: list[Quarantined] = []

    def __enter__(self) -> _Writer:
        names = ["tokens", "texts", "ids", "labels", "lengths", "lines", *self._ends]
        self._files = {name: (self._folder / name).open("wb") for name in names}
        for name in self._ends:
            self._append(name, np.zeros(1, np.int64))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, row: Row | Quarantined) -> None:
        if isinstance(row, Row):
            judged = judge(row.values, self._task.columns.text, self._label, self._task)
            if judged.stops:
                raise UserError(f"{self._shown} line {row.line}, {judged.why}")
            reason = judged.why
            if not reason:
                texts = row.values[: self._task.texts]
                self._chunk.append(_Example(row.line, judged.label, texts, row.id or ""))
                self._characters += sum(map(len, texts))
                if len(self._chunk) >= CHUNK_ROWS or self._characters >= CHUNK_CHARACTERS:
                    self._flush()
                return
        else:
            reason = row.reason
        self._quarantined.append(Quarantined(self._shown, row.line, reason, row.id))
        if len(self._quarantined) > MAX_QUARANTINED:
            raise UserError(f"{self._shown}: {self._unfit() or f'over {MAX_QUARANTINED:,} rows are malformed'}")

    def finish(self) -> None:
        """Write the manifest; from here on the folder counts as whole."""
        self._flush()
        self._quarantined.sort(key=lambda row: row.line)
        if why := self._unfit():
            raise UserError(f"{self._shown}: {why}")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "texts": len(self._task.columns.text),
            "named": self._task.columns.id is not None,
            "token_dtype": np.dtype(self._token_dtype).name,
            "quarantined": [(row.line, row.reason, row.id) for row in self._quarantined],
            "sizes": {name: file.tell() for name, file in self._files.items()},
            "checksums": {name: self._checksums.get(name, 0) for name in self._files},
        }
        checksum = zlib.crc32(json.dumps(manifest).encode())
        write_atomically(self._folder / "manifest.json", json.dumps({**manifest, "checksum": checksum}))

    def _unfit(self) -> str:
        first = "".join(f"line {row.line}: {row.reason}" for row in self._quarantined[:1])
        return unfit(self._examples, len(self._quarantined), first)

    def _flush(self) -> None:
        """Tokenise the chunk and append it."""
        examples, self._chunk, self._characters = self._chunk, [], 0
        if not examples:
            return
        texts = [text for example in examples for text in example.texts]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths_NS = np.array([len(i) for i in ids], np.int32).reshape(len(examples), -1)
        keep_N = lengths_NS.all(axis=1)
        for n in np.flatnonzero(~keep_N):  # control characters alone, for example
            column = self._task.columns.text[int(lengths_NS[n].argmin())]
            reason = f"column {column!r}: nothing in the text is a wordpiece"
            self._quarantined.append(Quarantined(self._shown, examples[n].line, reason, examples[n].id))
        kept = np.flatnonzero(keep_N).tolist()
        kept_texts = np.flatnonzero(keep_N.repeat(lengths_NS.shape[1])).tolist()
        names = [examples[n].id.encode(errors="replace") for n in kept]
        lengths_NS = lengths_NS[keep_N]
        tokens = itertools.chain.from_iterable(ids[i] for i in kept_texts)
        self._append("tokens", np.fromiter(tokens, self._token_dtype, int(lengths_NS.sum())))
        self._append("lengths", lengths_NS)
        self._append_starts("token_starts", lengths_NS.ravel())
        self._append_strings("texts", "text_starts", [texts[i].encode() for i in kept_texts])
        self._append_strings("ids", "id_starts", names)
        self._append("labels", np.array([examples[n].label for n in kept], np.float32))
        self._append("lines", np.array([examples[n].line for n in kept], np.int64))
        self._examples += len(kept)

    def _append(self, name: str, values: np.ndarray) -> None:
        self._write(name, np.ascontiguousarray(values).tobytes())

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self._checksums[name] = zlib.crc32(content, self._checksums.get(name, 0))

    def _append_starts(self, name: str, lengths: np.ndarray) -> None:
        starts = self._ends[name] + lengths.cumsum(dtype=np.int64)
        self._append(name, starts)
        self._ends[name] = int(starts[-1]) if len(starts) else self._ends[name]

    def _append_strings(self, name: str, starts: str, strings: list[bytes]) -> None:
        self._write(name, b"".join(strings))
        self._append_starts(starts, np.array([len(string) for string in strings], np.int64))
