"""One trial: a run folder and the ranks that train it. This runs in Ray's workers, not in the driver.

The trial is our trainer, unchanged. In each bundle of the trial's placement group a small actor starts one rank with
`launch/child.py`; scores come back through the run's `metrics.jsonl`. Death goes downwards: driver → raylet → trial →
actors → ranks (the kernel kills a rank with its actor), so no rank outlives its trial, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.records import End, job_folder, read_end
from mtbert.config_files import load_config, to_yaml
from mtbert.files import write_atomically
from mtbert.manifest import folders, step_of, with_the_best
from mtbert.record import keep_lines_before
from tune.curves import LINEAGE_FILE, STARTS_FILE, attempts, evaluations_in
from tune.owner import Owner

TOKEN = "trial"
"""The token of a trial's job: all its attempts are one job, so a new one takes the folder over at once."""
SCORE = "score/"
"""Before a task's name in what is reported: a task may be called `error` or `step`."""
POLL_S = 0.2
WRITTEN_S = 60.0
"""A checkpoint is written in the background after the evaluation it belongs to."""
PATIENCE_S = 15.0
"""For ranks whose peer has failed; they notice by themselves within a second on the same machine."""


@dataclass(frozen=True)
class Plan:
    """What a trial's ranks need to know. `settings` is what Ray Tune hands over."""

    number: int  # in the study; that of the trial whose weights it goes on from, where there is one
    trials: str  # folder of the trials' run folders
    config: str  # YAML; the run folder's own name is put in
    values: dict[str, Any]
    examples: dict[int, int]  # evaluation's step → examples seen
    replay: bool  # a continued trial reports again what it reported before: ASHA judges it anew; a population does not
    ranks: int
    cpus: int
    gpus: float

    def settings(self) -> dict[str, Any]:
        return {"plan": asdict(self)}


def run_trial(settings: dict[str, Any]) -> None:
    """Ray Tune's trainable. Reports `examples`, `step` and every score (`score/sst`) after each evaluation, with a
    checkpoint.

    A mistake of the configuration and a score that is not a number are reported as `error`, and the trial ends: trying
    it again would give the same. Anything else that goes wrong raises, and Tune starts the trial again.
    """
    plan = Plan(**settings["plan"])
    folder = Path(plan.trials) / Path(ray_tune.get_context().get_trial_dir()).name
    (folder / "error.txt").unlink(missing_ok=True)  # an attempt before; this one may be killed
    try:
        _train(folder, plan)
    except Exception as error:
        ours = isinstance(error, LostRanks)
        (folder / "error.txt").write_text(str(error) if ours else traceback.format_exc())
        raise


class LostRanks(RuntimeError):
    """The ranks ended before the run was finished."""


def _train(folder: Path, plan: Plan) -> None:
    last = 0
    if checkpoint := ray_tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            saved = json.loads((Path(directory) / "checkpoint.json").read_text())
        last = saved["step"]
        if saved["run"] != str(folder):
            last = graft(folder, Path(saved["run"]), last, plan)
    elif not plan.replay:
        last = max(0, _saved(folder) - 1)  # the newest is told again: nobody knows whether it was heard
    ranks = Ranks(folder, plan)
    try:
        for step, scores in ranks.evaluations(after=last):
            # nothing is decided at the end: a trial that is over can neither be stopped nor take over another's weights
            evaluation = 0 if step == max(plan.examples) else 1 + sorted(plan.examples).index(step)
            result: dict[str, Any] = {"step": step, "examples": plan.examples[step], "evaluation": evaluation}
            result |= {SCORE + name: score for name, score in scores.items()}
            if broken := [name for name, score in scores.items() if score is None]:
                seen = plan.examples[step]
                ray_tune.report({"error": f"score of {', '.join(broken)} is not a number after {seen:,} examples"})
                return
            if not plan.replay and evaluation:  # a member of a population may have to make room for another at once
                ranks.wait_for_checkpoint(step)
            with tempfile.TemporaryDirectory() as directory:
                (Path(directory) / "checkpoint.json").write_text(json.dumps({"run": str(folder), "step": step}))
                ray_tune.report(result, checkpoint=ray_tune.Checkpoint.from_directory(directory))
        end = ranks.end()
    finally:
        ranks.kill()
    if end.status == "mistake":
        ray_tune.report({"error": end.message})
    elif end.status != "finished":
        raise LostRanks(end.message)


def _saved(folder: Path) -> int:
    """The step of a run folder's newest checkpoint, 0 without one."""
    return max(map(step_of, folders(folder)), default=0)


def graft(folder: Path, donor: Path, step: int, plan: Plan) -> int:
    """Continue `folder` from a checkpoint of another trial, with the plan's configuration (population-based training).

    The donor may have moved on meanwhile and removed that checkpoint; then its oldest later one serves. Or it may
    still be writing it. Returns the checkpoint's step; what the trial itself had recorded from there on is gone.
    """
    own = folder / "checkpoints"
    deadline = time.monotonic() + WRITTEN_S
    while True:
        source = next((path for path in reversed(folders(donor)) if step_of(path) >= step), None)
        if source is None:
            if time.monotonic() > deadline:
                raise LostRanks(f"{donor.name} left no checkpoint at step {step} or later to go on from")
            time.sleep(POLL_S)
            continue
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        best = with_the_best([source]) - {source}
        try:
            shutil.copytree(source, own / source.name, copy_function=os.link)
        except (shutil.Error, FileNotFoundError):  # removed under our hands
            continue
        for path in best:  # which that checkpoint names, and `--checkpoint best` looks for
            with contextlib.suppress(shutil.Error, FileNotFoundError):
                shutil.copytree(path, own / path.name, copy_function=os.link)
        break
    own_file = folder / "config.yaml"
    write_atomically(own_file, plan.config)
    write_atomically(own_file, to_yaml(load_config(own_file, [f"run.name={folder.name!r}"])))
    start = step_of(source)
    keep_lines_before(folder, start)  # as the ranks will, but before old scores are read as new ones
    with (folder / LINEAGE_FILE).open("a") as file:
        file.write(json.dumps({"step": start, "from": donor.name, "values": plan.values}) + "\n")
    return start


class Ranks:
    """The ranks of one attempt at a trial."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        job_folder(folder).mkdir(exist_ok=True)
        self.attempt = attempts(folder)
        group = get_current_placement_group()
        assert isinstance(group, PlacementGroup)
        # the trial's own bundle holds nothing and is therefore not in the group
        self.owners = [
            Owner.options(  # type: ignore[attr-defined]
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            ).remote()
            for bundle in range(plan.ranks)
        ]
        self.exits = self._start()

    def _start(self) -> list[ray.ObjectRef]:
        places = ray.get([owner.place.remote() for owner in self.owners])
        order = sorted(range(len(places)), key=lambda index: places[index]["address"])  # hosts one after another
        self.owners = [self.owners[index] for index in order]
        places = [places[index] for index in order]
        addresses = [place["address"] for place in places]
        hosts = sorted(set(addresses))
        with (job_folder(self.folder) / STARTS_FILE).open("a") as file:
            file.write(json.dumps({"time": time.time(), "hosts": [place["host"] for place in places]}) + "\n")
        if len(hosts) == 1:
            rendezvous = f"file://{job_folder(self.folder)}/{TOKEN}-{self.attempt}.rendezvous"
        else:
            rendezvous = f"tcp://{addresses[0]}:{places[0]['port']}"
        started = []
        for number, (owner, address) in enumerate(zip(self.owners, addresses, strict=True)):
            local = [other for other, where in enumerate(addresses) if where == address]
            devices = [device for other in local for device in places[other]["gpus"]]
            words = [self.folder, TOKEN, self.attempt, number, len(places), local.index(number), len(local), rendezvous]
            started.append(owner.start.remote([*map(str, words), *hosts], self.folder.parent.parent / "code", devices))
        ray.get(started)
        return [owner.wait.remote() for owner in self.owners]

    def evaluations(self, after: int) -> Iterator[tuple[int, dict[str, float | None]]]:
        """(step, scores) of each evaluation past step `after`, as they come, until the ranks have ended."""
        ended = False
        while True:
            # looked at before reading: what was written before the end is then read
            ended = ended or len(ray.wait(self.exits, num_returns=1, timeout=POLL_S)[0]) > 0
            for step, scores in [*evaluations_in(self.folder)]:  # ranks that start may cut the file
                if step > after:
                    after = step
                    yield step, scores
            if ended:
                return

    def wait_for_checkpoint(self, step: int) -> None:
        """The ranks begin to save a moment after an evaluation is told. Not for ever: a full disk takes none."""
        until = time.monotonic() + WRITTEN_S
        while _saved(self.folder) < step and time.monotonic() < until:
            if ray.wait(self.exits, num_returns=1, timeout=POLL_S)[0]:
                return

    def end(self) -> End:
        """How the ranks ended. Waits for all of them, not long once one has failed."""
        waiting = self.exits
        codes: list[int] = []
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=PATIENCE_S if any(codes) else None)
            if not done:
                break
            codes.append(ray.get(done[0]))
        end = read_end(self.folder, f"{TOKEN}-{self.attempt}")
        if end is not None:
            return end
        files = [*sorted(job_folder(self.folder).glob("*_log.err")), *sorted((self.folder / "logs").glob("*.err"))]
        told = "\n".join(path.read_text(errors="replace") for path in files)
        return End("lost", 0, socket.gethostname(), message=f"a rank was killed (exit codes {codes})\n{told}".strip())

    def kill(self) -> None:
        for owner in self.owners:
            ray.kill(owner)
