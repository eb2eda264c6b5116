"""Files that other processes read, or several write: whole or not at all; and small ones that a stranger may have sent.

No torch in here.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mtbert.errors import UserError

T = TypeVar("T")

MAX_SMALL = 2**24

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that a full disk, a quota or a limit on file sizes refuses: training outlives them."""


def alive(pid: int) -> bool:
    """Whether a process of this host is there and not merely waiting for its parent to hear of its end: in containers
    the first process may never ask."""
    foreign = False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        foreign = True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except PermissionError:  # another user's, with hidepid=1
        return True
    except FileNotFoundError:  # gone meanwhile, or no Linux; another user's with hidepid=2
        return foreign or not Path("/proc/self").exists()


def _process_space() -> int:
    """The PID namespace: containers may share a host's name, and see no processes but their own."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        return 0


NODE, PROCESS_SPACE = platform.node().replace(".", "-"), _process_space()
HOST = f"{NODE}-{PROCESS_SPACE}"
ABANDONED_S = 86400.0


def aside(target: Path) -> Path:
    """Where this process writes what is to take the name of `target` when it is whole. `sweep` knows such names."""
    return target.with_name(f".{target.name}.{HOST}.{os.getpid()}.tmp")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what processes of this host that were killed have left aside in `folder`, for files of that name.

    Those of another container of its name are not to be seen: theirs goes when it was not touched for `ABANDONED_S`.
    """
    for path in folder.glob(f".{name}.{NODE}*.tmp"):
        *_, host, pid, _ = path.name.split(".")
        if pid.isdecimal() and re.fullmatch(rf"{re.escape(NODE)}(-\d+)?", host):
            with suppress(OSError):  # another user's, or another process sweeps as well
                if not alive(int(pid)) if host == HOST else _untouched_s(path) > ABANDONED_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _untouched_s(path: Path) -> float:
    return time.time() - max(part.lstat().st_mtime for part in (path, *path.rglob("*")))


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write what `path` is to hold: a file beside it that takes its name if nothing goes wrong. A link stays
    one, to the new file; a pipe or a device is written to itself, a rename would put a file in its place.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    sweep(target.parent, glob.escape(target.name))
    new = aside(target)
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)  # there only if something went wrong


@contextmanager
def folder_made_aside(target: Path, whole: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Where to put what the folder `target` is to hold: a new one beside it that takes its name if nothing goes wrong.

    Args:
        whole: whether a folder of that name is what this one would be. One that is stays, another process was first;
            one that is not was damaged, and gives way. Without it every folder that has anything in it stays.

    Raises `OSError`, also where one stays that is not whole.
    """
    sweep(target.parent)
    # several threads may want it; and after a restart a container has the name and the process ids it had before
    name = f"{target.name}.{uuid.uuid4().hex[:8]}"
    new, damaged = aside(target.with_name(name)), aside(target.with_name(f"{name}.damaged"))
    try:
        new.mkdir(parents=True)
        yield new
        if whole and target.is_dir() and not whole(target):
            with suppress(FileNotFoundError):  # another process was faster
                target.rename(damaged)
        try:
            new.rename(target)
        except OSError:
            if not (whole and whole(target)):
                raise
    finally:
        for left in (new, damaged):
            shutil.rmtree(left, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of it."""
    with written_aside(path) as new, new.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe refuses it
            os.fsync(file.fileno())


def seen_as_folder(path: Path) -> bool:
    """Not where one may not look, which `Path` raises `PermissionError` for."""
    return os.path.isdir(path)  # noqa: PTH112


@contextmanager
def permitted(what: str) -> Iterator[None]:
    """Raises `UserError` for what lies in a folder that one may not enter: `Path` does not say that it is not there."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{what}: {error.strerror}") from None


def user_path(name: str | Path) -> Path:
    """With ~ replaced as shells do: of a user that there is not it stays, and then no such file is found."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises RuntimeError for such a user


def read_small(path: Path) -> bytes:
    """A file of a run or a model that is small by nature. Raises `OSError`, and `UserError` for a large one."""
    with path.open("rb") as file:
        content = file.read(MAX_SMALL + 1)
    if len(content) > MAX_SMALL:
        raise UserError(f"{path}: more than {MAX_SMALL:,} bytes, which is not what its name promises")
    return content


def read_json(kind: TypeAdapter[T], path: Path) -> T | None:
    """What a small file holds, None where that is something else. Raises `OSError`, also for one that is not there.

    Args:
        kind: made once, by the caller: that takes ten times as long as to read with one.
    """
    try:
        content = read_small(path)
        return kind.validate_json(content, strict=True)
    except (UserError, ValidationError):
        return None
