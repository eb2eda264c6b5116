"""Comparisons of runs whose predictions are known, so that what is a difference is known too."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtbert.cli import main
from mtbert.compare import bootstrap, compare, grouped, holm
from mtbert.config_files import load_config, to_yaml
from mtbert.errors import UserError
from mtbert.figures import panels, svg
from mtbert.metrics import METRICS
from mtbert.record import Curve, RunRecord, Said, write_predictions
from mtbert.runs import Rank
from mtbert.tracking import Tracker

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
N = 300
METRIC = {"sst": "accuracy", "sts": "pearson"}


def said(seed: int, right: float) -> dict[str, Said]:
    """Labels that depend on no seed; answers of which about that share is right."""
    labels = np.random.default_rng(7)
    classes_N, values_N = labels.integers(0, 5, N), labels.random(N) * 5
    rng = np.random.default_rng(seed)
    guesses_N = np.where(rng.random(N) < right, classes_N, (classes_N + 1) % 5)
    common = {"ids_N": np.arange(N).astype(str), "lines_N": np.arange(N) + 2, "tokens_N": rng.integers(4, 30, N)}
    shares_NC = np.eye(5)[guesses_N] * 0.6 + 0.08
    losses_N = -np.log(shares_NC[np.arange(N), classes_N])
    noisy_N = values_N * right + rng.random(N) * 5 * (1 - right)
    sst = Said(**common, labels_N=classes_N, predictions_N=guesses_N, losses_N=losses_N, probabilities_NC=shares_NC)
    errors_N = (values_N - noisy_N) ** 2
    none_N0 = np.zeros((N, 0))
    sts = Said(**common, labels_N=values_N, predictions_N=noisy_N, losses_N=errors_N, probabilities_NC=none_N0)
    return {"sst": sst, "sts": sts}


def score(task: str, one: Said) -> float:
    return METRICS[METRIC[task]](one.predictions_N, one.labels_N)


def make(folder: Path, right: float, seed: int, *overrides: str, answers: dict[str, Said] | None = None) -> Path:
    """A run folder as training leaves it, with those answers."""
    answers = answers or said(seed, right)
    folder.mkdir()
    config = load_config(QUICKSTART, ["tasks.para=null", f"seed={seed}", f"run.name={folder.name}", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    scores = {f"metric/{task}/{METRIC[task]}": score(task, one) for task, one in answers.items()}
    with Tracker(folder, Rank(), 0, 10, quiet=True) as tracker:
        for step in range(9):
            tracker.scalars(step, {"loss/sst": 1 / (step + 1), "gradient/cosine/sst~sts": 0.1 - step / 50})
        tracker.scalars(9, {**scores, "metric/composite": float(np.mean(list(scores.values())))})
    write_predictions(folder, 10, answers, ())
    return folder


def test_groups_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """As trials of two searches: what differs is too long for a name, and their runs are called alike."""
    folders = [tmp_path / search / "trials" / "t3" for search in ("a", "b")]
    for folder, value in zip(folders, (0.125, 0.25), strict=True):
        folder.parent.mkdir(parents=True)
        keys = ("optimizer.lr", "optimizer.head_lr", "optimizer.weight_decay", "encoder.dropout", "tasks.sst.weight")
        make(folder, 0.6, 1, *(f"{key}={value}" for key in keys))
    assert [group.label for group in grouped([RunRecord(folder) for folder in folders])] == [*map(str, folders)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """pcgrad on three seeds, a clearly better sum, and a lr that changes nothing one could tell."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        *(make(folder / f"pcgrad-{seed}", 0.6, seed) for seed in range(3)),
        *(make(folder / f"sum-{seed}", 0.85, seed + 10, "surgery.method=sum") for seed in range(2)),
        make(folder / "lr", 0.6, 20, "optimizer.lr=0.5"),
    ]


def test_groups_are_runs_that_differ_in_seed_alone(runs: list[Path]) -> None:
    groups = grouped([RunRecord(folder) for folder in runs])
    assert [len(group.runs) for group in groups] == [3, 2, 1]
    assert [group.label for group in groups] == [
        "optimizer.lr=0.001 surgery.method=pcgrad",
        "optimizer.lr=0.001 surgery.method=sum",
        "optimizer.lr=0.5 surgery.method=pcgrad",
    ]


def test_a_real_difference_is_significant_and_chance_is_not(runs: list[Path]) -> None:
    comparison = compare(runs, "latest", 400)
    verdicts = {(d.group, d.task): d.verdict for d in comparison.differences}
    better, same = comparison.groups[1].label, comparison.groups[2].label
    assert {verdicts[better, task] for task in ("sst", "sts", "composite")} == {"better"}
    assert {verdicts[same, task] for task in ("sst", "sts", "composite")} == {"not significant"}
    for difference in comparison.differences:
        assert difference.low < difference.difference < difference.high
    own = [
        METRICS["accuracy"](RunRecord(r).said("latest")["sst"].predictions_N, said(0, 1)["sst"].labels_N) for r in runs
    ]
    first, second = comparison.scores[0]["sst"], comparison.scores[1]["sst"]
    assert (first.mean, first.deviation) == pytest.approx((np.mean(own[:3]), np.std(own[:3], ddof=1)))
    assert comparison.differences[0].difference == pytest.approx(second.mean - first.mean)
    assert comparison.scores[2]["sst"].deviation is None


def test_many_differences_can_be_significant(tmp_path: Path) -> None:
    """Nine: with 200 resamples, none would be after Holm's adjustment; 32 would be too many for 1,000."""
    bad = make(tmp_path / "bad", 0.3, 0)
    good = [make(tmp_path / f"good{n}", 0.9, n, f"optimizer.lr={n}e-3") for n in range(2, 5)]
    comparison = compare([bad, *good], "latest", 100)
    assert {d.verdict for d in comparison.differences} == {"better"} and len(comparison.differences) == 9


def test_a_repeat_is_no_other_seed(tmp_path: Path, runs: list[Path]) -> None:
    again = make(tmp_path / "again", 0.6, 0)
    comparison = compare([*runs[:3], again, runs[3]], "latest", 100)
    assert [len(group.runs) for group in comparison.groups] == [3, 1]
    assert comparison.notes == ["again: has the settings and the seed of pcgrad-0; only that one counts"]


def test_a_worse_run_is_significant_on_the_other_side(runs: list[Path]) -> None:
    comparison = compare([runs[3], runs[0]], "best", 200)
    assert [d.verdict for d in comparison.differences] == ["worse"] * 3


def test_the_interval_is_scipy_s() -> None:
    """Against scipy.stats.bootstrap on one run each, with resamples of its own: equal up to their noise."""
    one, other = said(1, 0.6)["sst"], said(2, 0.7)["sst"]
    resampled = bootstrap([[{"sst": one}], [{"sst": other}]], {"sst": "accuracy"}, 4000)
    delta_R = resampled[1]["sst"] - resampled[0]["sst"]
    wins_N = (other.predictions_N == other.labels_N).astype(float) - (one.predictions_N == one.labels_N)
    wanted = stats.bootstrap((wins_N,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    low, high = wanted.confidence_interval
    assert np.quantile(delta_R, [0.025, 0.975]) == pytest.approx([low, high], abs=0.006)
    assert delta_R.std() == pytest.approx(wanted.standard_error, rel=0.05)


def test_seeds_widen_the_interval() -> None:
    """Two runs that disagree: which of them is drawn is part of the uncertainty."""
    steady = [{"sst": said(1, 0.7)["sst"]}] * 2
    apart = [{"sst": said(1, 0.5)["sst"]}, {"sst": said(1, 0.9)["sst"]}]
    spread = [bootstrap([runs], {"sst": "accuracy"}, 500)[0]["sst"].std() for runs in (steady, apart)]
    assert spread[1] > 3 * spread[0]


def test_holm_s_adjustment() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_runs_of_other_examples_or_tasks_are_listed_but_not_compared(runs: list[Path], tmp_path: Path) -> None:
    answers = said(3, 0.9)
    sst = answers["sst"]
    shifted = Said(**{**vars(sst), "ids_N": np.arange(1, N + 1).astype(str)})
    other = make(tmp_path / "shifted", 0.9, 3, "surgery.method=mean", answers={**answers, "sst": shifted})
    comparison = compare([runs[0], other], "latest", 100)
    composite = "composite: not of all tasks; not compared"
    assert comparison.notes == ["sst: shifted was scored on other examples than pcgrad-0; not compared", composite]
    assert {difference.task for difference in comparison.differences} == {"sts"}
    less = make(tmp_path / "less", 0.9, 3, "tasks.sts=null", answers={"sst": sst})
    assert compare([runs[0], less], "latest", 100).notes == ["sts: less has no such task; not compared", composite]


def test_a_broken_model_is_no_difference(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = said(3, 0.6)
    sts = Said(**{**vars(answers["sts"]), "predictions_N": np.full(N, np.nan)})
    broken = make(tmp_path / "broken", 0.6, 3, "surgery.method=mean", answers={**answers, "sts": sts})
    for first, second in ((broken, runs[0]), (runs[0], broken)):
        comparison = compare([first, second, runs[3]], "latest", 100)
        finite = {(d.group, d.task) for d in comparison.differences}
        assert {task for group, task in finite if group == comparison.groups[1].label} == {"sst"}
        assert len(finite) == (2 if first == broken else 4)
        assert len(comparison.notes) == 6 - len(finite) and all("no finite score" in note for note in comparison.notes)
    assert main(["compare", str(broken), str(runs[0]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["groups"][0]["scores"]["sts"] == {"mean": None, "deviation": None}


def test_a_broken_classifier_is_no_difference_though_its_classes_are_numbers(runs: list[Path], tmp_path: Path) -> None:
    """Evaluation scores it NaN, and keeps NaN's class, which is 0."""
    answers = said(3, 0.6)
    broken = make(tmp_path / "broken", 0.6, 3, "surgery.method=mean", answers=answers)
    assert {difference.task for difference in compare([broken, runs[0]], "latest", 100).differences} >= {"sst"}
    curves = broken / "metrics.jsonl"
    lines = [json.loads(line) for line in curves.read_text().splitlines()]
    for line in lines:
        for tag in line.keys() & {"metric/sst/accuracy", "metric/composite"}:
            line[tag] = math.nan
    curves.write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compare([broken, runs[0]], "latest", 100)
    assert {difference.task for difference in comparison.differences} == {"sts"}
    assert len(comparison.notes) == 2 and all("no finite score" in note for note in comparison.notes)


def test_at_the_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    names = [str(run) for run in runs]
    assert main(["compare", *names, "--resamples", "100", "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Development scores") and lines[1].split() == [
        "run",
        "seeds",
        "step",
        "sst",
        "sts",
        "composite",
    ]
    assert lines[2].startswith("optimizer.lr=0.001 surgery.method=pcgrad") and lines[2].count("±") == 3
    assert "\x1b" not in "".join(lines) and lines[-1] == f"page: {page}"
    text = page.read_text()
    assert "surgery.method=sum" in text and text.count("data:image/svg+xml;base64,") >= 3
    assert main(["compare", *names[:2], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["groups"][0]["runs"] == names[:2] and record["differences"] == []
    assert main(["compare", names[0], names[3], "--json"]) == 0
    verdicts = {each["verdict"] for each in json.loads(capsys.readouterr().out)["differences"]}
    assert verdicts <= {"better", "worse", "not significant"} and verdicts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda names: [names[0], names[0]], "named twice"),
        (lambda names: [names[0], "nowhere"], "nowhere: no run folder"),
        (lambda names: [*names, "--resamples", "10"], "--resamples 10: an interval takes at least 100"),
        (lambda names: [names[0], "--html", "/proc/nothing/page.html"], "cannot write it"),
    ],
)
def test_mistakes(runs: list[Path], change, told: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert main(["compare", *change([str(run) for run in runs[:2]])]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_an_unfinished_run_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(QUICKSTART)))
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        compare([tmp_path], "latest", 100)


def test_a_resample_without_a_class_has_the_metric_of_the_others() -> None:
    """F1 of three classes, of which the third is rare, by a model that never says it: two thirds at best."""
    one = said(0, 1.0)["sst"]
    labels_N = np.arange(N) % 2.0
    labels_N[0] = 2
    three = dataclasses.replace(one, labels_N=labels_N, predictions_N=np.arange(N) % 2.0)
    [resampled] = bootstrap([[{"sst": three}]], {"sst": "f1"}, 100)
    assert set(np.round(resampled["sst"], 1)) == {0.7, 1.0}  # with the rare one and without
    wrong = dataclasses.replace(three, predictions_N=np.where(labels_N == 0, 2.0, labels_N))
    [resampled] = bootstrap([[{"sst": wrong}]], {"sst": "f1"}, 100)
    assert resampled["sst"].max() < 0.6, "nothing is right of class 0"


def test_labels_are_drawn_as_they_are() -> None:
    """What begins with an underscore would be left out, and dollars be taken for a formula."""
    curve = Curve(np.arange(2), np.ones(2))
    figure = panels({"loss": [("_first", curve), (r"$\frac$", curve)]})
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [" _first", r"\$\frac\$"]
    assert svg(figure)
