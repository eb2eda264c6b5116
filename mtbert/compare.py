"""Several runs side by side: scores, their spread over seeds, and which differences are significant.

    N examples, R resamples, G groups of runs

Runs that differ in nothing but their seed are one group. A difference is judged by a paired bootstrap (Efron and
Tibshirani 1993; on test sets Koehn 2004): development examples are drawn with replacement, the same for all runs, and
where a group has several seeds these are drawn too; the share of resamples on the other side of 0 gives p. With two or
three seeds their spread is known badly, and p is too small rather than too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtbert.errors import UserError
from mtbert.metrics import composite, metric_of
from mtbert.pages import Table, render, run_pictures, write_page_at
from mtbert.randomness import addressed_rng
from mtbert.record import RunRecord, Said, Which, settings

LEVEL = 0.05
FINENESS = 4
"""So many times finer than `LEVEL` / 2 is what resamples can tell of a p, after Holm's adjustment."""
LONGEST_LABEL = 70


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str  # what sets it apart from the other groups
    runs: list[RunRecord]


@dataclass(frozen=True)
class Score:
    """One score of a group: mean over its runs, and their standard deviation where there are several."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if self.deviation is not None else "")


@dataclass(frozen=True)
class Difference:
    """What a group scores above the first one."""

    group: str
    task: str  # or composite
    difference: float
    low: float  # of the 95 % percentile interval
    high: float
    p: float  # two-sided, Holm-adjusted for all differences of the comparison

    @property
    def verdict(self) -> str:
        if not self.p < LEVEL:
            return "not significant"
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]
    steps: list[list[int]]  # of every group's runs: steps done
    scores: list[dict[str, Score]]  # of every group, by task and `composite`
    differences: list[Difference]  # to the first group
    notes: list[str]  # what could not be compared, and why


def compare(folders: Sequence[Path], which: Which, resamples: int) -> Comparison:
    """Read, group and judge. The first folder's group is what the others are held against.

    `resamples` is what there is at least: many differences need more for any to be significant. Of runs that have their
    seed in common, too, the first counts.

    Raises `UserError` for a folder that is no run's, was not evaluated, or is named twice.
    """
    runs = [RunRecord(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("compare: a run folder is named twice; name each once")
    groups, repeats = _without_repeats(grouped(runs))
    found = [[run.scores(which) for run in group.runs] for group in groups]
    scores = [
        {name: _score([scores[name] for _, scores in own]) for name in own[0][1] if all(name in s for _, s in own)}
        for own in found
    ]
    differences, notes = _differences(groups, which, resamples) if len(groups) > 1 else ([], [])
    return Comparison(groups, [[step for step, _ in own] for own in found], scores, differences, repeats + notes)


def _score(values: Sequence[float]) -> Score:
    return Score(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


# ------------------------------------------------------------------------------------------------ groups


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """In the order of their first runs; each is called by the settings in which the groups differ."""
    members: dict[str, list[RunRecord]] = {}
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = settings(run.config)
        del own["seed"]
        members.setdefault(repr(own), []).append(run)
        values[repr(own)] = own
    keys = list(dict.fromkeys(key for own in values.values() for key in own))
    apart = [key for key in keys if len({repr(own.get(key)) for own in values.values()}) > 1]
    groups = []
    for name, own in values.items():
        label = " ".join(f"{key}={_short(own[key])}" for key in apart if key in own)
        first = members[name][0].name
        groups.append(Group(label if 0 < len(label) <= LONGEST_LABEL else first, members[name]))
    if len({group.label for group in groups}) < len(groups):  # only in what one of them has not got
        groups = [Group(group.runs[0].name, group.runs) for group in groups]
    if len({group.label for group in groups}) < len(groups):  # as trials of two searches do
        groups = [Group(str(group.runs[0].folder), group.runs) for group in groups]
    return groups


def _without_repeats(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Without runs that say nothing of the spread over seeds, and what is said of them."""
    kept, notes = [], []
    for group in groups:
        of_seed: dict[int, RunRecord] = {}
        for run in group.runs:
            first = of_seed.setdefault(run.config.seed, run)
            if first is not run:
                notes.append(f"{run.name}: has the settings and the seed of {first.name}; only that one counts")
        kept.append(Group(group.label, list(of_seed.values())))
    return kept, notes


def _short(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "")


# --------------------------------------------------------------------------------------------- differences


def _differences(groups: Sequence[Group], which: Which, resamples: int) -> tuple[list[Difference], list[str]]:
    said = [[run.said(which) for run in group.runs] for group in groups]
    metrics, notes = _shared_tasks(groups, said)
    if not metrics:
        return [], notes
    judged = (len(groups) - 1) * (len(metrics) + 1)
    resamples = max(resamples, math.ceil(FINENESS * judged / LEVEL))
    resampled = bootstrap(said, metrics, resamples)
    everything = {name: np.arange(len(said[0][0][name])) for name in metrics}
    observed = [_mean([_scores(run, metrics, everything) for run in runs]) for runs in said]
    for group, scores in zip(groups, observed, strict=True):
        recorded = [run.scores(which)[1] for run in group.runs]
        for name in scores:  # what a broken model said is no score, though its classes may be numbers
            if not all(math.isfinite(score[name]) for score in recorded):
                scores[name] = math.nan
    compared = list(metrics)
    if notes:  # it would be of fewer tasks than the composite that is shown
        notes.append("composite: not of all tasks; not compared")
    else:
        compared.append("composite")
    differences = []
    for number, group in enumerate(groups[1:], 1):
        for task in compared:
            change = observed[number][task] - observed[0][task]
            if not math.isfinite(change):  # a model that broke: its p would be as small as can be
                notes.append(f"{task}: {group.label} or {groups[0].label} has no finite score; not compared")
                continue
            delta_R = resampled[number][task] - resampled[0][task]
            low, high = np.quantile(delta_R, [0.025, 0.975])
            # the resample that is the data counts too, so that p is never 0 (Davison and Hinkley 1997, §4.2)
            tails = (1 + np.sum(delta_R <= 0), 1 + np.sum(delta_R >= 0))
            p = min(1.0, 2 * float(min(tails)) / (resamples + 1))
            differences.append(Difference(group.label, task, change, float(low), float(high), p))
    adjusted = holm([difference.p for difference in differences])
    return [Difference(**{**asdict(d), "p": p}) for d, p in zip(differences, adjusted, strict=True)], notes


def _shared_tasks(
    groups: Sequence[Group], said: Sequence[Sequence[dict[str, Said]]]
) -> tuple[dict[str, str], list[str]]:
    """The tasks scored by one metric on the same examples in every run, each with its metric; why others are not."""
    runs = [run for group in groups for run in group.runs]
    every = [one for own in said for one in own]
    metrics, notes = {}, []
    for name in dict.fromkeys(name for own in every for name in own):
        reasons = [_unlike(runs[0], every[0], run, own, name) for run, own in zip(runs, every, strict=True)]
        if found := [reason for reason in reasons if reason]:
            notes.append(f"{name}: {found[0]}; not compared")
        else:
            metrics[name] = runs[0].config.tasks[name].metric_kind
    return metrics, notes


def _unlike(
    first: RunRecord, first_said: dict[str, Said], run: RunRecord, said: dict[str, Said], name: str
) -> str | None:
    """Why two runs' scores of a task cannot be held against each other."""
    for one, own in ((first, first_said), (run, said)):
        if name not in own:
            return f"{one.name} has no such task"
    if run.config.tasks[name].metric_kind != first.config.tasks[name].metric_kind:
        return f"{run.name} is scored by another metric than {first.name}"
    if not _same_examples(said[name], first_said[name]):
        return f"{run.name} was scored on other examples than {first.name}"
    return None


def _same_examples(one: Said, other: Said) -> bool:
    return np.array_equal(one.ids_N, other.ids_N) and np.array_equal(one.labels_N, other.labels_N)


def bootstrap(
    said: Sequence[Sequence[dict[str, Said]]], metrics: dict[str, str], resamples: int
) -> list[dict[str, NDArray[np.float64]]]:
    """Of every group: each task's score and the composite in every resample, (R,).

    The examples of a resample are the same for all groups, which pairs them; each group draws its own runs.
    """
    rng = addressed_rng(0, "compare")
    rows: list[list[dict[str, float]]] = [[] for _ in said]
    for _ in range(resamples):
        drawn = {name: rng.integers(len(said[0][0][name]), size=len(said[0][0][name])) for name in metrics}
        for row, runs in zip(rows, said, strict=True):
            chosen = rng.integers(len(runs), size=len(runs)).tolist()
            once = {run: _scores(runs[run], metrics, drawn) for run in set(chosen)}
            row.append(_mean([once[run] for run in chosen]))
    return [{task: np.array([one[task] for one in row]) for task in row[0]} for row in rows]


def _scores(said: dict[str, Said], metrics: dict[str, str], rows: dict[str, NDArray[np.int64]]) -> dict[str, float]:
    scores = {}
    for name, metric in metrics.items():
        one = said[name]
        classes = max(int(one.labels_N.max()) + 1, one.probabilities_NC.shape[1])  # a resample may lack some
        scores[name] = metric_of(metric, classes)(one.predictions_N[rows[name]], one.labels_N[rows[name]])
    return {**scores, "composite": composite({name: (metrics[name], score) for name, score in scores.items()})}


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {task: float(np.mean([one[task] for one in scores])) for task in scores[0]}


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): together these p hold the family's error."""
    adjusted = np.empty(len(ps))
    order = np.argsort(ps)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)))
    return adjusted.tolist()


# ------------------------------------------------------------------------------------------- what is shown


def score_table(comparison: Comparison) -> Table:
    names = list(dict.fromkeys(name for scores in comparison.scores for name in scores))
    names = [name for name in names if name != "composite"] + ["composite"]
    rows: list[list[str | float | None]] = []
    for group, steps, scores in zip(comparison.groups, comparison.steps, comparison.scores, strict=True):
        shown = ", ".join(map(str, sorted(set(steps))))
        rows.append([group.label, len(group.runs), shown, *(str(scores[n]) if n in scores else None for n in names)])
    return ["run", "seeds", "step", *names], rows


def difference_table(comparison: Comparison) -> Table:
    rows: list[list[str | float | None]] = [
        [d.group, d.task, f"{d.difference:+.4f}", f"{d.low:+.4f} … {d.high:+.4f}", f"{d.p:.3f}", d.verdict]
        for d in comparison.differences
    ]
    return ["run", "task", "difference", "95 % interval", "p", "verdict"], rows


def as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "groups": [
            {
                "label": group.label,
                "runs": [str(run.folder) for run in group.runs],
                "steps": steps,
                "scores": {name: _finite(asdict(score)) for name, score in scores.items()},
            }
            for group, steps, scores in zip(comparison.groups, comparison.steps, comparison.scores, strict=True)
        ],
        "differences": [{**asdict(difference), "verdict": difference.verdict} for difference in comparison.differences],
        "notes": comparison.notes,
    }


def _finite(values: dict[str, float | None]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}


def write_page(comparison: Comparison, path: Path) -> None:
    """A self-contained page with the tables and all runs' curves over each other."""
    runs = [run for group in comparison.groups for run in group.runs]
    labels = [group.label for group in comparison.groups for _ in group.runs]
    page = render(
        "compare.html",
        title=f"{len(runs)} runs compared",
        scores=score_table(comparison),
        differences=difference_table(comparison) if comparison.differences else None,
        baseline=comparison.groups[0].label,
        notes=comparison.notes,
        pictures=dict(run_pictures(runs, labels)),
    )
    write_page_at(path, page)
