"""What a run folder tells afterwards."""

from __future__ import annotations

import errno
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtbert.config_files import load_config, to_yaml
from mtbert.errors import UserError
from mtbert.record import MAX_ID, RunRecord, Said, kept_id, settings, write_predictions
from mtbert.runs import Rank
from mtbert.tracking import Tracker

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def said(seed: int, classes: int = 5) -> Said:
    """Of a task of values where there is one class."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, classes, (2, 3)).astype(float) if classes > 1 else rng.random((2, 3))
    ids = np.array(["a", "<b>", "ü9"])
    return Said(ids, *rng.integers(1, 9, (2, 3)), *answers, rng.random(3), rng.random((3, classes)))


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
            write_predictions(tmp_path, step + 1, {"sst": said(step), "sts": said(step, 1)}, [best] if best else [])
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


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "environment.json"])
def test_a_file_that_cannot_be_read(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its owner keeps it from others, which cannot be had as root."""
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == run / name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    (run / name).touch()
    monkeypatch.setattr(Path, "open", refused)
    record = RunRecord(run)
    with pytest.raises(UserError, match=f"{name}: cannot be read: Permission denied"):
        _ = record.curves, record.result, record.environment


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        RunRecord(tmp_path / "nowhere")
    (run / "predictions" / "step-00000020.npz").unlink()
    with pytest.raises(UserError, match=r"step-00000020\.npz: no such file"):
        RunRecord(run).said("best")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        RunRecord(run).said("latest")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("result.json", content)
            for content in (b"[1]", b'{"step": ', b"\xff", b"[" * 2**17, b'{"tasks": {"a": 1}}')
        ),
        *(("environment.json", b'{"%b}' % damage) for damage in (b'command": 3', b'cpus": ' + b"7" * 5000)),
        *(("environment.json", b'{"%b}' % damage) for damage in (b'packages": []', b'host": "\\ud800"')),
    ],
)
def test_a_damaged_document_is_one_line(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not what training wrote; it was damaged"):
        assert RunRecord(run).environment and RunRecord(run).result


@pytest.mark.parametrize(
    ("task", "damage"),
    [
        ("sst", {"labels_N": np.array([0, 1])}),
        ("sst", {"labels_N": np.array([0.0, 1.0, 5.0])}),
        ("sst", {"predictions_N": np.array([0.0, 0.5, 1.0])}),
        ("sst", {"probabilities_NC": np.full((3, 4), 0.25)}),
        ("sst", {"probabilities_NC": np.full((3, 5), -0.5)}),
        ("sst", {"probabilities_NC": np.full((3, 5), 1e300)}),
        ("sst", {"ids_N": np.array([1, 2, 3])}),
        ("sst", {"ids_N": np.array(["a", "b", "\ud800"])}),
        ("sst", {"ids_N": np.array([0x110000] * 3, np.uint32).view("<U1")}),
        ("sst", {"lines_N": np.array([2.0, 3.0, 4.0])}),
        ("sts", {"tokens_N": np.array("7")}),
        ("sts", {"losses_N": np.zeros((3, 1))}),
        ("sts", {"labels_N": np.full(3, np.nan)}),
        ("sts", {"predictions_N": np.full(3, np.inf)}),
        ("sts", {"labels_N": np.array([0.0, 1e300, 5.0])}),
        ("sts", {name: np.zeros((0, 0) if name.endswith("NC") else 0) for name in vars(said(0))}),
    ],
)
def test_predictions_that_no_training_wrote(run: Path, task: str, damage: dict[str, np.ndarray]) -> None:
    both = {"sst": said(39), "sts": said(39, 1)}
    write_predictions(run, 40, {**both, task: Said(**{**vars(both[task]), **damage})}, ())
    with pytest.raises(UserError, match=f"what it says of {task} is not what training writes; it was damaged"):
        RunRecord(run).said("latest")


def test_a_model_that_broke_is_read(run: Path) -> None:
    broken = {"predictions_N": np.full(3, np.nan), "losses_N": np.full(3, np.nan)}
    write_predictions(run, 40, {"sst": said(39), "sts": Said(**{**vars(said(39, 1)), **broken})}, ())
    assert np.isnan(RunRecord(run).said("latest")["sts"].predictions_N).all()


@pytest.mark.parametrize(
    "damage",
    [
        '"step": Infinity',
        f'"step": {2**70}',
        '"step": -1',
        '"step": 1, "loss/a": 1e308',
        f'"step": 1, "loss/a": {10**400}',
    ],
)
def test_numbers_that_no_training_reaches(run: Path, damage: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"time": 1.0, {damage}}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 5: not what training wrote; it was damaged"):
        assert RunRecord(run).curves


def test_a_score_that_is_missing(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 49, "time": 1.0, "metric/sst/accuracy": 0.5, "metric/composite": 0.5}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: step 49 lacks the score of sts; it was damaged"):
        RunRecord(run).scores("latest")


def test_an_id_of_a_megabyte_is_kept_short_and_apart_from_others() -> None:
    ids = ["7", "x" * MAX_ID, "x" * 2**20, "x" * 2**20 + "y"]
    kept = [kept_id(id) for id in ids]
    assert kept[:2] == ids[:2] and len(set(kept)) == 4
    assert max(map(len, kept)) == MAX_ID and [kept_id(id) for id in kept] == kept


def test_settings_are_what_bears_on_learning() -> None:
    one = settings(load_config(QUICKSTART, ["surgery.method=sum", "surgery.options={}"]))
    other = settings(
        load_config(QUICKSTART, ["run.name=x", "engine.threads=1", "data.cache=/c", "seed=1", "run.evaluate_every=3"])
    )
    assert {key for key in one if one[key] != other[key]} == {"seed", "surgery.method", "run.evaluate_every"}
    assert one["tasks.sts.head.kind"] == "relu_cosine"
