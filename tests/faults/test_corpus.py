"""What fuzzing started from and what it found: every input is read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_readers import CORPUS, READERS, refuses_or_reads


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus_is_read_or_refused(reader: str, tmp_path: Path) -> None:
    files = sorted((CORPUS / reader).iterdir())
    assert files
    for path in files:
        refuses_or_reads(reader, path.read_bytes(), tmp_path)
