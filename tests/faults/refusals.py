"""Faults in which the system refuses something: memory, room, files, calls."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kinds import Evidence, kind
from moments import linger, to_training
from patient import SAVE_EVERY, Lost, NotInjected, Patient, cpu_s

HELD_S = 30.0
"""For which a limit, or a disk that fails, waits for the job to run into it."""
STUCK_S = 1.0
"""CPU time without a line in the metrics after which a rank is working into the void: a step takes a few hundredths."""


def bites(patient: Patient, rank: int, saying: str, mute: bool) -> Evidence:
    """Until the job shows that it has run into a fault that lasts: it says so, ends, or works on without getting on.

    Args:
        mute: whether the rank's log may not grow either, so that it cannot say it. What it works on then shows.
    """
    at, used, until = patient.last(), cpu_s(rank), time.monotonic() + HELD_S
    found: Evidence = {}

    def shown() -> bool:
        nonlocal at, used
        if said := re.search(saying, patient.words(everything=True)):
            found["said"] = said[0]
        # scores are followed by pictures, which take a while
        if not mute or patient.last() != at or patient.evaluating() or "metric/composite" in at:
            at, used = patient.last(), cpu_s(rank)
        elif (idle := cpu_s(rank) - used) > STUCK_S:
            found["no step for CPU seconds"] = round(idle, 1)
        if patient.ended and patient.job and patient.job.returncode:
            found["ended"] = patient.job.returncode
        return bool(found) or patient.ended or time.monotonic() > until

    patient.until("a fault that bites", shown)
    if not found:
        raise NotInjected("the job never ran into it", touched=True)
    time.sleep(patient.draw.uniform(0, 1.5))
    return found


@contextlib.contextmanager
def limited(pid: int, what: int, value: Callable[[int], int]) -> Iterator[None]:
    try:
        before = resource.prlimit(pid, what)
        resource.prlimit(pid, what, (value(pid), before[1]))
    except ProcessLookupError:
        raise NotInjected("the rank had ended") from None
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def under_limit(patient: Patient, what: int, value: Callable[[int], int], saying: str, start: bool) -> Evidence:
    if start:
        patient.restart()
        patient.ready()
        linger(patient, "start")
    else:
        to_training(patient)
    patient.saves_failed = True
    rank = patient.some_rank()
    patient.mark()
    with limited(rank, what, value):
        return {**bites(patient, rank, saying, mute=what == resource.RLIMIT_FSIZE), "pids": [rank]}


def size_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    return 2**30


NO_MEMORY = r"[Cc]annot allocate memory|can't allocate memory|MemoryError|bad_alloc|can't start new thread|was killed"

for name, what, value, codes, saying in (
    # the few lines about its end fit; with less a rank could not say why it ended
    ("no file may grow (EFBIG)", resource.RLIMIT_FSIZE, lambda _: 4096, (2,), "File too large"),
    ("no file may be opened (EMFILE)", resource.RLIMIT_NOFILE, lambda _: 3, (1, 2), "Too many open files"),
    ("no more memory for a rank", resource.RLIMIT_AS, size_of, (1,), NO_MEMORY),
    ("no more memory for a rank, starting", resource.RLIMIT_AS, size_of, (1,), NO_MEMORY),
):
    kind(name, *codes, because=saying)(
        functools.partial(under_limit, what=what, value=value, saying=saying, start="starting" in name)
    )


@kind("disk full (ENOSPC)", 2, because="No space left on device", needs="disk")
def fill_the_disk(patient: Patient) -> Evidence:
    to_training(patient)
    patient.saves_failed, rank = True, patient.ready()[0]
    patient.mark()
    ballast = patient.lab.disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        return bites(patient, rank, "No space left on device", mute=True)
    finally:
        ballast.unlink(missing_ok=True)


def failing(patient: Patient, calls: str, how: str) -> Evidence:
    """System calls of one rank that concern the run folder's files fail, or take their time."""
    to_training(patient)
    patient.saves_failed = True
    at, rank = patient.step(), patient.some_rank()
    target = [patient.run / "metrics.jsonl", patient.run / "checkpoints"]
    for step in range(at, at + 6 * SAVE_EVERY):
        if (step + 1) % SAVE_EVERY == 0:
            folder = patient.run / "checkpoints" / f".step-{step + 1:08d}.tmp"
            target += [folder, *(folder / f"rank-{n}-of-{patient.world}.safetensors" for n in range(patient.world))]
    paths = itertools.chain.from_iterable(("-P", path) for path in target)
    trace = patient.lab.root / "strace"
    trace.unlink(missing_ok=True)
    what = [f"--attach={rank}", *paths, "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", trace, *what], stderr=subprocess.PIPE)
    until = time.monotonic() + HELD_S

    def injected() -> int:
        return trace.read_text(errors="replace").count("(INJECTED)") + delayed() if trace.exists() else 0

    def delayed() -> int:
        return trace.read_text(errors="replace").count("(DELAYED)")

    try:
        over = lambda: injected() or tracer.poll() is not None or patient.ended or time.monotonic() > until  # noqa: E731
        patient.until("a call that fails", over)
        time.sleep(patient.draw.uniform(0, 1.5))
    finally:
        code = tracer.poll()
        tracer.terminate()
        complaint = tracer.communicate()[1].decode(errors="replace")
    if not (count := injected()):
        raise NotInjected(f"no call of the job met it (strace: {code}, {complaint.strip()})", touched=True)
    return {"injected": count, "pids": [rank]}


for name, calls, how, codes, saying in (
    ("writing fails (EIO)", "write,pwrite64,ftruncate", "error=EIO", (1, 2), "Input/output error"),
    ("fsync fails (EIO)", "fsync", "error=EIO", (1, 2), "Input/output error"),
    ("over quota (EDQUOT)", "write,pwrite64,ftruncate", "error=EDQUOT", (2,), "Disk quota exceeded"),
    ("slow shared folder", "write,fsync,openat,rename", "delay_enter=200000", (), ""),
):
    kind(name, *codes, because=saying, needs="strace")(functools.partial(failing, calls=calls, how=how))


@kind("shared folder away for a while", 1, 2, because=r"No such file or directory|out of reach")
def vanish(patient: Patient) -> Evidence:
    to_training(patient)
    patient.saves_failed = True
    away, for_s = patient.run.with_name(f"{patient.name}.away"), patient.draw.uniform(0.2, 3)
    patient.run.rename(away)
    time.sleep(for_s)
    try:
        if patient.run.exists():
            raise Lost(f"written into the void: {', '.join(map(str, patient.run.rglob('*')))}")
    finally:
        shutil.rmtree(patient.run, ignore_errors=True)
        away.rename(patient.run)
    return {"away_s": round(for_s, 2)}


@kind("/dev/shm full", needs="root")
def no_shared_memory(patient: Patient) -> Evidence:
    mount = 'set -e; mount -t tmpfs -o size=4k tmpfs /dev/shm; head -c 4096 /dev/zero >/dev/shm/full; exec "$@"'
    patient.restart(prefix=["unshare", "--mount", "sh", "-c", mount, "sh"])
    ranks = patient.ready()
    found = {rank: os.statvfs(f"/proc/{pid}/root/dev/shm") for rank, pid in ranks.items()}
    if not all(there.f_blocks == 1 and there.f_bavail == 0 for there in found.values()):
        raise NotInjected("there is room in the ranks' /dev/shm", touched=True)
    to_training(patient)
    return {"blocks left in /dev/shm": 0}


@kind("clock three days back", needs="faketime")
def clock_back(patient: Patient) -> Evidence:
    # not behind faketime itself, which would stay between the submitter and who waits for its exit code
    asked = subprocess.run(["faketime", "-m", "-f", "-3d", "printenv", "LD_PRELOAD"], check=True, capture_output=True)
    patient.restart(prefix=["env", f"LD_PRELOAD={asked.stdout.decode().strip()}", "FAKETIME=-3d"])
    ranks = patient.ready()
    to_training(patient)
    if not all("faketime" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks.values()):
        raise NotInjected("the ranks' clock is the true one", touched=True)
    return {"library": "faketime"}
