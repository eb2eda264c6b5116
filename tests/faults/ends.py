"""Faults that end processes, ask them to end, or stop them for a while."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kinds import Evidence, kind
from moments import PHASES, caught, to_training
from patient import ROOT, Lost, NotInjected, Patient, state

from mtbert.stops import STOPPED

PAUSE_S = 30.0
"""For which a rank is stopped."""


def kill_a_rank(patient: Patient, phase: str) -> Evidence:
    ranks = caught(patient, phase)
    evidence = patient.deliver(signal.SIGKILL, [patient.draw.choice(sorted(ranks.values()))])
    patient.thaw(ranks.values())
    return {**evidence, "phase": phase}


def kill_all(patient: Patient, phase: str) -> Evidence:
    caught(patient, phase)
    return {**patient.deliver(signal.SIGKILL, patient.processes()), "phase": phase}


KILLED = r"was killed"

for phase in PHASES:
    kind(f"kill -9 of a rank, {phase}", 1, because=KILLED, ends=True)(functools.partial(kill_a_rank, phase=phase))
    kind(f"kill -9 of everything, {phase}", -9, ends=True)(functools.partial(kill_all, phase=phase))


def crash(patient: Patient, number: int) -> Evidence:
    """Where it hit, the rank itself says: it has a handler that prints its stack as it dies."""
    to_training(patient)
    ranks = patient.ready()
    rank = patient.draw.choice(sorted(ranks))
    patient.mark()
    evidence = patient.deliver(number, [ranks[rank]])
    patient.until("a dead rank", lambda: state(ranks[rank]) in "ZX")
    errors = (patient.run / "logs" / f"rank{rank}.err").read_text(errors="replace")
    return {**evidence, "phase": where(errors.rpartition("Fatal Python error")[2])}


def where(stack: str) -> str:
    """The part of a step that a stack of faulthandler's is in."""
    main = stack.partition("Current thread")[2].partition("\n\n")[0] or stack
    calls = re.findall(r'File "[^"]*?(\w+)\.py", line \d+ in (\w+)', main)
    parts = {
        "evaluation": ("evaluate_all", "_evaluate"),
        "save": ("_save",),
        "forward": ("_loss",),
        "reduction": ("_agree", "_send", "_receive", "_own"),
        "optimizer": ("_apply", "_average"),
        "backward": ("_backward",),
        "data": ("_all_data",),
        "records": ("_record",),
        "rest of a step": ("_step",),
    }
    functions = {function for _, function in calls}
    found = (part for part, names in parts.items() if functions & {*names})
    return next(found, calls[0][1] if calls else "no stack")


for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
    kind(f"a rank crashes ({number.name})", 1, because=KILLED, ends=True)(functools.partial(crash, number=number))


@kind("kill -9 of everything, caching data", -9, ends=True)
def kill_at_caching(patient: Patient) -> Evidence:
    """Of a start that finds no cache, or only the generated corpus."""
    cache = patient.draw.choice([patient.lab.cache, patient.lab.cache / "tokens"])
    whole = token_folders(patient)
    patient.restart(lambda: shutil.rmtree(cache))
    # on a busy machine one may be whole before it is struck; then another is in the making
    while True:
        patient.until(
            "a cache in the making",
            lambda: patient.ended or making(patient) or whole <= token_folders(patient),
            nap_s=0.0005,
        )
        time.sleep(patient.draw.uniform(0, 0.3 if cache == patient.lab.cache else 0.005))
        pids = patient.processes()
        patient.freeze(pids)
        if making(patient):
            break
        patient.thaw(pids)
        if patient.ended or whole <= token_folders(patient):
            raise NotInjected("the caches were whole before it was killed", touched=True)
    evidence = patient.deliver(signal.SIGKILL, pids)
    patient.wait()
    left = making(patient)
    patient.lab.left.update(path for path in left if path.name.startswith(".making-"))
    return {**evidence, "phase": "caching", "left": [path.name for path in left]}


def token_folders(patient: Patient) -> set[str]:
    """Those that are whole."""
    names = {path.name for path in (patient.lab.cache / "tokens").glob("*") if path.is_dir()}
    return {name for name in names if not name.startswith(".")}


def making(patient: Patient) -> list[Path]:
    return [path for path in [*patient.lab.cache.rglob("*.tmp"), *patient.lab.cache.rglob(".making-*")]
            if path not in patient.lab.left]  # fmt: skip


# ------------------------------------------------------------------------------------ asked to stop, or paused

ASKED = r"stopped (at step \d+|before the first save)"


@kind("SIGTERM to a rank", STOPPED, because=ASKED, ends=True)
def terminate_a_rank(patient: Patient) -> Evidence:
    to_training(patient)
    return patient.deliver(signal.SIGTERM, [patient.some_rank()])


@kind("SIGTERM to a rank, starting", STOPPED, because=ASKED, ends=True)
def terminate_early(patient: Patient) -> Evidence:
    ranks = caught(patient, "starting")
    evidence = patient.deliver(signal.SIGTERM, [patient.draw.choice(sorted(ranks.values()))])
    patient.thaw(ranks.values())
    return {**evidence, "phase": "starting"}


@kind("Ctrl-C", STOPPED, because=ASKED, ends=True)
def interrupt(patient: Patient) -> Evidence:
    to_training(patient)
    return patient.deliver(signal.SIGINT, [patient.submitter()])


@kind("Ctrl-C twice", STOPPED, because=ASKED, ends=True, abrupt=True)
def interrupt_twice(patient: Patient) -> Evidence:
    interrupt(patient)
    time.sleep(patient.draw.uniform(0.06, 0.5))  # the submitter looks every 0.05 s
    try:
        return patient.deliver(signal.SIGINT, [patient.submitter()])
    except NotInjected:
        raise NotInjected("it had saved and ended before the second", touched=True) from None


@kind("kill -9 of the submitter, then cancel", -9, ends=True)
def kill_the_submitter(patient: Patient) -> Evidence:
    to_training(patient)
    evidence = patient.deliver(signal.SIGKILL, [patient.submitter()])
    cancelled = submitter("cancel", patient.run)
    if cancelled.returncode:
        raise Lost(f"cancel ended with {cancelled.returncode}: {cancelled.stdout}")
    return evidence


def submitter(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "submit.py", *words],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@kind("a rank stopped and continued")
def pause(patient: Patient) -> Evidence:
    to_training(patient)
    rank = patient.some_rank()
    patient.freeze([rank])
    time.sleep(PAUSE_S)
    if patient.ended or state(rank) not in "Tt":
        raise NotInjected("the rank did not stay stopped", touched=True)
    patient.thaw([rank])
    return {"pids": [rank], "stopped_s": PAUSE_S}
