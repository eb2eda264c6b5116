"""What is said of mutation testing is what was recorded. The trying itself takes an hour: `make mutants`."""

from __future__ import annotations

from typing import Any

import mutants


def test_the_record_adds_up() -> None:
    record = mutants.read_record()
    assert record
    for module, told in record.items():
        assert told["mutants"] == told["tried"] == sum(told["states"].values())
        assert told["killed"] == sum(told["states"].get(state, 0) for state in mutants.NOTICED)
        assert len(told["survived"]) == told["tried"] - told["killed"]
        assert all(name.startswith(f"mtbert.{module}.") and change for name, change in told["survived"].items())


def test_a_module_is_missed_met_or_not_tried() -> None:
    known = {"when": "2030-01-01", "commit": "abc1234", "mutants": 200}
    record: dict[str, Any] = {"surgery": {**known, "killed": 169}, "schedule": {**known, "killed": 170}}
    lines = mutants.block(record).splitlines()
    assert lines[2] == "| `surgery.py` | 200 | 169 | 84.5% (missed) | abc1234, 2030-01-01 |"
    assert lines[3] == "| `schedule.py` | 200 | 170 | 85.0% | abc1234, 2030-01-01 |"
    assert lines[4:] == ["| `checkpoint.py` | | | not tried | |", "| `manifest.py` | | | not tried | |"]


def test_what_changed_since_is_told() -> None:
    same = {"commit": "abc1234", **mutants.of_what("schedule")}
    assert mutants.changed_since({"schedule": same}) == []
    other = {"schedule": {**same, "tests": "0"}, "manifest": {**same, "source": "0"}}
    assert mutants.changed_since(other) == [
        "schedule: tests changed since abc1234; try it again",
        "manifest: source and tests changed since abc1234; try it again",
    ]
