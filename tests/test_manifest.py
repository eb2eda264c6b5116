"""Checkpoints looked at, checked and removed from outside; and manifests that nobody's training wrote."""

from __future__ import annotations

import datetime
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbert import manifest
from mtbert.checkpoint import Checkpointer
from mtbert.cli import main
from mtbert.errors import UserError
from mtbert.manifest import (
    Best,
    File,
    Manifest,
    NewerFormat,
    discard,
    find_checkpoint,
    folder_of,
    intact,
    open_checkpoint,
    prune,
    read_manifest,
    sealed,
    sha256,
    survey,
    with_the_best,
)
from mtbert.runs import FORMAT, Rank

SHARD = "rank-0-of-1.safetensors"


def make(run: Path, *steps: int, best: int | None = None) -> Path:
    """A run folder with checkpoints that hold a few bytes."""
    run.mkdir()
    (run / "config.yaml").touch()
    for step in steps:
        folder = folder_of(run, step)
        folder.mkdir(parents=True)
        (folder / SHARD).write_bytes(b"%d" % step)
        manifest = Manifest(
            format=FORMAT,
            step=step,
            adam_steps=[step],
            best=None if best is None else Best(step=best, score=0.5),
            shapes={"w": [2]},
            files={SHARD: File(size=len(str(step)), sha256=sha256(folder / SHARD))},
        )
        (folder / "manifest.json").write_text(sealed(manifest.model_dump(mode="json")))
    return run


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(sealed({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------- the commands


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", 10, 20, 30, best=20)
    assert main(["checkpoint", "verify", str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["step", "saved", "MB", "ranks", "state"]
    assert [(row[0], " ".join(row[5:])) for row in rows[1:]] == [
        *[("10", "intact"), ("20", "intact, best"), ("30", "intact, newest")],
    ]
    (folder_of(run, 30) / SHARD).write_bytes(b"31")
    assert main(["checkpoint", "list", str(run), "--json"]) == 0, "the bytes are not looked at"
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(each["step"], each["bytes"], each["ranks"], each["state"]) for each in listed] == [
        (step, 2, 1, "not read") for step in (10, 20, 30)
    ]
    assert main(["checkpoint", "verify", str(run), "--json"]) == 1
    printed = capsys.readouterr()
    assert [each["notes"] for each in json.loads(printed.out)["checkpoints"]] == [[], ["newest", "best"], []]
    assert (
        printed.err
        == f"mtbert: {folder_of(run, 30) / SHARD}: its checksum is not the one in manifest.json; it was damaged\n"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "RUN"], "RUN: has no checkpoint yet"),
        (["verify", "RUN"], "RUN: has no checkpoint yet"),
        (["prune", "RUN", "--keep", "1"], "RUN: has no checkpoint yet"),
        (["prune", "RUN", "--keep", "0"], "--keep 0: the newest one always stays; give 1 or more"),
    ],
    ids=itertools.count(),
)
def test_mistakes(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "RUN")
    assert main(["checkpoint", *arguments]) == 2
    assert capsys.readouterr().err == f"mtbert: {told}\n"


def test_prune_keeps_the_newest_intact_ones_and_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 is damaged, so the newest is 30; 10 is the best."""
    run = make(tmp_path / "run", 10, 15, 20, 30, 40, best=10)
    (folder_of(run, 40) / SHARD).unlink()
    assert main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0
    assert steps(run) == [10, 20, 30]
    assert capsys.readouterr().out == "".join(f"removed {folder_of(run, step)}\n" for step in (15, 40))
    assert main(["checkpoint", "prune", str(run), "--keep", "9"]) == 0
    assert steps(run) == [10, 20, 30]


def test_the_best_stays_that_an_older_one_knows(tmp_path: Path) -> None:
    """30 is better than 10, and then turns out to be damaged."""
    for name, remove in {
        "asked": lambda run: main(["checkpoint", "prune", str(run), "--keep", "2"]),
        "after a save": lambda run: Checkpointer(run, Rank(), keep=2)._prune(folder_of(run, 30), None),
    }.items():
        run = make(tmp_path / name, 5, 10, 20, 30, best=10)
        rewrite(folder_of(run, 30), best={"step": 30, "score": 0.6})
        remove(run)
        assert steps(run) == [10, 20, 30]
        (folder_of(run, 30) / SHARD).unlink()
        assert find_checkpoint(run, "best").step == 10
        (folder_of(run, 10) / SHARD).unlink()
        with pytest.raises(UserError, match=r"missing.*It is the best one; --checkpoint latest takes that of step 20"):
            find_checkpoint(run, "best")


def test_prune_removes_nothing_where_nothing_is_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", 10, 20)
    for step in (10, 20):
        (folder_of(run, step) / SHARD).write_text("")
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
    assert capsys.readouterr().err == f"mtbert: {run}: none of its 2 checkpoints is intact; nothing was removed\n"
    shutil.rmtree(folder_of(run, 20))
    rewrite(folder_of(run, 10), format=FORMAT + 1)
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
    assert "from a newer mtbert" in capsys.readouterr().err
    assert steps(run) == [10]


def test_best_and_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "run", 10, 20, best=10)
    assert [find_checkpoint(run, which).step for which in ("best", "latest")] == [10, 20]
    (folder_of(run, 20) / "manifest.json").unlink()
    told: list[str] = []
    assert find_checkpoint(run, "latest", told.append).step == 10
    assert len(told) == 1 and told[0].startswith("checkpoint passed over: ") and str(folder_of(run, 20)) in told[0]
    capsys.readouterr()
    rewrite(folder_of(run, 10), best={"step": 10, "score": 0.5})
    assert find_checkpoint(run, "best").step == 10
    assert capsys.readouterr().err.splitlines()[1:] == [
        "mtbert: which checkpoint is the best is what that of step 10 knows"
    ]


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 10, 20)
    (folder_of(run, 20) / SHARD).unlink()
    told: list[str] = []
    assert [checkpoint.step for checkpoint in intact(run, told.append)] == [10]
    assert told == [f"checkpoint passed over: {folder_of(run, 20) / SHARD}: missing; the checkpoint is not complete"]
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(make(tmp_path / "empty"), "latest")
    (folder_of(run, 10) / SHARD).write_text("1")
    with pytest.raises(UserError, match=rf"{folder_of(run, 20) / SHARD}: missing"):  # the newest one's trouble
        find_checkpoint(run, "latest")


def test_a_damaged_checkpoint_knows_no_best(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 10, 20, 30, best=10)
    (folder_of(run, 30) / "manifest.json").write_text("{")
    kept = [folder_of(run, 30), folder_of(run, 20)]
    assert with_the_best(kept) == {*kept, folder_of(run, 10)}


@pytest.mark.parametrize("name", [SHARD, "manifest.json"])
def test_what_the_disk_does_not_give_back_is_passed_over(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run", 10, 20)
    opened = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == folder_of(run, 20) / name:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    told: list[str] = []
    assert [checkpoint.step for checkpoint in intact(run, told.append)] == [10]
    assert len(told) == 1 and name in told[0]
    assert [not state.trouble for state in survey(run, thorough=True)] == [True, False]
    with pytest.raises(UserError, match=f"{name}.*; nothing was removed"):
        prune(run, keep=1)
    assert steps(run) == [10, 20]


def test_training_that_goes_on_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes 10 while that is looked at, 20 when it has been."""
    run = make(tmp_path / "run", 10, 20, 30)
    opened = manifest.open_checkpoint

    def slow(folder: Path) -> manifest.Checkpoint:
        if folder == folder_of(run, 10):
            discard(folder)
            discard(folder_of(run, 20))
        return opened(folder)

    monkeypatch.setattr(manifest, "open_checkpoint", slow)
    assert [(each.record()["step"], each.trouble) for each in survey(run, thorough=True)] == [(20, ""), (30, "")]
    monkeypatch.undo()
    other = make(tmp_path / "other", 10, 20)

    def late(folder: Path) -> None:
        shutil.rmtree(folder)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(manifest, "discard", late)
    assert prune(other, keep=1) == []
    assert steps(other) == [20]


def test_a_folder_that_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run", 10, 20)

    def refused(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(manifest, "discard", refused)
    with pytest.raises(UserError, match=r"step-00000010: cannot be removed: Permission denied$"):
        prune(run, keep=1)


def test_what_is_told_of_a_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 10, 20, 30, best=20)
    (folder_of(run, 30) / "manifest.json").unlink()
    moment = datetime.datetime(2026, 3, 4, 5, 6, 7, 890_000)
    for step in (10, 20, 30):
        os.utime(folder_of(run, step), (0, moment.timestamp()))
    common = {"saved": "2026-03-04 05:06:07", "bytes": 2, "ranks": 1}
    for thorough, state in ((True, "intact"), (False, "not read")):
        assert [each.record() for each in survey(run, thorough)] == [
            {"step": 10, **common, "state": state, "notes": []},
            {"step": 20, **common, "state": state, "notes": ["newest", "best"]},
            {"step": 30, **common, "bytes": None, "ranks": None, "state": "damaged", "notes": []},
        ]
    assert [state.checkpoint is None for state in survey(run, thorough=False)] == [False, False, True]


def test_keeping_none_is_our_own_bug(tmp_path: Path) -> None:
    run = make(tmp_path / "run", 10)
    with pytest.raises(AssertionError):
        prune(run, keep=0)
    assert prune(run, keep=1) == []


def test_a_checkpoint_goes_whole(tmp_path: Path) -> None:
    """Also where an attempt that was killed has left one half gone."""
    run = make(tmp_path / "run", 10)
    (run / "checkpoints" / ".step-00000010.old").mkdir()
    (run / "checkpoints" / ".step-00000010.old" / "half").touch()
    discard(folder_of(run, 10))
    assert not [*(run / "checkpoints").iterdir()]


# -------------------------------------------------------------------------------- manifests of strangers


def test_damage_is_told_in_full(tmp_path: Path) -> None:
    """One line: the file, what is wrong with it, and what that means."""

    def told(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            open_checkpoint(folder)
        return str(error.value)

    folder = folder_of(make(tmp_path / "run", 10), 10)
    path, shard = folder / "manifest.json", folder / SHARD
    whole = path.read_text()
    path.write_text("{")
    assert told(folder) == f"{path}: missing or not readable; the checkpoint is not complete"
    path.write_text(whole.replace('"step": 10', '"step": 11'))
    assert told(folder) == f"{path}: its checksum is not the one it holds; it was damaged"
    path.write_text(sealed({**json.loads(whole), "format": 3}))
    assert told(folder) == f"{path}: format 3 is from a newer mtbert, this one reads up to 2; update it"
    path.write_text(sealed({**json.loads(whole), "files": {SHARD: {"size": 2, "sha256": 5}}}))
    assert told(folder) == f"{path}: files.{SHARD}.sha256: Input should be a valid string; it was damaged"
    path.write_text("7")
    assert told(folder).startswith(f"{path}: the file: Input should be an object")
    path.write_text(sealed({**json.loads(whole), "step": 11}))
    assert told(folder) == f"{path}: is that of step-00000011; it was damaged, or the folder renamed"
    path.write_text(whole)
    shard.write_text("1")
    assert told(folder) == f"{shard}: 1 bytes instead of 2; it is cut short"
    shard.write_text("11")
    assert told(folder) == f"{shard}: its checksum is not the one in manifest.json; it was damaged"
    shard.unlink()
    assert told(folder) == f"{shard}: missing; the checkpoint is not complete"
    (tmp_path / "elsewhere").write_text("10")
    shard.symlink_to(tmp_path / "elsewhere")
    assert told(folder) == f"{shard}: is a link; a checkpoint holds its files itself"
    for name in ("step-00000010", "step-00000012"):
        link = tmp_path / name
        link.symlink_to(folder)
        assert told(link) == f"{link}/manifest.json: is behind a link; a checkpoint holds its files itself"


def test_a_seal_is_that_of_the_values_in_any_order(tmp_path: Path) -> None:
    folder = folder_of(make(tmp_path / "run", 10), 10)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(values.items()))))
    assert open_checkpoint(folder).step == 10
    assert sealed(values) == sealed({**values, "sha256": "that of before"})


def test_a_manifest_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(make(tmp_path / "run", 10), 10)
    size = (folder / "manifest.json").stat().st_size
    monkeypatch.setattr(manifest, "MAX_MANIFEST", size)
    assert read_manifest(folder).step == 10
    monkeypatch.setattr(manifest, "MAX_MANIFEST", size - 1)
    with pytest.raises(UserError, match="missing or not readable"):
        read_manifest(folder)


def test_what_is_longer_than_a_block_has_the_same_checksum(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2**13  # two blocks and no more, then a little more
    for more in (b"", b"x"):
        (tmp_path / "large").write_bytes(content + more)
        assert sha256(tmp_path / "large") == hashlib.sha256(content + more).hexdigest()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"files": {"../../secret": {"size": 1, "sha256": "0" * 64}}},
            "should match pattern",
        ),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}}, "should match pattern"),
        ({"files": {f"{SHARD}\n": {"size": 1, "sha256": "0" * 64}}}, "should match pattern"),
        ({"files": {SHARD: {"size": -1, "sha256": "0" * 64}}}, r"files\.rank-0.*size: .*greater than or equal to 0"),
        ({"files": {SHARD: {"size": 2, "sha256": "short"}}}, "should match pattern"),
        ({"step": "10"}, "step: .*valid integer"),
        ({"step": None}, "step: .*valid integer"),
        ({"shapes": {"w": [-1]}}, "greater than or equal to 0"),
        ({"best": {"step": 3}}, r"best\.score: Field required"),
        ({"histories": [[[1, "x"]]]}, "should be a valid (list|array)"),
        ({"averaged_stops": 3}, "averaged_stops: Extra inputs are not permitted"),
        ({"step": 11}, "is that of step-00000011"),
    ],
    ids=itertools.count(),
)
def test_a_manifest_that_no_training_wrote_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folder = folder_of(make(tmp_path / "run", 10), 10)
    rewrite(folder, **change)
    with pytest.raises(UserError, match=rf"manifest\.json: .*{told}") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"1", b"null", b"{", b"\xff", b"[" * 100_000, b"{}", b'{"format": "x"}'],
    ids=itertools.count(),
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        read_manifest(tmp_path)


def test_links_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = folder_of(make(tmp_path / "run", 10), 10)
    for name in (SHARD, "manifest.json"):
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        (copy / name).unlink()
        (copy / name).symlink_to(folder / name)
        with pytest.raises(UserError, match="link"):
            open_checkpoint(copy)
        shutil.rmtree(copy)


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    """Whatever else is new about it."""
    folder = folder_of(make(tmp_path / "run", 10), 10)
    (folder / "manifest.json").write_text(sealed({"format": FORMAT + 1, "spans": []}))
    with pytest.raises(NewerFormat):
        open_checkpoint(folder)


def test_a_flipped_format_is_damage(tmp_path: Path) -> None:
    """In a manifest with a checksum, and in one of format 1 without: an older checkpoint is then taken."""
    run = make(tmp_path / "run", 10, 20)
    path = folder_of(run, 20) / "manifest.json"
    with_checksum = path.read_text()
    values = {**json.loads(with_checksum), "format": 1}
    del values["sha256"]
    for text in (with_checksum, json.dumps(values)):
        path.write_text(text)
        assert find_checkpoint(run, "latest").step == 20
        for other in "013":
            if (flipped := re.sub('"format": .', f'"format": {other}', text)) != text:
                path.write_text(flipped)
                assert find_checkpoint(run, "latest").step == 10


def test_a_manifest_of_this_format_lacks_nothing(tmp_path: Path) -> None:
    """Not its checksum either, without which a flipped bit would pass."""
    folder = folder_of(make(tmp_path / "run", 10), 10)
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    for name in Manifest.model_fields:
        less = {key: value for key, value in whole.items() if key != name}
        path.write_text(json.dumps(less) if name == "sha256" else sealed(less))
        with pytest.raises(UserError, match=r"checksum is missing|Field required|not the one it holds"):
            read_manifest(folder)
        if name in ("adam_parts", "averaged_steps", "course", "histories"):
            path.write_text(sealed({**less, "format": 1}))
            assert read_manifest(folder).step == 10
    path.write_text(json.dumps({**whole, "sha256": None}))
    with pytest.raises(UserError, match=r"its checksum is missing; it was damaged$"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from([*Manifest.model_fields, "more"]), JSON))
def test_any_json_is_a_manifest_or_a_mistake(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    folder = folder_of(make(tmp_path_factory.mktemp("any") / "run", 10), 10)
    rewrite(folder, **values)
    try:
        open_checkpoint(folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", [SHARD, "manifest.json"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: bytes([b[0] ^ 1]) + b[1:]])
def test_every_damage_to_a_file_is_seen(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    folder = folder_of(make(tmp_path / "run", 10), 10)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match=name):
        open_checkpoint(folder)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = folder_of(make(tmp_path / "run", 10, best=10), 10)
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place, bit in itertools.product(range(len(content)), range(8)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"manifest\.json: ") as error:
            read_manifest(folder)
        assert not isinstance(error.value, NewerFormat)
