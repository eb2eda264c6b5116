"""The study: what is asked for, on a problem whose answer is known, and what its database keeps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mtbert.config_files import load_config
from mtbert.errors import UserError
from tune.space import Space, Values, load_space
from tune.study import Study

ROOT = Path(__file__).parent.parent.parent

SPACE = """
parameters:
  optimizer.lr: {loguniform: [1e-6, 1e-1]}
  optimizer.head_lr: {loguniform: [1e-6, 1e-1]}
  dropout: {uniform: [0, 0.9], keys: [encoder.dropout]}
  weights: {simplex: 3, keys: [tasks.*.weight]}
  schedule.kind: {choice: [round_robin, sampled]}
  schedule.alpha: {uniform: [0, 1], when: {schedule.kind: sampled}}
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return load_space(path, load_config(ROOT / "configs" / "quickstart.yaml"))


def score(values: Values) -> float:
    """Highest, 0, at lr 1e-3, head_lr 1e-2, dropout 0.2, weights (2, 0.5, 0.5) and alpha 0.3."""
    away = (math.log10(values["optimizer.lr"]) + 3) ** 2 + (math.log10(values["optimizer.head_lr"]) + 2) ** 2
    away += 4 * (values["dropout"] - 0.2) ** 2
    away += sum((have - want) ** 2 for have, want in zip(values["weights"], [2, 0.5, 0.5], strict=True))
    return -away - (2 * (values["schedule.alpha"] - 0.3) ** 2 if "schedule.alpha" in values else 0.5)


def study_of(space: Space, storage: str | None = None, **changes: object) -> Study:
    settings = {
        "name": "name",
        "identity": {"space": "this"},
        "metrics": ["composite"],
        "sampler": "tpe",
        "seed": 0,
        "trials": 40,
    }
    return Study(space, storage, **{**settings, **changes})  # type: ignore[arg-type]


def trained(study: Study) -> tuple[int, Values]:
    asked = study.ask()
    assert asked is not None
    number, values = asked
    study.report(number, 100, {"composite": score(values)})
    study.finish(number, "complete")
    return asked


def test_tpe_beats_random_search_on_average(space: Space) -> None:
    """20 seeds × 30 trials each, on a space with every kind of parameter."""
    best = {}
    for sampler in ("tpe", "random"):
        studies = [study_of(space, sampler=sampler, seed=seed) for seed in range(20)]
        best[sampler] = [max(score(trained(study)[1]) for _ in range(30)) for study in studies]
    tpe, random = (np.mean(best[sampler]) for sampler in ("tpe", "random"))
    print(f"best of 30, mean of 20 seeds: TPE {tpe:.3f}, random {random:.3f}")
    assert tpe > random + 0.3


def test_a_continued_study_asks_for_what_an_undisturbed_one_does(space: Space, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    undisturbed = [trained(whole)[1] for whole in [study_of(space)] for _ in range(14)]
    first = study_of(space, storage)
    values = [trained(first)[1] for _ in range(11)]
    interrupted = first.ask()  # and then the driver is killed
    assert interrupted is not None

    again = study_of(space, storage, resume=True)
    assert [trial.state for trial in again.tried()] == ["complete"] * 11 + ["running"]
    number = again.tried()[-1].number
    values.append(again.values_again(number))
    assert values[-1] == interrupted[1]
    again.report(number, 100, {"composite": score(values[-1])})
    again.finish(number, "complete")
    values += [trained(again)[1] for _ in range(2)]
    assert values == undisturbed


def test_more_trials_do_not_change_what_is_asked_for(space: Space, tmp_path: Path) -> None:
    undisturbed = [trained(whole)[1] for whole in [study_of(space, trials=16)] for _ in range(6)]
    storage = f"sqlite:///{tmp_path}/study.db"
    values = [trained(first)[1] for first in [study_of(space, storage, trials=16)] for _ in range(3)]
    values += [trained(again)[1] for again in [study_of(space, storage, trials=40, resume=True)] for _ in range(3)]
    assert values == undisturbed


def test_reports_told_twice_count_once(space: Space) -> None:
    study = study_of(space)
    study.ask()
    for examples, composite in [(100, 0.1), (200, 0.2), (100, 0.7), (200, 0.7)]:
        study.report(0, examples, {"composite": composite})
    study.finish(0, "pruned")
    study.finish(0, "complete")  # told by whoever comes too late
    [trial] = study.tried()
    assert (trial.state, trial.curve, trial.examples) == ("pruned", {100: 0.1, 200: 0.2}, 200)
    assert study.best() is None


def test_starts_come_first_and_leave_the_rest_to_the_sampler(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE + "starts: [{optimizer.lr: 2e-5}, {weights: [1, 1, 1], dropout: 0.5}]")
    study = study_of(load_space(path, load_config(ROOT / "configs" / "quickstart.yaml")))
    first, second, third = (trained(study)[1] for _ in range(3))
    assert first["optimizer.lr"] == 2e-5 and first["dropout"] != 0.5
    assert second["weights"] == pytest.approx([1, 1, 1]) and second["dropout"] == 0.5
    assert third["optimizer.lr"] != 2e-5


@pytest.mark.parametrize("metric", ["composite", "sst"])
def test_stages_wait_for_each_other_and_keep_the_best(metric: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / "search" / "c7.yaml"
    study = study_of(load_space(path, load_config(ROOT / "configs" / "quickstart.yaml")), metrics=[metric])
    merit = {1e-4: 0.3, 1e-5: 0.9, 1e-6: 0.5}
    for _ in range(3):
        asked = study.ask()
        assert asked is not None
        other = {"composite", "sst"} - {metric}
        study.report(
            *(asked[0], 100), {metric: (score := merit[asked[1]["optimizer.lr"]]), **dict.fromkeys(other, -score)}
        )
    assert study.ask() is None, "the second stage began before the first was over"
    for number in range(3):
        study.finish(number, "complete")
    later = [study.ask() for _ in range(3)]
    assert [asked[1] for asked in later if asked] == [
        {"optimizer.lr": 1e-5, "dropout": dropout} for dropout in (0.2, 0.3, 0.4)
    ]
    for number in range(3, 6):
        study.finish(number, "failed", "on purpose")
    assert study.ask() is None
    assert study.tried()[-1].error == "on purpose"


def test_front_holds_what_nothing_beats(space: Space) -> None:
    study = study_of(space, metrics=["sst", "sts"])
    for sst, sts in [(0.5, 0.5), (0.6, 0.4), (0.4, 0.4), (0.6, 0.5), (0.1, 0.9)]:
        asked = study.ask()
        assert asked is not None
        study.report(asked[0], 100, {"sst": sst, "sts": sts, "composite": (sst + sts) / 2})
        study.finish(asked[0], "complete")
    assert [trial.number for trial in study.front()] == [3, 4]
    best = study.best()
    assert best is not None and best.number == 3


def test_the_best_of_several_metrics_is_on_the_front(space: Space) -> None:
    """Whatever a composite of more tasks says."""
    study = study_of(space, metrics=["sst", "sts"])
    for sst, sts, para in [(0.5, 0.5, 0.9), (0.6, 0.5, 0.1), (0.5, 0.6, 0.2)]:
        asked = study.ask()
        assert asked is not None
        study.report(asked[0], 100, {"sst": sst, "sts": sts, "para": para, "composite": (sst + sts + para) / 3})
        study.finish(asked[0], "complete")
    best = study.best()
    assert best is not None and best.number == 2


def test_what_matters_is_found_important(space: Space) -> None:
    study = study_of(space, sampler="random")
    for _ in range(40):
        asked = study.ask()
        assert asked is not None
        study.report(asked[0], 100, {"composite": -abs(math.log10(asked[1]["dropout"]) + 1)})
        study.finish(asked[0], "complete")
    shares = study.importances()
    assert next(iter(shares)) == "dropout" and shares["dropout"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert "schedule.alpha" in shares


def test_a_password_is_in_no_message(space: Space) -> None:
    for storage in ("postgresql://me:geheim12@localhost:1/db", "nonsense://me:geheim12@localhost/db"):
        with pytest.raises(UserError, match=r"--storage .*//\[redacted\]@localhost") as refused:
            study_of(space, storage)
        assert "geheim12" not in str(refused.value)


@pytest.mark.parametrize(
    ("storage", "changes", "complaint"),
    [
        ("sqlite:///{}/study.db", {}, "study 'name' is there already, of this same search; continue it with --resume"),
        ("sqlite:///{}/study.db", {"identity": {"space": "that"}}, "belongs to a search with another space"),
        (
            "sqlite:///{}/study.db",
            {"identity": {"space": "that"}, "resume": True},
            "study 'name' was begun with another space: space.yaml or base.yaml has changed since, or mtbert has; put "
            "back what was there, or begin a new search",
        ),
        ("sqlite:///{}/other.db", {"resume": True}, "no study 'name' is in it"),
        ("sqlite:///file:{}/study.db?mode=ro&uri=true", {"name": "other"}, "cannot write a study to it: "),
        ("sqlite:///{}/no/folder/study.db", {}, "cannot open it as a study's database"),
        ("nonsense", {}, "cannot open it as a study's database"),
        ("sqlite:///{}/text.db", {}, "cannot open it as a study's database"),
    ],
)
def test_a_storage_that_does_not_fit_is_refused(
    space: Space, tmp_path: Path, storage: str, changes: dict[str, object], complaint: str
) -> None:
    (tmp_path / "text.db").write_text("no database, but a text that somebody wrote\n" * 40)
    study_of(space, f"sqlite:///{tmp_path}/study.db")
    with pytest.raises(UserError) as refused:
        study_of(space, storage.format(tmp_path), **changes)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"text.db", "study.db"}
