"""The baselines: hand-checked answers, and what they reach on the generated corpus, which is built to resist them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mtbert import baselines, synthetic
from mtbert.baselines import bag_of_words_baseline, trivial_baseline
from mtbert.metrics import metric_of

TASKS = {  # kind → file, and the score that a bag of words must stay below
    "classification": ("ids-sst", 0.72),
    "pair_classification": ("quora", 0.70),
    "pair_regression": ("sts", 0.76),
}


def read(path: Path) -> tuple[list[tuple[str, ...]], list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [tuple(row[2:-1]) for row in rows], [float(row[-1]) for row in rows]


def score(kind: str, predictions_N: NDArray[np.float64], labels: list[float]) -> float:
    if kind == "pair_regression":
        return float(np.corrcoef(predictions_N, labels)[0, 1])
    return float(np.mean(predictions_N == labels))


def test_trivial_is_the_majority_or_the_mean() -> None:
    assert trivial_baseline("classification", [2, 0, 2, 1], [0, 1]).tolist() == [2.0, 2.0]
    assert trivial_baseline("pair_classification", [1.0, 0.0, 0.0, 1.0], [1]).tolist() == [0.0]
    assert trivial_baseline("pair_regression", [0.0, 5.0, 4.0], [1, 2]).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0], [1, 1], [0, 1]])
def test_no_other_constant_class_scores_higher_in_training(metric: str, classes: int, labels: list[float]) -> None:
    labels_N = np.array(labels, dtype=np.float64)
    measure = metric_of(metric, classes)
    trivial_N = trivial_baseline("classification", labels_N, labels_N, metric, classes)
    best = max(measure(np.full_like(labels_N, number), labels_N) for number in range(classes))
    assert measure(trivial_N, labels_N) == best


def test_bag_of_words_learns_what_words_tell() -> None:
    train = [("a good film",), ("a bad film",)] * 20
    predictions = bag_of_words_baseline("classification", train, [1, 0] * 20, [("good",), ("bad play",)])
    assert predictions.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["pair_classification", "pair_regression"])
def test_bag_of_words_is_symmetric_in_the_pair(kind: str) -> None:
    train = [("a b c", "a b c"), ("a b c", "d e f"), ("d e", "d e"), ("d e", "a c")] * 10
    labels = [1.0, 0.0, 1.0, 0.0] * 10
    dev = [("a b", "a b"), ("a b", "d"), ("e f", "a b c")]
    forwards = bag_of_words_baseline(kind, train, labels, dev)
    backwards = bag_of_words_baseline(kind, train, labels, [(two, one) for one, two in dev])
    np.testing.assert_array_equal(forwards, backwards)
    assert forwards[0] > 0.5 > forwards[1]


def test_triplets_are_guessed_or_told_by_their_words() -> None:
    dev = [("a b c", "a b", "d e"), ("a b c", "d e", "c b a"), ("a b", "x", "y")]
    assert bag_of_words_baseline("triplets", [("a b c", "d", "e")], [1.0], dev).tolist() == [1.0, 0.0, 0.0]
    assert trivial_baseline("triplets", [1.0], [1.0] * 4).mean() == 0.5


def test_regression_stays_within_the_labels_seen() -> None:
    train = [("a b", "a b"), ("a b", "c d")] * 10
    predictions = bag_of_words_baseline("pair_regression", train, [5.0, 1.0] * 10, [("", "x"), ("a b c d", "a b c d")])
    assert predictions.min() >= 1.0 and predictions.max() <= 5.0


def test_pair_features_by_hand() -> None:
    from sklearn.feature_extraction.text import CountVectorizer

    vectoriser = CountVectorizer(binary=True).fit(["red car boat"])
    features_F = baselines._pair_features(vectoriser, [("red car", "car boat boat")]).toarray()[0]
    boat, car, red = (vectoriser.vocabulary_[word] for word in ("boat", "car", "red"))
    difference, product, overlap = features_F[:3], features_F[3:6], features_F[6:]
    assert (difference[boat], difference[car], difference[red]) == (1, 0, 1)
    assert (product[boat], product[car], product[red]) == (0, 1, 0)
    np.testing.assert_allclose(overlap, [1 / 3, 1 / 2, 1 / 2, 0])


def test_large_data_are_subsampled_in_a_fixed_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_TRAIN_ROWS", 10)
    texts = [(f"word{number}",) for number in range(100)]
    some, labels_N = baselines._subsample(texts, np.arange(100.0))
    assert len(some) == 10
    assert [f"word{label:.0f}" for label in labels_N] == [text for (text,) in some]
    again, _ = baselines._subsample(texts, np.arange(100.0))
    assert again == some


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.generate(tmp_path_factory.mktemp("baselines"), seed=0, train=4000, dev=600)


@pytest.mark.parametrize("kind", TASKS)
def test_bag_of_words_beats_the_trivial_answer_but_not_the_corpus(folder: Path, kind: str) -> None:
    name, ceiling = TASKS[kind]
    (train_texts, train_labels), (dev_texts, dev_labels) = (read(folder / f"{name}-{s}.csv") for s in ("train", "dev"))
    predictions_N = bag_of_words_baseline(kind, train_texts, train_labels, dev_texts)
    assert predictions_N.shape == (600,) and predictions_N.dtype == np.float64
    trivial = 0.0  # a constant does not correlate
    if kind != "pair_regression":
        trivial = score(kind, trivial_baseline(kind, train_labels, dev_labels), dev_labels)
    assert trivial + 0.05 < score(kind, predictions_N, dev_labels) < ceiling


@pytest.mark.parametrize("texts", [[("a b",), ("c d",)], [("!",), ("?",)]])
def test_where_there_is_nothing_to_learn_the_answer_is_the_trivial_one(texts: list[tuple[str, ...]]) -> None:
    """One class only, or no word at all: a baseline must not fail a run that is done."""
    labels = [1.0, 1.0] if texts[0] == ("a b",) else [0.0, 1.0]
    predictions = bag_of_words_baseline("classification", texts, labels, [("a",), ("b",), ("c",)])
    assert predictions.tolist() == [min(labels)] * 3
