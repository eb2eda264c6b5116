"""One writer at a time in a run folder: a file that names its owner, for processes of one host and of many."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from mtbert.errors import UserError
from mtbert.files import PROCESS_SPACE, alive, aside, read_json

HEARTBEAT_S = 5.0
STALE_S = 60.0
"""A lock untouched for this long belongs to nobody: twelve missed heartbeats, more than any pause of a file server."""

Plain = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""What goes into file names and command lines: a note may come from a stranger."""
SlurmJob = Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)?$")]
Count = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass
class Owner:
    """`lock`: the attempt that holds a run folder."""

    attempt: str
    host: Plain
    pid: Count
    slurm_job: SlurmJob | None
    process_space: int = 0


@dataclass
class Noted:
    """`job.json`, as far as it matters here: the job that a launcher can cancel."""

    token: str


_OWNER, _NOTED = TypeAdapter(Owner), TypeAdapter(Noted)


def read_owner(path: Path) -> Owner | None:
    """None where the file holds something else. Raises `OSError`, also for a file that is not there."""
    return read_json(_OWNER, path)


def _job(attempt: str) -> str:
    """The token of its job."""
    return attempt.rsplit("-", 1)[0]


def _words(owner: Owner | None, age_s: float) -> str:
    who = f"process {owner.pid} on {owner.host}" if owner else "a lock that names nobody"
    return f"{who}, seen {max(age_s, 0):.0f} s ago"


def _version(path: Path) -> tuple[int, int] | None:
    """Of a lock: that of another owner is another, and so is one that was touched. None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


class RunLock:
    """One attempt at a time in a run folder: `RUN/job/lock`.

    Another attempt may take it over when the owner is an earlier attempt of the same job, a dead process of this host
    (in the same container), or has not touched the file for `STALE_S`.
    """

    def __init__(self, run: Path, attempt: str, slurm_job: str | None = None) -> None:
        self.run = run
        self.path = run / "job" / "lock"
        self.owner = Owner(attempt, socket.gethostname(), os.getpid(), slurm_job, PROCESS_SPACE)

    def acquire(self) -> None:
        """Raises `UserError` when a living attempt of another job holds the folder."""
        while True:
            try:
                with self.path.open("x") as file:
                    json.dump(asdict(self.owner), file)
                return
            except FileExistsError:
                judged = _version(self.path)
            self.check()
            self._remove(judged)

    def _remove(self, judged: tuple[int, int] | None) -> None:
        """Removes that version alone: who judged it as well may have taken it over meanwhile."""
        taken = aside(self.path)
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            self.path.rename(taken)
            if _version(taken) != judged:
                with contextlib.suppress(FileExistsError):
                    self.path.hardlink_to(taken)
            taken.unlink()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds it during the block, or raises as `acquire` does. A process that lost it meanwhile ends at once."""
        try:
            self.path.parent.mkdir(exist_ok=True)
            self.acquire()
        except OSError as error:
            raise UserError(f"{self.run}: cannot be written to: {error.strerror}") from None
        over = threading.Event()
        watch = threading.Thread(target=self._keep, args=[over], name="lock", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()
            if self.is_mine():
                self.release()

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # of a file server that restarts
                if not self.is_mine():
                    print(f"{self.run}: another job took this run folder over", file=sys.stderr, flush=True)
                    os._exit(1)
                self.touch()

    def is_mine(self) -> bool:
        """Raises `OSError` where that cannot be read."""
        with contextlib.suppress(FileNotFoundError):
            return read_owner(self.path) == self.owner
        return False

    def check(self) -> None:
        """Raises `UserError` when a living attempt of another job holds the folder."""
        if living := self._living():
            owner, age_s = living
            end = f", or end process {owner.pid} on {owner.host}" if owner else ""
            with contextlib.suppress(OSError):  # a plain `mtbert train` leaves no note
                noted = read_json(_NOTED, self.path.with_name("job.json"))
                if owner and noted and noted.token == _job(owner.attempt):
                    end = f", or end it with: python launch/submit.py cancel {shlex.quote(str(self.run))}"
            raise UserError(
                f"{self.run}: another job is using this run folder ({_words(owner, age_s)}); wait for it{end}"
            )

    def holder(self) -> str | None:
        """Who holds the lock and lives, in words; None when nobody does."""
        living = self._living()
        return living and _words(*living)

    def held_by(self, token: str) -> bool:
        """Whether a living attempt of that job holds the lock."""
        owner, _ = self._living() or (None, 0.0)
        return owner is not None and _job(owner.attempt) == token

    def _living(self) -> tuple[Owner | None, float] | None:
        """Who holds the lock and lives, None where it names nobody, and for how long it was not touched."""
        try:
            owner = read_owner(self.path)  # empty while it is being written, or damaged: its age decides
            age_s = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        if owner:
            same_job = _job(owner.attempt) == _job(self.owner.attempt)
            near = (owner.host, owner.process_space) == (self.owner.host, PROCESS_SPACE)
            dead = near and not alive(owner.pid)
            if same_job or dead or (owner.slurm_job and self._is_over(owner.slurm_job)):
                return None
        return None if age_s > STALE_S else (owner, age_s)

    def _is_over(self, slurm_job: str) -> bool:
        """Whether Slurm says so; here nobody asks it."""
        return False

    def touch(self) -> None:
        os.utime(self.path)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
