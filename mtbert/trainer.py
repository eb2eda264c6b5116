"""The training loop: phases over one schedule, one engine step at a time, resumable at every step.

    run folder (config.yaml) → tasks, model → Engine → for each step: batches → losses → Engine.step → records

`train` is what every launcher calls on every rank.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtbert.building import Built, build, methods_of
from mtbert.checkpoint import Checkpointer
from mtbert.config import ENCODER, Config
from mtbert.config_files import load_config, to_yaml
from mtbert.data import Batch, prefetch
from mtbert.engine import (
    Engine,
    Group,
    StepResult,
    parameter_groups,
)
from mtbert.environment import cpu
from mtbert.errors import UserError
from mtbert.evaluate import Evaluation, evaluate, evaluate_all
from mtbert.figures import cosine_map, evaluation_figures
from mtbert.files import NO_ROOM, write_atomically
from mtbert.flops import encoder_flops, peak_flops
from mtbert.manifest import Best, Checkpoint, Course
from mtbert.metrics import metric_of
from mtbert.phases import Phase, plan
from mtbert.randomness import addressed_generator
from mtbert.ranks import close_ranks, in_turn, join_ranks, peak_memory
from mtbert.record import RunRecord, Said, Which, highest_composite, kept_id, settings, write_predictions
from mtbert.runs import Outcome, Rank, Stopwatch, check_run
from mtbert.schedule import Schedule, Share
from mtbert.surgery import Surgery, conflicts
from mtbert.tasks import Task, load_tasks, locate_data, scored_on, with_own_cache
from mtbert.tracking import Tracker, tokenising_told
from mtbert.trained import Trained, keep_encoder, load_run
from mtbert.weighting import Weighting
from mtbert.window import Window
from mtbert.zero import Loss

if TYPE_CHECKING:
    from mtbert.figures import Figure

LONGEST_WINDOW = 10_000
"""Steps between two lines of the log, at most: a checkpoint's manifest has a number for each, and a bound itself."""
SKIPS_IN_A_ROW = 10
"""Steps without a finite loss or gradient after which a run stops: it will not recover by itself."""


def train(
    run_dir: Path,
    rank: Rank,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
    launch: Stopwatch | None = None,
) -> Outcome:
    """Train the run in `run_dir` to its end, from its newest checkpoint if it has one. Collective.

    Args:
        stop: polled before every step; when it is true on any rank, all save at the same step and return "stopped".
        quiet: nothing on stdout.
        launch: what the launcher's part of the start has taken; goes on up to the first step, into `launch.json`.

    Raises `UserError` for a mistake in the configuration or the data, the same one on every rank.
    """
    launch = launch or Stopwatch()
    check_run(run_dir)
    config = load_config(run_dir / "config.yaml")
    surgery, weighting = methods_of(config)
    join_ranks(rank, config.engine)
    launch.lap("rendezvous")
    try:
        every = config.checkpoint.every_minutes
        seconds = math.inf if every is None else 60 * every
        checkpointer = Checkpointer(run_dir, rank, config.checkpoint.keep, seconds)
        notes: list[str] = []
        checkpoint = checkpointer.latest(notes.append)
        with tokenising_told(rank, quiet) as progress:
            built = in_turn(rank, lambda: _built(config, run_dir, rank, checkpoint is None, progress))
        built.notes.extend(notes)
        launch.lap("data")
        run = _Run(config, run_dir, rank, built, checkpointer, checkpoint, surgery, weighting, stop, quiet)
        outcome = run.train(launch)
    except UserError:  # the same on every rank; after anything else a barrier would wait for ranks that run on
        close_ranks()
        raise
    close_ranks()
    return outcome


def _built(
    config: Config, run_dir: Path, rank: Rank, initial: bool, progress: Callable[[str, int], None] | None
) -> Built:
    """The first rank also makes room in the run folder for what is to come, or says why it cannot."""
    built = build(config, run_dir, initial, progress)
    if rank.first:
        try:
            keep_encoder(run_dir, built.encoder)
        except OSError as error:
            raise UserError(f"{run_dir}: cannot be written to: {error.strerror}") from None
    return built


def evaluate_run(run_dir: Path, which: Which, quiet: bool = True) -> tuple[int, list[Evaluation], float]:
    """Score a checkpoint of a run in this process: its step, each task's result, and the composite.

    Args:
        quiet: nothing on stdout where tokenising takes long.
    """
    with _opened(run_dir, which) as (run, rank), tokenising_told(rank, quiet) as progress:
        config = with_own_cache(run.config)
        tasks = load_tasks(config, locate_data(config), run.tokenizer, run.max_length, progress)
        results, score = evaluate_all(run.model, tasks, rank, run.device)
    return run.step, results, score


def evaluate_file(
    run_dir: Path, which: Which, name: str, file: str, quiet: bool = True
) -> tuple[int, Task, Evaluation]:
    """Score a task on a file that has its columns, labels too, as on its development set: the step, the task with the
    file in that one's place, and the result. The run folder stays as it is.

    Raises `UserError` for a task that the run has not, and for what training refuses in a file.
    """
    with _opened(run_dir, which) as (run, rank), tokenising_told(rank, quiet) as progress:
        run.task(name)
        task = scored_on(file, name, with_own_cache(run.config), run.tokenizer, run.max_length, progress)
        return run.step, task, evaluate(run.model, task, rank, run.device)


@contextmanager
def _opened(run_dir: Path, which: Which) -> Iterator[tuple[Trained, Rank]]:
    """A run in this process alone, with the group that evaluation sums over."""
    rank = Rank()
    join_ranks(rank, load_config(run_dir / "config.yaml").engine)
    try:
        yield load_run(run_dir, which), rank
    finally:
        close_ranks()


@dataclass(frozen=True)
class _StepData:
    shares: list[Share]
    batches: list[list[Batch]]  # per share, its micro-batches


class _Run:
    def __init__(
        self,
        config: Config,
        run_dir: Path,
        rank: Rank,
        built: Built,
        checkpointer: Checkpointer,
        checkpoint: Checkpoint | None,
        surgery: Surgery,
        weighting: Weighting,
        stop: Callable[[], bool],
        quiet: bool,
    ) -> None:
        model = built.model
        self.config, self.run_dir, self.rank, self.tasks, self.stop = config, run_dir, rank, built.tasks, stop
        self.phases = plan(config, [task.tokens_N("train") for task in built.tasks])
        self.total_steps = self.phases[-1].last + 1
        self.engine = Engine(
            model,
            parameter_groups(model, config.optimizer, config.tasks, built.encoder.shape.layers, config.shared_layers),
            {name: task.weight for name, task in config.tasks.items()},
            config.engine,
            config.optimizer,
            surgery,
            rank,
            weighting,
        )
        self.device = self.engine.device
        self.checkpointer = checkpointer
        self.first_step = 0
        self.best: Best | None = None
        self.highest: Best | None = None  # as the metrics have it, whether or not it could be saved
        if checkpoint is not None:
            self.checkpointer.load(self.engine, checkpoint)
            self.first_step, self.best = checkpoint.step, checkpoint.best
        self.tracker = Tracker(run_dir, rank, self.first_step, self.total_steps, quiet)
        if rank.first and (found := highest_composite(run_dir)):
            self.highest = Best(step=found[0], score=found[1])
        for note in built.notes:
            self.tracker.message(note)
        self.results: list[Evaluation] = []
        self.skips_in_a_row = 0
        self.work = partial(encoder_flops, built.encoder.shape, only_first=config.encoder.pooling != "mean")
        peak = config.engine.peak_tflops
        self.peak = 1e12 * peak if peak else peak_flops(self.device, self.engine.dtype)
        self.window = Window([task.name for task in built.tasks], self.peak)
        self.cosines: dict[tuple[str, str], tuple[float, int]] = {}  # sum and number since the last evaluation
        if checkpoint is not None:
            self._take_course(checkpoint)

    # --------------------------------------------------------------------------------------------- the loop

    def train(self, launch: Stopwatch) -> Outcome:
        with self.tracker, self.checkpointer:
            launch.lap("build")
            self._introduce()
            steps = self._all_data()
            for step in range(self.first_step, self.total_steps):
                phase = self._phase(step)
                if step in (phase.first, self.first_step):
                    self.tracker.phase(phase.config.name, phase.first, phase.last)
                started = time.monotonic()
                data = next(steps)
                waited = time.monotonic() - started
                result = self._step(step, phase, data, save=self.rank.first and self.checkpointer.due())
                self.window.add(
                    data.shares, data.batches, result, waited, time.monotonic() - started, self._flops(phase, data)
                )
                self._record(step, phase, result)
                if step == self.first_step:
                    self._tell_launch(launch)
                if self._evaluation_due(step):
                    self._evaluate(step)
                if result.stop or result.save or self._save_due(step):
                    self._save(step + 1)
                if result.stop and step + 1 < self.total_steps:
                    steps.close()
                    self._finish_saving()
                    self.tracker.message(f"stopped after step {step + 1}; saved in {self.checkpointer.folder}")
                    return Outcome("stopped", step + 1, {})
            self._finish_saving()
            return Outcome("finished", self.total_steps, self._conclude())

    def _all_data(self) -> Generator[_StepData, None, None]:
        """The batches of all steps that are left, made ahead of time: up to the next evaluation where that decides
        which tasks come next."""
        first = self.first_step
        while first < self.total_steps:
            stop = self.total_steps
            if self.config.schedule.kind == "adaptive":
                stop = next(step for step in range(first, self.total_steps) if self._evaluation_due(step)) + 1
            yield from prefetch(self._step_data, first, stop)
            first = stop

    def _step_data(self, step: int) -> _StepData:
        """A step's packed batches on this rank; made in a thread."""
        phase = self._phase(step)
        shares = phase.schedule.shares(
            phase.schedule_step(step), self.rank.rank, self.rank.world, self.config.engine.accumulation
        )
        return _StepData(
            shares,
            [[self.tasks[share.task].batch("train", indices) for indices in share.micro_batches] for share in shares],
        )

    def _step(self, step: int, phase: Phase, data: _StepData, save: bool) -> StepResult:
        blocks = self.engine.model.encoder.reads_blocks
        # all before the first loss: a copy waits for what the GPU has been given to do before it
        moved = [[_moved(batch, self.device, blocks) for batch in batches] for batches in data.batches]
        losses: dict[int, Sequence[Loss]] = {
            share.task: [partial(self._loss, step, share, number, batch) for number, batch in enumerate(batches)]
            for share, batches in zip(data.shares, moved, strict=True)
        }
        word_ids = None
        if self.device.type == "cpu":  # to find the rows that ranks met, a host would wait for its GPU, to save little
            word_ids = torch.cat([batch.packed.ids_T for batches in data.batches for batch in batches])
        factor = phase.rate_factor(step, self.config.optimizer)
        result = self.engine.step(
            step,
            losses,
            rates=[self._rate(phase, group, factor) for group in self.engine.groups],
            heads_only=[number for number, task in enumerate(self.tasks) if task.name in phase.config.leave_out],
            epoch=phase.epoch(step),
            rate_factor=factor,
            stop=self.stop(),
            save=save,
            word_ids=word_ids,
        )
        self._count_skips(step, result)
        return result

    def _rate(self, phase: Phase, group: Group, factor: float) -> float | None:
        """A group's learning rate; None where the phase does not train it."""
        if not phase.config.trains(group.part):
            return None
        return self.config.rate(phase.config, group.part) * group.layer_scale * factor

    def _loss(self, step: int, share: Share, number: int, batch: Batch) -> Tensor:
        """Of a micro-batch on the device."""
        task = self.tasks[share.task]
        generator = addressed_generator(
            self.device, self.config.seed, "dropout", step, self.rank.rank, share.task, number
        )
        model, epoch = self.engine.model, self._phase(step).epoch(step)
        vectors_PD = model.vectors(batch.packed, generator)
        answers = model.answer(task.name, vectors_PD, generator)
        return task.loss(vectors_PD, answers, batch.labels_B, epoch) / share.examples

    def _count_skips(self, step: int, result: StepResult) -> None:
        self.skips_in_a_row = self.skips_in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            return
        broken = {task for task, loss in zip(result.tasks, result.losses_K, strict=True) if not loss.isfinite()}
        squares_M = result.gram_MM.diagonal()
        broken |= {task for task, square in zip(result.through, squares_M, strict=True) if not square.isfinite()}
        names = [self.tasks[task].name for task in sorted(broken)]
        cause = f"loss or gradient of {', '.join(names) or 'a head'} is not finite"
        if not broken and math.isfinite(result.head_norm):
            overflows = not result.gram_MM.float().isfinite().all()
            what = "a product of two gradients" if overflows else "what surgery makes of the gradients"
            cause = f"{what} is not finite"
        self.tracker.message(f"step {step}: skipped on all ranks, {cause}")
        if self.skips_in_a_row == SKIPS_IN_A_ROW:
            raise UserError(
                f"step {step}: {cause}, {SKIPS_IN_A_ROW} steps in a row; lower optimizer.lr and optimizer.head_lr, "
                f"or set engine.precision to fp32"
            )

    def _flops(self, phase: Phase, data: _StepData) -> float:
        """This rank's model FLOPs of a step."""
        total = 0.0
        for share, batches in zip(data.shares, data.batches, strict=True):
            trained = phase.config.trains(ENCODER) and self.tasks[share.task].name not in phase.config.leave_out
            total += sum(self.work(batch.packed.lengths_B, trained=trained) for batch in batches)
        return total

    def _phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step <= phase.last)

    def _schedules(self) -> list[Schedule]:
        return list(dict.fromkeys(phase.schedule for phase in self.phases))

    # ------------------------------------------------------------------------------- evaluation and saving

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.run.evaluate_every
        due = (step + 1) % every == 0 if every else self._phase(step).ends_epoch(step)
        return due or step + 1 == self.total_steps

    def _save_due(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        improved = self.best is not None and self.best.step == step + 1
        return improved or step + 1 == self.total_steps or (every is not None and (step + 1) % every == 0)

    def _evaluate(self, step: int) -> None:
        with self.engine.averaged():
            results, score = evaluate_all(self.engine.model, self.tasks, self.rank, self.device)
        self.results = results
        if step < self.first_step:  # of a run that was finished before; logged then
            return
        values = {f"metric/{result.task}/{result.metric}": result.score for result in results}
        values |= {f"loss/{result.task}/dev": result.loss for result in results if result.loss is not None}
        self.tracker.scalars(step, {**values, "metric/composite": score})
        told = "  ".join(f"{result.task} {result.metric} {result.score:.4f}" for result in results)
        self.tracker.message(f"step {step + 1}: {told}  composite {score:.4f}")
        before = self.best, self.checkpointer.best  # until a new best is on disk, a run that is killed goes back to one
        if math.isfinite(score) and (self.best is None or score > self.best.score):
            self.best = Best(step=step + 1, score=score)
        if math.isfinite(score) and (self.highest is None or score > self.highest.score):
            self.highest = Best(step=step + 1, score=score)
        if self.config.schedule.kind == "adaptive":
            self._adapt(step)
        if self.rank.first:
            self._show(step, results, [each.step for each in (*before, self.highest) if each])
        self.cosines.clear()

    def _show(self, step: int, results: Sequence[Evaluation], kept: Container[int]) -> None:
        """Keeps what was said of every example, and of those of the evaluations `kept`; and draws it."""
        tasks = {task.name: task for task in self.tasks}
        said = {result.task: _said(tasks[result.task], result) for result in results}
        with self._if_there_is_room("predictions"):
            write_predictions(self.run_dir, step + 1, said, kept)
        cosines = {pair: total / count for pair, (total, count) in self.cosines.items()}

        def draw() -> dict[str, Figure]:
            figures = {
                f"{name}/{kind}": figure
                for name, one in said.items()
                for kind, figure in evaluation_figures(name, tasks[name].config, one).items()
            }
            if cosines:
                figures["gradient/cosines"] = cosine_map(list(tasks), cosines)
            return figures

        self.tracker.figures(step, draw)

    @contextmanager
    def _if_there_is_room(self, what: str) -> Iterator[None]:
        """For what training does without."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.tracker.message(f"{what} were not kept: {error.strerror}")

    def _adapt(self, step: int) -> None:
        """Let the next step draw tasks by how they stand; one that is not evaluated does not lag."""
        phase = self._phase(step)
        names = [self.tasks[number].name for number in phase.schedule.tasks]
        targets = [self.config.schedule.targets.get(name, 1.0) for name in names]
        scores = {result.task: result.score for result in self.results}
        reached = [scores.get(name, target) for name, target in zip(names, targets, strict=True)]
        phase.schedule.adapt(phase.schedule_step(step) + 1, reached, targets)
        self.tracker.scalars(
            step,
            {f"sampling/{name}": chance for name, chance in zip(names, phase.schedule.history[-1][1], strict=True)},
        )

    def _save(self, step: int) -> None:
        self.tracker.flush()
        if self.checkpointer.wait() and self.best is not None and self.best.step != step:
            self.best = self.checkpointer.best  # it may be the one that could not be saved
        histories = [list(schedule.history) for schedule in self._schedules()]
        course = self._course() if self.rank.first else None
        self.checkpointer.save(self.engine, step, self.best, self.tracker.message, histories, course)

    def _course(self) -> Course:
        return Course(
            skips_in_a_row=self.skips_in_a_row,
            precision=str(self.engine.dtype),
            losses=dict(self.window.losses),
            sums={name: list(values) for name, values in self.window.sums.items()},
            counts=dict(self.window.counts),
            cosine_sums=[(*pair, *values) for pair, values in self.cosines.items()],
        )

    def _take_course(self, checkpoint: Checkpoint) -> None:
        for schedule, history in zip(self._schedules(), checkpoint.manifest.histories, strict=False):
            schedule.history = [(int(step), chances) for step, chances in history]
        course = checkpoint.manifest.course
        if course is None:
            return
        self.skips_in_a_row = course.skips_in_a_row
        # copies: the manifest is frozen, the log goes on
        self.window.losses |= course.losses
        self.window.sums |= {name: list(values) for name, values in course.sums.items()}
        self.window.counts |= course.counts
        self.cosines = {(one, other): (total, count) for one, other, total, count in course.cosine_sums}
        self.cosines |= {(one, other): (sum(values), len(values)) for one, other, values in course.cosines if values}
        if course.precision != (now := str(self.engine.dtype)):
            self.tracker.message(f"up to here in {course.precision}, from here on in {now}: results differ by rounding")

    def _finish_saving(self) -> None:
        if trouble := self.checkpointer.wait():
            raise UserError(f"{trouble}; the older checkpoints in {self.checkpointer.folder} are as they were")

    # ----------------------------------------------------------------------------------- what people see

    def _introduce(self) -> None:
        dtype = "bf16 with fp32 master weights" if self.engine.dtype == torch.bfloat16 else "fp32"
        tracker, config = self.tracker, self.config
        tracker.message(
            f"{self.rank.world} rank(s) on {self.device.type}, {torch.get_num_threads()} thread(s) each, {dtype}, "
            f"ZeRO-{config.engine.zero}, surgery {config.surgery.method}; "
            f"{sum(p.numel() for p in self.engine.model.parameters()) / 1e6:.1f} M parameters, {self.total_steps} steps"
        )
        for task in self.tasks:
            left_out = sum(len(data.quarantined) for data in task.splits)
            tracker.message(
                f"{task.name}: {len(task.train):,} training and {len(task.dev or ()):,} development examples"
                + (f", {left_out} rows left out (quarantined.jsonl says which and why)" if left_out else "")
            )
        for note in self._idle():
            tracker.message(f"note: {note}")
        if self.first_step:
            tracker.message(f"continuing after step {self.first_step}")
        if self.rank.first:
            rows = [row for task in self.tasks for data in task.splits for row in data.quarantined]
            if rows:
                told = [{"file": row.file, "line": row.line, "reason": row.reason, "id": row.id} for row in rows]
                lines = "".join(json.dumps(each) + "\n" for each in told)
                with self._if_there_is_room("rows that were left out"):
                    write_atomically(self.run_dir / "quarantined.jsonl", lines)
        if not self.first_step:
            tracker.text("config", f"```yaml\n{to_yaml(config)}```")
            environment = RunRecord(self.run_dir).environment
            tracker.text("command", f"```\n{shlex.join(environment.command)}\n```")
            tracker.text("environment", f"```json\n{environment.model_dump_json(indent=2, exclude={'command'})}\n```")
            tracker.settings({key: value for key, value in settings(config).items() if value is not None})

    def _idle(self) -> Iterator[str]:
        """What was asked for and does nothing, in all steps or from some epoch on."""
        config, kind = self.config, self.config.schedule.kind
        drawn = kind in ("sampled", "adaptive")
        if len(self.tasks) > 1 and (kind == "sequential" or (drawn and config.schedule.tasks_per_step == 1)):
            instead = (
                "schedule.tasks_per_step can be larger" if drawn else "schedule.kind round_robin has all in a step"
            )
            if config.surgery.method not in ("sum", "mean"):
                yield f"surgery {config.surgery.method} has nothing to do in steps of one task; {instead}"
            if config.weighting.method not in ("fixed", "homoscedastic", "imtl_l"):
                yield f"weighting {config.weighting.method} has nothing to do in steps of one task; {instead}"
        for task in self.tasks:
            ranking, highest = task.config.ranking, task.config.highest_label
            phases = [phase for phase in self.phases if task.name in (phase.config.tasks or config.tasks)]
            if ranking is None or ranking.threshold is None or ranking.start is None or not phases:
                continue
            limit = highest if ranking.threshold == "label" else 1.0
            if (last := ranking.start + ranking.rise * phases[-1].epoch(phases[-1].last)) > limit:
                yield f"{task.name}: mnrl's threshold rises to {last:g}, above {limit:g}: no pair is a positive then"

    def _tell_launch(self, launch: Stopwatch) -> None:
        launch.lap("first step")
        if not self.rank.first:
            return
        rounded = {part: round(seconds, 3) for part, seconds in launch.parts.items()}
        record = {"step": self.first_step, "seconds": rounded, "total": round(sum(rounded.values()), 3)}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu()
        record |= {"ranks": self.rank.world, "device": device}
        with self._if_there_is_room("times of the start"):
            write_atomically(self.run_dir / "launch.json", json.dumps(record) + "\n")
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in rounded.items())
        self.tracker.message(f"first step after {record['total']:.1f} s: {parts}")

    def _record(self, step: int, phase: Phase, result: StepResult) -> None:
        if (step + 1) % min(self.config.run.log_every, LONGEST_WINDOW) and step + 1 != self.total_steps:
            return
        values = self.window.close(self.rank.world)
        self.tracker.progress(step, self.window.losses, values["speed/examples_per_second"])
        values |= {f"loss/{name}": loss for name, loss in self.window.losses.items()}
        values |= self._gradient_values(result)
        if self.config.weighting.method != "fixed":
            for task, factor in zip(result.tasks, result.factors_K.tolist(), strict=True):
                values[f"weighting/factor/{self.tasks[task].name}"] = factor
            for task, learnt in self.engine.weighting.shown().items():
                values[f"weighting/learnt/{self.tasks[task].name}"] = learnt
        values |= {f"learning_rate/{part}": rate for part, rate in self._learning_rates(step, phase).items()}
        for task, passes in phase.schedule.passes_at(phase.schedule_step(step)).items():
            values[f"passes/{self.tasks[task].name}"] = passes
        values["memory/peak_gib"] = peak_memory(self.device) / 2**30
        self.tracker.scalars(step, values)

    def _gradient_values(self, result: StepResult) -> dict[str, float]:
        """Norms, and of the tasks that reach the encoder what surgery saw and did."""
        values = {"gradient/norm/combined": result.norm, "gradient/norm/heads": result.head_norm}
        if not result.through or result.skipped:  # what is not finite has no cosine
            return values
        names = [self.tasks[task].name for task in result.through]
        cosine_MM, rate = conflicts(result.gram_MM)
        if len(names) > 1:
            values["gradient/conflict_rate"] = rate
        for k, name in enumerate(names):
            values[f"gradient/norm/{name}"] = float(result.gram_MM[k, k].sqrt())
            values[f"gradient/weight/{name}"] = float(result.weights_M[k])
            for other in range(k + 1, len(names)):
                cosine = values[f"gradient/cosine/{name}~{names[other]}"] = float(cosine_MM[k, other])
                total, count = self.cosines.get((name, names[other]), (0.0, 0))
                self.cosines[name, names[other]] = total + cosine, count + 1
        return values

    def _learning_rates(self, step: int, phase: Phase) -> dict[str, float]:
        """Of every part: the heads by task, the encoder's by layer where they differ (0 is the top); 0 if frozen."""
        factor = phase.rate_factor(step, self.config.optimizer)
        groups = [(group, self._rate(phase, group, factor) or 0.0) for group in self.engine.groups]
        rates = {group.part: rate for group, rate in groups if group.task is not None}
        shared = {group.layer_scale: rate for group, rate in groups if group.task is None}
        for depth, scale in enumerate(sorted(shared, reverse=True)):
            rates[f"encoder/{depth}" if len(shared) > 1 else "encoder"] = shared[scale]
        return rates

    def _conclude(self) -> dict[str, float]:
        """The closing table and `result.json`, and where to look next."""
        if not self.results:  # resumed after the last step: all was done but this
            self._evaluate(self.total_steps - 1)
        scores = {result.task: result.score for result in self.results}
        if not self.rank.first:
            return scores
        rows: list[list[str | float | None]] = []
        record = {}
        scored = [task for task in self.tasks if task.dev is not None]
        for task, result in zip(scored, self.results, strict=True):
            trivial, words = _baselines(task, result)
            rows.append([task.name, result.metric, result.score, trivial, words])
            record[task.name] = {
                "metric": result.metric,
                "score": result.score if math.isfinite(result.score) else None,
                "trivial": trivial,
                "bag_of_words": words,
            }
        write_atomically(self.run_dir / "result.json", json.dumps({"step": self.total_steps, "tasks": record}) + "\n")
        self.tracker.finished()
        self.tracker.table("Development scores", ["task", "metric", "mtbert", "trivial", "bag of words"], rows)
        self.tracker.message(f"run folder: {self.run_dir}")
        self.tracker.message(f"curves: tensorboard --logdir {self.run_dir.parent}")
        return scores


def _moved(batch: Batch, device: torch.device, blocks: bool) -> Batch:
    packed, labels_B = batch.packed.to(device, blocks), batch.labels_B.to(device, non_blocking=True)
    return replace(batch, packed=packed, labels_B=labels_B)


def _said(task: Task, result: Evaluation) -> Said:
    dev = task.dataset("dev")
    return Said(
        ids_N=np.array([kept_id(id) for id in dev.ids], dtype=np.str_),
        lines_N=np.array(dev.lines_N),
        tokens_N=task.tokens_N("dev"),
        labels_N=dev.labels_N.astype(np.float64),
        predictions_N=result.predictions_N,
        losses_N=result.losses_N,
        probabilities_NC=result.probabilities_NC,
    )


def _baselines(task: Task, result: Evaluation) -> tuple[float, float]:
    """Scores of the trivial answer and of a bag of words on the same development set."""
    # scikit-learn takes a second to import, and the first step does not wait for it
    from mtbert.baselines import bag_of_words_baseline, training_rows, trivial_baseline

    train, dev, kind = task.train, task.dataset("dev"), task.config.kind
    metric = metric_of(result.metric, task.config.class_count)
    trivial = trivial_baseline(kind, train.labels_N, dev.labels_N, result.metric, task.config.class_count)
    rows = training_rows(len(train))
    words = bag_of_words_baseline(kind, train.raw(rows), train.labels_N[rows], dev.raw(np.arange(len(dev))))
    return metric(trivial, dev.labels_N), metric(words, dev.labels_N)
