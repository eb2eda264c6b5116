"""A task is YAML alone; the generated corpus is made once, whole; the tokenizer is found or asked for."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from torch.nn import functional as F

from mtbert import synthetic
from mtbert.config import Config
from mtbert.config_files import load_config
from mtbert.data import load_tokenizer
from mtbert.encoder import EncoderShape
from mtbert.errors import UserError
from mtbert.files import HOST
from mtbert.heads import MultiTaskModel
from mtbert.phases import plan
from mtbert.tasks import Task, load_tasks, locate_data, locate_tokenizer

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def quick(cache: Path, *overrides: str) -> Config:
    sizes = ["data.generate.train=60", "data.generate.dev=20", f"data.cache={cache}"]
    return load_config(QUICKSTART, [*sizes, *overrides])


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------- from YAML alone


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


TOPICS = {
    "kind": "classification",
    "train": "topics.csv",
    "dev": "topics.csv",
    "columns": {"text": ["headline"], "label": "topic"},
    "classes": 3,
    "head": {"hidden": [8]},
    "metric": "f1",
    "batch_size": 4,
}
ENTAILS = {
    "kind": "pair_classification",
    "train": "entails.jsonl",
    "dev": "entails.jsonl",
    "columns": {"text": ["premise", "hypothesis"], "label": "entailed"},
    "head": {"kind": "concat"},
}


def write_own_data(folder: Path) -> None:
    words = ["the doctor", "hired a cook", "a fine film", "two chairs", "never"]
    headlines = [[f"{words[n % 5]} {words[n % 3]}", n % 3] for n in range(11)]
    write_csv(folder / "topics.csv", ["headline", "topic"], headlines)
    pairs = [{"premise": words[n % 5], "hypothesis": words[n % 4], "entailed": n % 2} for n in range(9)]
    (folder / "entails.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.parametrize(("name", "values", "count"), [("topics", TOPICS, 11), ("entails", ENTAILS, 9)])
def test_a_fourth_task_needs_no_code(
    name: str, values: dict[str, Any], count: int, cache: Path, tmp_path: Path
) -> None:
    """Its file's absolute path leads out of the generated corpus, in which the other three lie."""
    write_own_data(tmp_path)
    files = {split: str(tmp_path / values[split]) for split in ("train", "dev")}
    over = {"base": str(QUICKSTART), "tasks": {name: {**values, **files}}}
    path = tmp_path / "four.yaml"
    path.write_text(yaml.safe_dump(over))
    config = load_config(path, ["data.generate.train=60", "data.generate.dev=20", f"data.cache={cache}"])
    data = locate_data(config)
    tokenizer = locate_tokenizer(config, data, None)
    tasks = load_tasks(config, data, tokenizer, 32)
    assert [task.name for task in tasks] == ["sst", "para", "sts", name]
    fourth = tasks[-1]
    assert len(fourth.train) == len(fourth.dev) == count

    [phase] = plan(config, [task.tokens_N("train") for task in tasks])
    share = phase.schedule.shares(0, 0, 1)[3]
    batch = fourth.batch("train", share.micro_batches[0])
    assert len(batch.labels_B) == share.examples <= (values.get("batch_size") or 32)

    shape = EncoderShape(tokenizer.get_vocab_size(), 8, 1, 2, 16, 32)
    model = MultiTaskModel(shape, config.encoder, config.tasks, seed=0)
    answers = model(name, batch.packed)
    losses = fourth.example_losses(answers, batch.labels_B)
    assert losses.shape == (share.examples,)
    if name == "topics":
        torch.testing.assert_close(losses, F.cross_entropy(answers, batch.labels_B, reduction="none"))
    else:
        wanted = F.binary_cross_entropy_with_logits(answers, batch.labels_B.float(), reduction="none")
        torch.testing.assert_close(losses, wanted)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.heads[name].parameters())


@pytest.fixture(scope="module")
def tasks(cache: Path) -> list[Task]:
    config = quick(cache)
    data = locate_data(config)
    return load_tasks(config, data, locate_tokenizer(config, data, None), 24)


def test_a_batch_costs_what_the_schedule_was_told(tasks: list[Task]) -> None:
    """A joint pair is one sequence, a pair encoded separately two; what is too long is cut."""
    for task in tasks:
        tokens_N = task.tokens_N("train")
        indices = np.arange(0, len(task.train), 3)
        assert task.batch("train", indices).packed.tokens == tokens_N[indices].sum()
        assert len(task.tokens_N("dev")) == len(task.dev) == 20


def test_labels_have_the_type_that_the_loss_wants(tasks: list[Task]) -> None:
    dtypes = {task.name: task.batch("dev", np.arange(4)).labels_B.dtype for task in tasks}
    assert dtypes == {"sst": torch.int64, "para": torch.int64, "sts": torch.float32}


# ------------------------------------------------------------------------------------------- generated corpus


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_generated_corpus_is_made_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(tmp_path, "data.generate.seed=4")
    data = locate_data(config)
    assert data.generate is None and data.dir is not None
    folder = Path(data.dir)
    first = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {task.train for task in config.tasks.values()} | {"tokenizer.json"} <= {path.name for path in first}
    monkeypatch.setattr(synthetic, "generate", interrupted)
    assert locate_data(config) == data
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == first
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing aside is left
    assert folder.stat().st_mode & 0o055 == 0o055  # another user may read a shared cache


@pytest.mark.parametrize("name", ["quora-train.csv", "tokenizer.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_corpus_is_made_again(tmp_path: Path, name: str, damage: str) -> None:
    folder = Path(locate_data(quick(tmp_path)).dir or "")
    whole = tree(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if damage == "flipped":
        (folder / name).write_bytes(content)
    locate_data(quick(tmp_path))
    assert tree(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, new = (tmp_path / "generated" / f".0.{HOST}.{pid}.tmp" for pid in (dead.pid, os.getpid()))
    for left in (old, new):
        left.mkdir(parents=True)
        (left / "sst-train.csv").write_text("half of it")
    locate_data(quick(tmp_path))
    assert not old.exists() and new.exists(), "the new one may be at work"


def test_another_seed_or_size_is_another_corpus(cache: Path) -> None:
    folders = {
        locate_data(quick(cache, f"data.generate.{key}")).dir for key in ("seed=1", "seed=2", "train=61", "dev=21")
    }
    assert len(folders) == 4


def test_the_corpus_and_its_tokenizer_do_not_depend_on_who_makes_them(tmp_path: Path) -> None:
    trees = [tree(tmp_path / name / "generated") for name in ("a", "b") if locate_data(quick(tmp_path / name))]
    assert trees[0] == trees[1]


def _locate(cache: Path, meet: Any) -> None:
    meet.wait(60)
    sys.exit(0 if locate_data(quick(cache)).dir else 1)


def test_two_processes_that_race_end_with_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    meet = context.Barrier(2)
    processes = [context.Process(target=_locate, args=(tmp_path, meet)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    [folder] = (tmp_path / "generated").iterdir()
    load_tokenizer(folder)
    assert tree(folder) == tree(Path(locate_data(quick(tmp_path / "alone")).dir or ""))


def test_a_corpus_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a corpus is never under the corpus's name."""
    config = quick(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "train_tokenizer", interrupted)  # the files are written by then
        with pytest.raises(KeyboardInterrupt):
            locate_data(config)
    assert list((tmp_path / "generated").iterdir()) == []
    assert (Path(locate_data(config).dir or "") / "tokenizer.json").is_file()


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.cache: cannot make a folder in .*file/generated: Not a directory$"):
        locate_data(quick(tmp_path / "file"))


def test_files_are_left_where_they_are(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["data.generate=null", f"data.dir={tmp_path}"])
    assert locate_data(config) == config.data


# ------------------------------------------------------------------------------------------- tokenizer


def tokens_of(tokenizer: Tokenizer) -> set[str]:
    return set(tokenizer.get_vocab())


def write_vocabulary(folder: Path, word: str) -> Path:
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", word]) + "\n")
    return folder


def test_the_config_s_tokenizer_goes_before_the_model_s_and_that_before_the_corpus_s(
    cache: Path, tmp_path: Path
) -> None:
    named = write_vocabulary(tmp_path / "named", "named")
    pretrained = write_vocabulary(tmp_path / "pretrained", "pretrained")
    config = quick(cache, f"encoder.tokenizer={named}")
    assert "named" in tokens_of(locate_tokenizer(config, locate_data(config), pretrained))
    config = quick(cache)
    data = locate_data(config)
    assert "pretrained" in tokens_of(locate_tokenizer(config, data, pretrained))
    assert tokens_of(locate_tokenizer(config, data, None)) == tokens_of(load_tokenizer(data.dir or ""))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.generate=null"], r"^encoder\.tokenizer: not set; an encoder trained from scratch needs a tokenizer"),
        (["encoder.tokenizer=/nowhere/t.json"], r"^/nowhere/t\.json: no such file; name a tokenizer\.json, a vocab"),
    ],
)
def test_no_tokenizer_is_told(cache: Path, overrides: list[str], told: str) -> None:
    config = quick(cache)
    config = load_config(QUICKSTART, [f"data.cache={cache}", *overrides])
    with pytest.raises(UserError, match=told):
        locate_tokenizer(config, config.data, None)


def test_a_pretrained_folder_without_a_tokenizer_is_told(cache: Path, tmp_path: Path) -> None:
    config = quick(cache)
    with pytest.raises(UserError, match=r"no tokenizer\.json and no vocab\.txt in this folder"):
        locate_tokenizer(config, config.data, tmp_path)
