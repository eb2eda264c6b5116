"""What a run's `environment.json` tells: the program, the command and the machine that made it, and no secret.

No torch in here, and no GPU: a run is made on a login node, too. `launch.json` says what it trained on.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mtbert import __version__

PACKAGES = ("torch", "deepspeed", "torchjd", "safetensors", "tokenizers", "numpy", "submitit")

_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY)(_ID)?$")
_SECRET_OPTIONS = re.compile(r"--?([\w-]*[_-])?(token|secret|password|passwd|key)", re.IGNORECASE)
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)|(?i:(?<=token=)|(?<=password=)|(?<=secret=))\S+")


def environment(command: list[str]) -> dict[str, Any]:
    """What a reader needs to repeat the run; no environment variables, they may hold secrets, and no secret that was
    typed."""
    return {
        "command": [_legible(word) for word in redacted_command(command)],
        "directory": _legible(str(Path.cwd())),
        "mtbert": __version__,
        "commit": commit() or None,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu(),
        "cpus": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def commit(code: Path = Path(__file__)) -> str:
    """Of this program, with a + where that is not what was committed; empty outside a checkout of it.

    Args:
        code: one of its files: an installed copy may lie inside the checkout of something else.
    """
    git = ["git", "-C", str(code.parent)]
    try:
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", code.name], capture_output=True)
        found = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
        changed = [*git, "diff", "--quiet", "HEAD", "--", ":(top)*.py", ":(top)*.yaml"]
        clean = subprocess.run(changed, capture_output=True)
    except FileNotFoundError:
        return ""
    return "" if ours.returncode or found.returncode else found.stdout.strip() + "+" * bool(clean.returncode)


def cpu() -> str:
    """The processor as Linux names it, with the number formats that decide how fast it multiplies."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    return f"{name} ({', '.join(found) or 'no bf16 products'})"


def redacted(text: str) -> str:
    """Without what looks like a secret: hub tokens, passwords in addresses, values of variables such as HF_TOKEN."""
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "[redacted]")
    return _SECRETS.sub("[redacted]", text)


def redacted_command(words: list[str]) -> list[str]:
    """Also without the word after an option such as --token."""
    return [
        "[redacted]" if at and _SECRET_OPTIONS.fullmatch(words[at - 1]) else redacted(word)
        for at, word in enumerate(words)
    ]


def _legible(text: str) -> str:
    """With all that is not UTF-8 escaped: JSON's readers refuse the half surrogate pair that Python makes of it."""
    return text.encode(errors="backslashreplace").decode()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
