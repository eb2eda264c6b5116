"""Runs of earlier versions, `tests/fixtures/format-*`: used, scored and continued by this one.

    python tests/test_formats.py          makes tests/fixtures/format-N, N being the format of run folders now

Do that when `mtbert.runs.FORMAT` goes up: the two formats before stay.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtbert.checkpoint import load_weights
from mtbert.config_files import load_config
from mtbert.manifest import find_checkpoint, survey
from mtbert.runs import FORMAT, Rank, check_run, create_run
from mtbert.trained import load_run
from mtbert.trainer import evaluate_run, train

FIXTURES = Path(__file__).parent / "fixtures"
STOPPED, STEPS = 4, 6

CONFIG: dict[str, Any] = {
    "data": {"dir": "DATA", "cache": "CACHE"},
    "encoder": {
        "shape": {"hidden_size": 4, "layers": 1, "heads": 1, "intermediate_size": 4, "max_positions": 16},
        "tokenizer": "DATA/vocab.txt",
        "pooling": "mean",
    },
    "tasks": {
        "films": {"kind": "classification", "train": "films.csv", "dev": "films.csv", "classes": 2,
                  "columns": {"text": ["text"], "label": "label"}},
        "pairs": {"kind": "pair_regression", "train": "pairs.csv", "dev": "pairs.csv", "range": [0, 5],
                  "columns": {"text": ["one", "two"], "label": "label"}, "head": {"kind": "cosine"}},
    },
    "phases": [{"steps": STEPS}],
    "schedule": {"batch_size": 4},
    "optimizer": {"lr": 0.01, "ema": 0.9},
    "weighting": {"method": "homoscedastic"},
    "engine": {"precision": "fp32", "threads": 1},
    "run": {"evaluate_every": 2, "name": "run"},
}  # fmt: skip
WORDS = ["a", "good", "bad", "film", "was", "seen", "by", "all", "of", "us"]


def settled(fixture: Path, place: Path) -> Path:
    """A copy of a fixture's run folder that knows where it lies now."""
    shutil.copytree(fixture, place / "format")
    run = place / "format" / "run"
    config = run / "config.yaml"
    text = config.read_text().replace("DATA", str(place / "format" / "data")).replace("CACHE", str(place / "cache"))
    config.write_text(text)
    return run


@pytest.mark.parametrize("fixture", sorted(FIXTURES.glob("format-*")), ids=lambda path: path.name)
def test_a_run_of_an_earlier_version_is_used_scored_and_continued(fixture: Path, tmp_path: Path) -> None:
    run = settled(fixture, tmp_path)
    expected = json.loads((fixture / "expected.json").read_text())
    assert all(state.checkpoint and not state.trouble for state in survey(run, thorough=True))

    opened = load_run(run, "latest")
    answers = opened.answer("films", opened.tokenise([("a good film",), ("a bad film",)]))
    assert answers.scores_N.tolist() == pytest.approx(expected["answers"], abs=1e-5)
    step, results, composite = evaluate_run(run, "latest")
    assert step == STOPPED and composite == pytest.approx(expected["composite"], abs=1e-5)
    assert [result.task for result in results] == ["films", "pairs"]

    outcome = train(run, Rank(), quiet=True)
    assert (outcome.status, outcome.step) == ("finished", STEPS)
    shapes = {name: parameter.shape for name, parameter in opened.model.named_parameters()}
    weights = load_weights(find_checkpoint(run, "latest"), shapes)
    sums = {name: float(weight.sum()) for name, weight in weights.items()}
    assert sums == pytest.approx(expected["sums"], abs=1e-4)
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(logged)) == [1, 3, 5]


def test_there_is_a_fixture_of_this_format_and_no_more_than_two_before() -> None:
    formats = [int(path.name.removeprefix("format-")) for path in FIXTURES.glob("format-*")]
    assert sorted(formats) == list(range(max(1, FORMAT - 2), FORMAT + 1))
    check_run(FIXTURES / f"format-{FORMAT}" / "run")


def make(place: Path) -> None:
    """A new fixture."""
    data = place / "data"
    data.mkdir(parents=True)
    (data / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    rows = [f"{' '.join(WORDS[n % 4 :])},{n % 2}" for n in range(12)]
    (data / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    rows = [f"{' '.join(WORDS[n % 3 :])},{' '.join(WORDS[: 2 + n % 5])},{n % 6}" for n in range(12)]
    (data / "pairs.csv").write_text("\n".join(["one,two,label", *rows]) + "\n")
    text = yaml.safe_dump(CONFIG).replace("DATA", str(data)).replace("CACHE", str(place / "cache"))
    (place / "c.yaml").write_text(text)
    run = create_run(load_config(place / "c.yaml", [f"run.dir={place}"]), None, ["python tests/test_formats.py"])
    polls = iter(range(STEPS))
    train(run, Rank(), lambda: next(polls) == STOPPED - 1, quiet=True)
    opened = load_run(run, "latest")
    answers = opened.answer("films", opened.tokenise([("a good film",), ("a bad film",)]))
    _, _, composite = evaluate_run(run, "latest")
    kept = place / "kept"
    shutil.copytree(run, kept)
    train(run, Rank(), quiet=True)
    shapes = {name: parameter.shape for name, parameter in opened.model.named_parameters()}
    weights = load_weights(find_checkpoint(run, "latest"), shapes)
    sums = {name: float(weight.sum()) for name, weight in weights.items()}
    expected = {"answers": answers.scores_N.tolist(), "composite": composite, "sums": sums}
    (place / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(run)
    kept.rename(run)
    for path in run.rglob("events*"):
        path.unlink()
    for name, secret in (("config.yaml", ""), ("environment.json", "")):
        words = (run / name).read_text().replace(str(data), "DATA").replace(str(place / "cache"), "CACHE")
        (run / name).write_text(words.replace(str(place), "PLACE") + secret)
    environment = json.loads((run / "environment.json").read_text())
    environment |= dict.fromkeys(("commit", "directory", "host", "cpu"), "")
    (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    shutil.rmtree(place / "cache")
    (place / "c.yaml").unlink()


if __name__ == "__main__":
    make(FIXTURES / f"format-{FORMAT}")
