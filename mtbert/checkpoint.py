"""Checkpoints of our own: sharded, exact, elastic, without pickles.

    checkpoints/step-00001200/
        rank-0-of-2.safetensors     tensors "name|start|stop|master" (exp_avg, exp_avg_sq, average): a rank's spans
        rank-1-of-2.safetensors
        surgery.safetensors         state of the surgery method, where it has one
        weighting.safetensors       what the weighting of the losses has learnt, where it learns
        manifest.json               format, step, AdamW's step counts, steps in the average of the weights, best score
                                    so far, how tasks were drawn (adaptive schedule), size and SHA-256 of each file

A save copies the state and returns; a thread of every rank writes it, under another name, fsyncs, and the first rank
renames it when all are done: a checkpoint is there whole or not at all, and training hardly waits. Loading intersects
the spans a rank needs with those in the files: on the same number of ranks every number comes back bit for bit, and on
any other number too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtbert.config import UserError
from mtbert.engine import Engine
from mtbert.runs import Rank, write_atomically
from mtbert.surgery import Surgery
from mtbert.weighting import Weighting
from mtbert.zero import Span

FORMAT = 1

RETRY_S = 30.0
"""After a save that failed, for example on a full disk."""

T = TypeVar("T")


class NewerFormat(UserError):
    """What was written by a newer mtbert. Not passed over like a damaged checkpoint: an older one would undo work."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int  # steps done: training goes on with this step
    adam_steps: list[int]
    averaged_steps: int
    best: dict[str, float] | None  # step and score of the best evaluation so far
    histories: list[Any]  # `Schedule.history` of every schedule of the run
    shapes: dict[str, list[int]]  # of the whole parameters
    files: dict[str, dict[str, Any]]


class Checkpointer:
    """Saves, finds and loads the checkpoints of a run folder. Leaving it as a context waits for the save under way.

    Args:
        keep: newest checkpoints kept; the best one is kept besides.
        every_s: seconds from one save to the next one that is `due`.
    """

    def __init__(self, run_dir: Path, rank: Rank, keep: int, every_s: float = math.inf) -> None:
        self.folder = run_dir / "checkpoints"
        self.rank = rank
        self.keep = keep
        self.every_s = every_s
        self.best: dict[str, float] | None = None  # of what is on disk
        self._due_at = time.monotonic() + every_s
        self._trouble: str | None = None  # of the last save
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._writing_best: dict[str, float] | None = None
        self._group: dist.ProcessGroup | None = None  # the threads' own, for training goes on in the other one

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, UserError):  # after anything else, other ranks may be gone
            self.wait()
        self._thread.shutdown(wait=False)

    def due(self) -> bool:
        """Whether this rank finds it is time for a save: by the clock, or again after one that failed."""
        return time.monotonic() >= self._due_at and (self._writing is None or self._writing.done())

    def save(
        self,
        engine: Engine,
        step: int,
        best: dict[str, float] | None,
        message: Callable[[str], None],
        histories: Sequence[Any] = (),
    ) -> None:
        """Collective. Copies this rank's state, and has it written in the background once the save before is done.

        A save that fails leaves the older checkpoints as they are; `message` says so, and soon one is `due` again.
        Afterwards the newest `keep` checkpoints and the best one are left.
        """
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        shard = {
            f"{span.name}|{span.start}|{span.stop}|{state}": tensor.to("cpu", copy=True)
            for span, states in engine.state()
            for state, tensor in states.items()
        }
        states = {
            file: {name: tensor.to("cpu", copy=True) for name, tensor in part.state_dict().items()}
            for file, part in _stateful(engine).items()
        }
        manifest = {
            "format": FORMAT,
            "step": step,
            "adam_steps": engine.steps_taken(),
            "averaged_steps": engine.averaged_steps,
            "best": best,
            "histories": histories,
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
        }
        self._due_at = time.monotonic() + self.every_s
        self._writing_best = best
        self._writing = self._thread.submit(self._write, shard, states, manifest, message)

    def wait(self) -> str | None:
        """Collective. Until the save under way, if any, is over; why the last one failed, None if it did not."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            if self._trouble is None:
                self.best = self._writing_best
        return self._trouble

    def _write(
        self,
        shard: dict[str, Tensor],
        states: dict[str, dict[str, Tensor]],
        manifest: dict[str, Any],
        message: Callable[[str], None],
    ) -> None:
        target = self.folder / f"step-{manifest['step']:08d}"
        aside = self.folder / f".{target.name}.tmp"
        name = f"rank-{self.rank.rank}-of-{self.rank.world}.safetensors"
        try:
            self._on_every_rank(lambda: _make_empty(aside) if self.rank.first else None)
            files = dict(self._on_every_rank(lambda: (name, _save(shard, aside / name))))
            self._on_every_rank(
                lambda: self._complete(aside, target, states, {**manifest, "files": files}) if self.rank.first else None
            )
        except OSError as error:
            self._trouble = f"step {manifest['step']} could not be saved: {error}"
            if self.rank.first:
                shutil.rmtree(aside, ignore_errors=True)
            self._due_at = time.monotonic() + RETRY_S
            message(f"{self._trouble}; training goes on, and saving is tried again")
        else:
            if self._trouble:
                message(f"step {manifest['step']} is saved")
            self._trouble = None

    def _on_every_rank(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns, from all ranks. Raises `OSError` on all ranks when it fails on one."""
        answer: tuple[T | None, str | None]
        try:
            answer = work(), None
        except OSError as error:
            answer = None, error.strerror or str(error)
        except SafetensorError as error:  # has the system's words inside of Rust's
            words = re.search(r"error: (.+) \(os error", str(error))
            answer = None, words[1] if words else str(error)
        answers: list[Any] = [None] * self.rank.world
        dist.all_gather_object(answers, answer, group=self._group)
        if troubles := [trouble for _, trouble in answers if trouble]:
            raise OSError(troubles[0])
        return [result for result, _ in answers]

    def _complete(
        self, aside: Path, target: Path, states: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
    ) -> None:
        """The manifest, when every shard is on disk; then the name that makes it a checkpoint."""
        for file, state in states.items():
            if state:
                manifest["files"][file] = _save(state, aside / file)
        write_atomically(aside / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        _fsync_folder(aside)
        if target.exists():  # damaged: else the run would have continued from it
            _discard(target)
        aside.rename(target)
        _fsync_folder(self.folder)
        self._prune(target, manifest["best"])

    def _prune(self, saved: Path, best: dict[str, float] | None) -> None:
        """What is newer than the checkpoint just saved was passed over as damaged, and must not crowd out good ones."""
        kept = [folder for folder in sorted(self.folder.glob("step-*")) if folder <= saved][-self.keep :]
        if best is not None:
            kept.append(self.folder / f"step-{int(best['step']):08d}")
        for folder in self.folder.glob("step-*"):
            if folder not in kept:
                _discard(folder)

    def latest(self, message: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint, the first rank's choice for all; a damaged one is passed over, and said so.

        Raises `UserError`, on every rank, for one that is from a newer mtbert.
        """
        choice: list[tuple[Checkpoint | None, str | None]] = [(None, None)]
        if self.rank.first:
            for left in [*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.old")]:
                shutil.rmtree(left, ignore_errors=True)  # of an attempt that was killed
            intact = (_opened(folder, message) for folder in sorted(self.folder.glob("step-*"), reverse=True))
            try:
                choice = [(next((checkpoint for checkpoint in intact if checkpoint), None), None)]
            except NewerFormat as error:
                choice = [(None, str(error))]
        dist.broadcast_object_list(choice)
        checkpoint, trouble = choice[0]
        if trouble:
            raise UserError(trouble)
        return checkpoint

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Every rank reads the spans it needs. Raises `UserError`, on every rank, for a checkpoint of another model."""
        _check_shapes(checkpoint, engine.shapes)
        with _Reader(checkpoint.folder) as reader:
            engine.load_state(reader.span, checkpoint.adam_steps, checkpoint.averaged_steps)
        for file, part in _stateful(engine).items():
            path = checkpoint.folder / file
            part.load_state_dict(load_file(path) if path.exists() else {})
        self.best = checkpoint.best


def _stateful(engine: Engine) -> dict[str, Surgery | Weighting]:
    return {"surgery.safetensors": engine.surgery, "weighting.safetensors": engine.weighting}


def find_checkpoint(run_dir: Path, which: Literal["best", "latest"]) -> Checkpoint:
    """The newest intact checkpoint of a run, or the one with the best score. Raises `UserError` where there is none."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    troubles: list[str] = []
    newest = next((checkpoint for folder in folders if (checkpoint := _opened(folder, troubles.append))), None)
    if newest is None:
        raise UserError(troubles[0] if troubles else f"{run_dir}: has no checkpoint yet")
    if which == "latest" or newest.best is None:
        return newest
    return open_checkpoint(run_dir / "checkpoints" / f"step-{int(newest.best['step']):08d}")


def _opened(folder: Path, message: Callable[[str], None]) -> Checkpoint | None:
    try:
        return open_checkpoint(folder)
    except NewerFormat:
        raise
    except UserError as error:
        message(f"checkpoint passed over: {error}")
        return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check its files against it.

    Raises `UserError` naming the file that is missing, cut short, changed or from a newer mtbert.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or not readable; the checkpoint is not complete") from None
    if manifest["format"] > FORMAT:
        raise NewerFormat(
            f"{path}: format {manifest['format']} is from a newer mtbert, this one reads up to {FORMAT}; update it"
        )
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        list(pool.map(partial(_verify, folder), manifest["files"].items()))
    return Checkpoint(
        folder,
        manifest["step"],
        manifest["adam_steps"],
        manifest.get("averaged_steps", 0),  # a run from before there were averages
        manifest["best"],
        manifest.get("histories", []),
        manifest["shapes"],
        manifest["files"],
    )


def _verify(folder: Path, entry: tuple[str, dict[str, Any]]) -> None:
    name, wanted = entry
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: missing; the checkpoint is not complete")
    if path.stat().st_size != wanted["size"]:
        raise UserError(f"{path}: {path.stat().st_size} bytes instead of {wanted['size']}; it is cut short")
    if _sha256(path) != wanted["sha256"]:
        raise UserError(f"{path}: its checksum is not the one in manifest.json; it was damaged")


def load_weights(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The whole fp32 weights of a checkpoint, put together from all ranks' shards: their average, where there is one,
    else those after the last step."""
    _check_shapes(checkpoint, shapes)
    state = "average" if checkpoint.averaged_steps else "master"
    with _Reader(checkpoint.folder) as reader:
        return {name: reader.span(Span(name, 0, shape.numel(), 0), state).view(shape) for name, shape in shapes.items()}


def _check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Spans are flat: without this, a part of a larger matrix would pass for a smaller one."""
    wanted = {name: list(shape) for name, shape in shapes.items()}
    for name in sorted(wanted.keys() | checkpoint.shapes.keys()):
        if wanted.get(name) != checkpoint.shapes.get(name):
            raise UserError(
                f"{checkpoint.folder}: {name} has shape {checkpoint.shapes.get(name)} there and {wanted.get(name)} in "
                f"this run's model; the checkpoint belongs to another configuration"
            )


class _Reader:
    """Spans of parameters out of the shards of a checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> _Reader:
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self.files = []
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise UserError(f"{path}: not a valid safetensors file: {error}") from None
            self.files.append(file.__enter__())
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name, start, stop, state = key.rsplit("|", 3)
                self.pieces.setdefault((name, state), []).append((int(start), int(stop), file, key))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.__exit__(None, None, None)

    def span(self, span: Span, state: str) -> Tensor:
        out = torch.empty(span.stop - span.start)
        found = 0
        for start, stop, file, key in self.pieces.get((span.name, state), []):
            low, high = max(start, span.start), min(stop, span.stop)
            if low < high:
                out[low - span.start : high - span.start] = file.get_slice(key)[low - start : high - start]
                found += high - low
        assert found == len(out), f"{self.folder} lacks numbers of {span.name} ({state})"
        return out


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _save(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _discard(folder: Path) -> None:
    """Renamed first: a reader must not find a checkpoint with half of its files."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
