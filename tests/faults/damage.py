"""Damage to what lies on the disk while no job runs."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ends import submitter
from kinds import Evidence, kind
from moments import to_training
from patient import Lost, NotInjected, Patient

from mtbert.manifest import folders


def truncated(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


def replaced(path: Path, draw: random.Random) -> None:
    """By noise, or by a whole file of the same name from another checkpoint."""
    others = [other for other in path.parent.parent.glob(f"step-*/{path.name}") if other != path]
    if others and draw.random() < 0.5:
        path.write_bytes(draw.choice(sorted(others)).read_bytes())
    else:
        path.write_bytes(draw.randbytes(path.stat().st_size))


@dataclass(frozen=True)
class Target:
    files: Callable[[Patient], list[Path]]
    hows: tuple[Callable[[Path, random.Random], None], ...] = (truncated, flipped, missing, replaced)
    codes: tuple[int, ...] = (2,)
    because: str = ""  # in its last words, other than the file's name
    mends: bool = False  # the job makes good what was damaged


def inside(*parts: str) -> Callable[[Patient], list[Path]]:
    return lambda patient: [path for path in patient.run.joinpath(*parts).rglob("*") if path.is_file()]


def of_the_newest_checkpoint(patient: Patient) -> list[Path]:
    """Where there is an older one to go on from; a job refuses to begin again from nothing."""
    there = folders(patient.run)
    return [*there[0].iterdir()] if len(there) > 1 else []


def of_code(patient: Patient) -> list[Path]:
    """What every rank imports."""
    names = ("start", "job", "records", "runs", "config", "tasks", "manifest", "checkpoint", "engine", "trainer")
    return [path for path in inside("code")(patient) if path.suffix == ".py" and path.stem in names]


def of_records(patient: Patient) -> list[Path]:
    return [patient.run / "metrics.jsonl", *inside("predictions")(patient), *patient.run.glob("events*")]


TARGETS = {
    "a file of the newest checkpoint": Target(of_the_newest_checkpoint, mends=True),
    "a file of the token cache": Target(
        lambda patient: [path for path in patient.lab.cache.rglob("*") if "generated" not in path.parts], mends=True
    ),
    "a file of the generated corpus": Target(
        lambda patient: [*(patient.lab.cache / "generated").rglob("*")], mends=True
    ),
    "a file of tokenizer and shape": Target(inside("encoder")),
    "metrics or predictions": Target(of_records, mends=True),
    "environment.json": Target(lambda patient: [patient.run / "environment.json"], because="run folder of format"),
    # it has no checksum: a flipped bit may give another configuration, and that is what is then trained
    "config.yaml": Target(lambda patient: [patient.run / "config.yaml"], hows=(missing, replaced)),
    "code": Target(of_code, hows=(missing, replaced), codes=(1, 2), because=r"\w+Error"),
    "job.json": Target(lambda patient: [patient.run / "job" / "job.json"]),
    "lock": Target(lambda patient: [patient.run / "job" / "lock"], because="using this run folder"),
}


def damage(patient: Patient, name: str, target: Target, how: Callable[[Path, random.Random], None]) -> Evidence:
    if name == "lock":  # one is left only by a job that was killed
        to_training(patient)
        patient.deliver(signal.SIGKILL, patient.processes())
        patient.wait()
        patient.gone()
    else:
        patient.stop()
    files = sorted(path for path in target.files(patient) if path.is_file() and path.stat().st_size)
    if not files:
        patient.start()
        raise NotInjected("there is no such file")
    path = patient.draw.choice(files)
    before, at = path.read_bytes(), patient.step()
    how(path, patient.draw)
    after = path.read_bytes() if path.exists() else None
    shown = path.relative_to(patient.lab.disk)
    if after == before:
        patient.start()
        raise NotInjected(f"{shown} is what it was")
    if not (target.mends or (name == "lock" and after is None)):  # a job that ends leaves no lock, and none is put back
        patient.damaged[path] = before, after
    patient.worn |= {path.parent.name} if name == "a file of the newest checkpoint" else set()
    patient.true_from = at + 1 if path.name == "metrics.jsonl" else patient.true_from
    plain = path.parent in (patient.run, patient.run / "job") or name == "code"
    folder = [] if plain else [re.escape(path.parent.name)]
    patient.named = "|".join([re.escape(path.name), *folder, *filter(None, [target.because])])
    if name == "job.json" and "Traceback" in (told := submitter("status", patient.run).stdout):
        raise Lost(f"status of a run with a damaged {shown}: {told}")
    patient.start()
    return {"file": str(shown), "bytes": [len(before), None if after is None else len(after)]}


for name, target in TARGETS.items():
    for how in target.hows:
        kind(f"{name} {how.__name__}", *target.codes)(functools.partial(damage, name=name, target=target, how=how))


@kind("a lock left by another host, and files dated a day ahead")
def left_lock(patient: Patient) -> Evidence:
    def harm() -> None:
        lock = {"attempt": "other-0", "host": "elsewhere", "pid": 1, "slurm_job": None}
        (patient.run / "job" / "lock").write_text(json.dumps(lock))
        for path in patient.run.rglob("*"):
            ahead = time.time() + 86400 if path.name != "lock" else time.time() - 600
            os.utime(path, (ahead, ahead))

    patient.restart(harm)
    return {"lock": "elsewhere"}
