"""The report of a search, from a study alone: warnings, of a picture that does not fit, are errors."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launch import submit
from mtbert.config_files import load_config, to_yaml
from mtbert.yaml_files import dump_yaml
from tune.report import write_best, write_report
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


def test_a_report_of_trials_with_other_tasks_and_of_many_options(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    para = base.model_dump(mode="json")["tasks"]["para"]
    options = [{"method": "pcgrad", "options": {"number": number}} for number in range(30)]
    path.write_text(dump_yaml({"parameters": {"tasks.para": {"choice": [None, para]}, "surgery": {"choice": options}}}))
    space = load_space(path, base)
    study = Study(space, None, "name", {}, ["sst"], "random", 0, 12)
    for number in range(6):
        asked = study.ask()
        assert asked is not None
        study.report(number, 100, dict.fromkeys(("composite", *space.config(asked[1]).tasks), number / 12))
        study.finish(number, "complete")
    settings = Settings(
        *("quickstart.yaml", 6, 100, 1, ["sst"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "name"),
    )
    write_report(tmp_path, settings, space, study)
    report = (tmp_path / "report.md").read_text()
    assert "y = {method: pcgrad, options: {number: 24}}; z = " in report
    assert "27 = {method: pcgrad, options: {number: 26}}" in report
    assert (tmp_path / "values.png").exists()


def test_the_command_in_best_yaml_names_a_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a search"
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    space = load_space(ROOT / "configs" / "search" / "default.yaml", base)
    study = Study(space, None, "name", {}, ["composite"], "random", 0, 1)
    assert study.ask() is not None
    study.report(0, 100, {"composite": 0.5})
    study.finish(0, "complete")
    for path in (folder / "base.yaml", folder / "trials" / "0000" / "config.yaml"):
        path.parent.mkdir(parents=True)
        path.write_text(to_yaml(base))
    settings = Settings(
        *("quickstart.yaml", 1, 100, 1, ["composite"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "name"),
    )
    assert write_best(folder, settings, study)
    _, command = (folder / "best.yaml").read_text().splitlines()[:2]
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.partition("python launch/submit.py ")[2])
    assert submit.main([*words, "--local", "--dry-run"]) == 0


def test_a_damaged_curve_costs_no_more_than_itself(tmp_path: Path) -> None:
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    space = load_space(ROOT / "configs" / "search" / "default.yaml", base)
    study = Study(space, None, "name", {}, ["composite"], "random", 0, 2)
    line = '{"step": 9, "time": 1.0, "metric/composite": 0.5}\n'
    for number, text in enumerate([line, line.replace("0.5", "half")]):
        assert study.ask() is not None
        study.report(number, 100, {"composite": 0.5})
        study.finish(number, "complete")
        trial = tmp_path / "trials" / f"{number:04d}"
        trial.mkdir(parents=True)
        (trial / "metrics.jsonl").write_text(text)
    settings = Settings(
        *("quickstart.yaml", 2, 100, 1, ["composite"], "asha", 3, "random", 0, 1, 1, 0.0, None, "", "name"),
    )
    write_report(tmp_path, settings, space, study)
    report = (tmp_path / "report.md").read_text()
    assert f"\n\nWithout the curve of trial 1: {trial}/metrics.jsonl line 1: not what training wrote; it" in report
    assert (tmp_path / "curves.png").exists() and "trial 0: " not in report


def test_pareto_holds_the_front_and_what_the_user_put_there(tmp_path: Path) -> None:
    """The first trial is alone on the front, until the search is continued with a second, which beats it."""
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    space = load_space(ROOT / "configs" / "search" / "default.yaml", base)
    study = Study(space, None, "name", {}, ["sst", "sts"], "random", 0, 2)
    settings = Settings(
        *("quickstart.yaml", 2, 100, 1, ["sst", "sts"], "none", 3, "random", 0, 1, 1, 0.0, None, "", "name"),
    )
    (tmp_path / "base.yaml").write_text(to_yaml(base))
    for number in range(2):
        assert study.ask() is not None
        study.report(number, 100, dict.fromkeys(("composite", "sst", "sts"), (1 + number) / 10))
        study.finish(number, "complete")
        trial = tmp_path / "trials" / f"{number:04d}"
        trial.mkdir(parents=True)
        (trial / "config.yaml").write_text(to_yaml(base))
        assert write_best(tmp_path, settings, study)
        (tmp_path / "pareto" / "mine.yaml").touch()
    assert {path.name for path in (tmp_path / "pareto").iterdir()} == {"0001.yaml", "mine.yaml"}
