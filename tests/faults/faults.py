"""The faults: what each does to a patient, the evidence that it did, and how a job may end of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patient import ROOT, SAVE_EVERY, Lab, Lost, NotInjected, Patient, cpu_s, state

from launch.show import STOPPED
from mtbert.manifest import Checkpoint, folders

Evidence = dict[str, Any]
"""What shows that a fault struck, for the ledger."""

PAUSE_S = 30.0
"""For which a rank is stopped."""
HELD_S = 30.0
"""For which a limit, or a disk that fails, waits for the job to run into it."""
STUCK_S = 1.0
"""CPU time without a line in the metrics after which a rank is working into the void: a step takes a few hundredths."""
TRIES = 10
TOLERANCE = 1e-5
"""Of weights on another number of ranks, as in tests/test_trainer.py."""


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


def here(needs: str, place: Lab | None = None) -> bool:
    """Whether what a kind needs can be had; of a disk of its own the lab knows."""
    if needs == "disk":
        return os.geteuid() == 0 if place is None else place.fills
    return os.geteuid() == 0 if needs == "root" else shutil.which(needs) is not None


# ----------------------------------------------------------------------------------------- sudden ends


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


def kill_a_rank(patient: Patient, phase: str) -> Evidence:
    ranks = caught(patient, phase)
    evidence = patient.deliver(signal.SIGKILL, [patient.draw.choice(sorted(ranks.values()))])
    patient.thaw(ranks.values())
    return {**evidence, "phase": phase}


def kill_all(patient: Patient, phase: str) -> Evidence:
    caught(patient, phase)
    return {**patient.deliver(signal.SIGKILL, patient.processes()), "phase": phase}


KILLED = r"was killed"

for phase in PHASES:
    kind(f"kill -9 of a rank, {phase}", 1, because=KILLED, ends=True)(functools.partial(kill_a_rank, phase=phase))
    kind(f"kill -9 of everything, {phase}", -9, ends=True)(functools.partial(kill_all, phase=phase))


def crash(patient: Patient, number: int) -> Evidence:
    """Where it hit, the rank itself says: it has a handler that prints its stack as it dies."""
    to_training(patient)
    ranks = patient.ready()
    rank = patient.draw.choice(sorted(ranks))
    patient.mark()
    evidence = patient.deliver(number, [ranks[rank]])
    patient.until("a dead rank", lambda: state(ranks[rank]) in "ZX")
    errors = (patient.run / "logs" / f"rank{rank}.err").read_text(errors="replace")
    return {**evidence, "phase": where(errors.rpartition("Fatal Python error")[2])}


def where(stack: str) -> str:
    """The part of a step that a stack of faulthandler's is in."""
    main = stack.partition("Current thread")[2].partition("\n\n")[0] or stack
    calls = re.findall(r'File "[^"]*?(\w+)\.py", line \d+ in (\w+)', main)
    parts = {
        "evaluation": ("evaluate_all", "_evaluate"),
        "save": ("_save",),
        "forward": ("_loss",),
        "reduction": ("_agree", "_send", "_receive", "_own"),
        "optimizer": ("_apply", "_average"),
        "backward": ("_backward",),
        "data": ("_all_data",),
        "records": ("_record",),
        "rest of a step": ("_step",),
    }
    functions = {function for _, function in calls}
    found = (part for part, names in parts.items() if functions & {*names})
    return next(found, calls[0][1] if calls else "no stack")


for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
    kind(f"a rank crashes ({number.name})", 1, because=KILLED, ends=True)(functools.partial(crash, number=number))


@kind("kill -9 of everything, caching data", -9, ends=True)
def kill_at_caching(patient: Patient) -> Evidence:
    """Of a start that finds no cache, or only the generated corpus."""
    cache = patient.draw.choice([patient.cache, patient.cache / "tokens"])
    patient.restart(lambda: shutil.rmtree(cache))
    patient.until("a cache in the making", lambda: patient.ended or making(patient), nap_s=0.0005)
    assert patient.reference
    time.sleep(patient.draw.uniform(0, 0.3 if cache == patient.cache else 0.01))
    evidence = patient.deliver(signal.SIGKILL, patient.processes())
    patient.wait()
    if not (left := making(patient)):
        raise NotInjected("the caches were whole when it was killed", touched=True)
    patient.lab.left.update(path for path in left if path.name.startswith(".making-"))
    return {**evidence, "phase": "caching", "left": [path.name for path in left]}


def making(patient: Patient) -> list[Path]:
    return [path for path in [*patient.cache.rglob("*.tmp"), *patient.cache.rglob(".making-*")]
            if path not in patient.lab.left]  # fmt: skip


# ------------------------------------------------------------------------------------ asked to stop, or paused

ASKED = r"stopped (at step \d+|before the first step)"


@kind("SIGTERM to a rank", STOPPED, because=ASKED, ends=True)
def terminate_a_rank(patient: Patient) -> Evidence:
    to_training(patient)
    return patient.deliver(signal.SIGTERM, [patient.some_rank()])


@kind("SIGTERM to a rank, starting", STOPPED, because=ASKED, ends=True)
def terminate_early(patient: Patient) -> Evidence:
    ranks = caught(patient, "starting")
    evidence = patient.deliver(signal.SIGTERM, [patient.draw.choice(sorted(ranks.values()))])
    patient.thaw(ranks.values())
    return {**evidence, "phase": "starting"}


@kind("Ctrl-C", STOPPED, because=ASKED, ends=True)
def interrupt(patient: Patient) -> Evidence:
    to_training(patient)
    return patient.deliver(signal.SIGINT, [patient.submitter()])


@kind("Ctrl-C twice", STOPPED, because=ASKED, ends=True, abrupt=True)
def interrupt_twice(patient: Patient) -> Evidence:
    interrupt(patient)
    time.sleep(patient.draw.uniform(0.06, 0.5))  # the submitter looks every 0.05 s
    if patient.ended:
        raise NotInjected("it had saved and ended before the second", touched=True)
    return patient.deliver(signal.SIGINT, [patient.submitter()])


@kind("kill -9 of the submitter, then cancel", -9, ends=True)
def kill_the_submitter(patient: Patient) -> Evidence:
    to_training(patient)
    evidence = patient.deliver(signal.SIGKILL, [patient.submitter()])
    cancelled = submitter("cancel", patient.run)
    if cancelled.returncode:
        raise Lost(f"cancel ended with {cancelled.returncode}: {cancelled.stdout}")
    return evidence


def submitter(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "submit.py", *words],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@kind("a rank stopped and continued")
def pause(patient: Patient) -> Evidence:
    to_training(patient)
    rank = patient.some_rank()
    patient.freeze([rank])
    time.sleep(PAUSE_S)
    if patient.ended or state(rank) not in "Tt":
        raise NotInjected("the rank did not stay stopped", touched=True)
    patient.thaw([rank])
    return {"pids": [rank], "stopped_s": PAUSE_S}


# ------------------------------------------------------------------------------------ what the system refuses


def bites(patient: Patient, rank: int, saying: str) -> Evidence:
    """Until the job shows that it has run into a fault that lasts: it says so, ends, or works on without getting on.

    A rank whose log may not grow either cannot say it.
    """
    at, used, until = patient.last(), cpu_s(rank), time.monotonic() + HELD_S
    found: Evidence = {}

    def shown() -> bool:
        nonlocal at, used
        if said := re.search(saying, patient.words(everything=True)):
            found["said"] = said[0]
        if patient.last() != at or patient.evaluating():
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
        return {**bites(patient, rank, saying), "pids": [rank]}


def size_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    return 2**30


NO_MEMORY = r"[Cc]annot allocate memory|can't allocate memory|MemoryError|bad_alloc|can't start new thread|was killed"

for name, what, value, codes, saying in (
    ("no file may grow (EFBIG)", resource.RLIMIT_FSIZE, lambda _: 1, (2,), "File too large"),
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
    patient.saves_failed = True
    patient.mark()
    ballast = patient.lab.disk / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        return bites(patient, patient.ready()[0], "No space left on device")
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
    patient.restart(prefix=["faketime", "-m", "-f", "-3d"])
    ranks = patient.ready()
    to_training(patient)
    if not all("faketime" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks.values()):
        raise NotInjected("the ranks' clock is the true one", touched=True)
    return {"library": "faketime"}


# ------------------------------------------------------------------------- damage to what lies on the disk


def truncated(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


def replaced(path: Path, draw: random.Random) -> None:
    """By noise, or by a whole file of the same name from another checkpoint."""
    others = [other for other in path.parent.parent.glob(f"step-*/{path.name}") if other != path]
    if others and draw.random() < 0.5:
        path.write_bytes(draw.choice(sorted(others)).read_bytes())
    else:
        path.write_bytes(draw.randbytes(path.stat().st_size))


@dataclass(frozen=True)
class Target:
    files: Callable[[Patient], list[Path]]
    hows: tuple[Callable[[Path, random.Random], None], ...] = (truncated, flipped, missing, replaced)
    codes: tuple[int, ...] = (2,)
    because: str = ""  # in its last words, other than the file's name
    mends: bool = False  # the job makes good what was damaged


def inside(*parts: str) -> Callable[[Patient], list[Path]]:
    return lambda patient: [path for path in patient.run.joinpath(*parts).rglob("*") if path.is_file()]


def of_code(patient: Patient) -> list[Path]:
    """What a rank has imported."""
    compiled = {path.name.split(".")[0] for path in (patient.run / "code").rglob("*.pyc")}
    return [path for path in inside("code")(patient) if path.suffix == ".py" and path.stem in compiled]


def of_records(patient: Patient) -> list[Path]:
    return [patient.run / "metrics.jsonl", *inside("predictions")(patient), *patient.run.glob("events*")]


TARGETS = {
    "a file of the newest checkpoint": Target(lambda patient: [*folders(patient.run)[0].iterdir()], mends=True),
    "a file of the token cache": Target(
        lambda patient: [path for path in (patient.cache).rglob("*") if "generated" not in path.parts], mends=True
    ),
    "a file of the generated corpus": Target(lambda patient: [*(patient.cache / "generated").rglob("*")], mends=True),
    "a file of tokenizer and shape": Target(inside("encoder")),
    "metrics or predictions": Target(of_records, mends=True),
    "environment.json": Target(lambda patient: [patient.run / "environment.json"], because="run folder of format"),
    # it has no checksum: a flipped bit may give another configuration, and that is what is then trained
    "config.yaml": Target(lambda patient: [patient.run / "config.yaml"], hows=(missing, replaced)),
    "code": Target(of_code, hows=(missing, replaced), codes=(1, 2), because=r"\w+Error"),
    "job.json": Target(lambda patient: [patient.run / "job" / "job.json"]),
    "lock": Target(lambda patient: [patient.run / "job" / "lock"], because="using this run folder"),
}


def damage(patient: Patient, name: str, target: Target, how: Callable[[Path, random.Random], None]) -> Evidence:
    if name == "lock":  # one is left only by a job that was killed
        to_training(patient)
        patient.deliver(signal.SIGKILL, patient.processes())
        patient.wait()
        patient.gone()
    else:
        patient.stop()
    files = sorted(path for path in target.files(patient) if path.is_file() and path.stat().st_size)
    if not files:
        patient.start()
        raise NotInjected("there is no such file")
    path = patient.draw.choice(files)
    before, at = path.read_bytes(), patient.step()
    how(path, patient.draw)
    after = path.read_bytes() if path.exists() else None
    shown = path.relative_to(patient.lab.disk)
    if after == before:
        patient.start()
        raise NotInjected(f"{shown} is what it was")
    if not target.mends:
        patient.damaged[path] = before
    patient.worn |= {path.parent.name} if name == "a file of the newest checkpoint" else set()
    patient.true_from = at + 1 if path.name == "metrics.jsonl" else patient.true_from
    plain = path.parent in (patient.run, patient.run / "job") or name == "code"
    folder = [] if plain else [re.escape(path.parent.name)]
    patient.named = "|".join([re.escape(path.name), *folder, *filter(None, [target.because])])
    if name == "job.json" and "Traceback" in (told := submitter("status", patient.run).stdout):
        raise Lost(f"status of a run with a damaged {shown}: {told}")
    patient.start()
    return {"file": str(shown), "bytes": [len(before), None if after is None else len(after)]}


for name, target in TARGETS.items():
    for how in target.hows:
        kind(f"{name} {how.__name__}", *target.codes)(functools.partial(damage, name=name, target=target, how=how))


@kind("a lock left by another host, and files dated a day ahead")
def left_lock(patient: Patient) -> Evidence:
    def harm() -> None:
        lock = {"attempt": "other-0", "host": "elsewhere", "pid": 1, "slurm_job": None}
        (patient.run / "job" / "lock").write_text(json.dumps(lock))
        for path in patient.run.rglob("*"):
            ahead = time.time() + 86400 if path.name != "lock" else time.time() - 600
            os.utime(path, (ahead, ahead))

    patient.restart(harm)
    return {"lock": "elsewhere"}


# ----------------------------------------------------------------------------- runs and programs of their own


def companion(patient: Patient, settings: list[str], world: int | None = None) -> Patient:
    """Another run, started while the patient goes on; nothing undisturbed is like it."""
    name = f"{patient.name}-{len(patient.lab.patients)}"
    other = Patient(patient.lab, name, world or patient.world, patient.draw, None, settings)
    return other


def bury(patient: Patient) -> None:
    patient.end()
    shutil.rmtree(patient.run, ignore_errors=True)
    shutil.rmtree(patient.scratch, ignore_errors=True)


def to_its_end(other: Patient) -> None:
    if code := other.wait():
        raise Lost(f"exit code {code}: {other.words()}")
    other.gone()
    other.tidy()


@kind("weights that are not finite", aside=True)
def not_finite(patient: Patient) -> Evidence:
    """What makes the numbers overflow is in its configuration."""
    draw = patient.draw
    rate = f"{10 ** draw.uniform(25, 36):.3g}"
    settings = [f"optimizer.lr={rate}", f"optimizer.head_lr={rate}", "optimizer.warmup=0", f"seed={draw.randrange(99)}"]
    settings += [f"schedule.batch_size={draw.choice([2, 4, 8])}", f"surgery.method={draw.choice(METHODS)}"]
    other = companion(patient, settings)
    other.start()
    code, words = other.wait(), other.words()
    if code != 2 or "not finite" not in words or "lower optimizer.lr" not in words:
        raise Lost(f"exit code {code}: {words}")
    other.gone()
    bury(other)
    return {"settings": settings}


METHODS = ("sum", "pcgrad", "cagrad", "imtl_g")


@kind("NaN in one rank's activations", aside=True)
def poisoned(patient: Patient) -> Evidence:
    """All ranks leave that step out, and nothing else. What comes of it is no undisturbed run's."""
    other = companion(patient, [])
    other.variables = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "hook"), str(ROOT)])}
    other.start()
    to_training(other)
    evidence = other.deliver(signal.SIGUSR1, [other.some_rank()])
    to_its_end(other)
    skipped = re.findall(r"step (\d+): skipped on all ranks", other.words())
    if not skipped:
        raise NotInjected("no step was left out")
    final = last_checkpoint(other)
    if len(skipped) > 1 or {*final.manifest.adam_steps} != {final.step - 1}:
        raise Lost(f"steps {', '.join(skipped)} were left out; AdamW did {final.manifest.adam_steps}")
    if not all(tensor.isfinite().all() for tensor in weights(final).values()):
        raise Lost("weights are not finite")
    bury(other)
    return {**evidence, "step left out": int(skipped[0])}


@kind("continued on another number of ranks", aside=True)
def moved(patient: Patient) -> Evidence:
    """Without dropout, which draws by rank, the weights are those of any other number of ranks up to rounding."""
    settings = ["encoder.dropout=0", *(f"tasks.{task}.head.dropout=0" for task in ("sst", "para", "sts"))]
    settings += ["optimizer.lr=1e-4", "optimizer.head_lr=1e-4", "optimizer.eps=1e-4"]  # eps: see test_engine.py
    worlds = patient.draw.sample([1, 2, 3], 3)
    other = companion(patient, settings, worlds[0])
    other.start()
    stops = []
    for world in worlds[1:]:
        to_training(other)
        other.stop()
        stops.append(last_checkpoint(other).step)
        other.world = world
        other.start()
    to_its_end(other)
    if not (wanted := patient.lab.still):
        still = companion(patient, settings, 1)
        still.start()
        to_its_end(still)
        wanted |= weights(last_checkpoint(still))
        bury(still)
    mine = weights(last_checkpoint(other))
    worst = max(float((mine[name] - wanted[name]).abs().max()) for name in wanted)
    if not worst < TOLERANCE:
        raise Lost(f"on {worlds} ranks in turn, weights differ by {worst:g} from those of a run on one")
    bury(other)
    return {"ranks": worlds, "stopped after": stops, "difference": worst}


def last_checkpoint(patient: Patient) -> Checkpoint:
    found = patient.checkpoints()
    if not found:
        raise Lost("it ended without a checkpoint")
    return found[max(found)]


def weights(checkpoint: Checkpoint) -> dict[str, Any]:
    import torch

    from mtbert.checkpoint import load_weights

    shapes = {name: torch.Size(shape) for name, shape in checkpoint.manifest.shapes.items()}
    return {**load_weights(checkpoint, shapes)}


@kind("kill -9 of an export", aside=True)
def kill_an_export(patient: Patient) -> Evidence:
    """Of the undisturbed run. The next one is whole, and clears up."""
    reference, place = patient.reference, patient.lab.disk / "exports"
    assert reference
    if not reference.exported:
        began = time.monotonic()
        to_its_own_end(export(reference.run, place / "whole"), "an export")
        reference.lasts["export"] = time.monotonic() - began
        reference.exported = contents(place / "whole")
        shutil.rmtree(place)
    killed = export(reference.run, place / "killed")
    patient.until("an export", lambda: killed.poll() is not None or [*place.glob(".exporting-*")], nap_s=0.0005)
    time.sleep(patient.draw.uniform(0, 0.03))
    killed.kill()
    left = [path.name for path in place.glob(".exporting-*")]
    if killed.wait() != -signal.SIGKILL or not left:
        shutil.rmtree(place, ignore_errors=True)
        raise NotInjected("the export was over")
    if (place / "killed").exists():
        raise Lost("half an export has the name of a whole one")
    to_its_own_end(export(reference.run, place / "killed"), "an export after one that was killed")
    if contents(place / "killed") != reference.exported:
        raise Lost("the export after one that was killed is not that of the undisturbed run")
    if still := [*place.glob(".exporting-*")]:
        raise Lost(f"left: {', '.join(map(str, still))}")
    shutil.rmtree(place)
    return {"pids": [killed.pid], "left": left}


def export(run: Path, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mtbert", "export", str(run), str(target), "--checkpoint", "latest"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables)


def to_its_own_end(program: subprocess.Popen[bytes], what: str) -> None:
    said = program.communicate()[0].decode(errors="replace")
    if program.returncode:
        raise Lost(f"{what} ended with {program.returncode}: {said}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
