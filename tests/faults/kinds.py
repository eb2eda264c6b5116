"""What a kind of fault is, and the table that the modules with faults fill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patient import Patient

Evidence = dict[str, Any]
"""What shows that a fault struck, for the ledger."""


@dataclass(frozen=True)
class Kind:
    name: str
    strike: Callable[[Patient], Evidence]  # raises NotInjected
    codes: tuple[int, ...] = ()  # with which the job may end of it; it may also go on
    because: str = ""  # what the last words then match
    needs: str = ""  # root, a disk of its own, strace, faketime
    ends: bool = False  # the job does not go on by itself
    abrupt: bool = False  # an end that leaves things to the next start to clear up
    aside: bool = False  # befalls another process than the patient, and is judged by the strike itself


KINDS: dict[str, Kind] = {}

Strike = Callable[[Patient], Evidence]


def kind(name: str, *codes: int, **options: Any) -> Callable[[Strike], Strike]:
    def register(strike: Strike) -> Strike:
        KINDS[name] = Kind(name, strike, codes, **options)
        return strike

    return register


def here(needs: str) -> bool:
    """Whether what a kind needs can be had."""
    return os.geteuid() == 0 if needs in ("root", "disk") else shutil.which(needs) is not None
