"""What runs on every rank: a picklable job that submitit loads, on Slurm and on one machine alike.

It finds its rank, joins its output to the run folder, turns signals into a flag, calls the trainer and records how
that ended. submitit only starts it: results, requeueing and the end of other ranks are settled through
`launch.records`, because submitit's own need accounting, reach rank 0 alone and ignore SIGTERM.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import io
import math
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.records import (
    ASK_EVERY_S,
    PATIENCE_S,
    End,
    EndRecord,
    Lock,
    end_path,
    hosts_of_job,
    job_folder,
    log_path,
    read_end,
    scontrol,
    scontrol_complaint,
    slurm_state,
    stop_path,
)
from mtbert.errors import UserError
from mtbert.files import NO_ROOM, alive, sweep
from mtbert.lock import HEARTBEAT_S, STALE_S
from mtbert.manifest import folders
from mtbert.runs import Outcome, Rank, Stopwatch, usable_cores

Train = Callable[[Path, Rank, Callable[[], bool], bool], Outcome]

STOPS = (signal.SIGUSR2, signal.SIGTERM)
"""Signals that ask a rank to save and stop. They are blocked from its first line until it has handlers for them."""

WATCH_S = 0.25
MEET_S = 1.0
"""How often a rank looks for those that have not come yet."""
COME_S = 120.0
"""How long the ranks of a job on one machine wait for one of them; what lies between their starts is a few imports,
torch not among them. Slurm itself ends a step of which a task was killed, and of another host's rank the file that says
it is there may come late."""
BLAME_S = 1.0
"""How long a failing rank waits before it takes the blame: a rank whose peer was killed learns of it by an exception
of its own, within milliseconds, and the watch needs a moment to see the peer gone."""

EXIT_CODES = {"finished": 0, "stopped": 0, "failed": 1, "mistake": 2, "lost": 137}
"""Of a rank. 137 is what a killed process has; the batch script starts again what ends above 128."""

KILLED_RESTARTS = 5
"""Restarts without a new checkpoint after which a job whose ranks are killed (memory, hardware) is given up."""

BATCH_STARTED, RANK_STARTED = "MTBERT_BATCH_STARTED", "MTBERT_RANK_STARTED"
"""Variables with the times at which the batch script and this process began, in seconds since 1970."""


@dataclass(frozen=True)
class Job:
    """One submission. Called on every rank, once per attempt.

    Args:
        run: run folder, seen from every node.
        token: name of this submission; unlike a job id, never used twice.
        terminal: (lines, columns) of the terminal that shows rank 0 live, None where there is none.
        train: the function to run, `mtbert.trainer.train` unless given.
    """

    run: Path
    token: str
    terminal: tuple[int, int] | None = None
    train: Train | None = None
    submitted: float = field(default_factory=time.time)

    def __call__(self) -> None:
        launch = self._launch()
        place = Place.here(job_folder(self.run) / f"{self.token}.rendezvous")
        with _output(self.run, place.rank, self.terminal):
            status = Attempt(self.run, self.token, place).run_to_end(self.train or _trainer(launch))
        if code := EXIT_CODES[status]:
            os._exit(code)  # an orderly exit may wait for peers that will not come

    def _launch(self) -> Stopwatch:
        """What the start of this rank has taken so far. After a requeue the time in the queue is not known."""
        launch = Stopwatch()
        before = self.submitted if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else None
        for part, variable in (("queue", BATCH_STARTED), ("nodes", RANK_STARTED)):
            if (then := os.environ.get(variable)) is not None:
                if before is not None:
                    launch.parts[part] = max(0.0, float(then) - before)  # clocks of two hosts may differ
                before = float(then)
        if before is not None:
            launch.parts["imports"] = time.time() - before
        return launch


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, and what the cluster knows about the attempt."""

    rank: Rank
    host: str
    hosts: tuple[str, ...]
    restarts: int
    slurm_job: str | None

    @classmethod
    def here(cls, rendezvous: Path) -> Place:
        """Read from the variables of submitit's local executor, or of srun; `rendezvous` serves the former."""
        host = socket.gethostname()
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            number, world = _numbers("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS")
            return cls(Rank(number, world, number, world, f"file://{rendezvous}"), host, (host,), 0, None)
        number, world, local, nodes = _numbers("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NUM_NODES")
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        hosts = hosts_of_job()
        # derived from the job, so that every rank knows it; another one after a requeue, lest the old one lingers
        port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + restarts) % 10_000
        rank = Rank(number, world, local, world // nodes, f"tcp://{hosts[0]}:{port}")
        return cls(rank, host, tuple(hosts), restarts, _slurm_job())


def _slurm_job() -> str:
    """What scontrol calls this job. Each task of an array has a plain id too, but one task's is that of the array, and
    scontrol takes it for all of them."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _numbers(*names: str) -> tuple[int, ...]:
    return tuple(int(os.environ[name]) for name in names)


class Attempt:
    """One start of a job on one rank."""

    def __init__(self, run: Path, token: str, place: Place) -> None:
        self.run = run
        self.token = token
        self.place = place
        self.rank = place.rank
        self.name = f"{token}-{place.restarts}"
        self.lock = Lock(run, self.name, place.slurm_job)
        self._record: EndRecord
        self.status = "finished"  # unless `_end` says otherwise
        self._stop = False  # no Event: a second signal may find the first one's handler inside of its lock
        self._over = threading.Event()
        self._peers: dict[int, int | None] = {}  # process ids of the ranks that have come; of other hosts' None
        self._meet_at = -math.inf
        self._came = time.monotonic()
        self._ending = threading.RLock()  # held while an end is recorded and what it calls for is done

    def run_to_end(self, train: Train) -> str:
        """Trains, records the end, requeues where that is due. Returns the status in the record."""
        for number in STOPS:
            signal.signal(number, self._ask_for_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a whole terminal; the submitter asks for the stop
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it along; submitit would report it in our output
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # one that came during the start arrives now
        _set_variables(self.place)
        try:
            self._record = EndRecord(self.run, self.name, self.place.host, self.rank.rank)
            self._presence(self.rank.rank).write_text(f"{self.place.host} {os.getpid()}")
        except OSError as error:  # no room for a record either
            print(f"error: {self.run}: cannot be written to: {error.strerror}", file=sys.stderr)
            return "mistake"
        try:
            if self.rank.first:
                self.lock.acquire()
                self._clear_up()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
            outcome = train(self.run, self.rank, lambda: self._stop, not self.rank.first)
        except UserError as error:
            self._end("mistake", message=str(error))
        except Exception as error:
            trace = _explained(traceback.format_exc())
            print(trace, file=sys.stderr, flush=True)
            self._await_cause()
            self._end("lost" if _peer_lost(error) else "failed", message=trace)
        else:
            if self.rank.first:
                self._end(outcome.status, outcome.step, outcome.metrics)
            # a late signal must not end scontrol, nor the interpreter on its way out, which drops our handlers
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
            if outcome.status == "stopped":
                self._requeue(outcome.step)
        self._over.set()
        end = None
        with contextlib.suppress(OSError):  # no file may be opened, say; the record is there
            end = read_end(self.run, self.name)
        self._vanish()
        return end.status if end else self.status

    def _ask_for_stop(self, *_: object) -> None:
        self._stop = True

    def _vanish(self) -> None:
        """Takes away what says that this rank lives. What cannot be taken away goes by the death of its process."""
        with self._ending:
            with contextlib.suppress(OSError):
                self._presence(self.rank.rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._record.close()
            with contextlib.suppress(OSError):
                if self.rank.first and self.lock.is_mine():
                    self.lock.release()

    # -------------------------------------------------------------------------------- the other ranks

    def _watch(self) -> None:
        """Ends this process when the attempt is lost, whatever the main thread is waiting for."""
        # the controller's process id; a rank that lost it would run on unseen
        parent = int(os.environ["SUBMITIT_LOCAL_JOB_ID"]) if self.place.slurm_job is None else os.getppid()
        beat = seen = time.monotonic()
        while not self._over.wait(WATCH_S):
            if os.getppid() != parent:
                self._leave(1)
            try:
                self._look()
                if self.rank.first and time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    if not self.lock.is_mine():
                        self._end("failed", message=f"{self.run}: another job took this run folder over")
                    else:
                        self.lock.touch()
                seen = time.monotonic()
            except OSError as error:  # a file server that restarts; the watch must outlive it
                if time.monotonic() - seen > STALE_S:
                    print(f"{self.run}: out of reach for {STALE_S:g} s ({error}); this rank ends", file=sys.stderr)
                    self._leave(1)

    def _look(self) -> None:
        if stop_path(self.run, self.token).exists():
            self._stop = True
        end = read_end(self.run, self.name)
        if end is None and (dead := self._dead_peer()) is not None:
            fate = "was killed" if dead in self._peers else f"did not start within {COME_S:g} s"
            self._end("lost", rank=dead, message=f"rank {dead} {fate}")
            # a full disk takes no record, and the other ranks are to end all the same
            end = read_end(self.run, self.name) or End("lost", dead, self.place.host)
        if end is not None and EXIT_CODES[end.status]:
            with self._ending:  # the main thread may be on its way to put the job back into the queue
                self._leave(EXIT_CODES[end.status])

    def _clear_up(self) -> None:
        """What attempts before this one left when they were killed; the folder is ours."""
        for path in job_folder(self.run).iterdir():
            ours = path.name.startswith(self.name if ".rank" in path.name else self.token)
            left = path.suffix in (".rendezvous", ".stop") or ".rank" in path.suffix or ".end.json." in path.name
            if left and not ours and not path.name.startswith(f".{self.name}"):
                path.unlink(missing_ok=True)
        for place, _, _ in os.walk(self.run):
            sweep(Path(place))

    def _leave(self, code: int) -> None:
        self._vanish()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    def _presence(self, rank: int) -> Path:
        return job_folder(self.run) / f"{self.name}.rank{rank}"

    def _dead_peer(self) -> int | None:
        """A rank of this host that has gone without a word, or never came. Slurm watches other hosts'."""
        if len(self._peers) < self.rank.world and time.monotonic() > self._meet_at:
            self._meet()
        for peer, pid in self._peers.items():
            if pid is not None and not alive(pid) and self._presence(peer).exists():
                return peer
        alone = self.place.slurm_job is None and len(self.place.hosts) == 1
        if alone and time.monotonic() - self._came > COME_S:
            return min(set(range(self.rank.world)).difference(self._peers), default=None)
        return None

    def _meet(self) -> None:
        """Reads each rank's presence once: all ranks do, on a file system that all share."""
        self._meet_at = time.monotonic() + MEET_S
        for peer in set(range(self.rank.world)).difference(self._peers):
            with contextlib.suppress(FileNotFoundError):
                words = self._presence(peer).read_text().split()
                if len(words) == 2:  # it is there whole
                    self._peers[peer] = int(words[1]) if words[0] == self.place.host else None

    def _await_cause(self) -> None:
        self._meet_at = -math.inf  # it may be the death of one that had only just come
        until = time.monotonic() + BLAME_S
        while time.monotonic() < until and not end_path(self.run, self.name).exists():
            time.sleep(WATCH_S / 5)

    def _end(
        self,
        status: str,
        step: int | None = None,
        metrics: dict[str, float] | None = None,
        message: str = "",
        rank: int | None = None,
    ) -> None:
        end = End(status, self.rank.rank if rank is None else rank, self.place.host, step, metrics or {}, message)  # type: ignore[arg-type]
        self.status = status
        with self._ending:
            try:
                if self._record.write(end) and status == "lost":
                    self._restart()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                print(f"{status}: {message}\n{self.run}: {error.strerror}", file=sys.stderr)

    # ----------------------------------------------------------------------------------------- requeue

    def _requeue(self, step: int) -> None:
        """Puts a stopped Slurm job back into the queue, unless it was cancelled.

        Slurm says which: a job that was preempted or nears its time limit is still running, a cancelled one is not.
        """
        job = self.place.slurm_job
        if job and self.rank.first and _goes_on(job):
            print(f"stopped at step {step}; back into the queue", flush=True)
            _back_into_queue(job)

    def _restart(self) -> None:
        """Puts a job that lost a rank back into the queue. The batch script does so only when no rank is left to.

        Not its business alone, because srun waits for ever for a node that fails and comes back before Slurm notices.
        """
        job = self.place.slurm_job
        if job is None or not _goes_on(job):
            return
        saved = max((path.stat().st_mtime for path in folders(self.run)), default=0.0)
        # the batch script counts in it too: a line per attempt since the last new checkpoint
        killed = job_folder(self.run) / f"{job}.killed"
        before = killed.read_text().split() if killed.exists() and killed.stat().st_mtime > saved else []
        attempts = [*before, str(self.place.restarts)]
        killed.write_text("".join(f"{attempt}\n" for attempt in attempts))
        if len(attempts) <= KILLED_RESTARTS:
            _back_into_queue(job)


def _goes_on(job: str) -> bool:
    """Whether Slurm, unless it is silent, has not ended the job."""
    return slurm_state(job) in ("RUNNING", "UNKNOWN")


def _back_into_queue(job: str) -> None:
    """Asks more than once: slurmctld may be restarting."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            scontrol("requeue", job)
            return
        except (OSError, subprocess.SubprocessError) as error:
            if time.monotonic() > until:
                print(f"not put back into the queue: {scontrol_complaint(error)}", file=sys.stderr)
                return
        time.sleep(ASK_EVERY_S)
        if not _goes_on(job):
            return


MEANINGS = {
    "could not create a primitive": (
        "most likely this process cannot allocate memory: oneDNN says so where it gets none"
    ),
    "CUDA out of memory": "a step does not fit on the GPU: lower schedule.batch_size, or raise engine.accumulation",
    "Duplicate GPU detected": "two ranks of a host have the same GPU; --gpus-per-node N gives each its own",
}
"""What words of libraries in a traceback mean for who started the job."""


def _explained(trace: str) -> str:
    return trace + "".join(f"{meaning}\n" for words, meaning in MEANINGS.items() if words in trace)


def _peer_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. By name, for torch may not even be imported."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return "Duplicate GPU" not in str(error)  # which another start would find as well
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _trainer(launch: Stopwatch) -> Train:
    def imported(run: Path, rank: Rank, stop: Callable[[], bool], quiet: bool) -> Outcome:
        from mtbert.trainer import train  # with torch, and after the variables it reads are set

        launch.lap("imports")
        return train(run, rank, stop, quiet, launch)

    return imported


# ---------------------------------------------------------------------------------- variables and output


def _set_variables(place: Place) -> None:
    """What libraries read when they are imported. The user's own settings win."""
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(_threads(place))
    if interface := _interface(place):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # else it is the beginning of a name
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _threads(place: Place) -> int:
    """Slurm may bind a rank to its own part of the step's CPUs on this node, to all of them, or to nothing.

    SLURM_CPUS_PER_TASK says what sbatch was asked for, which srun need not do.
    """
    of_step = os.environ.get("SLURM_CPUS_ON_NODE", "") if place.slurm_job else ""
    if not of_step.isdecimal():
        return place.rank.cores
    return max(1, min(usable_cores(), int(of_step) // place.rank.local_world))


def _interface(place: Place) -> str | None:
    """The network interface that leads to the other nodes; the loopback one on a single node.

    Left alone, gloo takes the address the host name resolves to, which on many machines is one that peers cannot reach.
    """
    if len(place.hosts) < 2:
        return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    # on Slurm by number: what a host calls itself need not be the name of its node
    first = os.environ["SLURM_NODEID"] == "0" if place.slurm_job else place.host.split(".")[0] == place.hosts[0]
    # the way to oneself is the loopback, so the first node asks for the way to the second
    other = place.hosts[1] if first else place.hosts[0]
    # OSError: a name without an IPv4 address, say; gloo then chooses
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing, but picks the route
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == mine:
                    return name
    return None


class _Log(io.FileIO):
    """A log loses what a full disk refuses; the training that fills it goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return len(data)


@contextlib.contextmanager
def _output(run: Path, rank: Rank, terminal: tuple[int, int] | None) -> Iterator[None]:
    """Points this process's stdout and stderr, on the level of descriptors, at its files in the run folder.

    Where someone watches on a terminal, rank 0 writes through a pseudo-terminal of its own into its file: it then
    draws the bar it would draw there, and who watches copies the file, bytes as they are. The job depends on nobody.
    """
    path = log_path(run, rank.rank)
    path.parent.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    errors = os.open(path.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(errors, 2)
    faulthandler.enable(file=2)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(_Log(number, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        for number in (1, 2)
    )
    if not (terminal and rank.first):
        os.dup2(log, 1)
        yield
        sys.stdout.flush()
        return

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", *terminal, 0, 0))
    modes = termios.tcgetattr(inner)
    modes[1] &= ~termios.OPOST  # the terminal that shows the file turns line ends into its own
    termios.tcsetattr(inner, termios.TCSANOW, modes)
    os.dup2(inner, 1)
    os.close(inner)

    def copy() -> None:
        with contextlib.suppress(OSError):  # EIO: the last writer has closed its end
            file = _Log(log, "w", closefd=False)
            while chunk := os.read(outer, 65536):
                file.write(chunk)

    copier = threading.Thread(target=copy, name="terminal", daemon=True)
    copier.start()
    yield
    sys.stdout.flush()
    os.dup2(log, 1)
    copier.join()
