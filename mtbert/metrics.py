"""Scores of predictions against labels, by the names the configuration uses; scikit-learn and SciPy do the arithmetic.

N examples. Predictions and labels are class numbers for accuracy, f1 and matthews, real numbers for the correlations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metric = Callable[[NDArray[Any], NDArray[Any]], float]
"""(predictions_N, labels_N) → score. Higher is better for every one of them."""


def accuracy(predictions_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """Share of the examples whose class is predicted, 0 … 1."""
    return float(np.mean(predictions_N == labels_N))


def f1(predictions_N: NDArray[Any], labels_N: NDArray[Any], classes: int | None = None) -> float:
    """F1 of class 1 where labels are 0 and 1; with more classes the unweighted mean of each one's F1 (macro).

    Averaged are the classes of the labels, so that what is predicted does not change the definition. 0 where it is 0/0.

    Args:
        classes: of the task, where these may be a part of its examples that has not got all; default: as the labels
            have it.
    """
    from sklearn.metrics import f1_score

    averaged = [1] if (classes or labels_N.max() + 1) <= 2 else np.unique(labels_N)
    return float(f1_score(labels_N, predictions_N, labels=averaged, average="macro", zero_division=0.0))


def matthews(predictions_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """Matthews correlation, −1 … 1; 0 where predictions or labels are all alike, as scikit-learn has it."""
    if _constant(predictions_N) or _constant(labels_N):
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels_N, predictions_N))


def pearson(predictions_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """Pearson correlation, −1 … 1.

    Constant predictions give 0.0: the quotient is 0/0, but a model that answers the same to everything has learned
    nothing, and early in training that is a usual state which must neither warn nor spoil a mean with NaN.
    Predictions that are not finite give NaN: that model is broken, and a number would hide it.
    """
    return _correlation("pearsonr", predictions_N, labels_N)


def spearman(predictions_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    """Spearman's rank correlation, −1 … 1; constant and non-finite predictions as in `pearson`."""
    return _correlation("spearmanr", predictions_N, labels_N)


def _correlation(name: str, predictions_N: NDArray[Any], labels_N: NDArray[Any]) -> float:
    from scipy import stats

    if not np.isfinite(predictions_N).all():
        return float("nan")
    if _constant(predictions_N) or _constant(labels_N):
        return 0.0
    with warnings.catch_warnings():
        # nearly constant, as bf16 predictions of a collapsed encoder are: the value is rough, and that is no news
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(getattr(stats, name)(predictions_N.astype(np.float64), labels_N.astype(np.float64)).statistic)


def _constant(values_N: NDArray[Any]) -> bool:
    return bool(values_N.min() == values_N.max())


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def metric_of(kind: str, classes: int) -> Metric:
    """The metric of that name, for any part of the examples of a task with so many classes."""
    return functools.partial(f1, classes=classes) if kind == "f1" else METRICS[kind]


CORRELATIONS = frozenset({"matthews", "pearson", "spearman"})
"""Metrics that run from −1 to 1; the others run from 0 to 1."""


def composite(scores: Mapping[str, tuple[str, float]]) -> float:
    """One number for a whole run: the mean over tasks, each score brought to 0 … 1.

    A correlation r counts as (r + 1) / 2, so that chance is worth the half it is worth in a balanced accuracy. With
    sentiment accuracy, paraphrase accuracy and similarity Pearson this is the score of the CS224N default project.

    Args:
        scores: task → (metric name, value).
    """
    assert scores, "a composite of no tasks"
    return float(np.mean([(value + 1) / 2 if kind in CORRELATIONS else value for kind, value in scores.values()]))
