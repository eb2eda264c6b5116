"""Every row of the papers: its configuration loads, trains, evaluates, saves and resumes, on the generated corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import papers
from mtbert import synthetic
from mtbert.config import Config, load_config
from mtbert.manifest import find_checkpoint
from mtbert.runs import Rank, create_run
from mtbert.trainer import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs" / "papers").glob("*.yaml"))
PARTS = ("base", "A", "B")  # what rows are based on


NAMES = [row.name for row in papers.ROWS]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The generated corpus and a tiny encoder in place of the real ones."""
    folder = tmp_path_factory.mktemp("papers")
    corpus = synthetic.generate(folder / "corpus", seed=0, train=40, dev=20)
    texts = [path.read_text() for path in sorted(corpus.glob("*-train.csv"))]
    tokenizer = synthetic.train_tokenizer(texts, folder / "tokenizer.json")
    shape = {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8, "max_positions": 64}
    return [
        f"data.dir={corpus}",
        f"data.cache={folder / 'cache'}",
        f"encoder.shape={json.dumps(shape)}",
        f"encoder.tokenizer={tokenizer}",
        "schedule.batch_size=8",
        "engine.precision=fp32",
        "engine.threads=1",
        "run.log_every=1",
    ]


def short(name: str, settings: list[str], steps: int) -> Config:
    path = ROOT / "configs" / "papers" / f"{name}.yaml"
    return load_config(path, [*settings, papers.shortened(load_config(path, settings), steps)])


def test_every_row_has_its_configuration_and_the_other_way_round() -> None:
    assert {path.stem for path in CONFIGS} == {*NAMES, *PARTS}
    assert len(NAMES) == len(set(NAMES))
    required = [f"A{n}" for n in range(1, 10)] + [f"B{n}" for n in range(6)] + [f"C{n}" for n in range(1, 7)]
    assert {*required, "C0-sst", "C0-cfimdb", "D1", "D2", "D3", "D4", "D5-sst", "D5-para", "D5-sts"} <= set(NAMES)
    assert sum(name.startswith("D6") for name in NAMES) == 4
    for claim in (claim for row in papers.ROWS for claim in row.claims):
        assert claim.than in NAMES and claim.metric in (*papers.TASKS, "composite")


@pytest.mark.parametrize("name", NAMES)
def test_a_row_trains_evaluates_saves_and_resumes(name: str, settings: list[str], tmp_path: Path) -> None:
    config = short(name, [*settings, f"run.dir={tmp_path}", "run.name=run"], steps=3)
    run = create_run(config, None, [])
    asked = iter([False, True])  # stops after the second step
    stopped = train(run, Rank(), lambda: next(asked), quiet=True)
    assert (stopped.status, stopped.step) == ("stopped", 2)
    finished = train(run, Rank(), quiet=True)
    assert finished.status == "finished" and finished.step >= 3
    assert find_checkpoint(run, "latest").step == finished.step
    scored = set(json.loads((run / "result.json").read_text())["tasks"])
    assert scored == {task for task, values in config.tasks.items() if values.dev is not None}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == list(range(finished.step))
    assert not any("not_finite" in line and any("loss" in tag for tag in line["not_finite"]) for line in lines)


def test_the_runner_goes_on_where_it_was_and_writes_the_page(settings: list[str], tmp_path: Path) -> None:
    """D1 and D6-dot-probe are one configuration and so one run; two seeds of rows with a finding, one of others."""
    data = next(text.partition("=")[2] for text in settings if text.startswith("data.dir="))
    arguments = ["--data", data, "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "docs" / "papers.md")]
    arguments += ["--rows", "D1", "D6*probe", "--seeds", "1", "--steps", "2", "--set", *settings]
    assert papers.main(arguments) == 0
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["D1-seed0", "D6-concat-probe-seed0"]
    results = {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}
    page = (tmp_path / "docs" / "papers.md").read_text()
    assert "3 of 3 runs are done" in page and "| [D6-dot-probe](" in page and data not in page
    assert "beats concatenation on paraphrases (paper: +.013): " in page and "not decided" in page
    (tmp_path / "docs" / "papers.md").unlink()
    assert papers.main([*arguments, "--report"]) == 0
    assert (tmp_path / "docs" / "papers.md").read_text() == page
    assert results == {folder: (folder / "result.json").stat().st_mtime_ns for folder in folders}


def found(**values: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name.replace("_", "-"): [{"sts": value} for value in each] for name, each in values.items()}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([0.70, 0.71, 0.72], [0.60, 0.61, 0.62], "holds; +.100 sts against E-linear (standard error .008, 3 seeds)"),
        ([0.50, 0.51, 0.52], [0.60, 0.61, 0.62], "does not hold; −.100"),
        ([0.60, 0.70, 0.50], [0.59, 0.62, 0.57], "not decided, within the spread of the seeds; +.007"),
        ([0.7], [0.6], "same direction, not decided; +.100 sts against E-linear (one seed)"),
        ([0.5], [0.6, 0.6], "other direction, not decided; −.100"),
        ([], [0.6], "not run"),
    ],
)
def test_verdicts_come_from_the_numbers(one: list[float], other: list[float], said: str) -> None:
    row = next(row for row in papers.ROWS if row.name == "E-cosine")
    assert said in papers.verdict(row.claims[0], row, found(E_cosine=one, E_linear=other))


def test_nothing_changes_where_the_difference_is_small() -> None:
    row = next(row for row in papers.ROWS if row.name == "A5")
    scores = {"A5": [{"composite": 0.708}], "A4": [{"composite": 0.7}]}
    assert "changes nothing (paper: +.000): holds; +.008 composite" in papers.verdict(row.claims[0], row, scores)
    scores["A5"][0]["composite"] = 0.65
    assert "does not hold; −.050" in papers.verdict(row.claims[0], row, scores)
