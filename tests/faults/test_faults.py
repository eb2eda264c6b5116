"""A few faults into real jobs of two ranks: what `make soak` does for hours, in a minute or two."""

from __future__ import annotations

import json
from pathlib import Path

import patient
import pytest
import soak

KINDS = [
    "kill -9 of a rank, saving",
    "Ctrl-C",
    "a file of the newest checkpoint flipped",
    "kill -9 of everything, caching data",
]


def test_jobs_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault struck, none was lost, and every patient came to the end of an undisturbed run; a soak that is begun
    again has nothing left to do."""
    monkeypatch.setattr(patient, "STEPS", 120)
    monkeypatch.setattr(patient, "EVALUATE_EVERY", 40)
    told: list[str] = []
    path = tmp_path / "soak.jsonl"
    soak.soak(len(KINDS), 0, KINDS, [2], soak.Ledger(path), tmp_path / "lost", told.append)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    survived = [line for line in lines if line.get("outcome") == soak.SURVIVED]
    assert sorted(line["kind"] for line in survived) == sorted(KINDS), told
    assert all(line["evidence"] for line in survived)
    struck = {line["patient"] for line in lines if "kind" in line}
    assert {line["concluded"] for line in lines if "concluded" in line} == struck, told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "undisturbed", None)  # nothing is started
        path.write_text(path.read_text() + '{"seed": 0, "numb')  # nor does half a line matter
        soak.soak(len(KINDS), 0, KINDS, [], soak.Ledger(path), tmp_path / "lost", told.append)
    assert f"| **all** | **{len(KINDS)}** | **0** |" in soak.table(soak.Ledger(path))
