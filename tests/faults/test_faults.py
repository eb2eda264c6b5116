"""A few faults into one real job of two ranks: what `make soak` does for an hour, in half a minute."""

from __future__ import annotations

import pytest
import soak


def test_a_job_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it saves, and stopped by Ctrl-C: the same bits, nobody left, and nothing."""
    monkeypatch.setattr(soak, "STEPS", 60)
    monkeypatch.setattr(soak, "EVALUATE_EVERY", 40)
    told: list[str] = []
    kinds = ["kill -9 of a rank, saving", "Ctrl-C"]
    answer = soak.soak(len(kinds), seed=0, names=kinds, worlds=[2], tell=told.append)
    assert answer["faults"] == len(kinds) and not answer["lost"], told
