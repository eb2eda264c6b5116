"""What is pinned for `make` and what is pinned with hashes are the same versions."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def pinned(text: str) -> dict[str, str]:
    """Version by name, on Python 3.11, for which the lock is made."""
    found = {}
    for line in re.sub(r"\\\n", "", text).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line.split("--hash=")[0].strip())
        if not requirement.marker or requirement.marker.evaluate({"python_version": "3.11"}):
            [version] = requirement.specifier
            found[canonicalize_name(requirement.name)] = version.version
    return found


def test_the_lock_holds_the_constraints() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked, constraints = pinned(lock), pinned((ROOT / "constraints.txt").read_text())
    assert len(locked) > 100 and locked == constraints
    assert all("--hash=sha256:" in line for line in re.sub(r"\\\n", "", lock).splitlines() if "==" in line)
