"""What a search leaves for its reader: `best.yaml`, and `report.md` with pictures."""

from __future__ import annotations

import math
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtbert.config_files import load_config, to_yaml
from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.record import read_lines
from tune.board import brief
from tune.curves import attempts, evaluations_in
from tune.space import Parameter, Space
from tune.study import COMPOSITE, Study, Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tune.search import Settings

COLOURS = {"complete": "tab:blue", "pruned": "tab:orange", "failed": "tab:red", "running": "tab:grey"}
SIGMA = "schedule.length"
Evaluations = list[tuple[int, dict[str, float | None]]]
"""Of a trial: steps done, and its scores."""
LONGEST_LABEL = 12
"""Characters of an option in a picture."""


def write_best(folder: Path, settings: Settings, study: Study) -> Tried | None:
    """`best.yaml`, and with several metrics `pareto/0003.yaml` … for the front. Returns the best trial."""
    best = study.best()
    if best is None:
        return None
    base = load_config(folder / "base.yaml")
    chosen = [(best, folder / "best.yaml")]
    if len(settings.metrics) > 1:
        (folder / "pareto").mkdir(exist_ok=True)
        chosen += [(trial, folder / "pareto" / f"{trial.number:04d}.yaml") for trial in study.front()]
        for path in {*(folder / "pareto").glob("[0-9]*.yaml")} - {path for _, path in chosen}:
            path.unlink()  # of a trial that later ones beat
    for trial, path in chosen:
        config = load_config(folder / "trials" / f"{trial.number:04d}" / "config.yaml")
        place = config.run.model_copy(update={"dir": base.run.dir, "name": None})
        ranks = f"--{'gpus' if settings.gpus else 'ranks'}-per-node {settings.ranks}"
        scores = ", ".join(f"{name} {score:.4f}" for name, score in trial.scores.items())
        head = f"# Trial {trial.number} of {settings.name}: {scores} after {trial.examples:,} examples.\n"
        if "lineage" in trial.notes:
            head += (
                "# Population-based: these values are the last ones; the weights saw others before (lineage.jsonl).\n"
            )
        head += f"# Trains again with: python launch/submit.py {ranks} --config {shlex.quote(str(path))}\n"
        write_atomically(path, head + to_yaml(config.model_copy(update={"run": place})))
    return best


# ------------------------------------------------------------------------------------------------- report.md


def write_report(folder: Path, settings: Settings, space: Space, study: Study) -> None:
    tried = study.tried()
    curves, damaged = _read_curves(folder, tried)
    pictures = _draw(folder, settings, space, study, curves)
    parts = [
        f"# Search {settings.name}",
        _summary(settings, tried),
        _best(study),
        _picture(pictures, "progress", "Best score so far, by trial and by examples trained on in all trials"),
        _picture(pictures, "pareto", "Every trial that saw all examples; the front in black"),
        _picture(pictures, "curves", "Every trial's score against the examples it has seen"),
        "\n\n".join(f"Without the curve of trial {number}: {why}." for number, why in damaged.items()),
        _importances(study),
        _picture(pictures, "importances", "Importance"),
        _picture(pictures, "parallel", "Parallel coordinates, the better the brighter"),
        _sigma(space),
        _picture(pictures, "sigma", "σ against each task's score"),
        _picture(pictures, "values", "Every parameter against every score"),
        _legend(space),
        _cost(folder, study),
        _trials(tried),
    ]
    write_atomically(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def _summary(settings: Settings, tried: Sequence[Tried]) -> str:
    states = [trial.state for trial in tried]
    counts = ", ".join(f"{states.count(state)} {state}" for state in COLOURS if state in states)
    judge = "no trial is stopped early" if settings.scheduler == "none" else f"scheduler {settings.scheduler}"
    return (
        f"{len(tried)} of {settings.trials} trials ({counts}) of `{Path(settings.source).name}`, sampler "
        f"{settings.sampler}, {judge}, search seed {settings.seed}, {settings.ranks} rank(s) per trial. Judged by "
        f"{', '.join(settings.metrics)} on the development sets.\n\n"
        f"**Every trial trains on {settings.examples:,} examples**, all tasks together, whatever its σ or batch "
        f"size, and trials are compared at equal numbers of examples, {settings.evaluations} times on the way. The "
        f"score of a trial is that of its last evaluation. `pruned` trials were stopped on the way."
    )


def _best(study: Study) -> str:
    best = study.best()
    if best is None:
        return "No trial saw all its examples."
    rows = [f"| {name} | {brief(value)} |" for name, value in best.values.items()]
    scores = ", ".join(f"{name} {score:.4f}" for name, score in best.scores.items())
    text = f"## Best: trial {best.number}\n\n{scores} (`best.yaml`)\n\n| parameter | value |\n|---|---|\n" + "\n".join(
        rows
    )
    if len(study.metrics) > 1:
        front = ", ".join(str(trial.number) for trial in study.front())
        text += (
            f"\n\nThe best composite of the Pareto front over {', '.join(study.metrics)}: trials {front} (`pareto/`)."
        )
    return text


def _importances(study: Study) -> str:
    shares = study.importances()
    if not shares:
        few = "Fewer than four different scores of trials that saw all their examples"
        return f"## Importance\n\n{few}: nothing can be said about importance."
    used = {label: sum(label in trial.params for trial in study.tried()) for label in shares}
    rows = [f"| {label} | {share:.2f} | {used[label]} |" for label, share in shares.items()]
    return (
        "## Importance\n\nShare of each parameter in reaching the best scores (PED-ANOVA), over the trials that saw "
        "all their examples. With few trials a rough guide. A weight appears as its share before all are scaled to "
        "their sum."
        "\n\n| parameter | importance | trials with it |\n|---|---|---|\n" + "\n".join(rows)
    )


def _labels(parameter: Parameter) -> list[str]:
    """Of a choice's options in pictures: letters where they are too long, and numbers after z."""
    texts = [brief(option) for option in parameter.options]
    short = [*string.ascii_lowercase, *map(str, range(27, len(texts) + 1))][: len(texts)]
    return texts if max(map(len, texts)) <= LONGEST_LABEL else short


def _legend(space: Space) -> str:
    """What the letters mean."""
    return "\n".join(
        f"`{parameter.name}`: " + "; ".join(f"{a} = {brief(b)}" for a, b in zip(labels, parameter.options, strict=True))
        for parameter in space.parameters
        if parameter.kind == "choice" and (labels := _labels(parameter)) != [brief(b) for b in parameter.options]
    )


def _sigma(space: Space) -> str:
    if not any(SIGMA in parameter.keys for parameter in space.parameters):
        return ""
    return (
        "## σ\n\nσ is the number of steps of an epoch. Here trials see the same number of examples, so σ does not say "
        "how long a trial trains, and in round robin, where loaders simply go on, it changes nothing else: a "
        "difference between values of σ is due to the other parameters. σ acts where something happens once an epoch "
        "(annealed sampling, milestones, rising thresholds). How long to train is what the curves above show."
    )


def _trials(tried: Sequence[Tried]) -> str:
    names = list(dict.fromkeys(name for trial in tried for name in trial.scores))
    head = ["trial", "state", "examples", *names, "values"]
    rows = []
    for trial in tried:
        scores = [f"{trial.scores[name]:.4f}" if name in trial.scores else "" for name in names]
        told = ", ".join(f"{name} {brief(value)}" for name, value in trial.values.items())
        if trial.error:
            told += f"; **{_last_line(trial.error)}**"
        rows.append([str(trial.number), trial.state, f"{trial.examples:,}", *scores, told])
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [head, *rows]]
    return "## Trials\n\n" + "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _last_line(text: str) -> str:
    return [line for line in text.splitlines() if line.strip()][-1].strip()


def _picture(pictures: Mapping[str, Path], name: str, caption: str) -> str:
    return f"![{caption}]({pictures[name].name})\n\n{caption}." if name in pictures else ""


# ------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """Where a trial's time went, in seconds."""

    start: float  # from the scheduler's decision to the first step
    steps: float
    whole: float


def cost(folder: Path, asked: float, examples: int) -> Cost | None:
    """Of a trial that was not interrupted, from its run folder; None when it never made a step.

    Args:
        asked: when the scheduler decided for it.
        examples: seen up to its last evaluation.
    """
    try:
        lines = [*read_lines(folder)]
    except UserError:
        return None
    evaluated = [line.step + 1 for line in lines if "metric/composite" in line.values]
    windows = [line for line in lines if "speed/examples_per_second" in line.values]
    if not windows or not evaluated:
        return None
    per_step = examples / evaluated[-1]
    before = [0, *(line.step + 1 for line in windows)]
    seconds = [
        (line.step + 1 - first) * per_step / line.values["speed/examples_per_second"]
        for line, first in zip(windows, before, strict=False)
    ]
    return Cost(windows[0].time - seconds[0] - asked, sum(seconds), lines[-1].time - asked)


def _cost(folder: Path, study: Study) -> str:
    known = []
    for trial in study.tried():
        run = folder / "trials" / f"{trial.number:04d}"
        once = attempts(run) == 1
        if once and "asked" in trial.notes and (found := cost(run, trial.notes["asked"], trial.examples)) is not None:
            known.append(found)
    if not known or "seconds" not in study.notes:
        return ""
    available = study.notes["seconds"] * study.notes.get("slots", 1)
    steps = sum(each.steps for each in known)
    between = sum(each.whole - each.start - each.steps for each in known)
    if steps + between > available:  # a session was killed, or had other places: its time is not known
        return ""
    start = float(np.median([each.start for each in known]))
    return (
        f"## Time\n\n{study.notes['seconds']:.0f} s for the whole search, {study.notes.get('slots', 1)} trial(s) at "
        f"once. From the decision for a trial to its first step {start:.1f} s (median). Of the time that trials had, "
        f"{100 * steps / available:.0f} % were training steps, {100 * between / available:.0f} % evaluations and saves "
        f"between them, {100 - 100 * (steps + between) / available:.0f} % the rest: starting and ending trials, Ray, "
        f"empty places at the end, {len(study.tried()) - len(known)} trial(s) too short or started more than once."
    )


# ------------------------------------------------------------------------------------------------- pictures


def _draw(
    folder: Path, settings: Settings, space: Space, study: Study, curves: Mapping[int, Evaluations]
) -> dict[str, Path]:
    """PNG files by name; what there is nothing to draw for is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tried = [trial for trial in study.tried() if trial.scores]
    if not tried:
        return {}
    names = list(dict.fromkeys(name for trial in tried for name in trial.scores))
    numeric = [parameter for parameter in space.parameters if _coordinates(parameter)]
    jobs: dict[str, tuple[tuple[float, float], Callable[[Any], None]]] = {
        "progress": ((9, 3.2), lambda figure: _progress(figure, tried, study.first_metric)),
        "curves": ((3.2 * len(names), 3), lambda figure: _curves(figure, tried, names, curves)),
        "parallel": ((1.4 * len(numeric) + 3, 4), lambda figure: _parallel(figure, numeric, tried, study.first_metric)),
        "values": (
            (2.2 * len(names), 1.7 * sum(len(_coordinates(each)) for each in numeric)),
            lambda figure: _scatter(figure, numeric, tried, names),
        ),
    }
    if shares := study.importances():
        jobs["importances"] = ((7, 0.3 * len(shares) + 0.8), lambda figure: _bars(figure, shares))
    if sigma := [parameter for parameter in numeric if SIGMA in parameter.keys]:
        jobs["sigma"] = ((2.6 * len(names), 2.4), lambda figure: _scatter(figure, sigma, tried, names))
    if len(settings.metrics) > 1:
        jobs["pareto"] = (
            (3.2 * (len(settings.metrics) - 1), 3),
            lambda figure: _pareto(figure, study, settings.metrics),
        )
    paths = {}
    for name, (size, draw) in jobs.items():
        figure = pyplot.figure(figsize=size, layout="constrained")
        draw(figure)
        paths[name] = folder / f"{name}.png"
        figure.savefig(paths[name], dpi=110)
        pyplot.close(figure)
    return paths


def _coordinates(parameter: Parameter) -> list[tuple[str, Callable[[Any], float]]]:
    """Label and number of each coordinate of a parameter's value; a choice is the place of its option."""
    if parameter.kind == "simplex":
        return [(key, partial(_weight, place)) for place, key in enumerate(parameter.keys)]
    if parameter.kind == "choice":
        return [(parameter.name, lambda value: float(parameter.options.index(value)))]
    return [(parameter.name, float)]


def _weight(place: int, value: list[float]) -> float:
    return value[place]


def _progress(figure: Any, tried: Sequence[Tried], metric: str) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    whole = [trial for trial in tried if trial.state == "complete"]
    scales = [list(range(len(tried))), np.cumsum([trial.examples for trial in tried]).tolist()]
    for axis, places in zip(axes, scales, strict=True):
        at = dict(zip((trial.number for trial in tried), places, strict=True))
        for state, colour in COLOURS.items():
            dots = [trial for trial in tried if trial.state == state]
            if not dots:
                continue
            axis.scatter([at[t.number] for t in dots], [t.scores[metric] for t in dots], c=colour, s=14, label=state)
        if whole:
            best = np.maximum.accumulate([trial.scores[metric] for trial in whole])
            axis.step([at[t.number] for t in whole], best, where="post", c="black", lw=1, label="best so far")
    axes[0].set(xlabel="trial", ylabel=metric)
    axes[1].set(xlabel="examples, all trials")
    axes[0].legend(fontsize="x-small")


def _read_curves(folder: Path, tried: Sequence[Tried]) -> tuple[dict[int, Evaluations], dict[int, str]]:
    """Evaluations of each trial, and what is wrong with those that cannot be read: one must not cost the report."""
    curves, damaged = {}, {}
    for trial in tried:
        try:
            curves[trial.number] = [*evaluations_in(folder / "trials" / f"{trial.number:04d}")]
        except UserError as error:
            damaged[trial.number] = str(error)
    return curves, damaged


def _curves(figure: Any, tried: Sequence[Tried], names: Sequence[str], curves: Mapping[int, Evaluations]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(names)))
    for trial in tried:
        if not (evaluations := curves.get(trial.number)):
            continue
        per_step = trial.examples / evaluations[-1][0] if trial.state != "running" else math.nan
        for axis, name in zip(axes, names, strict=True):
            points = [(step * per_step, scores.get(name)) for step, scores in evaluations]
            axis.plot(*zip(*points, strict=True), lw=0.8, marker=".", ms=3, c=COLOURS[trial.state])
    for axis, name in zip(axes, names, strict=True):
        axis.set(title=name, xlabel="examples")


def _bars(figure: Any, shares: Mapping[str, float]) -> None:
    axis = figure.subplots()
    axis.barh(list(shares)[::-1], list(shares.values())[::-1])
    axis.set(xlabel="importance")


def _position(parameter: Parameter, number: float, low: float, high: float) -> float:
    if parameter.kind in ("loguniform", "logint"):
        number, low, high = math.log(number), math.log(low), math.log(high)
    return (number - low) / (high - low) if high > low else 0.5


def _parallel(figure: Any, parameters: Sequence[Parameter], tried: Sequence[Tried], metric: str) -> None:
    """A line per trial over the coordinates that it has, and the score."""
    from matplotlib import colormaps

    axis: Axes = figure.subplots()
    columns = [(each, label, of) for each in parameters for label, of in _coordinates(each)]
    ends = []
    for parameter, _, _ in columns:
        if parameter.kind == "choice":
            ends.append((0.0, len(parameter.options) - 1.0))
        elif parameter.kind == "simplex":
            ends.append((0.0, parameter.total))
        else:
            ends.append((parameter.low, parameter.high))
    scores = [trial.scores[metric] for trial in tried]
    low, high = min(scores), max(scores)
    colours = colormaps["viridis"]
    for trial in sorted(tried, key=lambda trial: trial.scores[metric]):
        merit = (trial.scores[metric] - low) / (high - low) if high > low else 0.5
        heights = {
            place: _position(parameter, of(trial.values[parameter.name]), *end)
            for place, ((parameter, _, of), end) in enumerate(zip(columns, ends, strict=True))
            if parameter.name in trial.values
        }
        heights[len(columns)] = merit
        style = "-" if trial.state == "complete" else ":"
        axis.plot(list(heights), list(heights.values()), style, c=colours(merit), lw=1.2, marker=".", ms=4)
    for place, ((parameter, _, _), end) in enumerate(zip(columns, ends, strict=True)):
        if parameter.kind == "choice":
            for option, text in enumerate(_labels(parameter)):
                height = _position(parameter, option, *end)
                axis.text(place, height, f" {text}", fontsize="x-small", va="center")
        else:
            axis.text(place, -0.04, f"{end[0]:.3g}", fontsize="x-small", ha="center", va="top")
            axis.text(place, 1.02, f"{end[1]:.3g}", fontsize="x-small", ha="center")
    axis.text(len(columns), 1.02, f"{high:.4f}", fontsize="x-small", ha="center")
    axis.text(len(columns), -0.04, f"{low:.4f}", fontsize="x-small", ha="center", va="top")
    labels = [label.removesuffix(".weight") for _, label, _ in columns] + [metric]
    axis.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize="small")
    axis.set(yticks=[], ylim=(-0.1, 1.08))
    axis.grid(axis="x", alpha=0.4)


def _scatter(figure: Any, parameters: Sequence[Parameter], tried: Sequence[Tried], names: Sequence[str]) -> None:
    """A row per coordinate, a column per score. Trials that were stopped have seen fewer examples: orange."""
    rows = [(each, label, of) for each in parameters for label, of in _coordinates(each)]
    axes = figure.subplots(len(rows), len(names), squeeze=False, sharex="row", sharey="col")
    for row, (parameter, label, of) in enumerate(rows):
        for column, name in enumerate(names):
            axis: Axes = axes[row, column]
            dots = [trial for trial in tried if parameter.name in trial.values and name in trial.scores]
            axis.scatter(
                [of(trial.values[parameter.name]) for trial in dots],
                [trial.scores[name] for trial in dots],
                c=[COLOURS[trial.state] for trial in dots],
                s=12,
            )
            if parameter.kind in ("loguniform", "logint"):
                axis.set_xscale("log")
                marks = np.geomspace(parameter.low, parameter.high, 3)
                axis.set_xticks(marks, [f"{mark:.3g}" for mark in marks], fontsize=7)
                axis.set_xticks([], minor=True)
            if parameter.kind == "choice":
                axis.set_xticks(range(len(parameter.options)), _labels(parameter), fontsize=6, rotation=20)
            axis.set_xlabel("σ" if label == SIGMA else label, fontsize="small")
            if row == 0:
                axis.set_title(name, fontsize="medium")


def _pareto(figure: Any, study: Study, metrics: Sequence[str]) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(metrics) - 1))
    front = {trial.number for trial in study.front()}
    whole = [trial for trial in study.tried() if trial.state == "complete"]
    for axis, name in zip(axes, metrics[1:], strict=True):
        for trial in whole:
            colour = "black" if trial.number in front else "tab:grey"
            axis.scatter(trial.scores[metrics[0]], trial.scores[name], c=colour, s=16)
            axis.annotate(str(trial.number), (trial.scores[metrics[0]], trial.scores[name]), fontsize="x-small")
        axis.set(xlabel=metrics[0], ylabel=name)


__all__ = ["COMPOSITE", "cost", "write_best", "write_report"]
