"""What fuzzing started from and what it found: every input is read, or refused in one line, in bounded memory."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_readers import CORPUS, READERS, entries, outstanding, refuses_or_reads, table

from launch.records import End, JobNote
from mtbert.lock import Owner
from mtbert.manifest import Best

ROOM = 2**30


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """No more memory than this beyond what the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus_is_read_or_refused(reader: str, tmp_path: Path) -> None:
    files = sorted((CORPUS / reader).iterdir())
    assert files
    for path in files:
        refuses_or_reads(reader, path.read_bytes(), tmp_path)


def rows(read: Any) -> Any:
    return [row.values for row in read]


TABLE = [{"id": "1", "text": "a film", "label": "3"}, {"id": "2", "text": 'a, "b"\nc', "label": "4"}]
PLAIN: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "csv": (rows, TABLE),
    "tsv": (rows, TABLE),
    "delimited": (rows, TABLE),
    "jsonl": (lambda read: rows(read[:2]), [{"text": "a", "label": 1}, {"text": None}]),
    "parquet": (rows, [("a", 0.5), (None, 1.0)]),
    "yaml": (lambda read: (read.seed, read.data.dir, read.tasks["a"].classes), (1, "D", 3)),
    "manifest": (lambda read: (read.step, read.best), (3, Best(step=3, score=0.5))),
    "shard": (lambda read: read.tolist(), [1.0, 1.0]),
    "weights": (lambda read: read[1]["words.weight"].tolist(), [[1.0, 1.0]] * 3),
    "metrics": (lambda read: (read[0]["loss/a"].values[0], read[1][0], read[2][1]["b"]), (0.25, 4, 0.0)),
    "state": (lambda read: read["famo.m"].tolist(), [[1.0] * 3] * 3),
    "shape": (lambda read: (read.vocab_size, read.heads), (30, 2)),
    "tokenizer": (lambda read: read[1], ["a", "b", "[UNK]"]),
    "origin": (lambda read: read[0]["pretrained"], "x/y"),
    "checksums": (lambda read: read[1], ["a", "b", "[UNK]"]),
    "vocabulary": (list, ["a", "b", "[UNK]"]),
    "cache": (lambda read: read, True),
    "predictions": (lambda read: [read[task].ids_N.tolist() for task in "ab"], [["u", "v"]] * 2),
    "environment": (lambda read: [cell for _, cell in read], ["/x", "3.11.7", "Linux", "n", "2", "2.13.0"]),
    "result": (lambda read: [row[3:] for row in read[1][:2]], [[0.25, None], [0.0, 0.5]]),
    "note": (lambda read: read, JobNote("slurm", "7", "ab12", "n", 2, 1)),
    "lock": (lambda read: read, Owner("ab-0", "n", 7, "7_1")),
    "end": (lambda read: read, End("stopped", 1, "n", 4, {"a": 0.5}, "m")),
    "space": (lambda read: [parameter.name for parameter in read.parameters], ["optimizer.lr", "w"]),
    "search": (lambda read: (read.trials, read.metrics), (16, ["composite"])),
    "serve": (lambda read: (read["task"], len(read["predictions"])), ("a", 2)),
}
"""Of what `corpus/READER/plain` says: what to look at, and what is there."""


@pytest.mark.parametrize("reader", READERS)
def test_what_is_in_order_is_read(reader: str, tmp_path: Path) -> None:
    read = refuses_or_reads(reader, (CORPUS / reader / "plain").read_bytes(), tmp_path)
    look, wanted = PLAIN[reader]
    assert read is not None and look(read) == wanted


def test_a_manifest_is_sealed_before_it_is_read(tmp_path: Path) -> None:
    """Else no mutation of one with a checksum would get further than that."""
    folder = CORPUS / "manifest"
    for name in ("sealed", "format-2"):
        read = refuses_or_reads("manifest", (folder / name).read_bytes(), tmp_path)
        assert read is not None and read.size == 1
    assert refuses_or_reads("manifest", (folder / "sealed-newer").read_bytes(), tmp_path) is None


# --------------------------------------------------------------------------------------------------- counts


def test_all_readers_were_fuzzed_and_nothing_is_outstanding() -> None:
    runs = entries()
    assert {run["reader"] for run in runs} == set(READERS)
    assert not outstanding(runs)
    assert sum(run["executions"] for run in runs) >= 1_000_000


def test_a_find_is_outstanding_until_it_is_replayed_and_its_reader_has_run_again() -> None:
    def entry(found: list[str]) -> dict[str, Any]:
        return {"date": "d", "commit": "c", "reader": "lock", "seconds": 2, "executions": 1500, "found": found}

    kept = hashlib.sha1((CORPUS / "lock" / "plain").read_bytes()).hexdigest()
    assert outstanding([entry(["0" * 40])]) == ["lock " + "0" * 40, "lock: not run again"]
    assert outstanding([entry([kept])]) == ["lock: not run again"]
    assert outstanding([entry([kept]), entry([])]) == []
    assert "| lock | 3,000 | 4 | 1 | d | c |" in table([entry([kept]), entry([])])
