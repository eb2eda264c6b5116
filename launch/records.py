"""What a job leaves in its run folder, so that submitter, ranks and a later `--resume` agree without a daemon.

    RUN/code/                  packages as they were at submission; the job imports from here
    RUN/logs/rank0.log, .err   what each rank printed, over all attempts
    RUN/job/job.json           the job that was submitted last: where it runs, how large it is
    RUN/job/lock               the attempt that owns the folder; touched every few seconds
    RUN/job/ATTEMPT.end.json   how an attempt ended; the first rank to write it wins (room for it: .ATTEMPT.end.json.…)
    RUN/job/ATTEMPT.rank0      a living rank's host and process id
    RUN/job/TOKEN.stop         asks the ranks of a job to save and stop

A job is one submission and has a token; an attempt is one start of it (`TOKEN-0`, after a requeue `TOKEN-1`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from mtbert.errors import UserError
from mtbert.files import folder_made_aside, read_json, write_atomically
from mtbert.lock import Count, Plain, RunLock, SlurmJob

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mtbert", "launch")

ASK_EVERY_S = 2.0
PATIENCE_S = 30.0
"""How long slurmctld may be silent, or refuse, before that counts: it restarts, or is busy."""


def submit_command(words: str, run: Path) -> str:
    """The line to type for what `words` ask of a run."""
    return f"python launch/submit.py {words} {shlex.quote(str(run))}"


@dataclass(frozen=True)
class JobNote:
    """`job.json`: the submission a run folder belongs to."""

    cluster: Literal["slurm", "local"]
    id: SlurmJob
    token: Plain
    host: str
    nodes: Count
    ranks_per_node: Count
    gpus: bool = False

    def again(self, run: Path) -> str:
        """The command that continues the run in the same shape."""
        words = [f"--nodes {self.nodes}"]
        if self.gpus or self.ranks_per_node > 1:
            words.append(f"--{'gpus' if self.gpus else 'ranks'}-per-node {self.ranks_per_node}")
        if self.cluster == "local" and shutil.which("sbatch"):
            words.append("--local")
        return submit_command(" ".join([*words, "--resume"]), run)


@dataclass(frozen=True)
class End:
    """How an attempt ended. `mistake` is the user's, `failed` ours; `lost`: a rank or its node went without a word."""

    status: Literal["finished", "stopped", "mistake", "failed", "lost"]
    rank: int
    host: str
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""


_NOTE, _END = TypeAdapter(JobNote), TypeAdapter(End)


def job_folder(run: Path) -> Path:
    return run / "job"


def make_job_folder(run: Path) -> None:
    """Ranks unpickle from it what to do, so nobody else may write there. Raises `UserError` where it is another's."""
    folder = job_folder(run)
    folder.mkdir(exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise UserError(
            f"{folder}: belongs to another user, who could have your job do anything; copy {run} and continue that"
        )
    with contextlib.suppress(OSError, AttributeError):  # there is none, or no such thing here
        os.removexattr(folder, "system.posix_acl_default")  # a project's, which would count instead of the umask
    folder.chmod(folder.stat().st_mode & ~0o022)


@contextlib.contextmanager
def writing_to(run: Path) -> Iterator[None]:
    """Raises `UserError` where that is refused."""
    try:
        yield
    except OSError as error:
        # of a folder that is copied, a list of files with what was wrong
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise UserError(f"{run}: cannot be written to: {reason}") from None


@contextlib.contextmanager
def writable_by_me_alone() -> Iterator[None]:
    """What this process, and one that it starts, writes meanwhile."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def log_path(run: Path, rank: int = 0) -> Path:
    return run / "logs" / f"rank{rank}.log"


def end_path(run: Path, attempt: str) -> Path:
    return job_folder(run) / f"{attempt}.end.json"


def stop_path(run: Path, token: str) -> Path:
    return job_folder(run) / f"{token}.stop"


def write_note(run: Path, note: JobNote) -> None:
    write_atomically(job_folder(run) / "job.json", json.dumps(asdict(note), indent=2) + "\n")


def read_note(run: Path) -> JobNote | None:
    """Raises `UserError` for one that was damaged."""
    path = job_folder(run) / "job.json"
    try:
        note = read_json(_NOTE, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if note is None:
        raise UserError(f"{path}: not what a launcher wrote; it was damaged. Delete it when its job is over")
    return note


class EndRecord:
    """The file in which a rank is to tell how its attempt ended.

    It is opened, and has room, from the start: at the end the disk may be full, or this process may open no more files.
    """

    ROOM = 1 << 14  # bytes

    def __init__(self, run: Path, attempt: str, host: str, rank: int) -> None:
        self.path = end_path(run, attempt)
        self._aside = self.path.with_name(f".{self.path.name}.{host}.{rank}.{os.getpid()}")
        self._file = self._aside.open("wb", buffering=0)
        self._file.write(b" " * self.ROOM)

    def write(self, end: End) -> bool:
        """Records the end unless another rank was first, or this one before; whether this one was.

        A hard link is the one atomic "create with this content unless it exists" that network file systems keep.
        """
        if self._file.closed or self.path.exists():  # perhaps as this very file, which must not change any more
            return False
        self._file.seek(0)
        self._file.truncate(self._file.write(_fitting(end, self.ROOM)))
        try:
            self.path.hardlink_to(self._aside)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        """Leaves the record, if this rank made it, and nothing else."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


def _fitting(end: End, room: int) -> bytes:
    """JSON; of a message that is too long the last part, in which a traceback names the error."""
    while len(text := (json.dumps(asdict(end), indent=2) + "\n").encode()) > room and end.message:
        end = replace(end, message=end.message[len(end.message) // 8 + 1 :])
    return text


def read_end(run: Path, attempt: str) -> End | None:
    path = end_path(run, attempt)
    try:
        return read_json(_END, path) or End("failed", 0, "?", message=f"{path}: not what a rank wrote; it was damaged")
    except FileNotFoundError:
        return None


def last_end(run: Path, token: str) -> End | None:
    """The end of a job's latest attempt that left one."""
    numbers = [path.name.split(".")[0].rsplit("-", 1)[1] for path in job_folder(run).glob(f"{token}-*.end.json")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=None)
    return None if last is None else read_end(run, f"{token}-{last}")


def snapshot_code(run: Path) -> Path:
    """Copies our packages into the run folder, so that editing the checkout does not change a queued job.

    A folder that has them keeps them: a continued run goes on with the code it began with. Raises `UserError` where it
    cannot be written to.
    """
    code = run / "code"
    if not code.exists():
        with writing_to(run), folder_made_aside(code, Path.is_dir) as aside:
            if code.is_symlink():  # of a run taken out of its array
                code.unlink()
            for package in PACKAGES:
                shutil.copytree(ROOT / package, aside / package, ignore=shutil.ignore_patterns("__pycache__"))
    return code


class Lock(RunLock):
    """Besides, an attempt may take it over when the owner is a Slurm job that is over."""

    def _is_over(self, slurm_job: str) -> bool:
        return slurm_state(slurm_job) not in ("RUNNING", "COMPLETING", "UNKNOWN")


@contextlib.contextmanager
def outside_of_any_job() -> Iterator[None]:
    """For a submission: sbatch passes its environment on, and of a job around us (salloc, a notebook on a node) the new
    one would take ids, restarts and CPUs for its own. How Slurm is reached stays.
    """
    names = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "MTBERT_")
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
    outer = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(names) and name not in kept}
    try:
        yield
    finally:
        os.environ.update(outer)


def slurm_fields(job: str) -> dict[str, str]:
    """What slurmctld says of a job; nothing when it has forgotten it, or there is no Slurm here.

    Raises `UserError` with the complaint when there is no answer for `PATIENCE_S`.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            shown = scontrol("show", "job", "-o", job)
            return dict(word.partition("=")[::2] for word in shown.split())
        except FileNotFoundError:
            return {}
        except (OSError, subprocess.SubprocessError) as error:
            complaint = scontrol_complaint(error)
        if "Invalid job id" in complaint:
            return {}
        if time.monotonic() > until:
            raise UserError(f"Slurm does not answer: {complaint}")
        time.sleep(ASK_EVERY_S)


def slurm_state(job: str) -> str:
    """JobState of a job; UNKNOWN when Slurm has forgotten it or does not answer, or there is no Slurm here."""
    try:
        return slurm_fields(job).get("JobState", "UNKNOWN")
    except UserError:
        return "UNKNOWN"


def scontrol(*words: str) -> str:
    """What it prints. Raises `OSError` and `subprocess.SubprocessError`."""
    done = subprocess.run(["scontrol", *words], check=True, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.stdout


def hosts_of_job() -> list[str]:
    """Of the job that this process runs in. Raises as `scontrol` does."""
    return scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def complaint(stderr: str) -> str:
    """What a command of Slurm complained of, in one line."""
    return "; ".join(
        re.sub(r"^(sbatch: |scancel: )?(error: )?", "", line) for line in stderr.splitlines() if line.strip()
    )


def scontrol_complaint(error: Exception) -> str:
    return " ".join(str(getattr(error, "stderr", None) or error).split())
