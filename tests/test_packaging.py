"""What is pinned for `make` and what is pinned with hashes are the same versions."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mtbert.errors import to_install

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


def test_an_extra_is_had_by_the_command_of_the_readme() -> None:
    """Unpinned, or from an index, it would be another: nobody has this package's name there."""
    command = to_install("parquet").removesuffix(" in the checkout")
    assert f"`{command}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    extras = re.search(r"extras_require=\{(.*?)\}", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)
    assert extras
    named = set()
    for path in (path for package in ("mtbert", "launch", "tune") for path in (ROOT / package).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"to_install\(['\"](\w+)['\"]\)", source))
        assert path.name == "errors.py" or "pip install" not in source, path
    assert named == {"parquet", "serve", "onnx", "tune", "surgery"} <= set(re.findall(r'"([a-z]+)":', extras[1]))


def test_the_lock_holds_the_constraints() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked, constraints = pinned(lock), pinned((ROOT / "constraints.txt").read_text())
    assert len(locked) > 100 and locked == constraints
    assert all("--hash=sha256:" in line for line in re.sub(r"\\\n", "", lock).splitlines() if "==" in line)
