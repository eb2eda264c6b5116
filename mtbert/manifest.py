"""What lies in a run's `checkpoints` folder: finding, checking, listing and removing checkpoints. No torch in here.

    manifest.json    format, step, AdamW's step counts, steps in the average of the weights, best score so far, how
                     tasks were drawn (adaptive schedule), where the log stands, shapes, size and SHA-256 of each
                     file, and its own

A checkpoint may come from a stranger: a manifest is read strictly, names no file but those a checkpoint consists of,
and nothing is opened that it does not name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from mtbert.errors import UserError
from mtbert.runs import FORMAT

MAX_MANIFEST = 2**24
"""Bytes. That of a large encoder on 64 ranks takes a hundredth of it."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^(rank-\d+-of-\d+|surgery|weighting)\.safetensors$")]


class NewerFormat(UserError):
    """What was written by a newer mtbert. Not passed over like a damaged checkpoint: an older one would undo work."""


class Unreadable(UserError):
    """What the disk, a file server or a permission did not give: it may well be whole."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", ser_json_inf_nan="constants")


class File(_Strict):
    size: NonNegativeInt
    sha256: Sha256


class Best(_Strict):
    """The best evaluation so far: after how many steps, and its composite."""

    step: NonNegativeInt
    score: float


class Course(_Strict):
    """Where training and its log stand, beyond what weights and step tell."""

    skips_in_a_row: NonNegativeInt
    precision: str  # of the steps so far
    losses: dict[str, float]  # the last line of the log
    sums: dict[str, list[float]]  # the line that is not yet complete: losses, and everything it counts
    counts: dict[str, float]
    cosine_sums: list[tuple[str, str, float, PositiveInt]] = []  # of pairs of tasks since the last evaluation; how many
    cosines: list[tuple[str, str, list[float]]] = []  # each of them, of a run from before they were summed


class Manifest(_Strict):
    """Of format 1 are those that lack keys: they came in one after another. Each of format 2 has them all."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    step: NonNegativeInt  # steps done: training goes on with this step
    adam_steps: list[NonNegativeInt]  # of every group of parameters
    adam_parts: list[str] = []  # of the model, that these groups belong to
    averaged_steps: NonNegativeInt = 0
    best: Best | None
    histories: list[list[tuple[NonNegativeInt, list[float]]]] = []  # `Schedule.history` of every schedule of the run
    course: Course | None = None
    shapes: dict[str, list[NonNegativeInt]]  # of the whole parameters
    files: dict[FileName, File]
    sha256: Sha256 | None = None  # of all else (`sealed`)


def sealed(values: Mapping[str, Any]) -> str:
    """What manifest.json holds: these values, and the checksum that they are held to from then on."""
    return json.dumps({**values, "sha256": _checksum(values)}, indent=1)


def _checksum(values: Mapping[str, Any]) -> str:
    told = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest was read."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.manifest.files.values())

    @property
    def world(self) -> int:
        """How many ranks wrote it."""
        return sum(name.startswith("rank-") for name in self.manifest.files)

    @property
    def best(self) -> Best | None:
        return self.manifest.best


def folders(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, newest first; whole ones and damaged ones."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if folder.name.removeprefix("step-").isdecimal()), reverse=True)


def step_of(folder: Path) -> int:
    """That of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def read_manifest(folder: Path) -> Checkpoint:
    """A checkpoint's manifest, its files not looked at.

    Raises `UserError` where it is missing or damaged, `Unreadable` where it cannot be read, `NewerFormat` where a newer
    mtbert wrote it: a format is believed only where the checksum is right, which every manifest has from format 2 on.
    """
    path = folder / "manifest.json"
    try:
        if folder.is_symlink() or path.is_symlink():
            raise UserError(f"{path}: is behind a link; a checkpoint holds its files itself")
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST + 1)
        if len(text) > MAX_MANIFEST:
            raise ValueError
        values = json.loads(text)
        told = values if isinstance(values, dict) else {"format": 1}
        seal, written = told.get("sha256"), told.get("format")
        whole = seal == _checksum(told) or (seal is None and written == 1)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
        raise UserError(f"{path}: missing or not readable; the checkpoint is not complete") from None
    if not whole:
        raise UserError(f"{path}: its checksum is {'not the one it holds' if seal else 'missing'}; it was damaged")
    if isinstance(written, int) and written > FORMAT:
        raise NewerFormat(f"{path}: format {written} is from a newer mtbert, this one reads up to {FORMAT}; update it")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {' '.join(where.split())}: {first['msg']}; it was damaged") from None
    if manifest.format > 1 and (missing := Manifest.model_fields.keys() - manifest.model_fields_set):
        raise UserError(f"{path}: {min(missing)}: Field required; it was damaged")
    if folder.name != (name := folder_of(folder, manifest.step).name):
        raise UserError(f"{path}: is that of {name}; it was damaged, or the folder renamed")
    return Checkpoint(folder, manifest)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check its files against it.

    Raises `UserError` naming the file that is missing, cut short, changed, a link or from a newer mtbert, `Unreadable`
    naming one that cannot be read.
    """
    checkpoint = read_manifest(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        list(pool.map(partial(_verify, folder), checkpoint.manifest.files.items()))
    return checkpoint


def _verify(folder: Path, entry: tuple[str, File]) -> None:
    name, wanted = entry
    path = folder / name
    try:
        if path.is_symlink():
            raise UserError(f"{path}: is a link; a checkpoint holds its files itself")
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is not complete")
        if path.stat().st_size != wanted.size:
            raise UserError(f"{path}: {path.stat().st_size} bytes instead of {wanted.size}; it is cut short")
        if sha256(path) != wanted.sha256:
            raise UserError(f"{path}: its checksum is not the one in manifest.json; it was damaged")
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None


PASSED_OVER = "checkpoint passed over: "


def intact(run_dir: Path, message: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The checkpoints that are whole, newest first; those that are not are passed over, and `message` says why.

    Raises `NewerFormat`.
    """
    for folder in folders(run_dir):
        try:
            yield open_checkpoint(folder)
        except NewerFormat:
            raise
        except UserError as error:
            message(f"{PASSED_OVER}{error}")


def tell(message: str) -> None:
    print(f"mtbert: {message}", file=sys.stderr)


def find_checkpoint(
    run_dir: Path, which: Literal["best", "latest"], message: Callable[[str], None] = tell
) -> Checkpoint:
    """The newest intact checkpoint of a run, or the one with the best score; `message` is told of those passed over.

    Raises `UserError` where there is none.
    """
    troubles: list[str] = []
    newest = next(intact(run_dir, troubles.append), None)
    if newest is None:
        raise UserError(troubles[0].removeprefix(PASSED_OVER) if troubles else f"{run_dir}: has no checkpoint yet")
    for trouble in troubles:
        message(trouble)
    if which == "latest" or newest.manifest.best is None:
        return newest
    if troubles:
        message(f"which checkpoint is the best is what that of step {newest.step} knows")
    try:
        return open_checkpoint(folder_of(run_dir, newest.manifest.best.step))
    except UserError as error:
        raise UserError(f"{error}. It is the best one; --checkpoint latest takes that of step {newest.step}") from None


@dataclass(frozen=True)
class State:
    """How a checkpoint stands: one line of `python -m mtbert checkpoint`."""

    folder: Path
    checkpoint: Checkpoint | None  # None where it is damaged
    trouble: str  # why it is; empty where nothing was found
    unreadable: bool  # whether that is only because it cannot be read
    saved: float  # seconds since 1970
    thorough: bool  # whether its files were read
    notes: list[str]  # of: newest, best

    def record(self) -> dict[str, Any]:
        found = self.checkpoint
        saved = datetime.datetime.fromtimestamp(self.saved).isoformat(" ", "seconds")
        return {
            "step": found.step if found else step_of(self.folder),
            "saved": saved,
            "bytes": found.size if found else None,
            "ranks": found.world if found else None,
            "state": "damaged" if self.trouble else "intact" if self.thorough else "not read",
            "notes": self.notes,
        }


def survey(run_dir: Path, thorough: bool) -> list[State]:
    """Every checkpoint of a run, oldest first, but those that training removes meanwhile. Raises `NewerFormat`.

    Args:
        thorough: whether all files are read and held to their checksums, not only the manifest.
    """
    read = open_checkpoint if thorough else read_manifest
    found: list[tuple[Path, float, Checkpoint | UserError]] = []
    for folder in folders(run_dir):
        try:
            saved = folder.stat().st_mtime
        except FileNotFoundError:
            continue
        try:
            found.append((folder, saved, read(folder)))
        except NewerFormat:
            raise
        except UserError as error:
            if folder.exists():
                found.append((folder, saved, error))
    newest = next((what for _, _, what in found if isinstance(what, Checkpoint)), None)
    best = newest.manifest.best.step if newest and newest.manifest.best else None
    states = []
    for folder, saved, what in reversed(found):
        if isinstance(what, Checkpoint):
            marks = {"newest": what is newest, "best": what.step == best}
            notes = [mark for mark, true in marks.items() if true]
            states.append(State(folder, what, "", False, saved, thorough, notes))
        else:
            states.append(State(folder, None, str(what), isinstance(what, Unreadable), saved, thorough, []))
    return states


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all checkpoints but the newest `keep` intact ones and the best at each of them; returns what was removed.

    Damaged ones go, too. Raises `UserError`, and removes nothing, where none is intact, one cannot be read or is of a
    newer mtbert; and where one cannot be removed.
    """
    assert keep >= 1
    states = survey(run_dir, thorough=True)
    if not states:
        raise UserError(f"{run_dir}: has no checkpoint yet")
    if trouble := next((state.trouble for state in states if state.unreadable), ""):
        raise UserError(f"{trouble}; nothing was removed")
    whole = [state for state in states if not state.trouble]
    if not whole:
        raise UserError(f"{run_dir}: none of its {len(states)} checkpoints is intact; nothing was removed")
    kept = with_the_best([state.folder for state in whole[-keep:]])
    doomed = [state.folder for state in states if state.folder not in kept]
    removed = []
    for folder in doomed:
        try:
            discard(folder)
        except FileNotFoundError:  # training goes on, and was faster
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be removed: {error.strerror}") from None
        removed.append(folder)
    return removed


def with_the_best(kept: Sequence[Path]) -> set[Path]:
    """These checkpoints, and the best of the run as each of them knows it: it may turn out to be the newest intact one.

    Those that are damaged know none.
    """
    found = set(kept)
    for folder in kept:
        with contextlib.suppress(UserError):
            if best := read_manifest(folder).manifest.best:
                found.add(folder_of(folder.parent.parent, best.step))
    return found


def discard(folder: Path) -> None:
    """Renamed first: a reader must not find a checkpoint with half of its files."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()
