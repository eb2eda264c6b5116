"""The Optuna study: what is tried next, and the one record of what was tried. Lives in a database at all times.

Every draw of trial n comes from (seed, n) and the trials before it, so a search that is continued asks for the same
values as one that was never interrupted. Knows no Ray: `tune.search` runs what this asks for.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mtbert.environment import redacted
from mtbert.errors import UserError
from mtbert.randomness import addressed_rng
from tune.space import Space, Values

optuna.logging.set_verbosity(optuna.logging.WARNING)

COMPOSITE = "composite"
"""The metric that every trial has, besides the score of each task."""

Scores = Mapping[str, float]
"""Metric (`composite` or the name of a task) → score; higher is better."""


@dataclass(frozen=True)
class Tried:
    """One trial as the study knows it.

    `state`: running, complete (all examples seen), pruned (stopped early), failed.
    """

    number: int
    state: str
    values: Values
    scores: dict[str, float]
    examples: int
    error: str
    notes: dict[str, Any]
    curve: dict[int, float]  # examples of its rungs → first metric, where there is one metric
    params: dict[str, Any]  # in Optuna's words


STATES = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


_REFUSALS = (SQLAlchemyError, StorageInternalError, ImportError, ValueError, RuntimeError)


def _reason(error: Exception) -> str:
    return redacted(" ".join(str(error.__cause__ or error).split()))[:200]


class Study:
    """Asks for trials and keeps what became of them.

    Args:
        storage: database URL, as SQLAlchemy has it; None keeps the study in memory.
        identity: what makes this search this search (space, configuration, budget, metrics), as text by name.
        metrics: one, or several for a Pareto front.
        sampler: tpe (multivariate, conditional parameters in groups) or random.
        trials: how many are planned at first; TPE draws a quarter of them at random before it begins (4 to 10).
        resume: whether the study must be there already, or must not.

    Raises `UserError` when the storage cannot be opened, or holds a study of this name that is another search's.
    """

    def __init__(
        self,
        space: Space,
        storage: str | None,
        name: str,
        identity: Mapping[str, str],
        metrics: Sequence[str],
        sampler: str,
        seed: int,
        trials: int,
        resume: bool = False,
    ) -> None:
        self.space, self.metrics, self.seed, self._sampler = space, list(metrics), seed, sampler
        where = f"--storage {redacted(storage or 'none')}"
        file = storage.partition(":///")[2].partition("?")[0] if storage and storage.startswith("sqlite") else ""
        if resume and file.startswith("/") and not Path(file).exists():  # to open it would make it
            raise UserError(f"{where}: no study {name!r} is in it")
        # TPE's conditional groups and the importances are called experimental since 2021
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        try:
            # a dashboard may hold SQLite's lock for a moment
            options = {"connect_args": {"timeout": 60}} if storage and storage.startswith("sqlite") else {}
            database = RDBStorage(storage, engine_kwargs=options) if storage else InMemoryStorage()
            known = {each.study_name: each for each in optuna.get_all_study_summaries(database)}
        except _REFUSALS as error:
            raise UserError(f"{where}: cannot open it as a study's database: {_reason(error)}") from None
        if name in known:
            _compare(f"{where}: study {name!r}", known[name].user_attrs.get("identity", {}), identity, resume)
            if not resume:
                raise UserError(
                    f"{where}: study {name!r} is there already, of this same search; "
                    f"continue it with --resume, or choose another --name"
                )
        elif resume:
            raise UserError(f"{where}: no study {name!r} is in it")
        try:
            self.study = optuna.create_study(
                storage=database, study_name=name, directions=["maximize"] * len(self.metrics), load_if_exists=True
            )
            self.study.set_user_attr("identity", dict(identity))
            # of more trials that a resume asks for, none is another than it would have been
            self._startup: int = self.study.user_attrs.get("startup", min(10, max(4, trials // 4)))
            self.study.set_user_attr("startup", self._startup)
            if len(self.metrics) > 1:
                self.study.set_metric_names(self.metrics)
        except _REFUSALS as error:
            raise UserError(f"{where}: cannot write a study to it: {_reason(error)}") from None

    # ------------------------------------------------------------------------------------------- asking

    def ask(self) -> tuple[int, Values] | None:
        """A new trial; None while one of the stages before is not over, or when all stages are."""
        tried = self.tried()
        number = len(tried)
        fixed: Values = {}
        if self.space.stages:
            staged = self._staged(tried)
            if staged is None:
                return None
            fixed = staged
        elif number < len(self.space.starts):
            fixed = self.space.starts[number]
        if fixed and not any(trial.state == TrialState.WAITING for trial in self.study.get_trials(deepcopy=False)):
            self.study.enqueue_trial(self.space.encode(fixed))
        self.study.sampler = self._sampler_of(number)
        trial = self.study.ask()
        return trial.number, self._draw(trial)

    def values_again(self, number: int) -> Values:
        """Of a trial that was interrupted, perhaps before all its values were drawn."""
        frozen = self.study.get_trials(deepcopy=False)[number]
        self.study.sampler = self._sampler_of(number)
        return self._draw(optuna.Trial(self.study, frozen._trial_id))

    def _draw(self, trial: optuna.Trial) -> Values:
        values = self.space.draw(trial)
        trial.set_user_attr("values", values)
        return values

    def _sampler_of(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(addressed_rng(self.seed, "search", number).integers(2**31))
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(
            n_startup_trials=self._startup, multivariate=True, group=True, constant_liar=True, seed=seed
        )

    def _staged(self, tried: Sequence[Tried]) -> Values | None:
        number = len(tried)
        stage = self.space.stage_of(number)
        before = tried[: self.space.staged_trials(stage)]
        if stage == len(self.space.stages) or any(trial.state == "running" for trial in before):
            return None
        best = max((trial for trial in before if trial.scores), key=self._merit, default=None)
        return self.space.staged(number, best.values if best else {})

    def _merit(self, trial: Tried) -> tuple[bool, float]:
        return trial.state == "complete", trial.scores[self.first_metric]

    # ----------------------------------------------------------------------------------------- recording

    def report(
        self, number: int, examples: int, scores: Scores, *, rung: int | None = None, grafted: bool = False
    ) -> None:
        """After an evaluation. One that is known already is let pass: a continued trial tells all of them again.

        `rung`: the examples that this evaluation of any trial stands for, `examples` by default. Steps differ in size,
        and TPE ranks trials that were stopped by how far they came before it looks at their scores.
        `grafted`: the trial may have gone on from the weights of one that had seen less.
        """
        trial = self._trial(number)
        if examples <= trial.user_attrs.get("examples", 0) and not grafted:
            return
        if len(self.metrics) == 1:
            step = examples if rung is None else rung
            self.study._storage.set_trial_intermediate_value(trial._trial_id, step, scores[self.metrics[0]])
        self.note(number, examples=examples, scores=dict(scores))

    def note(self, number: int, **notes: Any) -> None:
        """Attributes of a trial, as JSON."""
        trial_id = self._trial(number)._trial_id
        for key, value in notes.items():
            self.study._storage.set_trial_user_attr(trial_id, key, json.loads(json.dumps(value)))

    def note_search(self, **notes: Any) -> None:
        """Attributes of the whole search."""
        for key, value in notes.items():
            self.study.set_user_attr(key, value)

    def finish(self, number: int, state: str, error: str = "") -> None:
        """`state`: complete, pruned or failed. The scores are those of the last report."""
        trial = self._trial(number)
        if trial.state.is_finished():
            return
        scores = trial.user_attrs.get("scores", {})
        if error:
            self.note(number, error=error)
        if state == "complete":
            self.study.tell(number, [scores[metric] for metric in self.metrics])
        else:
            self.study.tell(number, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)

    def delete(self) -> None:
        """Out of its database."""
        optuna.delete_study(study_name=self.study.study_name, storage=self.study._storage)

    def _trial(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    # ------------------------------------------------------------------------------------------- looking

    @property
    def notes(self) -> dict[str, Any]:
        return dict(self.study.user_attrs)

    @property
    def first_metric(self) -> str:
        """What decides where one number is needed: the metric, or the composite where there are several."""
        return self.metrics[0] if len(self.metrics) == 1 else COMPOSITE

    def tried(self) -> list[Tried]:
        """All trials, by number."""
        return [_tried(trial) for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def best(self) -> Tried | None:
        """The trial with the highest metric among those that saw all examples; of several metrics, that of the front
        with the highest composite, to which other tasks may contribute."""
        whole = [trial for trial in self.tried() if trial.state == "complete"]
        return max(
            whole if len(self.metrics) == 1 else self.front(),
            key=lambda trial: (trial.scores[self.first_metric], -trial.number),
            default=None,
        )

    def front(self) -> list[Tried]:
        """Trials that no other one beats in every metric."""
        whole = [trial for trial in self.tried() if trial.state == "complete"]

        def beaten(trial: Tried) -> bool:
            mine = [trial.scores[metric] for metric in self.metrics]
            others = ([other.scores[metric] for metric in self.metrics] for other in whole)
            return any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in others)

        return [trial for trial in whole if not beaten(trial)]

    def importances(self) -> dict[str, float]:
        """Share of each parameter in reaching the best 30 % of the scores (PED-ANOVA, Watanabe et al. 2023).

        Keyed by Optuna's names. Empty with fewer than four different scores to learn from.
        """
        whole = [trial for trial in self.tried() if trial.state == "complete"]
        losses = {trial.number: -trial.scores[self.first_metric] for trial in whole}
        if len(set(losses.values())) < 4:
            return {}
        with warnings.catch_warnings():
            # that a target is to be low, which this one is
            warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes", category=UserWarning)
            # that a conditional parameter was seldom in use: its share is rough, and the report shows the counts
            warnings.filterwarnings("ignore", message="Some regimes for parameter", category=UserWarning)
            # of few trials the best tenth, Optuna's default, would be one or two
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.3)
            found = optuna.importance.get_param_importances(
                self.study, evaluator=evaluator, target=lambda trial: losses[trial.number]
            )
        return {name: share for name, share in found.items() if math.isfinite(share)}


def _tried(trial: FrozenTrial) -> Tried:
    notes = dict(trial.user_attrs)
    return Tried(
        trial.number,
        STATES[trial.state],
        notes.pop("values", {}),
        notes.pop("scores", {}),
        notes.pop("examples", 0),
        notes.pop("error", ""),
        notes,
        dict(trial.intermediate_values),
        dict(trial.params),
    )


def _compare(where: str, known: Mapping[str, str], identity: Mapping[str, str], resume: bool) -> None:
    changed = [part for part, text in identity.items() if known.get(part) != text]
    if changed and resume:
        raise UserError(
            f"{where} was begun with another {changed[0]}: space.yaml or base.yaml has changed since, or mtbert has; "
            f"put back what was there, or begin a new search with --config and --space"
        )
    if changed:
        raise UserError(
            f"{where} belongs to a search with another {changed[0]}; choose another --name or --storage, "
            f"or continue that search with --resume"
        )
