"""Datasets hold what the files say, the cache is transparent, and batches are what BERT expects."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from harness import PATIENCE_S
from hub import stand_in_hub, use_hub
from hypothesis import HealthCheck, given, settings
from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import AutoTokenizer

from mtbert import token_cache
from mtbert.config import DataConfig, TaskConfig
from mtbert.data import (
    Dataset,
    collate,
    kept_lengths,
    load_dataset,
    load_tokenizer,
    locate_file,
    prefetch,
    sequence_lengths,
    special_ids,
)
from mtbert.errors import UserError
from mtbert.files import HOST
from mtbert.readers import Row, read_rows
from mtbert.token_cache import intact

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "film", "good", "##s", "É"]
PAIR = {"text": ["sentence1", "sentence2"], "label": "label", "id": "id"}


def make_task(file: str = "rows.tsv", **over: Any) -> TaskConfig:
    defaults: dict[str, Any] = {"kind": "classification", "columns": {"text": ["text"], "label": "label"}}
    return TaskConfig(train=file, dev=file, **(defaults | over))


def triplet_task(file: str = "rows.csv") -> TaskConfig:
    return TaskConfig(
        kind="triplets", train=file, columns={"text": ["sent0", "sent1", "hard_neg"]}, head={"kind": "cosine"}
    )


def pair_task(
    file: str = "rows.tsv", head: str = "joint", kind: str = "pair_classification", **over: Any
) -> TaskConfig:
    return make_task(file, kind=kind, columns=PAIR, head={"kind": head}, **over)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(vocab: Path) -> Tokenizer:
    return load_tokenizer(vocab)


class Home:
    """A data folder and a cache, and the loading of what is written there."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.tokenizer = tokenizer
        self.config = DataConfig(dir=str(folder), cache=str(self.cache))

    def load(self, content: str | bytes, task: TaskConfig | None = None, **arguments: Any) -> Dataset:
        task = task or make_task()
        (self.folder / task.train).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_dataset(task, "sst", "train", self.config, self.tokenizer, **arguments)

    def error(self, content: str | bytes, task: TaskConfig | None = None) -> str:
        with pytest.raises(UserError) as error:
            self.load(content, task)
        assert "\n" not in str(error.value)
        assert not [path for path in self.cache.rglob("*") if path.is_dir() and path.name != "tokens"]
        return str(error.value).replace(f"{self.folder}/", "")

    def folders(self) -> list[Path]:
        return [path for path in (self.cache / "tokens").iterdir() if path.is_dir()]


@pytest.fixture
def home(tmp_path: Path, tokenizer: Tokenizer) -> Home:
    return Home(tmp_path, tokenizer)


ROWS = "text\tlabel\na b\t0\nfilms\t1\n d  \t1\n"

# ------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("lowercase", [None, True, False])
@pytest.mark.parametrize("accents", [None, True, False])
@pytest.mark.parametrize("chinese", [None, True, False])
def test_vocab_txt_splits_as_others_split_by_it(
    vocab: Path, lowercase: bool | None, accents: bool | None, chinese: bool | None
) -> None:
    vocab.write_text(vocab.read_text(encoding="utf-8") + "É\né\nE\nfilm\u4e00film\n", encoding="utf-8")
    settings = {"do_lower_case": lowercase, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    settings = {key: value for key, value in settings.items() if value is not None}
    vocab.with_name("tokenizer_config.json").write_text(json.dumps(settings))
    vocab.with_name("config.json").write_text('{"model_type": "bert"}')
    by_tokenizers = BertWordPieceTokenizer(
        str(vocab), lowercase=lowercase is not False, strip_accents=accents, handle_chinese_chars=chinese is not False
    )
    by_transformers = AutoTokenizer.from_pretrained(vocab.parent)
    ours = load_tokenizer(vocab)
    for text in ["Good FILMS, a\tb", "é É [SEP] x", "film\u4e00film", "\\/ ``a''"]:
        assert ours.encode(text).ids == by_tokenizers.encode(text).ids == by_transformers.encode(text)
        assert ours.encode(text, "a b").type_ids == by_tokenizers.encode(text, "a b").type_ids


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, ""),
        ({"do_lower_case": True, "strip_accents": None}, ""),
        ({"do_lower_case": False}, "do_lower_case is false, tokenizer.json beside it has lowercase true"),
        ({"tokenizer_class": "BertTokenizerFast", "strip_accents": False}, "strip_accents is false, "),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is false, tokenizer.json beside it has handle_"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, ""),
    ],
)
def test_a_tokenizer_json_that_transformers_would_not_split_by_is_refused(
    vocab: Path, settings: dict[str, Any], refused: str
) -> None:
    load_tokenizer(vocab).save(str(vocab.with_name("tokenizer.json")))
    vocab.with_name("tokenizer_config.json").write_text(json.dumps(settings))
    vocab.with_name("config.json").write_text('{"model_type": "bert"}')
    by_transformers = AutoTokenizer.from_pretrained(vocab.parent).backend_tokenizer.normalizer
    ours = Tokenizer.from_file(str(vocab.with_name("tokenizer.json"))).normalizer
    text = "É \u4e00\u4e00"
    assert (by_transformers.normalize_str(text) != ours.normalize_str(text)) == bool(refused)
    if refused:
        with pytest.raises(UserError, match=re.escape(f"tokenizer_config.json: {refused}")):
            load_tokenizer(vocab.parent)
    else:
        load_tokenizer(vocab.parent)


def test_a_tokenizer_config_without_end_is_refused(vocab: Path) -> None:
    with vocab.with_name("tokenizer_config.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: more than 16,777,216 bytes"):
        load_tokenizer(vocab)


def test_tokenizer_json_comes_first_and_never_truncates_or_pads(vocab: Path) -> None:
    tokenizer = load_tokenizer(vocab.parent)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(vocab.with_name("tokenizer.json")))
    vocab.write_text("never read")
    assert len(load_tokenizer(vocab.parent).encode("a b c d", add_special_tokens=False)) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer"),
        ("vocab.txt", "a\nb\n[CLS]\n", r"the vocabulary has no \[SEP\]"),
        ("vocab.txt", "a\nb\n[CLS]\n[SEP]\n", r"the vocabulary has no '\[UNK\]', as which unknown words are read"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt: not a readable tokenizer"),
        ("readme.md", "", "no tokenizer.json and no vocab.txt in this folder"),
    ],
)
def test_a_bad_tokenizer_is_a_user_error(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "absent.json")


# ------------------------------------------------------------------------------------------------ reading


def test_a_dataset_holds_what_the_file_says(home: Home) -> None:
    dataset = home.load(ROWS)
    assert len(dataset) == 3
    assert dataset.labels_N.tolist() == [0, 1, 1]
    assert dataset.lines_N.tolist() == [2, 3, 4]
    assert list(dataset.ids) == ["2", "3", "4"]
    assert dataset.lengths_NS.tolist() == [[2], [2], [1]]
    assert dataset.raw([2, 0]) == [(" d  ",), ("a b",)]
    assert [[home.tokenizer.id_to_token(t) for t in dataset.tokens(i)[0]] for i in range(3)] == [
        ["a", "b"],
        ["film", "##s"],
        ["d"],
    ]


def test_pairs_with_ids(home: Home) -> None:
    content = "\tid\tsentence1\tsentence2\tlabel\n0\tx1\ta b c\td\t1.0\n1\té\tfilm\tgood film\t0.0\n"
    dataset = home.load(content, pair_task())
    assert dataset.texts == 2
    assert dataset.ids[:] == ["x1", "é"]
    assert dataset.ids[-1] == "é"
    assert dataset.raw(np.array([1])) == [("film", "good film")]
    assert [len(tokens) for tokens in dataset.tokens(1)] == dataset.lengths_NS[1].tolist() == [1, 2]


def test_large_vocabularies_get_wider_tokens(tmp_path: Path) -> None:
    words = [*VOCABULARY, *(f"w{n}" for n in range(2**16))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    home = Home(tmp_path, load_tokenizer(tmp_path))
    dataset = home.load("text\tlabel\nw65535 a\t1\n")
    assert dataset.tokens(0)[0].tolist() == [len(words) - 1, 5]


def test_chunks_make_no_difference(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "id\tsentence1\tsentence2\tlabel\n" + "".join(
        f"x{n}\t{'a ' * (n % 7 + 1)}\tb{n}\t{n % 2}\n" for n in range(50)
    )
    whole = home.load(content, pair_task())
    monkeypatch.setattr("mtbert.token_cache.CHUNK_ROWS", 7)
    home.config = DataConfig(dir=str(home.folder), cache=str(home.folder / "other"))
    parts = home.load(content, pair_task())
    assert list(parts.ids) == list(whole.ids)
    assert parts.raw(range(50)) == whole.raw(range(50))
    np.testing.assert_array_equal(parts.token_starts, whole.token_starts)
    np.testing.assert_array_equal(parts.all_tokens, whole.all_tokens)
    np.testing.assert_array_equal(parts.labels_N, whole.labels_N)


def test_rows_nothing_can_be_learnt_from_are_set_aside(home: Home) -> None:
    content = "id\tsentence1\tsentence2\tlabel\nx1\ta\t  \t1\nx2\ta\tb\t\nx3\t\x01\tb\t0\nx4\ta\t1\nx5\ta\tb\t0\n"
    dataset = home.load(content, pair_task())
    assert list(dataset.ids) == ["x5"]
    told = [(row.line, row.id, row.reason) for row in dataset.quarantined]
    assert told == [
        (2, "x1", "column 'sentence2': the text is empty"),
        (3, "x2", "column 'label': no label"),
        (4, "x3", "column 'sentence1': nothing in the text is a wordpiece"),
        (5, "x4", "3 fields instead of 4"),
    ]
    assert dataset.quarantined == home.load(content, pair_task()).quarantined


def test_triplets_have_three_texts_and_no_label(home: Home) -> None:
    content = 'sent0,sent1,hard_neg\n"a, b",a,c\nd,,e\nf,g\nh,i,j k\n'
    dataset = home.load(content, triplet_task())
    assert dataset.raw([0, 1]) == [("a, b", "a", "c"), ("h", "i", "j k")]
    assert [(row.line, row.reason) for row in dataset.quarantined] == [
        (3, "column 'sent1': the text is empty"),
        (4, "2 fields instead of 3"),
    ]
    batch = collate(dataset, np.array([1, 0]), triplet_task(), special_ids(home.tokenizer), 512)
    expected = [home.tokenizer.encode(text).ids for text in ("h", "a, b", "i", "a", "j k", "c")]
    assert sequences(batch.packed.ids_T, batch.packed.lengths_B, batch.packed.first_B) == expected
    assert batch.labels_B.tolist() == [1, 1]
    assert sequence_lengths(dataset, False, 512).tolist() == [11, 10]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("sent0,sent1\na,b\n", "rows.csv: no column 'hard_neg'; columns present: 'sent1', 'sent0'"),
        ("sent0,sent1,hard_neg\na,b,c\n" + "a,,c\n" * 6, "6 of 7 rows are malformed, more than 1 %: is this the right"),
        ("sent0,sent1,hard_neg\na, ,c\n", "The first is line 2: column 'sent1': the text is empty"),
    ],
)
def test_a_bad_file_of_triplets_is_an_error(home: Home, content: str, told: str) -> None:
    assert told in home.error(content, triplet_task())


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("5", "rows.tsv line 3, column 'label': '5' is not a class from 0 to 4"),
        ("-1", "is not a class from 0 to 4"),
        ("3.5", "is not a class from 0 to 4"),
        ("nan", "'nan' is not a class from 0 to 4"),
        ("inf", "is not a class from 0 to 4"),
        ("good", "'good' is not a class from 0 to 4"),
        ("0_1", "'0_1' is not a class from 0 to 4"),
    ],
)
def test_a_bad_label_is_an_error(home: Home, label: str, told: str) -> None:
    assert told in home.error(f"text\tlabel\na\t4.0\nb\t{label}\n", make_task(classes=5))


def test_labels_are_the_names_of_classes(home: Home) -> None:
    """In the order of the configuration, whatever comes first in the file; another order is another cache."""
    told = "rows.tsv line 3, column 'label': '1' is none of the classes world, sport"
    assert told in home.error("text\tlabel\na\tsport\nb\t1\n", make_task(classes=["world", "sport"]))
    assert "'sport' is not a class from 0 to 1" in home.error("text\tlabel\na\tsport\n", make_task())
    rows = "text\tlabel\na\tsport\nb\t world \nc\t\nd\tworld\n"
    dataset = home.load(rows, make_task(classes=["world", "sport"]))
    assert dataset.labels_N.tolist() == [1, 0, 0]
    assert [(row.line, row.reason) for row in dataset.quarantined] == [(4, "column 'label': no label")]
    assert home.load(rows, make_task(classes=["sport", "world"])).labels_N.tolist() == [0, 1, 1]


@pytest.mark.parametrize("label", ["5.1", "-0.1", "nan", "a lot"])
def test_a_bad_score_is_an_error(home: Home, label: str) -> None:
    task = pair_task(head="cosine", kind="pair_regression")
    content = f"id\tsentence1\tsentence2\tlabel\nx\ta\tb\t{label}\n"
    assert f"rows.tsv line 2, column 'label': '{label}' is not a number from 0 to 5" in home.error(content, task)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text\tlabel\n", "rows.tsv: no rows; a task needs at least one example"),
        ("text\tlabl\na\t1\n", "rows.tsv: no column 'label'; columns present: 'labl', 'text'"),
        (b"text\tlabel\ncaf\xe9\t1\n", "rows.tsv line 2, column 'text': byte 0xe9 is not UTF-8"),
        (b"text\tlabel\na\0b\t1\n", "rows.tsv line 2, column 'text': a NUL byte"),
        ("text\tlabel\n" + "a\t\n" * 3, "3 of 3 rows are malformed"),
        ("text\tlabel\n" + "a\t1\n" * 93 + "b\n" * 6, "6 of 99 rows are malformed, more than 1 %"),
    ],
)
def test_a_bad_file_is_an_error(home: Home, content: str | bytes, told: str) -> None:
    assert told in home.error(content)


def test_one_malformed_row_in_a_hundred_is_tolerated(home: Home) -> None:
    dataset = home.load("text\tlabel\n" + "a\t1\n" * 594 + "b\n" * 6)
    assert (len(dataset), len(dataset.quarantined)) == (594, 6)
    assert "7 of 600 rows are malformed" in Home(home.folder / "tokenizer", home.tokenizer).error(
        "text\tlabel\n" + "a\t1\n" * 593 + "b\n" * 7
    )


def test_json_lines_with_what_is_no_text(home: Home) -> None:
    task = make_task("rows.jsonl")
    lines = [
        {"text": "a", "label": True},
        {"text": 5, "label": 0},
        {"text": None, "label": 0},
        {"text": "b", "label": None},
    ]
    dataset = home.load("\n".join(map(json.dumps, lines)), task)
    assert dataset.labels_N.tolist() == [1]
    assert [row.line for row in dataset.quarantined] == [2, 3, 4]
    for character, code in (("\\u0000", "0000"), ("\\ud800", "D800")):
        content = '{"text": "a' + character + '", "label": 1}'
        with pytest.raises(UserError, match=f"line 1, column 'text': the character U\\+{code} is no text"):
            home.load(content, task)


def test_a_missing_file_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.load(ROWS)
    with pytest.raises(UserError, match=r"row\.tsv: no such file; did you mean rows\.tsv\?"):
        load_dataset(make_task("row.tsv"), "sst", "dev", home.config, home.tokenizer)
    monkeypatch.chdir(home.folder)
    with pytest.raises(UserError, match=r"tasks\.sst\.dev: row\.tsv: no such file in .*; data\.dir is not set"):
        load_dataset(make_task("row.tsv"), "sst", "dev", DataConfig(cache=str(home.cache)), home.tokenizer)


def test_a_cache_that_cannot_be_made(home: Home) -> None:
    home.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"data\.cache .*: cannot make"):
        home.load(ROWS)


def test_progress_is_told_when_it_takes_long(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    clock = iter(range(10**6))
    monkeypatch.setattr("mtbert.token_cache.time.monotonic", lambda: float(next(clock)))
    home.load("text\tlabel\n" + "a\t1\n" * 2000, progress=lambda shown, done: told.append((Path(shown).name, done)))
    assert told == [("rows.tsv", done) for done in (512, 768, 1024, 1280, 1536, 1792)]


# ------------------------------------------------------------------------------------------------ cache


class NoTokenizing:
    """Stands before a tokenizer and lets through only what the cache's key needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.to_str = tokenizer.to_str


def test_the_second_opening_tokenises_nothing(home: Home) -> None:
    first = home.load(ROWS)
    again = load_dataset(make_task(), "sst", "dev", home.config, NoTokenizing(home.tokenizer))  # type: ignore[arg-type]
    assert again.raw(range(3)) == first.raw(range(3))
    assert [*home.folders()] and len(home.folders()) == 1


def test_a_source_column_that_is_not_there_is_refused_although_the_texts_are_tokenised(home: Home) -> None:
    home.load(ROWS)
    load_dataset(make_task(), "sst", "dev", home.config, home.tokenizer)
    misspelt = make_task(columns={"text": ["text"], "label": "label", "source": "source"})
    home.load(ROWS, misspelt)
    with pytest.raises(UserError, match="no column 'source'; columns present: "):
        load_dataset(misspelt, "sst", "dev", home.config, home.tokenizer)


def test_what_the_arrays_depend_on_makes_another_key(home: Home, vocab: Path) -> None:
    home.load(ROWS)
    home.load(ROWS, make_task(classes=3))
    home.load(ROWS.replace("films", "film"))
    home.load(ROWS, make_task("rows.txt"))
    vocab.write_text(vocab.read_text() + "more\n")
    home.tokenizer = load_tokenizer(vocab)
    home.load(ROWS)
    assert len(home.folders()) == 5
    home.load(ROWS, make_task(loss="cross_entropy", weight=2.0, head={"hidden": [3]}))  # none of the data's business
    assert len(home.folders()) == 5


def test_an_untouched_file_is_not_hashed_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    load = functools.partial(load_dataset, make_task(), "sst", "train", home.config, home.tokenizer)
    path = home.folder / "rows.tsv"
    path.write_text(ROWS)
    age = 1.9
    monkeypatch.setattr("mtbert.token_cache.time.time", lambda: path.stat().st_ctime + age)
    load()
    assert not list(home.cache.rglob("*.seen"))  # so young a file may still change unseen
    age = 2.1
    load()
    [seen] = home.cache.rglob("*.seen")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen.read_text() == digest
    for damaged in (b"\x86" * 64, b"", b"0" * 63, b"0" * 65):
        seen.write_bytes(damaged)
        load()
        assert seen.read_text() == digest and len(home.folders()) == 1
    seen.write_text("0" * 64)  # what stands there is believed: the same rows get another key
    load()
    assert len(home.folders()) == 2
    path.write_text(ROWS.replace("films", "good b"))
    assert load().raw([1]) == [("good b",)]


def test_a_file_that_another_takes_the_place_of_while_it_is_read(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would lie under the hash of the first."""
    read = token_cache.read_rows

    def replaced(path: Path, *rest: Any) -> Iterator[Any]:
        path.write_text(ROWS.replace("films", "good b"))
        yield from read(path, *rest)

    monkeypatch.setattr(token_cache, "read_rows", replaced)
    assert home.error(ROWS) == "rows.tsv: changed while it was read; start again when it is whole"

    def touched(path: Path, *rest: Any) -> Iterator[Any]:
        path.chmod(0o600)
        yield from read(path, *rest)

    monkeypatch.setattr(token_cache, "read_rows", touched)
    home.load(ROWS)
    monkeypatch.undo()
    assert home.load(ROWS).raw([1]) == [("films",)]


def test_a_cache_that_takes_nothing_is_one_line(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "_tokenise", refuse)
    told = f"data.cache {home.cache}: cannot keep {home.folder}/rows.tsv there: No space left on device"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        home.load(ROWS)


def test_a_tokenizer_in_a_folder_that_one_may_not_enter(vocab: Path, as_nobody: Callable[[], Any]) -> None:
    private = vocab.parent / "private"
    private.mkdir(mode=0o700)
    with as_nobody(), pytest.raises(UserError, match=r"/tokenizer/private/model: Permission denied$"):
        load_tokenizer(private / "model")


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "texts", "no manifest"])
def test_a_damaged_cache_is_made_again(home: Home, damage: str) -> None:
    home.load(ROWS)
    [folder] = home.folders()
    if damage == "truncated":
        os.truncate(folder / "tokens", 2)
    elif damage == "missing":
        (folder / "labels").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"sizes"')
    elif damage == "texts":
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"texts": 1', '"texts": 3'))
    else:
        (folder / "manifest.json").unlink()
    assert home.load(ROWS).raw(range(3)) == [("a b",), ("films",), (" d  ",)]
    assert home.folders() == [folder]


def test_what_a_killed_process_left_is_cleared_away(home: Home) -> None:
    home.load(ROWS)
    [folder] = home.folders()
    (folder / "manifest.json").unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = folder.with_name(f".{folder.name}.{HOST}.{dead.pid}.tmp")
    left.mkdir()
    home.load(ROWS)
    assert home.folders() == [folder]


TOKENISE = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
from mtbert import token_cache
from mtbert.config import TaskConfig
folder = Path(sys.argv[1])
task = TaskConfig(kind="classification", train="", dev="", columns={"text": ["text"], "label": "label"})
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
print("ready", flush=True)
sys.stdin.readline()
print(token_cache.ensure(folder, folder / "rows.tsv", "rows.tsv", task, tokenizer, None))
"""


def test_processes_at_once_make_one_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "a b film\t1\n" * 20_000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", TOKENISE, str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    folders = {process.communicate(timeout=PATIENCE_S)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    [folder] = folders
    assert intact(Path(folder))
    assert np.fromfile(f"{folder}/tokens", np.uint16).tolist() == [5, 6, 31] * 20_000
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------ hub

HUB_FILE = b"text\tlabel\na b\t1\n"


@pytest.fixture
def hub() -> Iterator[str]:
    with stand_in_hub({"datasets/owner/name": {"0" * 40: {"folder/rows.csv": HUB_FILE}}}) as address:
        yield address


LOAD_FROM_HUB = """
import sys
from mtbert.config import DataConfig, TaskConfig
from mtbert.errors import UserError
from mtbert.data import load_dataset, load_tokenizer
folder, *files = sys.argv[1:]
for file in files:
    task = TaskConfig(kind="classification", train=file, dev=file, columns={"text": ["text"], "label": "label"})
    try:
        dataset = load_dataset(task, "sst", "train", DataConfig(cache=folder), load_tokenizer(folder + "/tokenizer"))
        print(dataset.file, dataset.raw([0]))
    except UserError as error:
        print(error)
"""


def test_a_file_from_the_hub(hub: str, tmp_path: Path, vocab: Path) -> None:
    """In its own process: the hub's client reads its address when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    files = [f"hub:owner/name/{file}" for file in ("folder/rows.csv", "absent.csv")]
    command = [sys.executable, "-c", LOAD_FROM_HUB, str(tmp_path), *files]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0] == f"{files[0]} [('a b',)]"
    assert told[1].startswith(f"tasks.sst.train: {files[1]}: cannot fetch it from the hub: 404")
    assert len(told) == 2


def test_a_file_from_the_hub_is_the_newest_or_of_the_revision_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {digit * 40: {"folder/rows.csv": f"text\n{digit}\n".encode()} for digit in "01"}
    with stand_in_hub({"datasets/owner/name": commits}) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path)
        for said, digit in [("", "1"), (f"@{'0' * 40}", "0"), (f"@{'1' * 40}", "1")]:
            file = f"hub:owner/name{said}/folder/rows.csv"
            shown, path = locate_file(file, "tasks.sst.train", DataConfig())
            assert (shown, path.read_bytes()) == (file, commits[digit * 40]["folder/rows.csv"])


def test_a_damaged_file_from_the_hub_is_refused(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, hub, tmp_path)
    asked = ("hub:owner/name/folder/rows.csv", "tasks.sst.train", DataConfig())
    blob = locate_file(*asked)[1].resolve()
    blob.write_bytes(HUB_FILE.replace(b"1", b"0"))
    with pytest.raises(UserError, match=re.escape(f"tasks.sst.train: {asked[0]}: {blob} is damaged; remove it")):
        locate_file(*asked)
    blob.unlink()
    assert locate_file(*asked)[1].read_bytes() == HUB_FILE


def test_an_unreachable_hub_and_a_wrong_name(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # what no network ends in, without the retries
    for file, told in [
        ("hub:owner/name/rows.csv", "cannot fetch it from the hub: "),
        ("hub:ow ner/name/rows.csv", "cannot fetch it from the hub: Repo id must "),
    ]:
        with pytest.raises(UserError, match=re.escape(f"tasks.sst.train: {file}: {told}")):
            load_dataset(make_task(file), "sst", "train", home.config, home.tokenizer)


# ------------------------------------------------------------------------------------------------ batches


@given(st.integers(0, 40), st.integers(0, 40), st.integers(4, 40))
def test_pairs_are_truncated_as_tokenizers_does(first: int, second: int, max_length: int) -> None:
    oracle = _oracle()
    oracle.enable_truncation(max_length, strategy="longest_first")
    encoded = oracle.encode("a " * first, "b " * second)
    [kept] = kept_lengths(np.array([[first, second]], np.int32), True, max_length).tolist()
    assert kept == [encoded.tokens.count("a"), encoded.tokens.count("b")]


@functools.cache
def _oracle() -> BertWordPieceTokenizer:
    return BertWordPieceTokenizer({token: number for number, token in enumerate(VOCABULARY)})


SIXTY = "id\tsentence1\tsentence2\tlabel\n" + "".join(
    f"x{n}\t{'a b c film ' * (n % 5 + 1)}\t{'good ' * (n % 13 + 1)}\t{n % 2}\n" for n in range(60)
)


def sequences(batch_ids: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor) -> list[list[int]]:
    """The packed sequences in the caller's order."""
    return [batch_ids[start : start + length].tolist() for start, length in zip(first, lengths, strict=True)]


@pytest.mark.parametrize("max_length", [512, 16, 9])
def test_a_joint_pair_is_what_the_tokenizer_makes_of_it(home: Home, max_length: int) -> None:
    task = pair_task()
    dataset = home.load(SIXTY, task)
    indices = np.array([7, 3, 59, 0, 3])
    batch = collate(dataset, indices, task, special_ids(home.tokenizer), max_length)
    oracle = _oracle()
    oracle.enable_truncation(max_length, strategy="longest_first")
    expected = [oracle.encode(*texts) for texts in dataset.raw(indices)]
    packed = batch.packed
    assert sequences(packed.ids_T, packed.lengths_B, packed.first_B) == [encoded.ids for encoded in expected]
    assert sequences(packed.types_T, packed.lengths_B, packed.first_B) == [encoded.type_ids for encoded in expected]
    assert batch.labels_B.tolist() == [1, 1, 1, 0, 1]
    assert batch.labels_B.dtype == torch.int64
    lengths_N = sequence_lengths(dataset, True, max_length)
    assert lengths_N[indices].tolist() == [len(encoded) for encoded in expected]
    assert lengths_N.dtype == np.int32


@pytest.mark.parametrize("max_length", [512, 7])
def test_a_separate_pair_is_all_first_texts_then_all_second(home: Home, max_length: int) -> None:
    task = pair_task(head="relu_cosine", kind="pair_regression")
    dataset = home.load(SIXTY, task)
    indices = np.array([7, 3, 59])
    batch = collate(dataset, indices, task, special_ids(home.tokenizer), max_length)
    oracle = _oracle()
    oracle.enable_truncation(max_length)
    firsts, seconds = zip(*dataset.raw(indices), strict=True)
    expected = [oracle.encode(text).ids for text in (*firsts, *seconds)]
    packed = batch.packed
    assert sequences(packed.ids_T, packed.lengths_B, packed.first_B) == expected
    assert not packed.types_T.any()
    assert batch.labels_B.dtype == torch.float32
    cost = [len(expected[b]) + len(expected[b + 3]) for b in range(3)]
    assert sequence_lengths(dataset, False, max_length)[indices].tolist() == cost


def test_single_texts(home: Home) -> None:
    task = make_task()
    dataset = home.load(ROWS, task)
    batch = collate(dataset, np.array([1, 2]), task, special_ids(home.tokenizer), 512)
    packed = batch.packed
    expected = [home.tokenizer.encode(text).ids for (text,) in dataset.raw([1, 2])]
    assert sequences(packed.ids_T, packed.lengths_B, packed.first_B) == expected
    assert sequence_lengths(dataset, False, 512).tolist() == [4, 4, 3]


ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds("{} films {}".format, ANY, ANY), min_size=1, max_size=12), st.integers(3, 20), st.randoms())
def test_any_texts_come_out_of_the_pack_as_the_tokenizer_splits_them(
    home: Home, texts: list[str], longest: int, order: random.Random
) -> None:
    """Through the file, the cache, the batch and the pack, in any order, cut to any length."""
    task = make_task(file="any.jsonl")
    dataset = home.load("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts), task)
    indices = order.sample(range(len(texts)), len(texts))
    packed = collate(dataset, np.array(indices), task, special_ids(home.tokenizer), longest).packed
    whole = [home.tokenizer.encode(texts[n]).ids for n in indices]
    expected = [[*ids[: min(len(ids), longest) - 1], ids[-1]] for ids in whole]
    assert sequences(packed.ids_T, packed.lengths_B, packed.first_B) == expected


@pytest.mark.parametrize("head", ["joint", "concat"])
def test_a_batch_of_no_examples(home: Home, head: str) -> None:
    task = pair_task(head=head)
    dataset = home.load(SIXTY, task)
    batch = collate(dataset, np.array([], dtype=np.int64), task, special_ids(home.tokenizer), 512)
    assert (len(batch.labels_B), batch.packed.tokens, len(batch.packed.lengths_B)) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------ prefetch


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_keeps_the_order_and_runs_ahead_by_no_more_than_it_may() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    for step, item in zip(range(3, 20), prefetch(make, 3, 20, ahead=2), strict=True):
        assert item == step * step
        assert max(made) <= step + 2
    assert made == list(range(3, 20))
    assert not prefetch_threads()
    assert list(prefetch(make, 5, 5)) == []


def test_prefetch_works_in_the_background() -> None:
    second_made = threading.Event()
    items = prefetch(lambda step: second_made.set() if step == 1 else None, 0, 10)
    next(items)
    assert second_made.wait(PATIENCE_S)
    items.close()


def fail_at_three(step: int) -> int:
    return 1 // (3 - step)


def test_prefetch_raises_what_went_wrong_where_it_went_wrong() -> None:
    items = prefetch(fail_at_three, 2, 9)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError) as error:
        next(items)
    assert "fail_at_three" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert not prefetch_threads()


def test_prefetch_ends_its_thread_when_closed() -> None:
    items = prefetch(lambda step: step, 0, 10**9)
    assert next(items) == 0
    assert prefetch_threads()
    items.close()
    assert not prefetch_threads()


# ------------------------------------------------------------------------------------------------ the real data

SENTIMENT = {"text": ["sentence"], "label": "sentiment", "id": "id"}
REAL = {
    "ids-sst": (make_task(columns=SENTIMENT, classes=5), 8544, 1101),
    "ids-cfimdb": (make_task(columns=SENTIMENT), 1707, 245),
    "sts": (
        make_task(kind="pair_regression", columns=PAIR | {"label": "similarity"}, head={"kind": "cosine"}),
        6040,
        863,
    ),
}


@pytest.mark.data
def test_counts_of_the_real_data(data_dir: Path, home: Home) -> None:
    config = DataConfig(dir=str(data_dir), cache=str(home.cache))
    for name, (task, train, dev) in REAL.items():
        task = task.model_copy(update={"train": f"{name}-train.csv", "dev": f"{name}-dev.csv"})
        for split, count in (("train", train), ("dev", dev)):
            dataset = load_dataset(task, name, split, config, home.tokenizer)  # type: ignore[arg-type]
            assert (len(dataset), dataset.quarantined) == (count, []), name
            assert dataset.lines_N.tolist() == list(range(2, count + 2))
            assert len(set(dataset.ids)) == count
            assert math.isfinite(dataset.labels_N.sum())


@pytest.mark.data
def test_every_real_triplet_is_read(data_dir: Path, home: Home) -> None:
    config = DataConfig(dir=str(data_dir), cache=str(home.cache))
    dataset = load_dataset(triplet_task("nli-triplets.csv"), "nli", "train", config, home.tokenizer)
    assert (len(dataset), dataset.quarantined, dataset.texts) == (27_275, [], 3)


@pytest.mark.data
def test_every_row_of_the_real_quora_files_is_read_or_named(data_dir: Path, home: Home) -> None:
    config = DataConfig(dir=str(data_dir), cache=str(home.cache))
    columns = {"text": ["sentence1", "sentence2"], "label": "is_duplicate", "id": "id"}
    task = make_task(kind="pair_classification", columns=columns, head={"kind": "joint"})
    task = task.model_copy(update={"train": "quora-train.csv", "dev": "quora-dev.csv"})
    dataset = load_dataset(task, "quora", "dev", config, home.tokenizer)
    assert [(row.line, row.id) for row in dataset.quarantined] == [
        (1313, "ad118c967d683c93883bf072d"),
        (7086, "9054345d02cd6c5642a4904dc"),
    ]
    assert sorted([*dataset.lines_N, 1313, 7086]) == list(range(2, 10_055))
    found = list(
        read_rows(data_dir / "quora-train.csv", [*columns["text"], "is_duplicate"], "id")
    )  # tokenising takes 10 s
    assert len(found) == 53_183
    assert all(isinstance(row, Row) for row in found)
