"""Checkpoints of one rank on a model of a few numbers; shards of several ranks written by hand. Whole runs that are
saved, killed and resumed: test_trainer.py."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import PATIENCE_S
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from mtbert import checkpoint
from mtbert.checkpoint import (
    RETRY_S,
    Checkpointer,
    _check_shapes,
    _fsync_folder,
    _load_state,
    _make_empty,
    _Reader,
    _steps_taken,
    load_weights,
)
from mtbert.config import EngineConfig, OptimizerConfig, TaskConfig
from mtbert.encoder import WordEmbedding
from mtbert.engine import Engine, parameter_groups
from mtbert.errors import UserError
from mtbert.manifest import (
    Best,
    Checkpoint,
    Course,
    File,
    Manifest,
    NewerFormat,
    folder_of,
    open_checkpoint,
    sealed,
    sha256,
)
from mtbert.ranks import close_ranks, join_ranks
from mtbert.runs import Rank
from mtbert.surgery import Surgery
from mtbert.weighting import Weighting
from mtbert.zero import Span

TASKS = {name: TaskConfig(kind="classification", train="-", dev="-", classes=2) for name in ("one", "two")}
HISTORIES: list[list[tuple[int, list[float]]]] = [[(2, [0.25, 0.75])], []]
COURSE = Course(skips_in_a_row=1, precision="fp32", losses={"one": 0.5}, sums={"one": [1.0]}, counts={"steps": 2.0})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = nn.ModuleDict({"words": WordEmbedding(5, 4), "linear": nn.Linear(4, 3)})
            nn.init.normal_(self.encoder["words"].weight)
            self.heads = nn.ModuleDict({name: nn.Linear(3, 2) for name in TASKS})

    def loss(self, task: str, step: int) -> Tensor:
        inputs = self.encoder["words"](torch.tensor([1, 3]))[step % 2] + torch.arange(4.0) - step
        value: Tensor = (self.heads[task](self.encoder["linear"](inputs)) - len(task)).square().sum()
        return value if task == "one" else -value.tanh()


def make_engine(method: str = "gradvac", weighting: str = "dwa", ema: float | None = 0.5) -> Engine:
    model, optimizer = Model(), OptimizerConfig(lr=0.1, head_lr=0.1, ema=ema)
    groups = parameter_groups(model, optimizer, TASKS, layers=1)
    methods = Surgery(method, {}, 0), Weighting(weighting, {}, [False, False], 0)
    config = EngineConfig(precision="fp32")
    return Engine(model, groups, dict.fromkeys(TASKS, 1.0), config, optimizer, methods[0], Rank(), methods[1])


def go_on(engine: Engine, steps: range) -> Engine:
    for step in steps:
        losses = {
            number: [lambda name=name, step=step: engine.model.loss(name, step)] for number, name in enumerate(TASKS)
        }
        assert not engine.step(step, losses).skipped
    return engine


def numbers(engine: Engine) -> dict[str, list[float]]:
    """All that belongs to the parameters, and what the methods have learnt."""
    told = {f"{span}|{name}": value.tolist() for span, states in engine.state() for name, value in states.items()}
    for part in (engine.surgery, engine.weighting):
        told |= {name: value.tolist() for name, value in part.state_dict().items()}
    return told


@pytest.fixture(scope="module", autouse=True)
def imports() -> None:
    """Of an engine, half a minute on a busy machine, in no test's time: mutants.py goes by how long a test takes."""
    for name in ("deepspeed", "torch._dynamo"):
        importlib.import_module(name)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    join_ranks(Rank(), EngineConfig(threads=1))
    yield
    close_ranks()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def save(
    keeper: Checkpointer,
    step: int,
    engine: Engine,
    best: Best | None = None,
    message: Callable[[str], None] = pytest.fail,
) -> str | None:
    keeper.save(engine, step, best, message, HISTORIES, COURSE)
    return keeper.wait()


def names(run: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-000000") for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------- saved and loaded


def test_what_is_saved_comes_back_bit_for_bit(run: Path) -> None:
    engine = go_on(make_engine(), range(3))
    before = numbers(engine)
    with Checkpointer(run, Rank(), keep=1) as keeper:
        assert save(keeper, 3, engine, Best(step=2, score=0.5)) is None
        assert keeper.best == Best(step=2, score=0.5)
    manifest = open_checkpoint(folder_of(run, 3)).manifest
    assert manifest.files.keys() == {"rank-0-of-1.safetensors", "surgery.safetensors", "weighting.safetensors"}
    assert (manifest.step, manifest.best, manifest.averaged_steps) == (3, Best(step=2, score=0.5), 3)
    assert (manifest.histories, manifest.course) == (HISTORIES, COURSE)
    assert manifest.shapes == {name: list(parameter.shape) for name, parameter in Model().named_parameters()}
    assert set(zip(manifest.adam_parts, manifest.adam_steps, strict=True)) == {("encoder", 3), ("one", 3), ("two", 3)}

    resumed = make_engine()
    keeper = Checkpointer(run, Rank(), keep=1)
    found = keeper.latest(pytest.fail)
    assert found is not None and found.step == 3
    keeper.load(resumed, found)
    assert numbers(resumed) == before and keeper.best == Best(step=2, score=0.5)
    assert numbers(go_on(resumed, range(3, 5))) == numbers(go_on(engine, range(3, 5)))


def test_who_may_read_a_checkpoint_is_as_for_other_files(run: Path) -> None:
    before = os.umask(0o027)
    try:
        with Checkpointer(run, Rank(), keep=2) as keeper:
            save(keeper, 3, go_on(make_engine(), range(3)))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder_of(run, 3).iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_method_that_learns_nothing_has_no_file(run: Path) -> None:
    """And forgets, when it is loaded, what it has learnt since."""
    keeper = Checkpointer(run, Rank(), keep=1)
    engine = make_engine(weighting="fixed", ema=None)
    assert save(keeper, 0, engine) is None
    found = open_checkpoint(folder_of(run, 0))
    assert found.manifest.files.keys() == {"rank-0-of-1.safetensors"}
    assert found.manifest.adam_steps == [0] * 7 and found.manifest.averaged_steps == 0
    go_on(engine, range(2))
    assert engine.surgery.state_dict()
    keeper.load(engine, found)
    assert not engine.surgery.state_dict()


def test_training_goes_on_while_a_copy_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, gate = checkpoint._save, threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> File:
        assert gate.wait(PATIENCE_S)
        return write(tensors, path)

    monkeypatch.setattr(checkpoint, "_save", slow)
    engine = go_on(make_engine(), range(2))
    before = numbers(engine)
    with Checkpointer(run, Rank(), keep=1, every_s=0.0) as keeper:
        assert keeper.due()
        keeper.save(engine, 2, Best(step=2, score=1.0), pytest.fail, [], None)
        go_on(engine, range(2, 4))
        assert not keeper.due(), "at most one save is under way"
        assert keeper.best is None and not folder_of(run, 2).exists()
        assert keeper._group not in (None, dist.group.WORLD), "the thread's collectives must not meet with training's"
        gate.set()
        assert keeper.wait() is None and keeper.best == Best(step=2, score=1.0)
        assert keeper.due()
        keeper.load(engine, open_checkpoint(folder_of(run, 2)))
    assert numbers(engine) == before


@pytest.mark.parametrize(("error", "waits"), [(None, True), (NewerFormat("x"), True), (RuntimeError("x"), False)])
def test_leaving_waits_unless_other_ranks_may_be_gone(
    run: Path, error: Exception | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, gate = checkpoint._save, threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> File:
        gate.wait(0.5 if waits else PATIENCE_S)
        return write(tensors, path)

    monkeypatch.setattr(checkpoint, "_save", slow)
    engine = make_engine("sum", "fixed")
    with contextlib.suppress(NewerFormat, RuntimeError), Checkpointer(run, Rank(), keep=1) as keeper:
        keeper.save(engine, 1, None, pytest.fail, [], None)
        if error:
            raise error
    assert folder_of(run, 1).exists() == waits
    gate.set()
    keeper.wait()
    with pytest.raises(RuntimeError, match="after shutdown"):
        keeper.save(engine, 2, None, pytest.fail, [], None)


# ------------------------------------------------------------------------------------------- when, and what is kept


def test_when_a_save_is_due(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine = make_engine("sum", "fixed")

    def due(keeper: Checkpointer, seconds: float) -> list[bool]:
        """Half a second too early, and on time."""
        told = []
        for more in (seconds - 0.5, 0.5):
            clock.now += more
            told.append(keeper.due())
        return told

    keeper = Checkpointer(run, Rank(), keep=1, every_s=10)
    assert due(keeper, 10) == [False, True]
    assert save(keeper, 1, engine) is None
    assert due(keeper, 10) == [False, True]
    by_steps = Checkpointer(run, Rank(), keep=1)
    assert due(by_steps, 1e9) == [False, False]
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "checkpoints").touch()
    assert save(by_steps, 2, engine, message=lambda text: None)
    assert due(by_steps, RETRY_S) == [False, True]


def test_the_newest_and_the_best_are_kept(run: Path) -> None:
    keeper, engine = Checkpointer(run, Rank(), keep=2), make_engine("sum", "fixed")
    for step in range(1, 5):
        assert save(keeper, step, engine, Best(step=1, score=0.5)) is None
    assert names(run) == ["01", "03", "04"]
    assert save(keeper, 5, engine, Best(step=5, score=0.6)) is None
    assert names(run) == ["01", "04", "05"], "the best that step 4 knows stays as long as that one"
    assert save(keeper, 6, engine, Best(step=5, score=0.6)) is None
    assert names(run) == ["05", "06"]


def test_damaged_checkpoints_do_not_crowd_out_good_ones(tmp_path: Path) -> None:
    """10 is good, 12 was passed over as damaged, 11 is just saved: one is kept, and that is 11."""
    for step in (10, 11, 12):
        folder_of(tmp_path, step).mkdir(parents=True)
    keeper = Checkpointer(tmp_path, Rank(), keep=1)
    keeper._prune(folder_of(tmp_path, 11), Best(step=10, score=1.0))
    assert names(tmp_path) == ["10", "11"]
    blocker = tmp_path / "checkpoints" / ".step-00000010.old"
    blocker.write_text("in the way")
    folder_of(tmp_path, 9).mkdir()
    keeper._prune(folder_of(tmp_path, 11), None)  # what cannot go now goes later, and does not hold up the others
    assert names(tmp_path) == [blocker.name, "10", "11"]
    blocker.unlink()
    keeper._prune(folder_of(tmp_path, 11), None)
    assert names(tmp_path) == ["11"]


def test_a_newer_checkpoint_that_is_whole_stays(run: Path) -> None:
    """It was passed over because it could not be read that time: a file server's hiccup."""
    keeper, engine = Checkpointer(run, Rank(), keep=3), make_engine("sum", "fixed")
    for step in range(1, 4):
        save(keeper, step, engine)
    keeper = Checkpointer(run, Rank(), keep=1)
    keeper._prune(folder_of(run, 1), None)
    assert names(run) == ["01", "02", "03"]
    (folder_of(run, 3) / "manifest.json").write_text("{}")
    keeper._prune(folder_of(run, 1), None)
    assert names(run) == ["01", "02"], "damaged ones must not crowd out good ones"


def test_what_a_user_put_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    there = ["step-00000001", "step-00000002", "step-00000002.bak", "step-old"]
    for name in there:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    Checkpointer(tmp_path, Rank(), keep=1)._prune(folder_of(tmp_path, 2), None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == there[1:]


def test_a_damaged_checkpoint_of_the_same_step_gives_way(run: Path) -> None:
    keeper, engine = Checkpointer(run, Rank(), keep=1), make_engine("sum", "fixed")
    folder_of(run, 3).mkdir(parents=True)
    (folder_of(run, 3) / "rank-0-of-9.safetensors").write_text("damaged")
    (run / "checkpoints" / ".step-00000003.tmp").mkdir()
    (run / "checkpoints" / ".step-00000003.tmp" / "half").write_text("of an attempt that was killed")
    assert save(keeper, 3, engine) is None
    assert names(run) == ["03"]
    assert {path.name for path in folder_of(run, 3).iterdir()} == {"manifest.json", "rank-0-of-1.safetensors"}


def test_nothing_has_its_name_before_it_is_on_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def seen_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def seen_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    keeper = Checkpointer(run, Rank(), keep=1)
    assert save(keeper, 3, go_on(make_engine(), range(2))) is None
    whole = [event for event in events if not event[1].startswith(".manifest")]
    assert whole == [
        ("fsync", "rank-0-of-1.safetensors"),
        ("fsync", "surgery.safetensors"),
        ("fsync", "weighting.safetensors"),
        ("fsync", ".step-00000003.tmp"),
        ("rename", ".step-00000003.tmp"),
        ("fsync", "checkpoints"),
    ]
    manifest = next(place for place, event in enumerate(events) if event[1].startswith(".manifest"))
    assert manifest < events.index(("fsync", ".step-00000003.tmp")), "the folder's entry of it, too"


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = {*Path("/proc/self/fd").iterdir()}
    _fsync_folder(tmp_path)
    assert {*Path("/proc/self/fd").iterdir()} == before


# ------------------------------------------------------------------------------------------- saves that fail


def test_a_save_that_fails_leaves_the_older_ones_and_says_so(run: Path) -> None:
    """The disk takes no file over a kilobyte: as good as a full one."""
    said: list[str] = []
    keeper, engine = Checkpointer(run, Rank(), keep=1), make_engine("sum", "fixed")
    assert save(keeper, 1, engine, Best(step=1, score=0.1)) is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        trouble = save(keeper, 2, engine, Best(step=2, score=0.2), said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trouble == "step 2 could not be saved: File too large"
    assert said == [f"{trouble}; training goes on, and saving is tried again"]
    assert keeper.wait() == trouble, "until one succeeds"
    assert names(run) == ["01"] and keeper.best == Best(step=1, score=0.1)
    assert save(keeper, 3, engine, Best(step=3, score=0.3), said.append) is None
    assert said[1:] == ["step 3 is saved"] and keeper.best == Best(step=3, score=0.3)
    assert save(keeper, 4, engine) is None, "nothing is told of one that nobody waits for"


def test_a_run_folder_that_is_away_is_not_made_again(run: Path) -> None:
    run.rename(run.with_name("away"))
    keeper = Checkpointer(run, Rank(), keep=1)
    trouble = save(keeper, 1, make_engine("sum", "fixed"), message=lambda text: None)
    assert trouble == "step 1 could not be saved: No such file or directory" and not run.exists()


def test_what_could_not_be_read_back_is_not_saved(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, engine = Checkpointer(run, Rank(), keep=1), make_engine("sum", "fixed")
    assert save(keeper, 1, engine) is None
    size = (folder_of(run, 1) / "manifest.json").stat().st_size
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST", size)
    assert save(keeper, 2, engine) is None
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST", size - 1)
    trouble = save(keeper, 3, engine, message=lambda text: None)
    told = f"manifest.json has {size:,} bytes, and no more than {size - 1:,} are read back"
    assert trouble == f"step 3 could not be saved: {told}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file"), "No space left on device"),
        (OSError("something"), "something"),
        (
            SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
            "Disk quota exceeded",
        ),
        (SafetensorError("of another sort"), "of another sort"),
    ],
)
def test_the_cause_is_told_on_every_rank(run: Path, error: Exception, told: str) -> None:
    def fail() -> None:
        raise error

    keeper = Checkpointer(run, Rank(), keep=1)
    with pytest.raises(OSError, match=f"^{told}$"):
        keeper._on_every_rank(fail)
    assert keeper._on_every_rank(lambda: (1, "x")) == [(1, "x")]


# ------------------------------------------------------------------------------------------- what is found


def test_the_first_rank_sweeps_and_chooses(run: Path) -> None:
    keeper, engine = Checkpointer(run, Rank(), keep=2), make_engine("sum", "fixed")
    assert keeper.latest(pytest.fail) is None
    for step in (1, 2):
        assert save(keeper, step, engine) is None
    damaged = folder_of(run, 2) / "rank-0-of-1.safetensors"
    damaged.unlink()
    for left in (".step-00000002.tmp", ".step-00000001.old"):
        (run / "checkpoints" / left).mkdir()
        (run / "checkpoints" / left / "half").touch()
    stuck = run / "checkpoints" / ".step-00000003.tmp"
    stuck.write_text("no folder: what cannot be swept stays")
    assert Checkpointer(run, Rank(1, 2), keep=2).latest(pytest.fail) is None, "another rank is told"
    assert len(names(run)) == 5
    said: list[str] = []
    found = keeper.latest(said.append)
    assert found is not None and found.step == 1
    assert said == [f"checkpoint passed over: {damaged}: missing; the checkpoint is not complete"]
    assert names(run) == [stuck.name, "01", "02"]
    manifest = folder_of(run, 2) / "manifest.json"
    manifest.write_text(sealed({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99 is from a newer mtbert"):
        keeper.latest(pytest.fail)


# ------------------------------------------------------------------------------------------- shards of several ranks

WHOLE = {"encoder.w": torch.arange(6.0).view(2, 3), "heads.one.b": torch.arange(10.0, 14.0)}
SPANS = [
    {"encoder.w|0|3|master": WHOLE["encoder.w"].flatten()[:3], "heads.one.b|3|4|master": WHOLE["heads.one.b"][3:]},
    {"encoder.w|3|6|master": WHOLE["encoder.w"].flatten()[3:], "heads.one.b|0|3|master": WHOLE["heads.one.b"][:3]},
]
SHAPES = {name: value.shape for name, value in WHOLE.items()}


def write(folder: Path, shards: list[dict[str, Tensor]], **values: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"rank-{rank}-of-{len(shards)}.safetensors" for rank in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    save_file({"gradvac.x": torch.zeros(2)}, folder / "surgery.safetensors")
    files = {path.name: File(size=path.stat().st_size, sha256=sha256(path)) for path in folder.iterdir()}
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    known = {"format": 1, "step": 7, "adam_steps": [], "best": None, "shapes": shapes, "files": files}
    return Checkpoint(folder, Manifest(**{**known, **values}))


def averages(shards: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**shard, **{key.replace("master", "average"): -value for key, value in shard.items()}} for shard in shards]


def test_weights_are_put_together_from_all_ranks(tmp_path: Path) -> None:
    """Those of the average, where there is one."""
    found = load_weights(write(tmp_path / "last", SPANS), SHAPES)
    assert found.keys() == WHOLE.keys() and all(torch.equal(found[name], WHOLE[name]) for name in WHOLE)
    found = load_weights(write(tmp_path / "average", averages(SPANS), averaged_steps=1), SHAPES)
    assert found.keys() == WHOLE.keys() and all(torch.equal(found[name], -WHOLE[name]) for name in WHOLE)


def test_any_part_is_read_from_whatever_files_hold_it(tmp_path: Path) -> None:
    whole = WHOLE["encoder.w"].flatten()
    with _Reader(write(tmp_path / "all", SPANS)) as reader:
        for start in range(7):
            for stop in range(start, 7):
                part = reader.span(Span("encoder.w", start, stop, 5), "master")
                assert torch.equal(part, whole[start:stop]), (start, stop)
        for name, state in (("encoder.w", "exp_avg"), ("encoder.v", "master")):
            with pytest.raises(UserError, match=rf"all: does not hold {name} \({state}\); it was damaged"):
                reader.span(Span(name, 0, 1, 0), state)
        files = [piece[2] for pieces in reader.pieces.values() for piece in pieces]
    for file in files:
        with pytest.raises(SafetensorError, match="closed"):
            file.keys()


def changed(*drop: str, **more: Tensor) -> list[dict[str, Tensor]]:
    kept = [{key: value for key, value in shard.items() if key not in drop} for shard in SPANS]
    return [kept[0], {**kept[1], **more}]


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        (changed("encoder.w|0|3|master"), r"does not hold encoder\.w \(master\) whole"),
        (changed(**{"encoder.w|0|3|master": torch.zeros(3)}), r"does not hold encoder\.w \(master\) whole"),
        (changed("encoder.w|3|6|master"), r"does not hold encoder\.w \(master\) whole"),
        (
            changed("encoder.w|3|6|master", **{"encoder.w|4|6|master": torch.zeros(2)}),
            r"does not hold encoder\.w \(master\) whole",
        ),
        (
            changed("encoder.w|3|6|master", **{"encoder.w|2|6|master": torch.zeros(4)}),
            r"does not hold encoder\.w \(master\) whole",
        ),
        (changed(**{"encoder.w|6|7|master": torch.zeros(1)}), r"does not hold encoder\.w \(master\) whole"),
        (changed(**{"encoder.w|0|5|exp_avg": torch.zeros(5)}), r"does not hold encoder\.w \(exp_avg\) whole"),
        (changed(**{"other|0|1|master": torch.zeros(1)}), r"does not hold other \(master\) whole"),
        (changed("heads.one.b|0|3|master", "heads.one.b|3|4|master"), r"does not hold heads\.one\.b \(master\) whole"),
        (changed(**{"encoder.w|0|6": torch.zeros(6)}), r"encoder\.w\|0\|6 is no span"),
        (changed(**{"w|0|6|master|": torch.zeros(6)}), r"w\|0\|6\|master\| is no span"),
        (changed(**{"encoder.w|0|6|exp_avg": torch.zeros(5)}), r"encoder\.w\|0\|6\|exp_avg is no span"),
        (changed(**{"encoder.w|0|6|exp_avg": torch.zeros(6).double()}), r"encoder\.w\|0\|6\|exp_avg is no span"),
        (changed(**{"encoder.w|0|6|exp_avg": torch.zeros(2, 3)}), r"encoder\.w\|0\|6\|exp_avg is no span"),
        (changed(**{f"w|0|{10**18}|exp_avg": torch.zeros(6)}), r".*exp_avg is no span"),
    ],
)
def test_spans_that_make_up_no_model_are_refused(tmp_path: Path, shards: list[dict[str, Tensor]], told: str) -> None:
    with (
        pytest.raises(UserError, match=rf"{tmp_path}/bad.*: {told}.*; it was damaged"),
        _Reader(write(tmp_path / "bad", shards)),
    ):
        pass


def test_an_average_that_is_missing_is_noticed(tmp_path: Path) -> None:
    found = write(tmp_path / "bad", SPANS, averaged_steps=1)
    with pytest.raises(UserError, match=r"\(average\) whole"), _Reader(found):
        pass
    shards = averages(SPANS)
    del shards[0]["encoder.w|0|3|average"]
    with pytest.raises(UserError, match=r"encoder\.w \(average\) whole"), _Reader(write(tmp_path / "half", shards)):
        pass


def test_a_shard_that_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    found = write(tmp_path / "bad", SPANS)
    (tmp_path / "bad" / "rank-1-of-2.safetensors").write_text("something else, and long enough")
    with pytest.raises(UserError, match=r"rank-1-of-2\.safetensors: not a valid safetensors file: "), _Reader(found):
        pass


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    found = write(tmp_path / "other", SPANS)
    _check_shapes(found, SHAPES)
    for shapes, told in (
        (
            {**SHAPES, "encoder.w": torch.Size([3, 2])},
            r"encoder\.w has shape \[2, 3\] there and \[3, 2\] in this run's",
        ),
        ({"encoder.w": SHAPES["encoder.w"]}, r"heads\.one\.b has shape \[4\] there and None in"),
        ({**SHAPES, "a": torch.Size([1])}, r"a has shape None there and \[1\] in"),
    ):
        for refuse in (_check_shapes, load_weights):
            with pytest.raises(UserError, match=rf"{tmp_path}/other: {told}.*belongs to another configuration"):
                refuse(found, shapes)
    with pytest.raises(UserError, match=r"encoder\.linear\.bias has shape None there and \[3\] in this run's model"):
        Checkpointer(tmp_path, Rank(), keep=1).load(make_engine("sum", "fixed"), found)


@pytest.mark.parametrize(
    ("theirs", "counts", "ours", "steps"),
    [
        (["encoder", "encoder", "one"], [3, 3, 2], ["encoder", "one"], {"encoder": 3, "one": 2}),
        ([], [3, 2], ["encoder", "encoder", "one"], {"encoder": 3, "one": 2}),
        (["encoder", "encoder"], [3, 2], ["encoder"], None),
        (["encoder"], [3], ["encoder", "one"], None),
        (["encoder", "one"], [3, 2], ["encoder"], None),
        (["encoder", "one"], [3], ["encoder"], None),
        (["encoder"], [3, 2], ["encoder"], None),
        ([], [3], ["encoder", "encoder", "one"], None),
        ([], [3, 3, 2], ["encoder", "encoder", "one"], None),
        ([], [], ["encoder", "encoder"], None),
    ],
)
def test_step_counts_go_by_parts(
    tmp_path: Path, theirs: list[str], counts: list[int], ours: list[str], steps: dict[str, int] | None
) -> None:
    found = write(tmp_path / "some", SPANS, adam_parts=theirs, adam_steps=counts)
    if steps is not None:
        assert _steps_taken(found, ours) == steps
        return
    told = r"some: AdamW's step counts do not fit this run's parameters; if optimizer\.layer_decay or optimizer\.weight"
    with pytest.raises(UserError, match=told):
        _steps_taken(found, ours)


def test_what_no_method_has_learnt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weighting.safetensors"
    state = {"dwa.a": torch.zeros(3, 3), "dwa.b": torch.ones(2), "dwa.c": torch.tensor(4.0)}
    save_file(state, path)
    read = _load_state(path, tasks=3)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    for shape in ([4], [3, 4], [4, 3], [1, 1, 1]):
        save_file({"dwa.a": torch.zeros(shape)}, path)
        told = rf"weighting\.safetensors: dwa\.a has shape \[{str(shape)[1:-1]}\], for 3 tasks; it was damaged"
        with pytest.raises(UserError, match=told):
            _load_state(path, tasks=3)
    path.write_text("no such file")
    with pytest.raises(UserError, match=r"weighting\.safetensors: not a valid safetensors file: "):
        _load_state(path, tasks=3)


def test_an_empty_folder_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        _make_empty(tmp_path / "checkpoints" / "new")
        assert not [*(tmp_path / "checkpoints" / "new").iterdir()]
        (tmp_path / "checkpoints" / "new" / "left").touch()
    with pytest.raises(FileNotFoundError):
        _make_empty(tmp_path / "gone" / "checkpoints" / "new")
