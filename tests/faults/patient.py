"""A *patient*: a run of `STEPS` steps on a few ranks, started by `launch/submit.py --local`, and watched from outside.

What must hold is `Lost` where it does not. Time is counted in what this process saw of it, so that a machine that
stands still is no fault.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from mtbert.config_files import load_config  # noqa: E402
from mtbert.files import alive  # noqa: E402
from mtbert.manifest import Checkpoint, prune, survey  # noqa: E402
from mtbert.stops import STOPPED  # noqa: E402

STEPS, SAVE_EVERY, EVALUATE_EVERY = 240, 10, 80
PATIENCE_S = 300.0
NAP_S = 0.05
LONGEST_NAP_S = 1.0
"""What counts of a nap: in a longer one this process stood still, and the patient with it."""
LISTEN_EVERY_S = 0.02

TINY: dict[str, Any] = {
    "base": str(ROOT / "configs" / "quickstart.yaml"),
    "data": {"generate": {"train": 60, "dev": 20}, "cache": "cache"},
    "encoder": {"shape": {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8}, "dropout": 0.1},
    "tasks": {task: {"head": {"dropout": 0.1}} for task in ("sst", "para", "sts")},
    "schedule": {"batch_size": 4},
    "engine": {"threads": 1, "precision": "fp32"},
    "checkpoint": {"every_steps": SAVE_EVERY, "keep": 3},
}


class Lost(Exception):
    """What must hold does not: the fault won."""


class NotInjected(Exception):
    """The fault came to nothing, so that nothing was survived.

    Args:
        touched: whether something was done to the patient all the same, so that it may end as after the fault.
    """

    def __init__(self, why: str, touched: bool = False) -> None:
        super().__init__(why)
        self.touched = touched


@dataclass
class Lab:
    root: Path  # what jobs print, and their folders for temporary files
    disk: Path  # where they work, with tiny.yaml; as root a small file system of its own
    patients: list[Patient] = field(default_factory=list)  # everyone who was ever started here
    left: set[Path] = field(default_factory=set)  # folders in the making that a kill left, and that stay for an hour
    still: dict[str, Any] = field(default_factory=dict)  # weights of a run without dropout on one rank

    @property
    def cache(self) -> Path:
        """Of data; all patients share it."""
        return self.disk / "cache"

    @property
    def fills(self) -> bool:
        """Whether the disk is its own, so that nothing else gets full with it."""
        return os.path.ismount(self.disk)


@contextmanager
def lab() -> Iterator[Lab]:
    """Nobody who was started in it lives on after it."""
    root = Path(tempfile.mkdtemp(prefix="mtbert-soak-"))
    place = Lab(root, root / "disk")
    place.disk.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", place.disk], check=False)
    try:
        tiny = {**TINY, "phases": [{"steps": STEPS}], "run": {"log_every": 1, "evaluate_every": EVALUATE_EVERY}}
        (place.disk / "tiny.yaml").write_text(yaml.safe_dump(tiny))
        config = load_config(place.disk / "tiny.yaml")
        # without it, random numbers that a resumed run draws anew would be no matter
        assert config.encoder.dropout and all(task.head.dropout for task in config.tasks.values())
        yield place
    finally:
        for patient in place.patients:
            patient.end()
        if place.fills:
            subprocess.run(["umount", "--lazy", place.disk], check=True)
        shutil.rmtree(root, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- a run


@dataclass
class Patient:
    lab: Lab
    name: str
    world: int
    draw: random.Random
    reference: Undisturbed | None = None
    settings: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    job: subprocess.Popen[bytes] | None = None
    waited_s: float = 0.0  # as this process saw it
    # what faults have done to it, and what follows from that
    damaged: dict[Path, tuple[bytes, bytes | None]] = field(default_factory=dict)  # as they were, and after the damage
    worn: set[str] = field(default_factory=set)  # checkpoints that were damaged
    named: str = ""  # what its last words must match if it ends of the damage
    true_from: int = 0  # step from which on its metrics were left alone
    saves_failed: bool = False
    _heard: dict[Path, int] = field(default_factory=dict)
    _others: set[str] = field(default_factory=set)
    _listened: float = 0.0
    _told: int = 0  # when `launch.json` was written last before this start
    _pids: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lab.patients.append(self)
        self.scratch.mkdir()

    @property
    def run(self) -> Path:
        return self.lab.disk / "runs" / self.name

    @property
    def said(self) -> Path:
        """What the job printed; not on its disk, which may be full."""
        return self.lab.root / f"{self.name}.out"

    @property
    def scratch(self) -> Path:
        """Its TMPDIR."""
        return self.lab.root / f"{self.name}.tmp"

    def start(self, prefix: Iterable[str] = ()) -> None:
        """The first time, or again as `--resume`."""
        begun = self.job is not None
        what = ["--resume", self.run] if begun else ["--config", "tiny.yaml", "--set", f"run.name={self.name}"]
        submit = [*prefix, sys.executable, ROOT / "launch" / "submit.py", "--local", "--nodes", str(self.world)]
        self.mark()
        self._told = _changed(self.run / "launch.json")
        with self.said.open("ab") as out:
            self.job = subprocess.Popen(
                [*submit, *what, *([] if begun else self.settings)],
                cwd=self.lab.disk,
                stdout=out,
                stderr=out,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    **self.variables,
                    "SOAK": str(self.run),
                    "TMPDIR": str(self.scratch),
                },
                start_new_session=True,
            )

    # ------------------------------------------------------------------------------------- its processes

    def processes(self) -> list[int]:
        """Everything that was started for this run and lives."""
        found = _with_variable(f"SOAK={self.run}\0")
        self._pids.update(found)
        return found

    def submitter(self) -> int:
        """The process that a Ctrl-C is for: not a wrapper that started it."""
        assert self.job
        for pid in self.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"python" in Path(os.fsdecode(words[0])).name.encode() and words[1].endswith(b"submit.py"):
                    return pid
        return self.job.pid

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have said where they are."""
        found = {}
        for path in (self.run / "job").glob("*.rank*"):
            with suppress(OSError, ValueError, IndexError):
                rank, pid = int(path.name.rsplit("rank", 1)[1]), int(path.read_text().split()[1])
                if f"SOAK={self.run}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found[rank] = pid
        return found

    def ready(self) -> dict[int, int]:
        """Process ids of all ranks, once they are there."""
        self.until("ranks", lambda: self.ended or len(self.ranks()) == self.world)
        if self.ended:
            raise NotInjected("the job had ended")
        ranks = self.ranks()
        self._pids.update(ranks.values())
        return ranks

    def some_rank(self) -> int:
        ranks = self.ready()
        return ranks[self.draw.choice(sorted(ranks))]

    def deliver(self, number: int, pids: Iterable[int]) -> dict[str, Any]:
        """The signal, to whoever of them lives; the evidence."""
        hit = []
        for pid in pids:
            with suppress(ProcessLookupError):
                if alive(pid):
                    os.kill(pid, number)
                    hit.append(pid)
        if not hit:
            raise NotInjected("nobody was left to get the signal")
        return {"signal": signal.Signals(number).name, "pids": hit}

    def freeze(self, pids: Iterable[int]) -> None:
        """Until they stand still, so that what is found to be so stays so."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            self.until("a stopped process", lambda: state(pid) in "TtZX", nap_s=0.0005)  # noqa: B023

    def thaw(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @property
    def ended(self) -> bool:
        assert self.job
        return self.job.poll() is not None

    def wait(self) -> int:
        """The exit code."""
        assert self.job
        self.until("the end of the job", lambda: self.ended)
        return int(self.job.returncode)

    def gone(self) -> None:
        """Every process of a job that has ended is gone."""
        self.until("the end of its processes", lambda: not self.processes())

    def end(self) -> None:
        """Whatever is left of it."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.job:
                self.job.wait()
            time.sleep(NAP_S)

    def bury(self) -> None:
        self.end()
        for folder in (self.run, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)

    # -------------------------------------------------------------------------------------------- the clock

    def until(self, what: str, true: Callable[[], Any], nap_s: float = NAP_S) -> Any:
        """What `true` answers when that is no longer false. Looks who listens meanwhile."""
        seen, began = 0.0, time.monotonic()
        last = began
        while not (answer := true()):
            if seen > PATIENCE_S:
                raise Lost(f"{what}: waited for {seen:.0f} s, {last - began:.0f} s by the clock")
            self.listen()
            time.sleep(nap_s)
            now = time.monotonic()
            seen += min(now - last, LONGEST_NAP_S)
            self.waited_s += min(now - last, LONGEST_NAP_S)
            last = now
        return answer

    def listen(self) -> None:
        """No socket, of this or another patient, may be within reach of other machines."""
        if time.monotonic() < self._listened + LISTEN_EVERY_S:
            return
        self._listened = time.monotonic()
        if not (fresh := {inode: where for inode, where in _reachable() if inode not in self._others}):
            return
        for pid in _with_variable(f"SOAK={self.lab.disk}/"):
            with suppress(OSError):
                for entry in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        link = str(entry.readlink())
                        if link.startswith("socket:[") and (where := fresh.get(link[8:-1])):
                            raise Lost(f"it listens off the loopback: {where}")
        self._others.update(fresh)

    # -------------------------------------------------------------------------------------- where it stands

    def mark(self) -> None:
        """From here on counts what `words` gives."""
        paths = [self.said, *(self.run / "logs").glob("*")]
        self._heard = {path: path.stat().st_size for path in paths if path.exists()}

    def words(self, everything: bool = False) -> str:
        """What the job printed since `mark` or its start; `everything`: what its ranks wrote to their logs, too."""
        found = []
        for path in [self.said, *((self.run / "logs").glob("*") if everything else ())]:
            with suppress(OSError), path.open("rb") as file:
                file.seek(self._heard.get(path, 0))
                found.append(file.read().decode(errors="replace"))
        return "\n".join(found)

    def last(self) -> dict[str, Any]:
        """The last line of its metrics; empty before the first."""
        with suppress(OSError, ValueError), (self.run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            line: dict[str, Any] = json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])
            return line
        return {}

    def step(self) -> int:
        return int(self.last().get("step", -1))

    def trains(self) -> bool:
        """Whether it has done a step since it was started last."""
        return _changed(self.run / "launch.json") != self._told

    def training(self) -> None:
        """Until it is found training."""
        self.ready()
        self.until("a first step", lambda: self.ended or self.trains())
        before = self.step()
        self.until("a step", lambda: self.ended or self.step() != before)
        if self.ended:
            raise NotInjected("the job had ended")

    def saving(self) -> bool:
        return bool([*(self.run / "checkpoints").glob(".step-*.tmp")])

    def evaluating(self) -> bool:
        """The line of the losses is written before an evaluation, that of the scores after it."""
        line = self.last()
        return (
            self.trains() and bool(line) and (line["step"] + 1) % EVALUATE_EVERY == 0 and "metric/composite" not in line
        )

    # -------------------------------------------------------------------------------------- its checkpoints

    def checkpoints(self) -> dict[int, Checkpoint]:
        """The intact ones by step. One that is damaged, and not by us, is a loss."""

        def torn() -> set[str]:
            return {state.trouble for state in states if state.trouble and state.folder.name not in self.worn}

        states = survey(self.run, thorough=True)
        if first := torn():  # or it was removed while it was read
            time.sleep(0.2)
            states = survey(self.run, thorough=True)
            if again := first & torn():
                raise Lost(f"a checkpoint is not whole: {', '.join(again)}")
        return {state.checkpoint.step: state.checkpoint for state in states if state.checkpoint}

    def same(self) -> None:
        """Every checkpoint has, number by number, what it has in the undisturbed run."""
        assert self.reference
        for step, checkpoint in self.checkpoints().items():
            mine, wanted = facts(checkpoint), dict(self.reference.checkpoints[step])
            if self.saves_failed:  # the best may be one that could not be saved
                mine["best"] = wanted["best"] = None
            if differ := [key for key in wanted if mine.get(key) != wanted[key]]:
                raise Lost(f"the checkpoint after step {step} is not that of the undisturbed run: {', '.join(differ)}")

    def tidy(self) -> None:
        """A job that ended in order leaves nothing behind."""
        left = [path for path in self.run.rglob(".*") if "code" not in path.parts]
        records = (".json", ".pkl", ".out", ".err", ".log", ".sh")
        left += [path for path in (self.run / "job").iterdir() if path.suffix not in records]
        left += [*self.lab.cache.rglob("*.tmp"), *self.lab.cache.rglob(".making-*")]
        left += [path for path in self.scratch.iterdir() if not path.name.startswith("torchinductor_")]  # torch's cache
        # others have theirs in there, too
        left += [path for path in Path("/dev/shm").iterdir() if self._pids & {*map(int, re.findall(r"\d+", path.name))}]
        if left := [path for path in left if path not in self.lab.left]:
            raise Lost(f"left: {', '.join(map(str, left))}")

    def stop(self) -> None:
        """Asks one rank to save and stop."""
        self.training()
        self.deliver(signal.SIGTERM, [self.some_rank()])
        code = self.wait()
        self.gone()
        if code == 0:
            raise NotInjected("its end came first")
        if code != STOPPED:
            raise Lost(f"asked to stop, it ended with {code}: {self.words()}")
        self.tidy()

    def restart(self, meanwhile: Callable[[], Any] = lambda: None, prefix: Iterable[str] = ()) -> None:
        self.stop()
        meanwhile()
        self.start(prefix)

    def put_back(self) -> None:
        """What was damaged, unless the job has written it anew meanwhile, as it does its lock."""
        for path, (content, damaged) in self.damaged.items():
            if (path.read_bytes() if path.exists() else None) == damaged:
                path.write_bytes(content)
        self.damaged.clear()

    def conclude(self) -> None:
        """Of a run that has come to its end."""
        assert self.reference
        self.gone()
        self.same()
        if STEPS not in self.checkpoints():
            raise Lost("it ended without its last checkpoint")
        if (self.run / "result.json").read_text() != self.reference.result:
            raise Lost("its result is not that of the undisturbed run")
        mine, wanted = ([line for line in lines if line["step"] >= self.true_from]
                        for lines in (measured(self.run), self.reference.metrics))  # fmt: skip
        for number, (one, other) in enumerate(zip(mine, wanted, strict=False)):
            if differ := [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]:
                raise Lost(f"line {number} of its metrics, step {other['step']}, differs in {', '.join(differ)}")
        if len(mine) != len(wanted):
            raise Lost(f"its metrics have {len(mine)} lines instead of {len(wanted)}")
        self.tidy()


def _with_variable(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if text.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def state(pid: int) -> str:
    """As in /proc: R, S, D, T (stopped), Z; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


def cpu_s(pid: int) -> float:
    """What a process has used."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _reachable() -> Iterator[tuple[str, str]]:
    """Inodes and addresses of sockets of this machine that wait for others off the loopback, TCP and UDP."""
    for table, waiting in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        with suppress(OSError):  # no IPv6
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                address, _, port = words[1].partition(":")
                v4 = address.removeprefix("0000000000000000FFFF0000")
                loopback = v4.endswith("7F") if len(v4) == 8 else address == "0" * 24 + "01000000"
                if words[3] == waiting and port != "0000" and not loopback:
                    yield words[9], f"{table} {words[1]}"


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says, its files' checksums among it, without what depends on the clock."""
    found = checkpoint.manifest.model_dump(mode="json")
    del found["sha256"]
    if course := found["course"]:
        del course["counts"]["seconds"], course["counts"]["waited"]
    return found


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics, without what depends on the clock and on memory."""
    lines = []
    for text in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
        with suppress(ValueError):  # damaged: what is missing is seen elsewhere
            line = json.loads(text)
            kept = {key: value for key, value in line.items() if not key.startswith(("speed/", "memory/"))}
            kept.pop("time", None)
            lines.append(kept)
    return lines


# ------------------------------------------------------------------------------------------ left alone


@dataclass
class Undisturbed:
    run: Path
    checkpoints: Mapping[int, dict[str, Any]]  # of every step: its facts
    result: str
    metrics: list[dict[str, Any]]
    seconds: float
    lasts: dict[str, float]  # seconds: a start up to the first step, a save, an evaluation
    exported: dict[str, bytes] = field(default_factory=dict)


def undisturbed(place: Lab, world: int) -> Undisturbed:
    """A run that saves after every step, and keeps all."""
    patient = Patient(place, f"undisturbed-{world}", world, random.Random(0))
    patient.settings = ["checkpoint.every_steps=1", f"checkpoint.keep={STEPS}"]
    before = time.monotonic()
    patient.start()
    patient.ready()
    present = patient.waited_s
    patient.until("a first step", lambda: patient.ended or patient.trains(), nap_s=0.002)
    spent, last = {"start": patient.waited_s - present, "save": 0.0, "evaluation": 0.0}, time.monotonic()

    def over() -> bool:
        nonlocal last
        now, phases = time.monotonic(), {"save": patient.saving(), "evaluation": patient.evaluating()}
        for phase, inside in phases.items():
            spent[phase] += inside * min(now - last, LONGEST_NAP_S)
        last = now
        return patient.ended

    patient.until("its end", over, nap_s=0.002)
    if code := patient.wait():
        raise Lost(f"undisturbed, it ended with {code}: {patient.words()}")
    patient.gone()
    lasts = {**spent, "save": spent["save"] / STEPS, "evaluation": spent["evaluation"] / (STEPS // EVALUATE_EVERY)}
    checkpoints = {step: facts(checkpoint) for step, checkpoint in patient.checkpoints().items()}
    if checkpoints.keys() != {*range(1, STEPS + 1)}:
        raise Lost(f"undisturbed, it has the checkpoints {[*checkpoints]}")
    patient.tidy()
    result, metrics = (patient.run / "result.json").read_text(), measured(patient.run)
    prune(patient.run, keep=1)
    return Undisturbed(patient.run, checkpoints, result, metrics, time.monotonic() - before, lasts)
