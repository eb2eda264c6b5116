"""What a table of results is compared with: the trivial answer and a bag of words.

    N examples, V vocabulary (1- and 2-grams seen in training), F features

A score means little alone: the majority class may already be right half of the time, and word counts read more from
a corpus than one expects. Both baselines see only the training rows and predict the development rows.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import normalize

MAX_TRAIN_ROWS = 20_000
"""Of larger training sets this many rows, drawn without replacement by a fixed seed, are fitted."""

Text = tuple[str, ...]
"""One sentence, the two of a pair or the three of a triplet."""


def trivial_baseline(
    kind: str, train_labels: ArrayLike, dev_labels: Sized, metric: str = "accuracy", classes: int = 2
) -> NDArray[np.float64]:
    """The best constant answer in training, once per development row: majority class, or mean for pair_regression.

    Of equally frequent classes the smallest is taken. The F1 of two classes is that of class 1, so there class 1 is the
    answer, however rare; by the other metrics no class is better than the majority. Triplets are all of class 1, the
    match being the nearer text; who cannot tell it guesses, and is right half of the time. Returns (N,) float64; the
    development labels only give N.
    """
    if kind == "triplets":
        return np.arange(len(dev_labels), dtype=np.float64) % 2
    labels_N = np.asarray(train_labels, dtype=np.float64)
    if kind == "pair_regression":
        answer = labels_N.mean()
    elif metric == "f1" and classes == 2:
        answer = 1.0
    else:
        numbers, counts = np.unique(labels_N, return_counts=True)
        answer = numbers[counts.argmax()]
    return np.full(len(dev_labels), answer, dtype=np.float64)


def bag_of_words_baseline(
    kind: str, train_texts: Sequence[Text], train_labels: ArrayLike, dev_texts: Sequence[Text]
) -> NDArray[np.float64]:
    """Predictions (N,) of a linear model on word and word-pair counts, float64.

    - classification: logistic regression on counts of 1- and 2-grams.
    - pair_classification: logistic regression on the symmetric features of `_pair_features`.
    - pair_regression: ridge regression on the same features, clipped to the range of the training labels.
    - triplets: 1 where the cosine of the counts is higher with the match than with the hard negative.

    At most `MAX_TRAIN_ROWS` training rows are used.
    """
    train_texts, labels_N = _subsample(train_texts, np.asarray(train_labels, dtype=np.float64))
    vectoriser = CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", binary=kind != "classification")
    try:
        vectoriser.fit(sentence for text in train_texts for sentence in text)
    except ValueError:  # no word in any text
        return trivial_baseline(kind, labels_N, dev_texts)
    if kind == "triplets":
        text_NV, match_NV, other_NV = (normalize(vectoriser.transform(part)) for part in zip(*dev_texts, strict=True))
        nearer_N = np.asarray(text_NV.multiply(match_NV - other_NV).sum(axis=1)).ravel() > 0
        return nearer_N.astype(np.float64)
    if kind != "pair_regression" and len(np.unique(labels_N)) == 1:
        return trivial_baseline(kind, labels_N, dev_texts)
    featurise = _single_features if kind == "classification" else _pair_features
    train_NF, dev_NF = featurise(vectoriser, train_texts), featurise(vectoriser, dev_texts)
    if kind == "pair_regression":
        predictions_N = Ridge(alpha=1.0, solver="lsqr", tol=1e-4).fit(train_NF, labels_N).predict(dev_NF)
        return np.asarray(predictions_N.clip(labels_N.min(), labels_N.max()), dtype=np.float64)
    model = LogisticRegression(C=1.0, max_iter=2000, tol=1e-3)
    return np.asarray(model.fit(train_NF, labels_N).predict(dev_NF), dtype=np.float64)


def training_rows(count: int) -> NDArray[np.int64]:
    """Which of `count` training rows are used: all, or `MAX_TRAIN_ROWS` drawn with a fixed seed, ascending."""
    if count <= MAX_TRAIN_ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MAX_TRAIN_ROWS, replace=False))


def _subsample(texts: Sequence[Text], labels_N: NDArray[np.float64]) -> tuple[Sequence[Text], NDArray[np.float64]]:
    rows = training_rows(len(texts))
    return [texts[row] for row in rows], labels_N[rows]


def _single_features(vectoriser: CountVectorizer, texts: Sequence[Text]) -> sparse.csr_matrix:
    return vectoriser.transform(sentence for (sentence,) in texts)


def _pair_features(vectoriser: CountVectorizer, texts: Sequence[Text]) -> sparse.csr_matrix:
    """|u − v| and u ∘ v of the binary count vectors u, v of the two sentences, and how much they overlap.

    The overlap columns are Jaccard, Dice and containment of n-grams and the relative difference in length, all
    within 0…1 like the other features, so that one regularisation suits all. (N, 2V + 4).
    """
    u_NV = vectoriser.transform(first for first, _ in texts).astype(np.float64)
    v_NV = vectoriser.transform(second for _, second in texts).astype(np.float64)
    common_NV = u_NV.multiply(v_NV).tocsr()
    size_u_N, size_v_N, common_N = (np.asarray(m.sum(axis=1)).ravel() for m in (u_NV, v_NV, common_NV))
    longer_N, shorter_N = np.maximum(size_u_N, size_v_N), np.minimum(size_u_N, size_v_N)
    overlap_N4 = np.column_stack(
        [
            common_N / np.maximum(size_u_N + size_v_N - common_N, 1),
            2 * common_N / np.maximum(size_u_N + size_v_N, 1),
            common_N / np.maximum(shorter_N, 1),
            (longer_N - shorter_N) / np.maximum(longer_N, 1),
        ]
    )
    return sparse.hstack([abs(u_NV - v_NV), common_NV, overlap_N4], format="csr")
