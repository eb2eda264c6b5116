"""When a fault strikes: somewhere inside of a phase of the job."""

from __future__ import annotations

import time
from collections.abc import Callable

from patient import NotInjected, Patient

TRIES = 10


def to_start(patient: Patient) -> None:
    """Imports, rendezvous, data, model, loading."""
    if patient.trains():
        patient.restart()
    patient.ready()
    linger(patient, "start")


def to_training(patient: Patient) -> None:
    patient.training()
    time.sleep(patient.draw.uniform(0, 1))


def to_save(patient: Patient) -> None:
    patient.ready()
    patient.until("a save", lambda: patient.ended or patient.saving(), nap_s=0.0005)
    linger(patient, "save")


def to_evaluation(patient: Patient) -> None:
    patient.ready()
    patient.until("an evaluation", lambda: patient.ended or patient.evaluating(), nap_s=0.002)
    linger(patient, "evaluation")


def linger(patient: Patient, what: str) -> None:
    """Some part of the time that this takes when nothing disturbs it."""
    assert patient.reference
    time.sleep(patient.draw.uniform(0, patient.reference.lasts[what]))


PHASES: dict[str, tuple[Callable[[Patient], None], Callable[[Patient], bool]]] = {
    "starting": (to_start, lambda patient: not patient.trains()),
    "training": (to_training, lambda patient: patient.trains() and not patient.evaluating()),
    "saving": (to_save, Patient.saving),
    "evaluating": (to_evaluation, Patient.evaluating),
}


def caught(patient: Patient, phase: str) -> dict[int, int]:
    """The ranks, stopped inside of a phase."""
    go, inside = PHASES[phase]
    for _ in range(TRIES):
        go(patient)
        ranks = patient.ready()
        patient.freeze(ranks.values())
        if inside(patient):
            return ranks
        patient.thaw(ranks.values())
    raise NotInjected(f"it was never caught {phase}")
