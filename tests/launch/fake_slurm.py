"""Slurm's commands as small shell scripts, for what the real ones (tests/slurm) do too rarely."""

from __future__ import annotations

from pathlib import Path


class FakeSlurm:
    """sbatch, srun and scontrol, each of which writes down how it was called and does what a test asks for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            self.does(name, "exit 0")

    def does(self, name: str, body: str) -> None:
        """From now on this command is that shell script."""
        script = self.place / name
        script.write_text(f'#!/bin/bash\necho "$*" >>{self.place}/{name}.calls\n{body}\n')
        script.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.place / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []
