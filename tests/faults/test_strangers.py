"""What a stranger may send: refused in one line, or read, and neither fills the memory nor leads out of its folder.

Each case runs in a process that may take `ROOM` bytes more than it has when it starts; the files hold gigabytes (they
are sparse) or claim to.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import forking_context
from safetensors.numpy import save_file

from launch.records import Lock, last_end, read_note
from mtbert.cli import main
from mtbert.config_files import load_config
from mtbert.data import load_tokenizer
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.manifest import read_manifest
from mtbert.pretrained import load_pretrained, read_shape, write_shape
from mtbert.readers import read_rows
from mtbert.record import PREDICTIONS, RunRecord
from mtbert.runs import check_run, create_run
from mtbert.trained import load_run

ROOM = 2**30
HUGE = 10 * 2**30


def sparse(path: Path, begins: bytes) -> None:
    path.write_bytes(begins)
    os.truncate(path, HUGE)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def tensor(shape: list[int], end: int) -> bytes:
    return (
        safetensors(json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()) + b"\0" * 8
    )


WEIGHTS = {
    "header of 2^63 bytes": safetensors(b"{}", 2**63),
    "header longer than the file": safetensors(b"{}", 90_000_000),
    "tensor of 2^62 bytes": tensor([2**60], 2**62),
    "tensor larger than the file": tensor([2**30], 2**32),
    "sizes whose product overflows": tensor([2**40, 2**40], 8),
    "nested": safetensors(b"[" * 2**20),
    "nothing": b"",
}


def say(call: Callable[[], Any], tell: Any) -> None:
    """In a process of its own."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    try:
        call()
        tell.send("accepted")
    except UserError as error:
        tell.send(str(error))
    except BaseException as error:
        tell.send(f"{type(error).__name__}\n{error}")


def told(function: Callable[..., Any], *arguments: Any) -> str:
    """The one line with which `function` refuses, in bounded memory."""
    context = forking_context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=say, args=(Call(function, arguments), send))
    process.start()
    send.close()
    try:
        answer: str = receive.recv()
    except EOFError:
        answer = "killed\n"
    process.join()
    assert "\n" not in answer and answer != "accepted", answer
    return answer


class Call:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        self.function(*self.arguments)


def all_rows(path: Path) -> None:
    for _ in read_rows(path, ["text"]):
        pass


def environment(run: Path) -> None:
    assert RunRecord(run).environment.command


def curves(run: Path) -> None:
    assert RunRecord(run).curves


def said(run: Path) -> None:
    assert RunRecord(run).said("latest")


@pytest.fixture
def copy(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------ large


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_line_of_ten_gigabytes(tmp_path: Path, name: str) -> None:
    sparse(tmp_path / name, b"text\nx" if name != "a.jsonl" else b'{"text": "')
    assert "longer than 16,777,216 bytes" in told(all_rows, tmp_path / name)


def test_large_files_where_small_ones_belong(copy: Path) -> None:
    for name, function in {
        "config.yaml": load_run,
        "environment.json": environment,
        "encoder/config.json": load_run,
        "encoder/origin.json": load_run,
        "encoder/tokenizer.json": load_run,
        "metrics.jsonl": curves,
    }.items():
        content = (copy / name).read_bytes()
        sparse(copy / name, b"{")
        assert name.rsplit("/")[-1] in told(function, copy, *["latest"] * (function is load_run))
        (copy / name).write_bytes(content)
    (copy / "job").mkdir()
    for name in ("job.json", "lock", "token-0.end.json"):
        sparse(copy / "job" / name, b"{")
    assert "job.json: not what a launcher wrote" in told(read_note, copy)
    assert "a lock that names nobody" in told(Lock(copy, "token-0").check)
    assert (end := last_end(copy, "token")) and end.status == "failed"
    newest = max((copy / "checkpoints").iterdir())
    sparse(newest / "manifest.json", b"{")
    assert "manifest.json: missing or not readable" in told(read_manifest, newest)


def test_aliases_of_aliases(tmp_path: Path) -> None:
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'lol'}]\n" for n in range(60)]
    (tmp_path / "laughs.yaml").write_text("".join(lines))
    assert "aliases" in told(load_config, tmp_path / "laughs.yaml")


# ------------------------------------------------------------------------------------- claims to be large


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(tmp_path: Path, copy: Path, kind: str) -> None:
    write_shape(EncoderShape(30, 8, 1, 2, 8, 16), tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[kind])
    assert "model.safetensors" in told(load_pretrained, str(tmp_path))


def test_a_shape_that_no_memory_holds(copy: Path, tmp_path: Path) -> None:
    """Neither a model folder nor a run folder is believed what its weights do not bear out."""
    path = copy / "encoder" / "config.json"
    sizes = {"vocab_size": 10**8, "hidden_size": 10**6, "intermediate_size": 10**8, "num_hidden_layers": 9}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    assert "changed since the run started" in told(load_run, copy, "latest")
    path.with_name("checksums.json").unlink()  # as a stranger would
    assert "belongs to another configuration" in told(load_run, copy, "latest")
    shutil.copy(path, tmp_path / "config.json")
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert "no tensor embeddings.word_embeddings.weight" in told(load_pretrained, str(tmp_path))
    for key in sizes:
        path.write_text(json.dumps({**json.loads(path.read_text()), **sizes, key: 10**30}))
        with pytest.raises(UserError, match="it must be a positive int"):
            read_shape(path)


def test_predictions_that_unpack_to_terabytes(copy: Path) -> None:
    path = max((copy / PREDICTIONS).iterdir())
    path.write_bytes(bomb(b"x" * 1000, 2**32 - 2))
    assert "when unpacked" in told(said, copy)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    path.write_bytes(bomb(header.getvalue() + b"\0" * 64, None))
    assert "it was damaged" in told(said, copy)
    path.write_bytes(b"PK\3\4 no archive")
    assert "it was damaged" in told(said, copy)


def bomb(content: bytes, claimed: int | None) -> bytes:
    """An archive whose one member claims to be `claimed` bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for task in ("sst", "para", "joint", "sts"):
            archive.writestr(f"{task}/ids_N.npy", content)
    size = struct.pack("<L", len(content))
    return packed.getvalue().replace(size, struct.pack("<L", claimed)) if claimed else packed.getvalue()


def test_files_of_a_tokenizer(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        sparse(tmp_path / name, b"[CLS]\n[SEP]\n")
        assert "which is no tokenizer" in told(load_tokenizer, tmp_path / name)


# ----------------------------------------------------------------------------------- out of the run folder


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "predictions", "encoder/tokenizer.json", "checkpoints/step-00000009"]
)
def test_links_out_of_the_run_folder(copy: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    path = copy / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    for which in (load_run, lambda run, _: check_run(run)):
        with pytest.raises(UserError, match=rf"{name}: is a link out of the run folder") as error:
            which(copy, "latest")
        assert "\n" not in str(error.value)
    for command in (["train", "--resume"], ["report"], ["compare"], ["checkpoint", "list"]):
        assert main([*command, str(copy)]) == 2
    with pytest.raises(UserError, match="is a link out of"):
        RunRecord(copy)
    assert not list(target.iterdir())


def test_links_within_the_run_folder_and_to_it_are_fine(copy: Path, tmp_path: Path) -> None:
    (copy / "newest").symlink_to("checkpoints")
    (copy / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to(copy)
    (copy / "code").symlink_to("../code")  # as in an array of runs
    check_run(tmp_path / "link")


def test_a_pipe_in_a_run_folder_does_not_hold_us_up(copy: Path) -> None:
    os.mkfifo(copy / "pipe")
    with pytest.raises(UserError, match="pipe: is neither a file nor a folder"):
        check_run(copy)


def test_a_file_that_goes_while_a_run_folder_is_checked(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list(os.walk(copy))
    (copy / "result.json").unlink()
    monkeypatch.setattr(os, "walk", lambda folder: seen)
    check_run(copy)


# ------------------------------------------------------------------------------------------------ secrets


def test_secrets_that_were_typed_do_not_get_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "opensesame42")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0123456789")
    config = load_config(None, [f"run.dir={tmp_path}", "tasks.a={kind: classification, train: t, dev: d}"])
    words = ["x=hf_abcdefghijklmnop", "https://me:pass@host/x", "token=abc", "opensesame42!", "tokenizer=t.json"]
    words += ["id=AKIA0123456789", "--token", "abc", "--api-key", "def", "--tokenizer", "t.json"]
    run = create_run(config, None, words)
    kept = json.loads((run / "environment.json").read_text())["command"]
    hidden = "[redacted]"
    wanted = [f"x={hidden}", f"https://{hidden}@host/x", f"token={hidden}", f"{hidden}!", "tokenizer=t.json"]
    assert kept == [*wanted, f"id={hidden}", "--token", hidden, "--api-key", hidden, "--tokenizer", "t.json"]
