"""Faults into real jobs, drawn from a seed, and what comes out held against jobs that were left alone.

    python tests/faults/soak.py [--faults 500] [--seed 0] [--kinds WORD ...] [--json FILE]

A *patient* is a run of `STEPS` steps on 1 or 2 ranks, started by `launch/submit.py --local`. A fault strikes it at a
moment drawn from the seed; the job goes on, or ends and is continued as its last words say. After every fault:

- every checkpoint on disk has, file by file, the checksums it has in a run that was left alone;
- a job that ended named the cause and how to go on; all of its processes are gone, nobody holds the run folder;
- it did not wait for anything longer than `PATIENCE_S`;

and when a patient has ended: its result is that of the undisturbed run, its metrics have every step once, no temporary
file is left and none of its processes ever listened off the loopback.

Some kinds need root (a file system of their own) or strace (errors of system calls); those that cannot be had here are
named and left out. Time is counted in naps of the harness, so that a machine that stands still is no fault.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from mtbert.manifest import folders, survey  # noqa: E402

STEPS, SAVE_EVERY, EVALUATE_EVERY = 240, 10, 80
PATIENCE_S = 120.0
NAP_S = 0.05
PAUSE_S = 30.0
"""For which a rank is stopped; the quick tests take less."""

TINY: dict[str, Any] = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "data": {"generate": {"train": 60, "dev": 20}, "cache": "cache"},
    "encoder": {"shape": {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8}},
    "schedule": {"batch_size": 4},
    "engine": {"threads": 1, "precision": "fp32"},
    "checkpoint": {"every_steps": SAVE_EVERY, "keep": 3},
}
"""Dropout stays on."""


class Lost(Exception):
    """What must hold does not: the fault won."""


def until(what: str, true: Callable[[], Any], patience_s: float = PATIENCE_S, nap_s: float = NAP_S) -> Any:
    """What `true` answers when that is no longer false."""
    for _ in range(int(patience_s / nap_s)):
        if answer := true():
            return answer
        time.sleep(nap_s)
    raise Lost(f"{what}: waited for {patience_s:g} s")


# --------------------------------------------------------------------------------------------------- a job


@dataclass
class Patient:
    place: Path  # with tiny.yaml in it
    name: str
    world: int
    draw: random.Random
    prefix: list[str] = field(default_factory=list)  # of the command that starts it next
    settings: list[str] = field(default_factory=list)
    metrics_harmed: bool = False
    job: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> Path:
        return self.place / "runs" / self.name

    @property
    def said(self) -> Path:
        """What the job printed; not in the place, whose disk may be full."""
        return self.place.with_name(f"{self.place.name}.{self.name}.out")

    def start(self) -> None:
        """The first time, or again as `--resume`."""
        begun = (self.run / "config.yaml").exists()
        what = ["--resume", self.run] if begun else ["--config", "tiny.yaml", "--set", f"run.name={self.name}"]
        submit = [*self.prefix, sys.executable, ROOT / "launch" / "submit.py", "--local", "--nodes", str(self.world)]
        with self.said.open("wb") as out:
            self.job = subprocess.Popen(
                [*submit, *what, *([] if begun else self.settings)],
                cwd=self.place,
                stdout=out,
                stderr=out,
                env={**os.environ, "SOAK": str(self.run), "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        self.prefix = []

    def processes(self) -> list[int]:
        """Everything that was started for this run and lives."""
        mark = f"SOAK={self.run}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have said where they are."""
        found = {}
        for path in (self.run / "job").glob("*.rank*"):
            with suppress(OSError, ValueError, IndexError):
                rank, pid = int(path.name.rsplit("rank", 1)[1]), int(path.read_text().split()[1])
                if Path(f"/proc/{pid}/environ").read_bytes():
                    found[rank] = pid
        return found

    def some_rank(self) -> list[int]:
        """One process id; none if the job has ended."""
        ranks = self.ready()
        return [ranks[self.draw.choice(sorted(ranks))]] if ranks else []

    def ready(self) -> dict[int, int]:
        """Process ids of all ranks, once they are there; none if the job has ended."""
        until("ranks", lambda: self.ended or len(self.ranks()) == self.world)
        return {} if self.ended else self.ranks()

    def step(self) -> int:
        """The last one in the metrics, -1 before the first."""
        with suppress(OSError, ValueError, KeyError):
            whole = (self.run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
            return int(json.loads(whole.rpartition(b"\n")[2])["step"])
        return -1

    @property
    def ended(self) -> bool:
        assert self.job
        return self.job.poll() is not None

    def training(self) -> int:
        """The step at which it is found training; or that it has ended."""
        before = self.step()
        until("a step", lambda: self.ended or self.step() > before)
        return self.step()

    def checkpoints(self) -> dict[int, dict[str, str]]:
        """Step and checksums of the intact ones. What is removed while it is read is none."""
        while True:
            with suppress(OSError):
                return {
                    state.checkpoint.step: {name: file.sha256 for name, file in state.checkpoint.manifest.files.items()}
                    for state in survey(self.run, thorough=True)
                    if state.checkpoint
                }

    def wait(self) -> int:
        """The exit code."""
        assert self.job
        until("the end of the job", lambda: self.ended)
        return int(self.job.returncode)

    def end(self) -> None:
        """Whatever is left of it."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.job:
            self.job.wait()

    def moment(self, longest_s: float = 1.0) -> None:
        """Training, and then some."""
        self.ready()
        self.training()
        time.sleep(self.draw.uniform(0, longest_s))

    def own(self, signal_number: int, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)


# ------------------------------------------------------------------------------------------------ the faults


@dataclass(frozen=True)
class Kind:
    name: str
    strike: Callable[[Patient], None]
    codes: tuple[int, ...]  # with which the job may end; it may also go on
    needs: str = ""  # root, strace, faketime
    ends: bool = False  # the job does not go on by itself
    gives_up: bool = False  # the job need not go on afterwards


KINDS: dict[str, Kind] = {}


def kind(name: str, *codes: int, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(strike: Callable[..., None]) -> Callable[..., None]:
        KINDS[name] = Kind(name, strike, codes, **options)
        return strike

    return register


def at_start(patient: Patient) -> None:
    """Any time up to the first step: imports, rendezvous, data, model, loading."""
    patient.ready()
    time.sleep(patient.draw.uniform(0, 3))


def at_caching(patient: Patient) -> None:
    """The job found no cache; kill it as it writes one."""
    cache = patient.place / "cache"
    until("a cache in the making", lambda: patient.ended or [*cache.glob("*.tmp")], nap_s=0.001)


def at_save(patient: Patient) -> None:
    patient.ready()
    saves = patient.run / "checkpoints"
    until("a save", lambda: patient.ended or [*saves.glob(".step-*.tmp")], nap_s=0.0005)


def at_evaluation(patient: Patient) -> None:
    patient.ready()
    until("an evaluation", lambda: patient.ended or (patient.step() + 1) % EVALUATE_EVERY == 0, nap_s=0.002)
    time.sleep(patient.draw.uniform(0, 0.3))


PHASES = {
    "starting": at_start,
    "training": Patient.moment,
    "saving": at_save,
    "evaluating": at_evaluation,
}


def kill_a_rank(patient: Patient, wait: Callable[[Patient], None]) -> None:
    wait(patient)
    patient.own(signal.SIGKILL, patient.some_rank())


def kill_all(patient: Patient, wait: Callable[[Patient], None]) -> None:
    wait(patient)
    patient.own(signal.SIGKILL, patient.processes())


for phase, waits in PHASES.items():
    kind(f"kill -9 of a rank, {phase}", 1, ends=True)(functools.partial(kill_a_rank, wait=waits))
    kind(f"kill -9 of everything, {phase}", -9, ends=True)(functools.partial(kill_all, wait=waits))


@kind("kill -9 of everything, caching data", -9, ends=True)
def kill_at_caching(patient: Patient) -> None:
    restart(patient, lambda: shutil.rmtree(patient.place / "cache"))
    kill_all(patient, at_caching)


@kind("SIGTERM to a rank", 130, ends=True)
def terminate_a_rank(patient: Patient) -> None:
    patient.moment()
    patient.own(signal.SIGTERM, patient.some_rank())


@kind("SIGTERM to a rank, starting", 130, 1, ends=True)
def terminate_early(patient: Patient) -> None:
    at_start(patient)
    patient.own(signal.SIGTERM, patient.some_rank())


@kind("Ctrl-C", 130, ends=True)
def interrupt(patient: Patient) -> None:
    patient.moment()
    assert patient.job
    patient.own(signal.SIGINT, [patient.job.pid])


@kind("Ctrl-C twice", 130, ends=True)
def interrupt_twice(patient: Patient) -> None:
    interrupt(patient)
    time.sleep(patient.draw.uniform(0.1, 0.5))
    assert patient.job
    patient.own(signal.SIGINT, [patient.job.pid])


@kind("kill -9 of the submitter, then cancel", -9, ends=True)
def kill_the_submitter(patient: Patient) -> None:
    patient.moment()
    assert patient.job
    patient.own(signal.SIGKILL, [patient.job.pid])
    subprocess.run(
        [sys.executable, ROOT / "launch" / "submit.py", "cancel", patient.run],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@kind("a rank stopped and continued")
def pause(patient: Patient) -> None:
    patient.moment()
    rank = patient.some_rank()
    patient.own(signal.SIGSTOP, rank)
    time.sleep(PAUSE_S)
    patient.own(signal.SIGCONT, rank)


@contextmanager
def limited(pids: list[int], what: int, value: Callable[[int], int]) -> Iterator[None]:
    before = []
    for pid in pids:
        with suppress(ProcessLookupError):
            old = resource.prlimit(pid, what)
            resource.prlimit(pid, what, (value(pid), old[1]))
            before.append((pid, old))
    yield
    for pid, old in before:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, what, old)


def under_limit(what: int, value: Callable[[int], int]) -> Callable[[Patient], None]:
    def strike(patient: Patient) -> None:
        patient.moment()
        with limited(patient.some_rank(), what, value):
            time.sleep(patient.draw.uniform(0.2, 1.5))

    return strike


def size_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    return 2**30


kind("no file may grow (EFBIG)", 2)(under_limit(resource.RLIMIT_FSIZE, lambda _: 1))
kind("no file may be opened (EMFILE)", 1, 2)(under_limit(resource.RLIMIT_NOFILE, lambda _: 3))
kind("no more memory for a rank", 1)(under_limit(resource.RLIMIT_AS, size_of))


@kind("no more memory for a rank, starting", 1)
def starve(patient: Patient) -> None:
    restart(patient)
    at_start(patient)
    with limited(patient.some_rank(), resource.RLIMIT_AS, size_of):
        patient.wait()


@kind("disk full (ENOSPC)", 2, needs="root")
def fill_the_disk(patient: Patient) -> None:
    patient.moment()
    ballast = patient.place / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        time.sleep(patient.draw.uniform(0.5, 2))
    finally:
        ballast.unlink()


def failing(calls: str, how: str) -> Callable[[Patient], None]:
    """System calls of one rank that concern the run folder's files fail, or take their time."""

    def strike(patient: Patient) -> None:
        patient.moment()
        at = patient.step()
        target = [patient.run / "metrics.jsonl", patient.run / "checkpoints"]
        for step in range(at, at + 6 * SAVE_EVERY):
            if (step + 1) % SAVE_EVERY == 0:
                folder = patient.run / "checkpoints" / f".step-{step + 1:08d}.tmp"
                shards = [folder / f"rank-{rank}-of-{patient.world}.safetensors" for rank in range(patient.world)]
                target += [folder, *shards]
        paths = itertools.chain.from_iterable(("-P", path) for path in target)
        processes = [f"--attach={pid}" for pid in patient.some_rank()]
        if not processes:
            return
        what = [*processes, *paths, "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", *what], stderr=subprocess.DEVNULL)
        time.sleep(patient.draw.uniform(0.5, 2))
        tracer.terminate()
        tracer.wait()

    return strike


kind("writing fails (EIO)", 1, 2, needs="strace")(failing("write,pwrite64,ftruncate", "error=EIO"))
kind("fsync fails (EIO)", 1, 2, needs="strace")(failing("fsync", "error=EIO"))
kind("over quota (EDQUOT)", 2, needs="strace")(failing("write,pwrite64,ftruncate", "error=EDQUOT"))
kind("slow shared folder", needs="strace")(failing("write,fsync,openat,rename", "delay_enter=200000"))


@kind("shared folder away for a while", 1, 2)
def vanish(patient: Patient) -> None:
    patient.moment()
    away = patient.run.with_name(f"{patient.name}.away")
    patient.run.rename(away)
    time.sleep(patient.draw.uniform(0.2, 3))
    if patient.run.exists():  # something was written into the void
        for left in [*patient.run.rglob("*")]:
            print(f"    written meanwhile: {left}", flush=True)
        shutil.rmtree(patient.run)
    away.rename(patient.run)


@kind("/dev/shm full", needs="root")
def no_shared_memory(patient: Patient) -> None:
    mount = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero >/dev/shm/full; exec "$@"'
    restart(patient, prefix=["unshare", "--mount", "sh", "-c", mount, "sh"])
    patient.moment()


@kind("clock three days back", needs="faketime")
def clock_back(patient: Patient) -> None:
    restart(patient, prefix=["faketime", "-m", "-f", "-3d"])
    patient.moment()


# ------------------------------------------------------------------------- damage to what lies on the disk


def restart(patient: Patient, meanwhile: Callable[[], Any] = lambda: None, prefix: list[str] | None = None) -> None:
    """Asks the job to save and stop, and starts it again."""
    if not patient.ended:
        patient.ready()
        patient.training()
        patient.own(signal.SIGTERM, [*patient.ranks().values()][:1])
        patient.wait()
    meanwhile()
    patient.prefix = prefix or []
    patient.start()


def truncated(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


def replaced(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


def of_checkpoint(patient: Patient) -> list[Path]:
    return [*folders(patient.run)[0].iterdir()]


def of_cache(patient: Patient) -> list[Path]:
    return [path for path in (patient.place / "cache").rglob("*") if path.is_file() and path.stat().st_size]


def of_encoder(patient: Patient) -> list[Path]:
    return [*(patient.run / "encoder").iterdir()]


def of_records(patient: Patient) -> list[Path]:
    return [patient.run / "metrics.jsonl", *(patient.run / "predictions").glob("*"), *patient.run.glob("events*")]


def damage(files: Callable[[Patient], list[Path]], how: Callable[[Path, random.Random], None]) -> Callable[..., None]:
    def strike(patient: Patient) -> None:
        kept: dict[Path, bytes] = {}

        def harm() -> None:
            path = patient.draw.choice(sorted(files(patient)))
            kept[path] = path.read_bytes()
            patient.metrics_harmed |= path.name == "metrics.jsonl"
            how(path, patient.draw)

        restart(patient, harm)
        patient.ready()
        patient.training()
        if patient.ended and patient.job and patient.job.returncode == 2:  # it names the file: put it back
            [(path, content)] = kept.items()
            words = patient.said.read_text(errors="replace")
            if path.name not in words and path.parent.name not in words:
                raise Lost(f"{path} is damaged, and the job says: {words}")
            path.write_bytes(content)

    return strike


for files, where in {of_checkpoint: "newest checkpoint", of_cache: "token cache", of_encoder: "tokenizer and shape",
                     of_records: "metrics and predictions"}.items():  # fmt: skip
    for how in (truncated, flipped, missing, replaced):
        kind(f"a file of the {where} {how.__name__}", 2)(damage(files, how))


@kind("a lock left by another host, and files dated a day ahead")
def left_lock(patient: Patient) -> None:
    def harm() -> None:
        lock = {"attempt": "other-0", "host": "elsewhere", "pid": 1, "slurm_job": None}
        (patient.run / "job" / "lock").write_text(json.dumps(lock))
        for path in patient.run.rglob("*"):
            ahead = time.time() + 86400 if path.name != "lock" else time.time() - 600
            os.utime(path, (ahead, ahead))

    restart(patient, harm)
    patient.moment()


@kind("weights that are not finite", 2, gives_up=True)
def not_finite(patient: Patient) -> None:
    """A run of its own: what made the numbers overflow is in its configuration."""
    patient.end()
    other = Patient(patient.place, f"{patient.name}-nan", patient.world, patient.draw)
    other.settings = ["optimizer.lr=1e30", "optimizer.head_lr=1e30", "optimizer.warmup=0"]
    other.start()
    code, words = other.wait(), other.said.read_text()
    if code != 2 or "not finite" not in words or "lower optimizer.lr" not in words:
        raise Lost(f"exit code {code}: {words}")
    gone(other)


@kind("kill -9 of an export")
def kill_an_export(patient: Patient) -> None:
    patient.moment()
    until("a checkpoint", lambda: folders(patient.run))
    target = patient.place / f"{patient.name}.exported"
    command = [sys.executable, "-m", "mtbert", "export", str(patient.run), str(target), "--checkpoint", "latest"]
    before = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    export = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=before)
    aside = target.with_name(f".{target.name}.tmp")
    until("an export", lambda: export.poll() is not None or aside.exists(), nap_s=0.001)
    time.sleep(patient.draw.uniform(0, 0.02))
    export.kill()
    export.wait()
    if target.exists() and not (target / "README.md").exists():
        raise Lost("half an export has the name of a whole one")
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True)
class Undisturbed:
    checkpoints: dict[int, dict[str, str]]  # of every step
    result: str
    seconds: float


def undisturbed(place: Path, world: int) -> Undisturbed:
    """A run that saves after every step, and keeps all."""
    patient = Patient(place, f"undisturbed-{world}", world, random.Random(0))
    patient.settings = ["checkpoint.every_steps=1", f"checkpoint.keep={STEPS}"]
    before = time.monotonic()
    patient.start()
    patient.ready()
    patient.training()
    if heard := {address for pid in patient.processes() for address in listening(pid)}:
        raise Lost(f"it listens off the loopback: {heard}")
    if code := patient.wait():
        raise Lost(f"exit code {code}: {patient.said.read_text()}")
    gone(patient)
    answer = Undisturbed(patient.checkpoints(), (patient.run / "result.json").read_text(), time.monotonic() - before)
    shutil.rmtree(patient.run)
    return answer


def listening(pid: int) -> list[str]:
    """Addresses off the loopback that a process listens on."""
    inodes = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table, local in (("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes and words[1].split(":")[0] != local:
                found.append(words[1])
    return found


def gone(patient: Patient) -> None:
    """Every process of a job that has ended is gone, and the run folder is nobody's."""
    until(f"the end of processes {patient.processes()}", lambda: not patient.processes(), patience_s=20)


def same(patient: Patient, reference: Undisturbed) -> None:
    for step, files in patient.checkpoints().items():
        if files != reference.checkpoints[step]:
            raise Lost(f"the checkpoint after step {step} is not that of the undisturbed run")


def judge(patient: Patient, fault: Kind, reference: Undisturbed) -> bool:
    """Lets the job go on after a fault until it has saved anew; whether the run has come to its end."""
    assert patient.job
    if fault.ends:
        patient.wait()
    for _ in range(3):
        newest = max(patient.checkpoints(), default=-1)
        until("a save or an end", lambda: patient.ended or max(patient.checkpoints(), default=-1) > newest)  # noqa: B023
        if not patient.ended:
            same(patient, reference)
            return False
        gone(patient)
        code, words = patient.job.returncode, patient.said.read_text(errors="replace")
        if code == 0:
            return True
        if code not in fault.codes:
            raise Lost(f"exit code {code}: {words}")
        if code > 0 and "--resume" not in words and code != 2:
            raise Lost(f"exit code {code} without a word on how to go on: {words}")
        if code > 0 and not words.strip():
            raise Lost(f"exit code {code} without a word")
        same(patient, reference)
        patient.start()
    raise Lost(f"it does not go on: {patient.said.read_text(errors='replace')}")


def conclude(patient: Patient, reference: Undisturbed) -> None:
    """Of a run that has come to its end."""
    same(patient, reference)
    if STEPS not in patient.checkpoints():
        raise Lost("it ended without its last checkpoint")
    if (patient.run / "result.json").read_text() != reference.result:
        raise Lost("its result is not that of the undisturbed run")
    steps = [json.loads(line) for line in (patient.run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in steps if "speed/examples_per_second" in line]
    if logged != (sorted(set(logged)) if patient.metrics_harmed else list(range(STEPS))):
        raise Lost(f"its metrics have the steps {logged}")
    left = [path for path in patient.run.rglob(".*") if "code" not in path.parts]
    records = (".json", ".pkl", ".out", ".err", ".log", ".sh")
    left += [path for path in (patient.run / "job").iterdir() if path.suffix not in records]
    left += (patient.place / "cache").glob("*.tmp")
    if left:
        raise Lost(f"left: {', '.join(map(str, left))}")


# ------------------------------------------------------------------------------------------------- the soak


def have(needs: str) -> bool:
    return os.geteuid() == 0 if needs == "root" else shutil.which(needs) is not None


@contextmanager
def lab() -> Iterator[Path]:
    """A folder; as root a small file system of its own, that can be filled."""
    place = Path(tempfile.mkdtemp(prefix="mtbert-soak-"))
    mounted = have("root") and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", place]).returncode
    tiny = {**TINY, "phases": [{"steps": STEPS}], "run": {"log_every": 1, "evaluate_every": EVALUATE_EVERY}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", place], check=True)
        shutil.rmtree(place)
        for said in place.parent.glob(f"{place.name}.*.out"):
            said.unlink()


def soak(faults: int, seed: int, names: list[str], worlds: list[int], tell: Callable[[str], None]) -> dict[str, Any]:
    """Counts by kind. A patient that a fault got the better of is kept in the answer, and a new one takes its place."""
    draw = random.Random(seed)
    counts: dict[str, list[int]] = {name: [0, 0] for name in names}
    lost, began, usage = [], time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # every kind as often as any other, in an order of its own each round
    order = itertools.chain.from_iterable(draw.sample(names, len(names)) for _ in itertools.count())
    with lab() as place:
        references = {world: undisturbed(place, world) for world in worlds}
        tell(f"undisturbed: {', '.join(f'{world} rank(s) {r.seconds:.0f} s' for world, r in references.items())}")
        patient: Patient | None = None
        number = itertools.count()
        fault = KINDS[names[0]]
        for at in range(faults):
            before, fault = fault, KINDS[next(order)]
            try:
                if patient is not None and patient.ended and judge(patient, before, references[patient.world]):
                    conclude(patient, references[patient.world])
                    patient = buried(patient)
                if patient is None:
                    patient = Patient(place, f"patient-{next(number)}", draw.choice(worlds), draw)
                    patient.start()
                reference, since = references[patient.world], time.monotonic()
                fault.strike(patient)
                over = fault.gives_up or judge(patient, fault, reference)
                counts[fault.name][0] += 1
                tell(f"{at + 1} {fault.name}: {patient.name} × {patient.world}, {time.monotonic() - since:.0f} s")
                if over:
                    if not fault.gives_up:
                        conclude(patient, reference)
                    patient = buried(patient)
            except Lost as error:
                assert patient
                counts[fault.name][1] += 1
                lost.append({"number": at + 1, "kind": fault.name, "what": str(error)})
                tell(f"{at + 1} {fault.name}: LOST: {error}")
                patient = buried(patient)
        if patient is not None:
            buried(patient)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seed": seed,
        "kinds": {name: {"survived": survived, "lost": lost_} for name, (survived, lost_) in counts.items()},
        "faults": sum(map(sum, counts.values())),
        "lost": lost,
        "hours": round((time.monotonic() - began) / 3600, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime),
        "not_here": [name for name, each in KINDS.items() if each.needs and not have(each.needs)],
    }


def buried(patient: Patient) -> None:
    patient.end()
    shutil.rmtree(patient.run, ignore_errors=True)


def table(answer: dict[str, Any]) -> str:
    """For docs/reliability.md."""
    rows = [f"| {name} | {count['survived']} | {count['lost']} |" for name, count in answer["kinds"].items()]
    total = collections.Counter[str]()
    for count in answer["kinds"].values():
        total.update(count)
    head = ["| fault | survived | lost |", "|---|---|---|"]
    return "\n".join([*head, *rows, f"| **all** | **{total['survived']}** | **{total['lost']}** |"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults into real jobs, and what comes of them.")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=[""], metavar="WORD", help="only kinds with one of these in them")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], metavar="W")
    parser.add_argument("--json", type=Path, default=Path("soak.json"), metavar="FILE", help="what came out")
    parser.add_argument("--table", action="store_true", help="print that of FILE for the docs, and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.json.read_text())))
        return 0
    here = [name for name, each in KINDS.items() if not each.needs or have(each.needs)]
    names = [name for name in here if any(word in name for word in args.kinds)]
    answer = soak(args.faults, args.seed, names, args.worlds, lambda text: print(text, flush=True))
    args.json.write_text(json.dumps(answer, indent=1) + "\n")
    print(table(answer))
    each = answer["cpu_seconds"] / max(answer["faults"], 1)
    print(f"{answer['hours']} h, {each:.1f} CPU seconds a fault; in {args.json}")
    if answer["not_here"]:
        print(f"not to be had here: {', '.join(answer['not_here'])}")
    return int(bool(answer["lost"]))


if __name__ == "__main__":
    sys.exit(main())
