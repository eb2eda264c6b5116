"""The generated corpus: what is promised of it, read back from its files."""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mtbert import synthetic
from mtbert.baselines import bag_of_words_baseline

TRAIN, DEV = 1500, 400
COLUMNS = {
    "ids-sst": ["sentence", "sentiment"],
    "quora": ["sentence1", "sentence2", "is_duplicate"],
    "sts": ["sentence1", "sentence2", "similarity"],
    "ids-cfimdb": ["sentence", "sentiment"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(tmp_path_factory.mktemp("synthetic"), seed=3, train=TRAIN, dev=DEV)


def read(folder: Path, name: str) -> list[list[str]]:
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def texts(folder: Path, name: str) -> list[tuple[str, ...]]:
    return [tuple(row[2:-1]) for row in read(folder, name)[1:]]


def labels(folder: Path, name: str) -> list[str]:
    return [row[-1] for row in read(folder, name)[1:]]


def sentences(folder: Path, *names: str) -> set[str]:
    return {sentence for name in names for row in texts(folder, name) for sentence in row}


def digest(folder: Path, *names: str) -> str:
    files = sorted(folder / f"{name}-{split}.csv" for name in names for split in ("train", "dev"))
    files = files or sorted(folder.glob("*.csv"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_same_seed_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from mtbert.synthetic import generate;"
        f"generate(pathlib.Path(sys.argv[1]), seed=3, train={TRAIN}, dev={DEV})"
    )
    # another hash seed: the order of sets would differ
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "12345"})
    assert digest(tmp_path) == digest(folder)


def test_bytes_are_the_ones_published(tmp_path: Path) -> None:
    """A change here changes every published quickstart figure: measure them anew."""
    folder = synthetic.generate(tmp_path, seed=0, train=50, dev=20)
    assert digest(folder, "ids-sst", "quora", "sts")[:16] == "26442e44ca35136f"
    assert len(list(folder.iterdir())) == 9


def test_another_seed_gives_another_corpus_and_a_smaller_one_is_the_beginning(folder: Path, tmp_path: Path) -> None:
    other = synthetic.generate(tmp_path / "seed", seed=4, train=100, dev=20)
    assert not set(texts(other, "sts-train")) & set(texts(folder, "sts-train"))
    smaller = synthetic.generate(tmp_path / "small", seed=3, train=100, dev=20)
    for name in COLUMNS:
        assert read(smaller, f"{name}-train") == read(folder, f"{name}-train")[:101]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("split", "size"), [("train", TRAIN), ("dev", DEV)])
def test_files_have_the_cs224n_format(folder: Path, name: str, split: str, size: int) -> None:
    header, *rows = read(folder, f"{name}-{split}")
    assert header == ["", "id", *COLUMNS[name]]
    assert [row[0] for row in rows] == [str(number) for number in range(size)]
    assert all(len(row) == len(header) for row in rows)
    assert all(re.fullmatch(r"[0-9a-f]{25}", row[1]) for row in rows)
    assert len({row[1] for row in rows}) == size
    assert len({tuple(row[2:-1]) for row in rows}) == size
    assert b"\r" not in (folder / f"{name}-{split}.csv").read_bytes()
    words = [len(sentence.split()) for row in rows for sentence in row[2:-1]]
    shortest, longest = (24, 300) if name == "ids-cfimdb" else (4, 20)
    assert min(words) >= shortest and max(words) <= longest


@pytest.mark.parametrize("split", ["train", "dev"])
def test_labels_are_in_range_and_balanced(folder: Path, split: str) -> None:
    size = TRAIN if split == "train" else DEV
    sentiment = Counter(labels(folder, f"ids-sst-{split}"))
    assert set(sentiment) == set("01234")
    assert all(0.14 < count / size < 0.26 for count in sentiment.values())
    duplicate = Counter(labels(folder, f"quora-{split}"))
    assert set(duplicate) == {"0.0", "1.0"}
    assert all(0.42 < count / size < 0.58 for count in duplicate.values())
    similarity = Counter(labels(folder, f"sts-{split}"))
    assert set(similarity) <= {str(half / 2) for half in range(11)}
    assert all(similarity[f"{score}.0"] / size > 0.08 for score in range(6))
    review = Counter(labels(folder, f"ids-cfimdb-{split}"))
    assert set(review) == set("01")
    assert all(0.42 < count / size < 0.58 for count in review.values())


def test_no_development_sentence_occurs_in_training(folder: Path) -> None:
    for task in (["ids-sst"], ["quora", "sts"]):
        train = sentences(folder, *(f"{name}-train" for name in task))
        dev = sentences(folder, *(f"{name}-dev" for name in task))
        assert not train & dev


def test_triplets(folder: Path) -> None:
    """The match is told in other words more often than the hard negative, so that common words do not tell it."""
    with (folder / "nli-triplets.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["sent0", "sent1", "hard_neg"]
    assert len(rows) == len({tuple(row) for row in rows}) == TRAIN
    assert all(len(set(row)) == 3 for row in rows)
    told = bag_of_words_baseline("triplets", rows[:500], np.ones(500), rows)
    assert 0.4 < told.mean() < 0.65
    assert not {text for row in rows for text in row} & sentences(folder, "quora-dev", "sts-dev")


def test_templates_are_disjoint_and_every_part_of_them_is_trained() -> None:
    train, dev = synthetic.templates(dev=False), synthetic.templates(dev=True)
    assert not set(train) & set(dev)
    for part in range(2):
        assert {template[part] for template in dev} <= {template[part] for template in train}


def test_kept_nouns_occur_in_development_only(folder: Path) -> None:
    pairs = [*synthetic.DEV_PEOPLE, *synthetic.DEV_THINGS]
    kept = [name for concept in pairs for name in concept] + synthetic.DEV_ASPECTS
    train = sentences(folder, "ids-sst-train", "quora-train", "sts-train")
    dev = sentences(folder, "ids-sst-dev", "quora-dev", "sts-dev")
    for name in kept:
        assert not any(name in sentence for sentence in train)
        assert any(name in sentence for sentence in dev)
    assert not set(synthetic.DEV_ASPECTS) & set(synthetic.ASPECTS)
    trained = {word for aspect in synthetic.ASPECTS for word in aspect.split()}
    assert {word for aspect in synthetic.DEV_ASPECTS for word in aspect.split()} <= trained


def test_kept_action_and_object_combinations_occur_in_development_only(folder: Path) -> None:
    objects = {name: number for number, concept in enumerate(synthetic.THINGS) for name in concept}
    actions = {name: number for number, concept in enumerate(synthetic.DEALINGS) for name in concept}

    def combinations(split: str) -> set[tuple[int, int]]:
        found = set()
        for sentence in sentences(folder, f"quora-{split}", f"sts-{split}"):
            words = sentence.split()
            action = [actions[word] for word in words if word in actions]
            thing = [objects[word] for word in words if word in objects]
            if action and thing:
                found.add((action[0], thing[0]))
        return found

    kept = {pair for pair in combinations("dev") if synthetic.kept_for_dev(*pair)}
    assert len(kept) == 12
    assert not kept & combinations("train")


def test_paraphrases_share_few_words_and_some_others_share_all(folder: Path) -> None:
    """Role swaps have one bag of words, most duplicates hardly a common noun: overlap alone must not tell."""
    function_words = {"the", "was", "were", "by", "it", "who", "that", "never", "in", "at", "on", ","}
    overlap: dict[str, list[float]] = {"0.0": [], "1.0": []}
    for (one, two), label in zip(texts(folder, "quora-train"), labels(folder, "quora-train"), strict=True):
        u, v = (set(sentence.split()) - function_words for sentence in (one, two))
        overlap[label].append(len(u & v) / len(u | v))
    assert abs(np.mean(overlap["0.0"]) - np.mean(overlap["1.0"])) < 0.1
    assert np.mean(np.array(overlap["1.0"]) == 0) > 0.5


EVENT = synthetic.Event(
    ("doctor", "physician"), ("called", "phoned"), ("chef", "cook"), None, ("in the shop", "in the store"), False
)


def test_tell_voices_and_orders() -> None:
    one_name = synthetic.Event(("chef",), ("found",), ("cars",), ("two",), ("in the shop",), True)
    draw = synthetic.Draw(0, 0)
    assert synthetic.tell(one_name, (0, 0), draw) == "the chef never found two cars in the shop"
    assert synthetic.tell(one_name, (1, 1), draw) == "in the shop two cars were never found by the chef"
    assert synthetic.tell(one_name, (2, 2), draw) == "in the shop , it was the chef who never found two cars"
    assert synthetic.tell(one_name, (3, 0), draw) == "it was two cars that the chef never found in the shop"
    told = synthetic.tell(EVENT, (0, 0), draw, avoid="the doctor called the chef in the shop")
    assert told == "the physician phoned the cook in the store"


def test_swapped_roles_keep_the_words() -> None:
    assert synthetic.swap_roles(synthetic.swap_roles(EVENT)) == EVENT
    swapped = synthetic.swap_roles(EVENT)
    assert (swapped.agent, swapped.object) == (EVENT.object, EVENT.agent)


@pytest.mark.parametrize("slot", [*synthetic.SLOTS, "number"])
def test_change_alters_one_slot_only(slot: str) -> None:
    draw = synthetic.Draw(1, 0)
    for _ in range(50):
        event = synthetic.draw_event(draw, dev=False)
        if slot == "number" and event.number is None:
            continue
        changed = synthetic.change(event, slot, draw, dev=False)
        differing = [name for name in event.__dataclass_fields__ if getattr(event, name) != getattr(changed, name)]
        assert differing == [slot]
        assert changed.agent != changed.object


@pytest.mark.parametrize(
    ("joined", "a", "b", "value"),
    [
        ("{0} but {1}", 2, -1, -1),
        ("although {0} , {1}", -2, 1, 1),
        ("{0} although {1}", -2, 1, -2),
        ("{0} and {1}", 1, 2, 2),
        ("{0} and {1}", -2, -1, -2),
        ("{0} and {1}", 2, -1, 0),
    ],
)
def test_connectives_say_which_clause_counts(joined: str, a: int, b: int, value: int) -> None:
    assert dict(synthetic.CONNECTIVES)[joined](a, b) == value


def test_a_clause_is_worth_what_its_words_say() -> None:
    draw = synthetic.Draw(2, 0)
    worth = {word: value for value, words in synthetic.ADJECTIVES.items() for word in words}
    for _ in range(200):
        denied = draw.below(2)
        text, value = synthetic.clause(draw.below(len(synthetic.FRAMES)), denied, draw, dev=False)
        *before, adjective = text.split()
        sign = 1 if worth[adjective] > 0 else -1
        if denied:
            assert value == -sign
        elif before[-1] in synthetic.STRONGER:
            assert value == 2 * sign
        elif before[-1] in synthetic.WEAKER:
            assert value == sign
        else:
            assert value == worth[adjective]


def test_tokenizer_knows_every_training_word_and_spells_the_others(folder: Path, tmp_path: Path) -> None:
    train = sorted(sentences(folder, "ids-sst-train", "quora-train", "sts-train"))
    path = synthetic.train_tokenizer(train, tmp_path / "tokenizer.json")
    again = synthetic.train_tokenizer(train, tmp_path / "again.json")
    assert path.read_bytes() == again.read_bytes()

    tokenizer = Tokenizer.from_file(str(path))
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.encode(train[0], add_special_tokens=False).tokens == train[0].split()
    pair = tokenizer.encode("The Chef", "the cook")
    assert pair.tokens == ["[CLS]", "the", "chef", "[SEP]", "the", "cook", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 0, 1, 1, 1]
    for sentence in sentences(folder, "ids-sst-dev", "quora-dev", "sts-dev"):
        assert tokenizer.token_to_id("[UNK]") not in tokenizer.encode(sentence).ids
