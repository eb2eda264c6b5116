"""One run as a page to read: scores, curves, and where each task goes wrong. Self-contained, opens without a server."""

from __future__ import annotations

import datetime
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtbert.config import TaskConfig
from mtbert.config_files import to_yaml
from mtbert.data import locate_file
from mtbert.errors import UserError
from mtbert.figures import data_uri, evaluation_figures
from mtbert.metrics import metric_of
from mtbert.pages import Table, render, run_pictures, write_page_at
from mtbert.readers import Row, read_rows
from mtbert.record import RunRecord, Said, TaskResult, Which, kept_id
from mtbert.tasks import locate_data
from mtbert.token_cache import wanted_columns

WORST = 20
"""Errors shown per task."""
SLICES = 5
"""Slices by length, of about as many examples each."""


@dataclass(frozen=True)
class TaskReport:
    name: str
    summary: str
    pictures: dict[str, str]  # title → src of an image
    tables: dict[str, Table]


def write_report(folder: Path, which: Which, path: Path | None = None) -> Path:
    """Write the page, `report.html` in the run folder unless said otherwise, and say where it is.

    Texts and sources are read again from the development files; where these are gone or have changed, the page says so
    and does without.
    Raises `UserError` for a folder that is no run's, a run that was not evaluated, or a page that cannot be written.
    """
    run = RunRecord(folder)
    step, scores = run.scores(which)
    said = run.said(which)
    notes: list[str] = []
    tasks = [_task(run, name, scores[name], one, notes) for name, one in said.items()]
    page = render(
        "report.html",
        title=run.name,
        summary=_summary(run, step, which),
        notes=notes,
        scores=_scores(run, scores),
        pictures=dict(run_pictures([run], [run.name])),
        tasks=tasks,
        command=shlex.join(run.environment.command),
        environment=_environment(run),
        config=to_yaml(run.config),
    )
    path = path or folder / "report.html"
    write_page_at(path, page)
    return path


def _summary(run: RunRecord, step: int, which: Which) -> str:
    finished = "finished" if run.result else "not finished"
    today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"{which.capitalize()} evaluation, after step {step} of a run that is {finished}. Written {today}."


def _scores(run: RunRecord, scores: dict[str, float]) -> Table:
    baselines = run.result.tasks if run.result else {}
    rows: list[list[str | float | None]] = []
    for name in run.evaluated:
        told = baselines.get(name, TaskResult())
        metric = run.config.tasks[name].metric_kind
        rows.append([name, metric, scores[name], told.trivial, told.bag_of_words])
    rows.append(["composite", None, scores["composite"], None, None])
    return ["task", "metric", "score", "trivial", "bag of words"], rows


def _environment(run: RunRecord) -> list[list[str]]:
    told = run.environment.model_dump(exclude={"command", "packages"}, exclude_unset=True)
    return [[key, str(value)] for key, value in {**told, **run.environment.packages}.items()]


# ------------------------------------------------------------------------------------------------ one task


def _task(run: RunRecord, name: str, score: float, said: Said, notes: list[str]) -> TaskReport:
    task = run.config.tasks[name]
    # where no example has a loss of its own, the distance tells
    errors_N = np.where(np.isfinite(said.losses_N), said.losses_N, np.abs(said.predictions_N - said.labels_N))
    worst = np.argsort(-errors_N, kind="stable")[:WORST]
    try:
        texts, sources = _read(run, name, said, set(said.lines_N[worst].tolist()))
    except UserError as error:
        notes.append(f"{name}: without texts and sources, for {error}")
        texts, sources = {}, {}
    tables = {"By length": _by_length(task, said)}
    if sources:
        tables["By source"] = _by_source(task, said, sources)
    if not task.regression:
        tables["By class"] = _by_class(task, said)
    order = "largest loss" if task.has_example_loss else "farthest from the label"
    tables[f"The {len(worst)} worst errors ({order})"] = _errors(task, said, worst, texts)
    loss = f", mean loss {said.losses_N.mean():.4f}" if task.has_example_loss else ""
    return TaskReport(
        name,
        f"{task.kind}, {len(said):,} development examples, {task.metric_kind} {score:.4f}{loss}",
        {kind: data_uri(figure) for kind, figure in evaluation_figures(name, task, said).items()},
        tables,
    )


def _read(run: RunRecord, name: str, said: Said, wanted: set[int]) -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    """The texts that begin on the wanted lines of a development file, and every line's source where a column has it.

    Raises `UserError` where an example is not on its line any more: its text would be another's.
    """
    task = run.config.tasks[name]
    assert task.dev is not None
    shown, path = locate_file(task.dev, f"tasks.{name}.dev", locate_data(run.config))
    (columns, id_column), source = wanted_columns(task), task.columns.source
    texts, sources = {}, {}
    missing = {line: at for at, line in enumerate(said.lines_N.tolist())}
    for row in read_rows(path, columns, id_column, shown, source):
        if not isinstance(row, Row) or row.line not in missing or not _same(row, task, said, missing[row.line]):
            continue
        del missing[row.line]
        if source is not None:
            sources[row.line] = row.source
        if row.line in wanted:
            texts[row.line] = tuple(map(str, row.values[: task.texts]))
    if missing:
        raise UserError(f"{shown} has changed: line {min(missing)} is not the example that was evaluated")
    return texts, sources


def _same(row: Row, task: TaskConfig, said: Said, at: int) -> bool:
    """Whether a row is the example said something of: by its id, without ids by its label. Triplets have neither."""
    if task.columns.id is not None:
        return kept_id(row.id or "") == kept_id(str(said.ids_N[at]))
    try:
        return task.kind == "triplets" or math.isclose(
            task.number_of(row.values[task.texts]), said.labels_N[at], rel_tol=1e-6
        )
    except ValueError:
        return False


def _slice(title: str, task: TaskConfig, said: Said, rows: NDArray[np.intp]) -> list[str | float | None]:
    """Score and mean loss of some examples; a correlation of fewer than three says nothing."""
    predictions, labels = said.predictions_N[rows], said.labels_N[rows]
    enough = len(rows) > (2 if task.regression else 0)
    score = metric_of(task.metric_kind, task.class_count)(predictions, labels) if enough else None
    return [title, len(rows), score, *([float(said.losses_N[rows].mean())] if task.has_example_loss else [])]


def _columns(first: str, task: TaskConfig) -> list[str]:
    return [first, "examples", task.metric_kind, *(["mean loss"] if task.has_example_loss else [])]


def _by_length(task: TaskConfig, said: Said) -> Table:
    edges = np.unique(np.quantile(said.tokens_N, np.linspace(0, 1, SLICES + 1), method="higher"))
    slice_N = np.clip(np.searchsorted(edges, said.tokens_N, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(slice_N):
        inside = np.flatnonzero(slice_N == number)
        lengths = said.tokens_N[inside]
        rows.append(_slice(f"{lengths.min()} … {lengths.max()}", task, said, inside))
    return _columns("tokens", task), rows


def _by_source(task: TaskConfig, said: Said, sources: dict[int, str]) -> Table:
    source_N = np.array([sources.get(line, "") for line in said.lines_N.tolist()])
    names, counts = np.unique(source_N, return_counts=True)
    ordered = [str(names[at]) for at in np.argsort(-counts, kind="stable")]
    rows = [_slice(name or "(empty)", task, said, np.flatnonzero(source_N == name)) for name in ordered]
    return _columns("source", task), rows


def _by_class(task: TaskConfig, said: Said) -> Table:
    from sklearn.metrics import precision_recall_fscore_support

    names = task.class_names
    columns = precision_recall_fscore_support(
        said.labels_N, said.predictions_N, labels=range(len(names)), zero_division=0.0
    )
    rows: list[list[str | float | None]] = [
        [name, int(count), float(precision), float(recall), float(f1)]
        for name, precision, recall, f1, count in zip(names, *columns, strict=True)
    ]
    return ["class", "examples", "precision", "recall", "F1"], rows


def _errors(task: TaskConfig, said: Said, worst: NDArray[np.intp], texts: dict[int, tuple[str, ...]]) -> Table:
    graded = said.probabilities_NC.shape[1] > 0
    columns = ["id", *(task.columns.text if texts else []), "true", "predicted"]
    columns += [*(["probability of the true class"] if graded else []), *(["loss"] if task.has_example_loss else [])]
    rows = []
    for at in worst.tolist():
        label, prediction = said.labels_N[at], said.predictions_N[at]
        row: list[str | float | None] = [str(said.ids_N[at])]
        row += texts.get(int(said.lines_N[at]), [""] * len(task.columns.text)) if texts else []
        row += [task.label_of(float(label)), task.label_of(float(prediction))]
        row += [float(said.probabilities_NC[at, int(label)])] if graded else []
        rows.append([*row, *([float(said.losses_N[at])] if task.has_example_loss else [])])
    return columns, rows
