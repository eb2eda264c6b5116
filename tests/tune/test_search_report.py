"""The report of a search, from a study alone: warnings, of a picture that does not fit, are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtbert.config import load_config
from tune.report import write_report
from tune.search import Settings
from tune.space import load_space
from tune.study import Study

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("metrics", [["composite"], ["sst", "sts"]])
def test_long_options_are_letters_in_pictures(metrics: list[str], tmp_path: Path) -> None:
    space = load_space(ROOT / "configs" / "search" / "cs224n.yaml", load_config(ROOT / "configs" / "cs224n.yaml"))
    study = Study(space, None, "name", {}, metrics, "random", 0, 12)
    for number in range(12):
        assert study.ask() is not None
        study.report(number, 100, dict.fromkeys(("composite", "sst", "para", "sts"), number / 12))
        study.finish(number, "complete" if number % 2 else "pruned")
    settings = Settings(
        *("cs224n.yaml", 12, 100, 4, metrics, "asha", 3, "random", 0, 1, 1, 0.0, None, "", "name"),
    )
    write_report(tmp_path, settings, space, study)
    report = (tmp_path / "report.md").read_text()
    assert "`schedule`: a = {kind: round_robin}; b = {alpha: 0.5, kind: sampled, tasks_per_step: 3}; c = " in report
    assert "`surgery.method`" not in report
    for picture in ("progress", "curves", "parallel", "sigma", "values", *(["pareto"] if len(metrics) > 1 else [])):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
