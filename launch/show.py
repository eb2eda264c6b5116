"""What the user sees of a job: rank 0's log while it grows, and last words with the exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from launch.records import End, JobNote, job_folder, log_path
from mtbert.files import NO_ROOM
from mtbert.manifest import folders
from mtbert.stops import STOPPED, give_up

REMEMBERED = 4000
"""Bytes of a log shown to someone who joins late, about a screen and a half."""


class Unwatched(Exception):
    """The reader of our stdout has enough (`| head`), or its terminal was closed."""


def tell(words: str, stream: TextIO | None = None) -> None:
    """On stderr, or `stream`, if somebody is left to read it."""
    stream = stream or sys.stderr
    try:
        print(words, file=stream, flush=True)
    except OSError:
        give_up(stream)


def show(output: bytes) -> None:
    """Raises `Unwatched` for the first that nobody reads; that and later ones go nowhere, as where a disk is full."""
    try:
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        if error.errno not in NO_ROOM:  # the run folder has it all, and training outlives a full disk
            raise Unwatched from None


def length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Tail:
    """Copies what is appended to a file to our stdout, as it is: from byte `start` on; None: its last lines first."""

    def __init__(self, path: Path, start: int | None) -> None:
        self.path = path
        self._offset = length(path) if start is None else start
        if start is None and self._offset:
            with path.open("rb") as file:
                file.seek(max(0, self._offset - REMEMBERED))
                # half a line at the beginning is left out
                self._offset = file.tell() + (len(file.readline()) if file.tell() else 0)

    def copy(self) -> None:
        """Raises `Unwatched`, as `show` does."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        show(new)


def report(run: Path, note: JobNote, end: End | None, said: str = "") -> int:
    """Last words of a job to its user; returns the exit code. The trainer itself has told a finished run's.

    Args:
        said: what Slurm says of a job that left no word.
    """
    resume = note.again(run)
    if end is None:
        words = _launcher_errors(run, note) or f"the job was killed{said}; see {log_path(run).parent}/"
        tell(f"error: {words}\ncontinue with: {resume}")
        return 1
    if end.status == "mistake":
        tell(f"error: {end.message}")
        if folders(run):  # a disk that was full at the end, say
            tell(f"continue with: {resume}")
        return 2
    if end.status in ("failed", "lost"):
        tell(f"rank {end.rank} on {end.host} failed; all output: {log_path(run).parent}/\n{end.message.rstrip()}")
        why = "a rank was killed (memory?) or its node failed; " if end.status == "lost" else ""
        tell(f"{why}continue with: {resume}")
        return 1
    if end.status == "stopped":
        tell(f"stopped {_when(run, end)}; continue with: {resume}", sys.stdout)
        return STOPPED
    return 0


def _when(run: Path, end: End) -> str:
    if end.step is not None:
        return f"at step {end.step}"
    if saved := folders(run):  # its ranks were killed, or had not begun to go on
        return f"without another save; the last is {saved[0].name}"
    return "before the first save"


def launcher_logs(run: Path, note: JobNote) -> list[Path]:
    """Of the batch script, srun and an interpreter that could not start; for an array they lie in its folder."""
    places = (job_folder(run), job_folder(run.resolve().parent))
    return [path for place in places for path in place.glob(f"{note.id}_*_log.err")]


def _launcher_errors(run: Path, note: JobNote) -> str:
    """What they say of why no rank had a log. Attempts write one after another."""
    newest = sorted(launcher_logs(run, note), key=lambda path: path.stat().st_mtime)
    lines = [line for path in newest for line in path.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else "\n".join(lines[-10:])
