"""Against the definitions written out, and against what a score must not change under."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from mtbert.config import MetricKind
from mtbert.metrics import CORRELATIONS, METRICS, composite, metric_of

CLASSES = ("accuracy", "f1", "matthews")


def pairs(elements: st.SearchStrategy[Any], dtype: type) -> st.SearchStrategy[tuple[NDArray[Any], NDArray[Any]]]:
    def of_size(size: int) -> st.SearchStrategy[tuple[NDArray[Any], NDArray[Any]]]:
        one = arrays.arrays(dtype, size, elements=elements)
        return st.tuples(one, one)

    return st.integers(1, 40).flatmap(of_size)


BINARY = pairs(st.integers(0, 1), np.int64)
FIVE = pairs(st.integers(0, 4), np.int64)
REAL = pairs(st.integers(-50, 50).map(lambda tenths: tenths / 10), np.float32)


def f1_of(klass: int, predictions: NDArray[Any], labels: NDArray[Any]) -> float:
    hits = np.sum((predictions == klass) & (labels == klass))
    total = np.sum(predictions == klass) + np.sum(labels == klass)
    return float(2 * hits / total) if total else 0.0


def ranks_of(values: NDArray[Any]) -> NDArray[Any]:
    """Mean rank of each value, ties sharing theirs."""
    return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])


def pearson_of(x: NDArray[Any], y: NDArray[Any]) -> float:
    x, y = x - np.mean(x, dtype=np.float64), y - np.mean(y, dtype=np.float64)
    norms = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms else 0.0


def test_names_are_those_of_the_configuration() -> None:
    assert set(METRICS) == set(get_args(MetricKind))
    assert set(METRICS) > CORRELATIONS


@given(FIVE)
def test_accuracy(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    predictions, labels = pair
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(np.mean(predictions == labels))


@given(BINARY)
def test_f1_of_two_classes_is_that_of_class_one(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    assert METRICS["f1"](*pair) == pytest.approx(f1_of(1, *pair))


@given(FIVE)
def test_f1_of_more_classes_is_the_mean_over_those_of_the_labels(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    """Whatever is predicted, or the best of a run's checkpoints would be chosen across two definitions."""
    classes = sorted({*pair[1].tolist()})
    if max(classes) > 1:
        assert METRICS["f1"](*pair) == pytest.approx(np.mean([f1_of(klass, *pair) for klass in classes]))
    else:
        assert METRICS["f1"](*pair) == pytest.approx(f1_of(1, *pair))


def test_f1_of_a_part_is_that_of_the_task() -> None:
    """As of a slice in a report or a resample of a comparison that holds nothing of the third class."""
    predictions, labels = np.array([2, 2, 1, 0]), np.array([0, 0, 1, 0])
    assert metric_of("f1", 3)(predictions, labels) == pytest.approx((f1_of(0, predictions, labels) + 1) / 2)
    assert metric_of("f1", 2)(labels, labels) == metric_of("accuracy", 3)(labels, labels) == 1.0
    assert metric_of("f1", 3)(labels[:2], labels[:2]) == 1.0
    assert metric_of("f1", 2)(labels[:2], labels[:2]) == 0.0, "0/0"


@given(BINARY)
def test_matthews_of_two_classes_is_their_pearson(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    assert METRICS["matthews"](*pair) == pytest.approx(pearson_of(*pair), abs=1e-12)


@given(REAL)
def test_correlations_follow_their_definition(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    predictions, labels = (values.astype(np.float64) for values in pair)
    assert METRICS["pearson"](*pair) == pytest.approx(pearson_of(predictions, labels), abs=1e-9)
    expected = pearson_of(ranks_of(predictions), ranks_of(labels))
    assert METRICS["spearman"](*pair) == pytest.approx(expected, abs=1e-9)


@given(FIVE, st.randoms(use_true_random=False))
def test_order_of_examples_does_not_matter(pair: tuple[NDArray[Any], NDArray[Any]], shuffler: Any) -> None:
    order = list(range(len(pair[0])))
    shuffler.shuffle(order)
    for metric in METRICS.values():
        assert metric(pair[0][order], pair[1][order]) == pytest.approx(metric(*pair), abs=1e-12)


@pytest.mark.parametrize("kind", sorted(METRICS))
def test_perfect_predictions_score_one(kind: str) -> None:
    labels = np.array([0, 1, 2, 1, 0, 4]) if kind in CLASSES else np.array([0.0, 1.5, 2.0, 5.0])
    assert METRICS[kind](labels, labels) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", sorted(CORRELATIONS))
@pytest.mark.parametrize("size", [1, 7])
def test_constant_predictions_correlate_with_nothing(kind: str, size: int) -> None:
    assert METRICS[kind](np.full(size, 1), np.arange(size) % 2) == 0.0


def test_nearly_constant_predictions_do_not_warn() -> None:
    predictions = 1e6 + np.array([0, 1, 0, 1]) * 1e-9
    assert -1 <= METRICS["pearson"](predictions, np.array([0.0, 1.0, 2.0, 3.0])) <= 1


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_predictions_are_not_hidden(kind: str, broken: float) -> None:
    assert math.isnan(METRICS[kind](np.array([1.0, broken, 2.0]), np.array([1.0, 2.0, 3.0])))


def test_composite_is_the_score_of_the_course() -> None:
    scores = {"sst": ("accuracy", 0.5), "quora": ("accuracy", 0.8), "sts": ("pearson", 0.4)}
    assert composite(scores) == pytest.approx((0.5 + 0.8 + 0.7) / 3)
    assert composite({"cola": ("matthews", -1.0)}) == 0.0
    assert composite({"mrpc": ("f1", 0.25)}) == 0.25
