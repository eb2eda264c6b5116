"""Checkpoints of our own: sharded, exact, elastic, without pickles.

    checkpoints/step-00001200/
        rank-0-of-2.safetensors     tensors "name|start|stop|master" (exp_avg, exp_avg_sq, average): a rank's spans
        rank-1-of-2.safetensors
        surgery.safetensors         state of the surgery method, where it has one
        weighting.safetensors       what the weighting of the losses has learnt, where it learns
        manifest.json               see manifest.py

A save copies the state and returns; a thread of every rank writes it, under another name, fsyncs, and the first rank
renames it when all are done: a checkpoint is there whole or not at all, and training hardly waits. Loading intersects
the spans a rank needs with those in the files: on the same number of ranks every number comes back bit for bit, and on
any other number too.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtbert.engine import Engine
from mtbert.errors import UserError
from mtbert.files import write_atomically
from mtbert.manifest import (
    MAX_MANIFEST,
    PASSED_OVER,
    Best,
    Checkpoint,
    Course,
    File,
    Manifest,
    NewerFormat,
    Unreadable,
    discard,
    folder_of,
    folders,
    intact,
    open_checkpoint,
    sealed,
    sha256,
    with_the_best,
)
from mtbert.runs import FORMAT, Rank
from mtbert.surgery import Surgery
from mtbert.weighting import Weighting
from mtbert.zero import Span

RETRY_S = 30.0
"""After a save that failed, for example on a full disk."""

T = TypeVar("T")


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
        self.best: Best | None = None  # of what is on disk
        self._due_at = time.monotonic() + every_s
        self._trouble: str | None = None  # of the last save
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._writing_best: Best | None = None
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
        best: Best | None,
        message: Callable[[str], None],
        histories: Sequence[list[tuple[int, list[float]]]],
        course: Course | None,
    ) -> None:
        """Collective. Copies this rank's state, and has it written in the background once the save before is done.

        A save that fails leaves the older checkpoints as they are; `message` says so, and soon one is `due` again.
        Afterwards the newest `keep` checkpoints and the best one at each of them are left.

        Args:
            course: the first rank's is kept.
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
        manifest = Manifest(
            format=FORMAT,
            step=step,
            adam_steps=engine.steps_taken(),
            adam_parts=[group.part for group in engine.groups],
            averaged_steps=engine.averaged_steps,
            best=best,
            histories=list(histories),
            course=course,
            shapes={name: list(shape) for name, shape in engine.shapes.items()},
            files={},
        )
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
        manifest: Manifest,
        message: Callable[[str], None],
    ) -> None:
        target = folder_of(self.folder.parent, manifest.step)
        aside = self.folder / f".{target.name}.tmp"
        name = f"rank-{self.rank.rank}-of-{self.rank.world}.safetensors"
        try:
            self._on_every_rank(lambda: _make_empty(aside) if self.rank.first else None)
            files = dict(self._on_every_rank(lambda: (name, _save(shard, aside / name))))
            whole = manifest.model_copy(update={"files": files})
            self._on_every_rank(lambda: self._complete(aside, target, states, whole) if self.rank.first else None)
        except OSError as error:
            self._trouble = f"step {manifest.step} could not be saved: {error}"
            if self.rank.first:
                shutil.rmtree(aside, ignore_errors=True)
            self._due_at = time.monotonic() + RETRY_S
            message(f"{self._trouble}; training goes on, and saving is tried again")
        else:
            if self._trouble:
                message(f"step {manifest.step} is saved")
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

    def _complete(self, aside: Path, target: Path, states: dict[str, dict[str, Tensor]], manifest: Manifest) -> None:
        """The manifest, when every shard is on disk; then the name that makes it a checkpoint."""
        for file, state in states.items():
            if state:
                manifest.files[file] = _save(state, aside / file)
        text = sealed(manifest.model_dump(mode="json")) + "\n"
        if len(text) > MAX_MANIFEST:
            raise OSError(f"manifest.json has {len(text):,} bytes, and no more than {MAX_MANIFEST:,} are read back")
        write_atomically(aside / "manifest.json", text)
        _fsync_folder(aside)
        if target.exists():  # damaged: else the run would have continued from it
            discard(target)
        aside.rename(target)
        _fsync_folder(self.folder)
        self._prune(target, manifest.best)

    def _prune(self, saved: Path, best: Best | None) -> None:
        """What is newer than the checkpoint just saved was passed over, and goes if it is damaged: one that only could
        not be read that time is what this run will come to, and is kept."""
        there = folders(self.folder.parent)
        kept = with_the_best([folder for folder in there if folder <= saved][: self.keep])
        if best is not None:  # whatever the disk says of the manifest just written
            kept.add(folder_of(self.folder.parent, best.step))
        for folder in there:
            if folder not in kept and (folder < saved or _is_damaged(folder)):
                with contextlib.suppress(OSError):  # the new one is saved all the same; the next save tries again
                    discard(folder)

    def latest(self, message: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint, the first rank's choice for all; a damaged one is passed over, and said so.

        Raises `UserError`, on every rank, for one that is from a newer mtbert, and where there are some and none is
        intact: a start from step 0 would write over what can perhaps be read tomorrow, or put right.
        """
        choice: list[tuple[Checkpoint | None, str | None]] = [(None, None)]
        if self.rank.first:
            for left in [*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.old")]:
                shutil.rmtree(left, ignore_errors=True)  # of an attempt that was killed
            troubles: list[str] = []
            try:
                found = next(intact(self.folder.parent, troubles.append), None)
                if found is None and troubles:
                    why = f"{troubles[0].removeprefix(PASSED_OVER)}; no checkpoint there is intact"
                    raise UserError(f"{why}: put one right, or move {self.folder} away to begin again")
                choice = [(found, None)]
            except UserError as error:
                choice = [(None, str(error))]
            for passed_over in troubles:
                message(passed_over)
        dist.broadcast_object_list(choice)
        checkpoint, trouble = choice[0]
        if trouble:
            raise UserError(trouble)
        return checkpoint

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Every rank reads the spans it needs. Raises `UserError`, on every rank, for a checkpoint of another model."""
        _check_shapes(checkpoint, engine.shapes)
        steps = _steps_taken(checkpoint, [group.part for group in engine.groups])
        with _Reader(checkpoint) as reader:
            engine.load_state(reader.span, steps, checkpoint.manifest.averaged_steps)
        for file, part in _stateful(engine).items():
            known = file in checkpoint.manifest.files
            part.load_state_dict(_load_state(checkpoint.folder / file, len(engine.tasks)) if known else {})
        self.best = checkpoint.best


def _stateful(engine: Engine) -> dict[str, Surgery | Weighting]:
    return {"surgery.safetensors": engine.surgery, "weighting.safetensors": engine.weighting}


def _load_state(path: Path, tasks: int) -> dict[str, Tensor]:
    """What a method has learnt: a number per task of the run, or per pair of tasks, or one."""
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a valid safetensors file: {error}") from None
    for name, tensor in state.items():
        if tensor.ndim > 2 or max(tensor.shape, default=0) > tasks:
            raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, for {tasks} tasks; it was damaged")
    return state


def load_weights(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The whole fp32 weights of a checkpoint, put together from all ranks' shards: their average, where there is one,
    else those after the last step."""
    _check_shapes(checkpoint, shapes)
    state = "average" if checkpoint.manifest.averaged_steps else "master"
    with _Reader(checkpoint) as reader:
        return {name: reader.span(Span(name, 0, shape.numel(), 0), state).view(shape) for name, shape in shapes.items()}


def _is_damaged(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except (Unreadable, NewerFormat):
        return False
    except UserError:
        return True
    return False


def _check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Spans are flat: without this, a part of a larger matrix would pass for a smaller one."""
    wanted, found = {name: list(shape) for name, shape in shapes.items()}, checkpoint.manifest.shapes
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{checkpoint.folder}: {name} has shape {found.get(name)} there and {wanted.get(name)} in this run's "
                f"model; the checkpoint belongs to another configuration"
            )


def _steps_taken(checkpoint: Checkpoint, parts: list[str]) -> dict[str, int]:
    """AdamW's step count of every part of the model. `parts`: those of this run's groups of parameters."""
    manifest = checkpoint.manifest
    # before parts were kept, groups had to be the same; the encoder had one less, its table of words being with others
    theirs = manifest.adam_parts or parts[1:]
    steps = dict(zip(theirs, manifest.adam_steps, strict=False))
    if [steps.get(part) for part in theirs] != manifest.adam_steps or steps.keys() != set(parts):
        raise UserError(
            f"{checkpoint.folder}: AdamW's step counts do not fit this run's parameters; if optimizer.layer_decay or "
            f"optimizer.weight_decay has changed since, put it back"
        )
    return steps


class _Reader:
    """Spans of parameters out of the shards of a checkpoint, whatever number of ranks wrote it.

    Raises `UserError`, on every rank, unless the spans of every parameter make up the whole of it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __enter__(self) -> _Reader:
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        with contextlib.ExitStack() as files:
            for path in [self.checkpoint.folder / name for name in self.checkpoint.manifest.files if "rank-" in name]:
                try:
                    file = files.enter_context(safe_open(path, "pt"))
                except SafetensorError as error:
                    raise UserError(f"{path}: not a valid safetensors file: {error}") from None
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    name, start, stop, state = _parsed(key, file.get_slice(key), path)
                    self.pieces.setdefault((name, state), []).append((start, stop, file, key))
            self._check_whole()
            self.files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def _check_whole(self) -> None:
        manifest = self.checkpoint.manifest
        everywhere = ["master", "average"] if manifest.averaged_steps else ["master"]
        for name, state in self.pieces.keys() | {(name, state) for name in manifest.shapes for state in everywhere}:
            pieces = self.pieces.setdefault((name, state), [])
            pieces.sort(key=lambda piece: piece[:2])
            ends = [0, *(stop for _, stop, _, _ in pieces)]
            if [*(start for start, _, _, _ in pieces), math.prod(manifest.shapes.get(name, [-1]))] != ends:
                raise UserError(f"{self.checkpoint.folder}: does not hold {name} ({state}) whole; it was damaged")

    def span(self, span: Span, state: str) -> Tensor:
        out = torch.empty(span.stop - span.start)
        if (span.name, state) not in self.pieces:
            raise UserError(f"{self.checkpoint.folder}: does not hold {span.name} ({state}); it was damaged")
        for start, stop, file, key in self.pieces[span.name, state]:
            low, high = max(start, span.start), min(stop, span.stop)
            if low < high:
                out[low - span.start : high - span.start] = file.get_slice(key)[low - start : high - start]
        return out


def _parsed(key: str, tensor: Any, path: Path) -> tuple[str, int, int, str]:
    """Name, start, stop and state of a span."""
    found = re.fullmatch(r"(.+)\|(\d{1,18})\|(\d{1,18})\|(\w+)", key)
    if not found or tensor.get_shape() != [int(found[3]) - int(found[2])] or tensor.get_dtype() != "F32":
        raise UserError(f"{path}: {key} is no span of a parameter; it was damaged")
    return found[1], int(found[2]), int(found[3]), found[4]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)  # not the run folder itself: a shared one that is away would not be missed
    folder.mkdir()


def _save(tensors: dict[str, Tensor], path: Path) -> File:
    path.touch()  # who may read it is as for every other file of the run; `save_file` closes its own to others
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return File(size=path.stat().st_size, sha256=sha256(path))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
