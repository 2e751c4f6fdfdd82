"""What a classifier has to beat: the most frequent class, and a logistic regression on TF-IDF."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from kit.evaluation.classification_metrics import decide

# The solver holds some twenty copies of its parameters, of which each class has one for each feature.
_MOST_FEATURES, _MOST_PARAMETERS = 200_000, 2_000_000
_STRENGTHS = (10.0, 1.0, 100.0)  # of several that are equally good on validation, the first


def majority(train_labels: np.ndarray, classes: int, rows: int, multi: bool) -> np.ndarray:
    """Return for each row the share of training rows that have each class: float64 (rows, classes).

    The most frequent class is thus predicted always; with `multi` each label that half of the rows have.

    Args:
        train_labels: int64 (training rows,), or with `multi` bool (training rows, classes).
        classes: number of classes.
        rows: how many there are to classify.
        multi: whether a row has any number of labels.
    """
    counts = train_labels.sum(axis=0) if multi else np.bincount(train_labels, minlength=classes)
    return np.tile(counts / len(train_labels), (rows, 1))


def join_pairs(texts: Sequence[str], pairs: Sequence[str | None] | None) -> list[str]:
    """Return texts with the second text of each on a line of its own."""
    pairs = [None] * len(texts) if pairs is None else pairs
    return [text if pair is None else f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]


def tfidf_logreg(
    train_texts: Sequence[str],
    train_labels: np.ndarray,
    texts: Mapping[str, Sequence[str]],
    multi: bool,
    class_weight: Mapping[int, float] | Literal["balanced"] | None = None,
    seed: int = 0,
    validation: tuple[Sequence[str], np.ndarray] | None = None,
    classes: int | None = None,
) -> dict[str, np.ndarray]:
    """Return the probabilities of a logistic regression on TF-IDF, of each set of texts: float64 (texts, classes).

    One setting for all data, that of a strong baseline: words and punctuation marks, single and in twos, lower-cased,
    1 + ln of their count; the 200,000 most frequent, or fewer where that makes more than 2,000,000 weights. C = 10, or
    of 1, 10 and 100 the one with the best macro-F1 on validation. With `multi` one regression for each label. What the
    training rows never or always have keeps that probability.

    Args:
        train_texts: pairs joined to one text each, as in the others.
        train_labels: int64 (training rows,), or with `multi` bool (training rows, classes).
        texts: to classify, by the name of the set.
        multi: whether a row has any number of labels.
        class_weight: as in scikit-learn: what a row of each class weighs. With `multi`, the weight of a label's
            positive rows.
        seed: of the solver.
        validation: texts and labels that choose C.
        classes: number of classes; by default that of the training rows' highest, or with `multi` of their columns.
    """
    classes = classes or (train_labels.shape[1] if multi else int(train_labels.max()) + 1)
    most = _MOST_FEATURES if multi else min(_MOST_FEATURES, max(1_000, _MOST_PARAMETERS // classes))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]", max_features=most)
    train = vectorizer.fit_transform(train_texts)
    sets = [vectorizer.transform(of_set) for of_set in texts.values()]
    given = (classes, multi, class_weight, seed)
    if validation is None:
        chosen = _fit_predict(train, train_labels, sets, *given, _STRENGTHS[0])
    else:
        held_out, best = vectorizer.transform(validation[0]), -1.0
        for strength in _STRENGTHS:
            on_held_out, *found = _fit_predict(train, train_labels, [held_out, *sets], *given, strength)
            predicted = decide(on_held_out, multi)
            score = f1_score(validation[1], predicted, labels=np.arange(classes), average="macro", zero_division=0)
            if score > best:
                best, chosen = score, found
    return dict(zip(texts, chosen, strict=True))


def _fit_predict(
    train: csr_matrix,
    labels: np.ndarray,
    sets: Sequence[csr_matrix],
    classes: int,
    multi: bool,
    class_weight: Mapping[int, float] | Literal["balanced"] | None,
    seed: int,
    strength: float,
) -> list[np.ndarray]:
    if multi:
        columns = []
        for label in range(classes):
            weights = {1: class_weight.get(label, 1.0)} if isinstance(class_weight, Mapping) else class_weight
            both = _fit_predict(train, labels[:, label].astype(int), sets, 2, False, weights, seed, strength)
            columns.append([probabilities[:, 1] for probabilities in both])
        return [np.stack(column, axis=1) for column in zip(*columns, strict=True)]
    present = np.unique(labels)
    found = [np.zeros((rows.shape[0], classes)) for rows in sets]
    if isinstance(class_weight, Mapping):
        class_weight = {label: class_weight.get(label, 1.0) for label in present.tolist()}
    if len(present) > 1:
        model = LogisticRegression(C=strength, class_weight=class_weight, random_state=seed, max_iter=1000)
        with warnings.catch_warnings():
            # After 1,000 steps what is missing to convergence changes no prediction worth a line on the terminal.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train, labels)
    for probabilities, rows in zip(found, sets, strict=True):
        probabilities[:, present] = model.predict_proba(rows) if len(present) > 1 else 1.0
    return found
