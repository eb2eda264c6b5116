"""What docs/reliability.md tells as measured is what the records have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import again
import fuzz_readers
import mutants
import page
import pytest
import soak

ROOT = Path(__file__).parent.parent.parent


BLOCKS = {
    "soak": lambda: soak.table(soak.Ledger(soak.LEDGER)) + "\n",
    "fuzz": lambda: fuzz_readers.block(fuzz_readers.entries()),
    "mutants": lambda: mutants.block(mutants.read_record()),
    "test-again": lambda: again.table(again.read(again.RECORD)) + "\n",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_page_has_what_was_recorded(name: str) -> None:
    """Each tool writes its block, with `--table` nothing else."""
    assert page.cut(name)[1] == BLOCKS[name]()


SUITE = """
import pytest

def test_passes(): pass

@pytest.mark.skip
def test_skipped(): pass

@pytest.mark.skipif({good}, reason="good")
def test_fails(): raise ValueError

@pytest.fixture
def broken(): raise ValueError

@pytest.mark.skipif({good}, reason="good")
def test_has_an_error(broken): pass
"""


@pytest.mark.parametrize("good", [True, False])
def test_a_run_of_a_suite_is_counted(good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE.format(good=good))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    line = again.once([sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(suite)])
    assert (line["passed"], line["skipped"], line["code"]) == ((1, 3, 0) if good else (1, 1, 1))
    assert line["failed"] == ([] if good else ["test_suite::test_fails", "test_suite::test_has_an_error"])
    assert json.loads(json.dumps(line)) == line


def test_a_suite_that_does_not_run_is_no_run() -> None:
    with pytest.raises(SystemExit, match="exit code 3, and no test has run"):
        again.once([sys.executable, "-c", "raise SystemExit(3)"])


def test_in_a_row_are_those_since_the_last_failure() -> None:
    lines = [{"code": code, "commit": str(number)} for number, code in enumerate([0, 2, 0, 0])]
    assert [line["commit"] for line in again.in_a_row(lines)] == ["2", "3"]
    assert again.in_a_row(lines[:2]) == []


def test_nothing_run_is_no_table() -> None:
    assert again.table([]) == "Not run yet: tests/faults/again.jsonl has no line."


def test_the_command_takes_no_nonsense() -> None:
    words = [sys.executable, str(ROOT / "tests" / "faults" / "again.py"), "--times", "many"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid int value: 'many'" in done.stderr
