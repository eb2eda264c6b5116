"""What a run folder tells afterwards."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from mtbert.config import load_config, to_yaml
from mtbert.errors import UserError
from mtbert.record import MAX_ID, RunRecord, Said, kept_id, settings, write_predictions
from mtbert.runs import Rank
from mtbert.tracking import Tracker

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def said(seed: int, classes: int = 5) -> Said:
    rng = np.random.default_rng(seed)
    return Said(
        np.array(["a", "<b>", "ü9"]), *rng.integers(0, classes, (2, 3)), *rng.random((3, 3)), rng.random((3, classes))
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Evaluated after 10, 20, 30 and 40 steps; the best is the one after 20, as good as the one after 40."""
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, ["tasks.para=null"])))
    best = None
    with Tracker(tmp_path, Rank(), 0, 40, quiet=True) as tracker:
        for step, score in ((9, math.nan), (19, 0.75), (29, 0.5), (39, 0.75)):
            scores = {"metric/sst/accuracy": score / 2, "metric/sts/pearson": score, "metric/composite": score}
            tracker.scalars(step, {**scores, "loss/sst": 1.0})
            best = step + 1 if score == 0.75 and best is None else best
            write_predictions(tmp_path, step + 1, {"sst": said(step), "sts": said(step, 1)}, best)
    return tmp_path


def test_curves_and_scores(run: Path) -> None:
    record = RunRecord(run)
    assert record.curves["metric/composite"].steps.tolist() == [9, 19, 29, 39]
    assert math.isnan(record.curves["metric/composite"].values[0])
    assert record.scores("best") == (20, {"sst": 0.375, "sts": 0.75, "composite": 0.75})
    assert record.scores("latest")[0] == 40


def test_predictions_of_the_best_and_the_newest_evaluation_stay(run: Path) -> None:
    assert sorted(path.name for path in (run / "predictions").iterdir()) == ["step-00000020.npz", "step-00000040.npz"]
    record = RunRecord(run)
    for which, step in (("best", 19), ("latest", 39)):
        read = record.said(which)["sst"]  # type: ignore[arg-type]
        for field in fields(Said):
            np.testing.assert_array_equal(getattr(read, field.name), getattr(said(step), field.name))


def test_a_line_in_the_writing_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "time": 1.0, "loss/s')
    assert RunRecord(run).curves["loss/sst"].steps[-1] == 39


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        RunRecord(tmp_path / "nowhere")
    (run / "predictions" / "step-00000020.npz").unlink()
    with pytest.raises(UserError, match=r"step-00000020\.npz: no such file"):
        RunRecord(run).said("best")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        RunRecord(run).said("latest")


def test_a_damaged_document_is_one_line(run: Path) -> None:
    for content in (b"[1]", b'{"step": ', b"\xff", b'{"step": ' + b"7" * 5000 + b"}", b"[" * 2**17):
        (run / "result.json").write_bytes(content)
        with pytest.raises(UserError, match=r"result\.json: not what training wrote; it was damaged"):
            assert RunRecord(run).result


def test_an_id_of_a_megabyte_is_kept_short_and_apart_from_others() -> None:
    ids = ["7", "x" * MAX_ID, "x" * 2**20, "x" * 2**20 + "y"]
    kept = [kept_id(id) for id in ids]
    assert kept[:2] == ids[:2] and len(set(kept)) == 4
    assert max(map(len, kept)) == MAX_ID and [kept_id(id) for id in kept] == kept


def test_settings_are_what_bears_on_learning() -> None:
    one = settings(load_config(QUICKSTART, ["surgery.method=sum", "surgery.options={}"]))
    other = settings(load_config(QUICKSTART, ["run.name=x", "engine.threads=1", "data.cache=/c", "seed=1"]))
    assert {key for key in one if one[key] != other[key]} == {"seed", "surgery.method"}
    assert one["tasks.sts.head.kind"] == "relu_cosine"
