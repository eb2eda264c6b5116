"""Ray Tune's side of a search: hands out what the study asks for, and tells the study what comes back."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray import tune as ray_tune
from ray.tune import Callback, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from mtbert.config import Config
from mtbert.config_files import to_yaml
from mtbert.errors import UserError
from mtbert.randomness import addressed_rng
from mtbert.runs import create_run
from tune.board import Board
from tune.curves import lineage
from tune.length import of_equal_length
from tune.space import Space, Values
from tune.study import Study
from tune.trial import SCORE, Plan, run_trial

if TYPE_CHECKING:
    from tune.search import Settings

RETRIES = 1
"""Of a trial that fails through no fault of its configuration."""


class Conductor:
    """Runs the trials of a study that are not over."""

    def __init__(self, folder: Path, settings: Settings, space: Space, study: Study, board: Board) -> None:
        self.folder, self.settings, self.space = folder, settings, space
        self.study, self.board = study, board
        self.interrupted = [trial.number for trial in study.tried() if trial.state == "running"]
        self.numbers: dict[str, int] = {}  # Tune's trial → ours
        self.goals: dict[int, int] = {}  # trial → examples at its end
        # draws of a population; those before a resume are not made again
        self.explored = sum(len(lineage(self._run(trial.number))) for trial in study.tried())
        self.asha: ASHAScheduler | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, for a way of continuing that is not ours."""
        return {}

    def conduct(self, slots: int) -> None:
        """Until all trials are over. What runs when it raises is continued by a resume.

        Raises `KeyboardInterrupt` on Ctrl-C, and as `suggest`.
        """
        settings, aside = self.settings, self.folder / ".ray"
        shutil.rmtree(aside, ignore_errors=True)
        left = settings.trials - sum(trial.state != "running" for trial in self.study.tried())
        if left <= 0:
            return
        at_once = min(settings.concurrent or slots, slots)
        self.study.note_search(slots=at_once)
        # what goes wrong is told by the board, once
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        bundle = {"CPU": settings.cpus} | ({"GPU": settings.gpus} if settings.gpus else {})
        population: dict[str, Any] = {}
        if settings.scheduler == "pbt":  # which Tune wants to know whole, and without a searcher
            members = iter(lambda: self.suggest(""), Searcher.FINISHED)
            population = {"plan": ray_tune.grid_search([each["plan"] for each in members])}
        try:
            Tuner(
                ray_tune.with_resources(run_trial, PlacementGroupFactory([{}] + [bundle] * settings.ranks, "PACK")),
                param_space=population,
                tune_config=TuneConfig(
                    search_alg=None if population else _Asks(self),
                    scheduler=self._scheduler(),
                    # a trial's Ray process serves the next one: two seconds of imports each. But where there is none
                    # until a stage is over, the ranks of a trial that was stopped would train on meanwhile
                    reuse_actors=not self.space.stages,
                    num_samples=1 if population else left,
                    # a population takes turns
                    max_concurrent_trials=None if population else at_once,
                    trial_dirname_creator=_dirname,
                ),
                run_config=RunConfig(
                    name="tune",
                    storage_path=str(aside),
                    failure_config=FailureConfig(max_failures=RETRIES),
                    callbacks=[_Tells(self)] if population else [],
                    verbose=0,
                ),
            ).fit()
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            self._tidy()

    def _scheduler(self) -> TrialScheduler:
        settings = self.settings
        if settings.scheduler == "none":
            return FIFOScheduler()
        # by evaluations: where steps differ in size, two trials' evaluations lie at slightly different examples
        common: dict[str, Any] = {"time_attr": "evaluation", "metric": SCORE + self.study.first_metric, "mode": "max"}
        if settings.scheduler == "pbt":
            # Tune recommends another kind of trainable
            warnings.filterwarnings("ignore", message="Consider boosting PBT", category=UserWarning)
            return PopulationBasedTraining(
                **common,
                perturbation_interval=1,
                custom_explore_fn=self._explore,
                log_config=False,
                require_attrs=False,  # a trial that cannot be scored reports an error instead
            )
        asha = ASHAScheduler(
            **common,
            grace_period=1,
            max_t=max(1, settings.evaluations - 1),  # no rung at the end, where nothing is left to be stopped
            reduction_factor=settings.reduction,
            stop_last_trials=False,
        )
        for trial in self.study.tried():  # of a search that is continued
            if trial.state != "running":
                self._remind(asha, f"before-{trial.number}", sorted(trial.curve.items()))
        self.asha = asha
        return asha

    def _remind(self, asha: ASHAScheduler, tune_id: str, evaluations: Sequence[tuple[int, float]]) -> None:
        """Of what a trial had shown before the search was stopped."""
        known = SimpleNamespace(trial_id=tune_id)
        asha.on_trial_add(None, known)
        for number, (_, score) in enumerate(evaluations, 1):
            asha.on_trial_result(None, known, {"evaluation": number, SCORE + self.study.first_metric: score})

    # ------------------------------------------------------------------------------ what Tune asks and tells

    def suggest(self, tune_id: str) -> Any:
        """Settings of a trial, None for \"not now\", or `Searcher.FINISHED`.

        Raises `UserError` for what would fail every trial; this one then waits for a resume.
        """
        while True:
            known: list[tuple[int, float]] = []
            if self.interrupted:
                number = self.interrupted.pop(0)
                known = sorted(self.study.tried()[number].curve.items())
                values = self.study.values_again(number)
                if moves := lineage(self._run(number)):
                    values = moves[-1]["values"]
            elif len(self.study.tried()) >= self.settings.trials:
                return Searcher.FINISHED
            elif asked := self.study.ask():
                number, values = asked
            else:
                return None
            try:
                plan, config = self._planned(number, values)
            except UserError as error:
                self._planned(number, {})  # raises where no values are to blame: the data are gone, for all trials
                self.study.finish(number, "failed", str(error))
                self.board.show(number)
                continue
            self._make_run(plan, config)
            if self.asha and known:
                # it has passed these rungs, which others may have raised since; of the newest nobody knows
                self._remind(self.asha, tune_id, known[:-1])
            self.numbers[tune_id] = number
            self.study.note(number, asked=time.time())
            self.board.show(number)
            return plan.settings()

    def reported(self, tune_id: str, result: dict[str, Any]) -> None:
        if "error" not in result:
            self._record(self.numbers[tune_id], result)
            self.board.show(self.numbers[tune_id])

    def _record(self, number: int, result: dict[str, Any]) -> None:
        scores = {key.removeprefix(SCORE): score for key, score in result.items() if key.startswith(SCORE)}
        settings = self.settings
        evaluation = result["evaluation"] or settings.evaluations  # 0 is the last
        rung = round(settings.examples * evaluation / settings.evaluations)
        self.study.report(number, result["examples"], scores, rung=rung, grafted=settings.scheduler == "pbt")

    def completed(self, tune_id: str, result: dict[str, Any] | None, error: bool) -> None:
        number = self.numbers.pop(tune_id)
        if result is not None and "examples" in result:
            self._record(number, result)  # that for which a trial is stopped, Tune tells only here
        folder = self._run(number)
        if moves := lineage(folder):
            self.study.note(number, lineage=moves, values=moves[-1]["values"])
        trial = self.study.tried()[number]
        if error or result is None:
            told = folder / "error.txt"
            self.study.finish(number, "failed", told.read_text() if told.exists() else "the trial's process was killed")
        elif "error" in result:
            self.study.finish(number, "failed", result["error"])
        else:
            # a member of a population may have taken over another's schedule, which ends elsewhere past the aim
            goal = min(self.goals[number], self.settings.examples)
            self.study.finish(number, "complete" if trial.examples >= goal else "pruned")
        if self.settings.scheduler != "pbt":  # there, others may yet go on from it
            self._tidy()
        self.board.show(number)

    # ------------------------------------------------------------------------------------------- run folders

    def _run(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def _make_run(self, plan: Plan, config: Config) -> None:
        """The trial's run folder, unless it is there. Raises `UserError` where it cannot be written."""
        self.goals[plan.number] = max(plan.examples.values())
        folder = self._run(plan.number)
        if not (folder / "config.yaml").exists():
            shutil.rmtree(folder, ignore_errors=True)  # killed while it was made
            place = config.run.model_copy(update={"name": folder.name})
            create_run(config.model_copy(update={"run": place}), None, [])
        if not (folder / "code").is_symlink():
            (folder / "code").symlink_to(Path("..") / ".." / "code")

    def _planned(self, number: int, values: Values) -> tuple[Plan, Config]:
        """Raises `UserError` for values that do not fit together, and where data or weights cannot be read."""
        settings = self.settings
        config = self.space.config(values)
        config, examples = of_equal_length(config, settings.examples, settings.evaluations)
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"dir": str(self.folder / "trials"), "name": None}),
                # a population's members begin again from one another's checkpoints, while these move on
                "checkpoint": config.checkpoint.model_copy(update={"keep": 3 if settings.scheduler == "pbt" else 1}),
                # as many on any machine, or best.yaml would not give the same numbers elsewhere
                "engine": config.engine.model_copy(update={"threads": config.engine.threads or settings.cpus}),
            }
        )
        trials = str(self.folder / "trials")
        replay = settings.scheduler != "pbt"
        size = settings.ranks, settings.cpus, settings.gpus
        plan = Plan(number, trials, to_yaml(config), values, examples, replay, *size)
        return plan, config

    def _explore(self, donor: dict[str, Any]) -> dict[str, Any]:
        self.explored += 1
        values = self.space.perturb(
            donor["plan"]["values"], addressed_rng(self.settings.seed, "explore", self.explored)
        )
        try:
            return self._planned(donor["plan"]["number"], values)[0].settings()
        except UserError:  # values that do not fit, or data that are gone: Tune would make a traceback of it
            return {"plan": donor["plan"]}

    def _tidy(self) -> None:
        """Weights are kept of the best trial, or of those on the Pareto front; curves and configurations of all."""
        kept = {trial.number for trial in self.study.front()} if len(self.settings.metrics) > 1 else set()
        if best := self.study.best():
            kept.add(best.number)
        for trial in self.study.tried():
            if trial.state != "running" and trial.number not in kept:
                shutil.rmtree(self._run(trial.number) / "checkpoints", ignore_errors=True)


class _Tells(Callback):  # type: ignore[misc]
    """Ray Tune's view of the conductor, for a population."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # not from its configuration, which becomes the donor's
        self.conductor.numbers[trial.trial_id] = int(trial.custom_dirname)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.conductor.reported(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.conductor.completed(trial.trial_id, trial.last_result, False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.conductor.completed(trial.trial_id, None, True)


class _Asks(Searcher):  # type: ignore[misc]
    """Ray Tune's view of the conductor, where trials come one by one."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        return self.conductor.suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.conductor.reported(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.conductor.completed(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the record."""


def _dirname(trial: Any) -> str:
    return f"{trial.config['plan']['number']:04d}"
