"""Looking at data files before training on them, and fetching the three that the examples use.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtbert.config import Config, TaskConfig
from mtbert.data import locate_file
from mtbert.errors import UserError
from mtbert.files import read_small, user_path, write_atomically
from mtbert.pretrained import hub_file
from mtbert.readers import Quarantined, csv_writer, form_of, read_rows, read_table, unfit
from mtbert.token_cache import Judged, judge, wanted_columns

TEXTS = [
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("sentence",),
    ("text",),
]
LABELS = ["label", "sentiment", "is_duplicate", "similarity", "score"]
"""Columns that `data check` recognises by name, the first that are there."""
SHOWN = 5
CLASSES_SHOWN = 20

# ------------------------------------------------------------------------------------------------ check


class Wanted(NamedTuple):
    """A file to look at; files of one group are compared with each other."""

    path: Path
    shown: str  # what it is called
    texts: Sequence[str]
    label: str | None
    group: str
    task: TaskConfig | None = None  # that its labels must be of
    id: str | None = None  # column that names a row
    source: str | None = None  # column that says where a row comes from


@dataclass(frozen=True)
class Found:
    """What is in a file."""

    file: str
    texts: list[str]
    label: str | None
    rows: int  # usable ones
    left_out: int
    reasons: list[str]  # of the first rows left out
    refused: int  # rows with a label that is none of the task's, or no text: training stops at the first
    refusals: list[str]  # of the first of them
    unfit: str  # why training takes none of its rows
    labels: dict[str, float]  # of few: label → rows; of many: lowest, mean, highest
    words: dict[str, float]  # per row, all texts together: mean, p95, longest
    duplicates: int  # rows whose texts, lower-cased and with blanks made one, stood there before
    conflicting: int  # of these, rows whose label is another


@dataclass(frozen=True)
class Overlap:
    """Rows of `second` whose texts are in `first` too."""

    first: str
    second: str
    rows: int


def check(wanted: Sequence[Wanted]) -> tuple[list[Found], list[Overlap]]:
    """Read every file once; memory grows by some bytes per row."""
    found: list[Found] = []
    seen: list[Counter[bytes]] = []
    overlaps = []
    for number, each in enumerate(wanted):
        report, keys = _check_file(each)
        for other, other_keys in zip(wanted[:number], seen, strict=True):
            if other.group == each.group and len(other.texts) == len(each.texts):
                rows = sum(count for key, count in keys.items() if key in other_keys)
                overlaps.append(Overlap(other.shown, each.shown, rows))
        found.append(report)
        seen.append(keys)
    return found, overlaps


def wanted_files(files: Sequence[str], texts: Sequence[str] | None, label: str | None) -> list[Wanted]:
    """Files by name; columns that are not given are found by their names."""
    return [_recognised(user_path(file), texts, label) for file in files]


def wanted_by(config: Config) -> list[Wanted]:
    """The files of a configuration's tasks."""
    if config.data.generate is not None:
        raise UserError("data.generate: the corpus is generated; there are no files to check")
    wanted = []
    for name, task in config.tasks.items():
        columns, id_column = wanted_columns(task)
        label = next(iter(columns[task.texts :]), None)
        for split, file in (("train", task.train), ("dev", task.dev)):
            if file is not None:
                shown, path = locate_file(file, f"tasks.{name}.{split}", config.data)
                source = task.columns.source if split == "dev" else None
                wanted.append(Wanted(path, shown, columns[: task.texts], label, name, task, id_column, source))
    return wanted


def _recognised(path: Path, texts: Sequence[str] | None, label: str | None) -> Wanted:
    columns = _columns(path)
    chosen = texts or next((names for names in TEXTS if set(names) <= set(columns)), None)
    if chosen is None:
        raise UserError(f"{path}: which column is the text? --text NAME [NAME]; columns present: {', '.join(columns)}")
    return Wanted(path, str(path), chosen, label or next((name for name in LABELS if name in columns), None), "")


def _columns(path: Path) -> list[str]:
    if path.suffix.lower() in (".parquet", ".pq"):
        next(read_rows(path, []), None)  # says what is wrong with the file
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    try:
        with path.open("rb") as file:
            table = read_table(file, form_of(path), str(path))
            if table.columns:
                return table.columns
            return next((list(row.values) for row in table.rows if not isinstance(row, Quarantined)), [])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _check_file(wanted: Wanted) -> tuple[Found, Counter[bytes]]:
    columns = [*wanted.texts, *([wanted.label] if wanted.label else [])]
    keys: Counter[bytes] = Counter()
    first_label: dict[bytes, str] = {}
    labels: Counter[str] = Counter()
    words: list[int] = []
    reasons: list[str] = []
    refusals: list[str] = []
    left_out = refused = conflicting = 0
    for row in read_rows(wanted.path, columns, wanted.id, wanted.shown, wanted.source):
        judged = (
            Judged(row.reason)
            if isinstance(row, Quarantined)
            else judge(row.values, wanted.texts, wanted.label, wanted.task)
        )
        if judged.stops:
            refused += 1
            if len(refusals) < SHOWN:
                refusals.append(f"line {row.line}, {judged.why}")
            continue
        if judged.why or isinstance(row, Quarantined):
            left_out += 1
            if len(reasons) < SHOWN:
                reasons.append(f"line {row.line}: {judged.why}")
            continue
        texts = row.values[: len(wanted.texts)]
        label = _label(row.values[-1]) if wanted.label else ""
        normal = "\0".join(" ".join(text.lower().split()) for text in texts)
        key = hashlib.blake2b(normal.encode(), digest_size=16).digest()
        conflicting += first_label.setdefault(key, label) != label
        keys[key] += 1
        labels[label] += 1
        words.append(sum(len(text.split()) for text in texts))
    report = Found(
        file=wanted.shown,
        texts=list(wanted.texts),
        label=wanted.label,
        rows=len(words),
        left_out=left_out,
        reasons=reasons,
        refused=refused,
        refusals=refusals,
        unfit=unfit(len(words) + refused, left_out, "".join(reasons[:1])),
        labels=_spread(labels) if wanted.label else {},
        words=_lengths(words),
        duplicates=len(words) - len(keys),
        conflicting=conflicting,
    )
    return report, keys


def _label(value: Any) -> str:
    """1, 1.0 and "1.0" are one label."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: of an integer that is no float
        return str(value)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else f"{number:g}"


def _spread(labels: Counter[str]) -> dict[str, float]:
    try:
        numbers = {float(label): count for label, count in labels.items()}
    except ValueError:
        return dict(labels.most_common(CLASSES_SHOWN))
    finite = {number: count for number, count in numbers.items() if math.isfinite(number)}
    if len(numbers) <= CLASSES_SHOWN:
        return {_label(number): numbers[number] for number in sorted(numbers)}
    mean = sum(number * count for number, count in finite.items()) / sum(finite.values())
    broken = {_label(number): count for number, count in numbers.items() if number not in finite}
    return {"lowest": min(finite), "mean": round(mean, 4), "highest": max(finite), **broken}


def _lengths(words: Sequence[int]) -> dict[str, float]:
    if not words:
        return {}
    mean, p95 = float(np.mean(words)), float(np.percentile(words, 95))
    return {"mean": round(mean, 1), "p95": p95, "longest": max(words)}


def as_text(found: Iterable[Found], overlaps: Iterable[Overlap]) -> str:
    lines = []
    for each in found:
        named = f"texts {', '.join(each.texts)}; " + (f"label {each.label}" if each.label else "no labels")
        lines.append(f"{each.file}: {each.rows:,} rows ({named})")
        if each.labels:
            lines.append("  labels      " + "  ".join(f"{label}: {count:,g}" for label, count in each.labels.items()))
        if each.words:
            lines.append("  words       " + "  ".join(f"{name} {value:g}" for name, value in each.words.items()))
        if each.duplicates:
            lines.append(f"  duplicates  {each.duplicates:,}, {each.conflicting:,} of them with another label")
        if each.left_out:
            lines.append(f"  left out    {each.left_out:,}")
            lines += [f"              {reason}" for reason in each.reasons]
        if each.unfit:
            lines.append(f"  refused     {each.unfit}")
        if each.refused:
            lines.append(f"  refused     {each.refused:,}: training stops at the first")
            lines += [f"              {refusal}" for refusal in each.refusals]
    for overlap in overlaps:
        if overlap.rows:
            lines.append(f"{overlap.rows:,} rows of {overlap.second} are in {overlap.first} too")
    return "\n".join(lines) + "\n"


def as_json(found: Iterable[Found], overlaps: Iterable[Overlap]) -> str:
    content = {"files": [asdict(each) for each in found], "overlaps": [asdict(each) for each in overlaps]}
    return json.dumps(content, indent=2) + "\n"


# ------------------------------------------------------------------------------------------------ fetch


class Source(NamedTuple):
    """A file of a dataset repository on the hub, and what becomes of it."""

    repository: str
    path: str
    target: str
    columns: dict[str, str]  # theirs → ours


_GLUE = "nyu-mll/glue"
_SST = {"text": "sentence", "label": "sentiment"}
_QUORA = {"question1": "sentence1", "question2": "sentence2", "label": "is_duplicate"}
_STS = {"sentence1": "sentence1", "sentence2": "sentence2", "label": "similarity"}
SOURCES = {
    "sst": [
        Source("SetFit/sst5", "train.jsonl", "ids-sst-train.csv", _SST),
        Source("SetFit/sst5", "dev.jsonl", "ids-sst-dev.csv", _SST),
    ],
    "para": [
        Source(_GLUE, "qqp/train-00000-of-00001.parquet", "quora-train.csv", _QUORA),
        Source(_GLUE, "qqp/validation-00000-of-00001.parquet", "quora-dev.csv", _QUORA),
    ],
    "sts": [
        Source(_GLUE, "stsb/train-00000-of-00001.parquet", "sts-train.csv", _STS),
        Source(_GLUE, "stsb/validation-00000-of-00001.parquet", "sts-dev.csv", _STS),
    ],
}
"""The public relatives of the course's files: SST-5 is the same, Quora and STS-B have splits of their own."""


def fetch(folder: Path, tasks: Sequence[str]) -> Iterator[str]:
    """Bring the tasks' files from the hub into `folder`, as configs/cs224n.yaml names them; yields a line for each.

    A file that is there already stays. `sources.json` records commit and SHA-256 of what was fetched.
    Raises `UserError` where the hub cannot be reached, a file is damaged, or nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    record = folder / "sources.json"
    origins = _origins(record)
    for source in (source for task in tasks for source in SOURCES[task]):
        target = folder / source.target
        if target.exists():
            yield f"{target}: is there already"
            continue
        fetched = hub_file(source.repository, source.path, f"{source.repository}/{source.path}")
        content, rows = _rewritten(fetched, source)
        origins[source.target] = {
            "repository": source.repository,
            "path": source.path,
            "commit": fetched.parts[-len(Path(source.path).parts) - 1],
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
        try:
            write_atomically(target, content)
            write_atomically(record, json.dumps(origins, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}") from None
        yield f"{target}: {rows:,} rows from {source.repository}"


def _origins(record: Path) -> dict[str, Any]:
    """What an earlier fetch recorded."""
    if not record.exists():
        return {}
    try:
        origins = json.loads(read_small(record))
    except (OSError, ValueError, RecursionError):
        origins = None
    if not isinstance(origins, dict):
        raise UserError(f"{record}: not what `data fetch` wrote; it was damaged: remove it")
    return origins


def _rewritten(path: Path, source: Source) -> tuple[str, int]:
    """As the CS224N files are: tab-separated, with ids."""
    out = io.StringIO()
    writer = csv_writer(out, "\t")
    writer.writerow(["id", *source.columns.values()])
    count = 0
    stem = source.target.removesuffix(".csv")
    for row in read_rows(path, list(source.columns), shown=f"{source.repository}/{source.path}"):
        if isinstance(row, Quarantined):
            raise UserError(f"{row.file} line {row.line}: {row.reason}; the data set is not what it was")
        writer.writerow([f"{stem}-{count}", *row.values])
        count += 1
    return out.getvalue(), count
