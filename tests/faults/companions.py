"""Faults of other runs and programs, while the patient goes on: what comes of them is judged here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kinds import Evidence, kind
from moments import to_training
from patient import ROOT, Lost, NotInjected, Patient

from mtbert.manifest import Checkpoint

TOLERANCE = 1e-5
"""Of weights on another number of ranks, as in tests/test_trainer.py."""


def companion(patient: Patient, settings: list[str], world: int | None = None) -> Patient:
    """Another run, started while the patient goes on; nothing undisturbed is like it."""
    name = f"{patient.name}-{len(patient.lab.patients)}"
    other = Patient(patient.lab, name, world or patient.world, patient.draw, None, settings)
    return other


def to_its_end(other: Patient) -> None:
    if code := other.wait():
        raise Lost(f"exit code {code}: {other.words()}")
    other.gone()
    other.tidy()


@kind("weights that are not finite", aside=True)
def not_finite(patient: Patient) -> Evidence:
    """What makes the numbers overflow is in its configuration."""
    draw = patient.draw
    rate = f"{10 ** draw.uniform(25, 36):.3g}"
    settings = [f"optimizer.lr={rate}", f"optimizer.head_lr={rate}", "optimizer.warmup=0", f"seed={draw.randrange(99)}"]
    settings += [f"schedule.batch_size={draw.choice([2, 4, 8])}", f"surgery={draw.choice(METHODS)}"]
    other = companion(patient, settings)
    other.start()
    code, words = other.wait(), other.words()
    if code != 2 or "not finite" not in words or "lower optimizer.lr" not in words:
        raise Lost(f"exit code {code}: {words}")
    other.gone()
    other.bury()
    return {"settings": settings}


METHODS = ("{method: sum}", "{method: pcgrad}", "{method: cagrad, options: {c: 0.5}}", "{method: imtl_g}")


@kind("NaN in one rank's activations", aside=True)
def poisoned(patient: Patient) -> Evidence:
    """All ranks leave that step out, and nothing else. What comes of it is no undisturbed run's."""
    other = companion(patient, [])
    other.variables = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "hook"), str(ROOT)])}
    other.start()
    to_training(other)
    evidence = other.deliver(signal.SIGUSR1, [other.some_rank()])
    to_its_end(other)
    skipped = re.findall(r"step (\d+): skipped on all ranks", other.words())
    if not skipped:
        raise NotInjected("no step was left out")
    final = last_checkpoint(other)
    if len(skipped) > 1 or {*final.manifest.adam_steps} != {final.step - 1}:
        raise Lost(f"steps {', '.join(skipped)} were left out; AdamW did {final.manifest.adam_steps}")
    if not all(tensor.isfinite().all() for tensor in weights(final).values()):
        raise Lost("weights are not finite")
    other.bury()
    return {**evidence, "step left out": int(skipped[0])}


@kind("continued on another number of ranks", aside=True)
def moved(patient: Patient) -> Evidence:
    """Without dropout, which draws by rank, the weights are those of any other number of ranks up to rounding."""
    settings = ["encoder.dropout=0", *(f"tasks.{task}.head.dropout=0" for task in ("sst", "para", "sts"))]
    settings += ["optimizer.eps=1e-4"]  # eps: see test_engine.py
    worlds = patient.draw.sample([1, 2, 3], 3)
    other = companion(patient, settings, worlds[0])
    other.start()
    stops = []
    for world in worlds[1:]:
        to_training(other)
        other.stop()
        stops.append(last_checkpoint(other).step)
        other.world = world
        other.start()
    to_its_end(other)
    if not (wanted := patient.lab.still):
        still = companion(patient, settings, 1)
        still.start()
        to_its_end(still)
        wanted |= weights(last_checkpoint(still))
        still.bury()
    mine = weights(last_checkpoint(other))
    worst = max(float((mine[name] - wanted[name]).abs().max()) for name in wanted)
    if not worst < TOLERANCE:
        raise Lost(f"on {worlds} ranks in turn, weights differ by {worst:g} from those of a run on one")
    other.bury()
    return {"ranks": worlds, "stopped after": stops, "difference": worst}


def last_checkpoint(patient: Patient) -> Checkpoint:
    found = patient.checkpoints()
    if not found:
        raise Lost("it ended without a checkpoint")
    return found[max(found)]


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    import torch

    from mtbert.checkpoint import load_weights

    shapes = {name: torch.Size(shape) for name, shape in checkpoint.manifest.shapes.items()}
    return {**load_weights(checkpoint, shapes)}


@kind("kill -9 of an export", aside=True)
def kill_an_export(patient: Patient) -> Evidence:
    """Of the undisturbed run. The next one is whole, and clears up."""
    reference, place = patient.reference, patient.lab.disk / "exports"
    assert reference
    if not reference.exported:
        to_its_own_end(export(reference.run, place / "whole"), "an export")
        reference.exported = contents(place / "whole")
        shutil.rmtree(place)
    killed = export(reference.run, place / "killed")
    patient.until("an export", lambda: killed.poll() is not None or [*place.glob(".exporting-*")], nap_s=0.0005)
    time.sleep(patient.draw.uniform(0, 0.03))
    killed.kill()
    left = [path.name for path in place.glob(".exporting-*")]
    if killed.wait() != -signal.SIGKILL or not left:
        shutil.rmtree(place, ignore_errors=True)
        raise NotInjected("the export was over")
    if (place / "killed").exists():
        raise Lost("half an export has the name of a whole one")
    to_its_own_end(export(reference.run, place / "killed"), "an export after one that was killed")
    if contents(place / "killed") != reference.exported:
        raise Lost("the export after one that was killed is not that of the undisturbed run")
    if still := [*place.glob(".exporting-*")]:
        raise Lost(f"left: {', '.join(map(str, still))}")
    shutil.rmtree(place)
    return {"pids": [killed.pid], "left": left}


def export(run: Path, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mtbert", "export", str(run), str(target), "--checkpoint", "latest"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables)


def to_its_own_end(program: subprocess.Popen[bytes], what: str) -> None:
    said = program.communicate()[0].decode(errors="replace")
    if program.returncode:
        raise Lost(f"{what} ended with {program.returncode}: {said}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
