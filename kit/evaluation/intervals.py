"""Confidence intervals of accuracy and macro-F1, and of the difference between two classifiers."""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse import csr_array

_BOUNDS = (2.5, 97.5)  # percentiles: 95 % between them


def bootstrap_intervals(
    labels: np.ndarray, predicted: np.ndarray, classes: int, multi: bool, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """Return `accuracy` and `f1_macro` with the [low, high] of their 95 % intervals: percentile bootstrap over rows.

    Args:
        labels: what is given: int64 (rows,), or with `multi` bool (rows, classes).
        predicted: what is predicted, likewise.
        classes: number of classes; each counts in macro-F1.
        multi: whether a row has any number of labels.
        resamples: how many samples, each of as many rows, are drawn with replacement.
        seed: of the drawing.
    """
    (given, column), counts = _cells([labels, predicted], classes, multi)
    scores = _scorer(given, column)
    drawn = [scores(sample) for sample in _resample(counts, resamples, seed)]
    return {name: _interval([each[name] for each in drawn]) for name in drawn[0]}


def paired_difference(
    labels: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    classes: int,
    multi: bool,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return how much better a is than b on the same rows: `difference`, `low` and `high` of `accuracy`, `f1_macro`.

    The paired bootstrap: both are scored on the same resampled rows, so that how hard the rows are cancels out. An
    interval that excludes 0 is called significant. Arguments are those of `bootstrap_intervals`.
    """
    (given, a, b), counts = _cells([labels, predicted_a, predicted_b], classes, multi)
    score_a, score_b = _scorer(given, a), _scorer(given, b)

    def differences(sample: np.ndarray) -> dict[str, float]:
        of_a, of_b = score_a(sample), score_b(sample)
        return {name: of_a[name] - of_b[name] for name in of_a}

    drawn = [differences(sample) for sample in _resample(counts, resamples, seed)]
    result = {}
    for name, value in differences(counts).items():
        low, high = _interval([each[name] for each in drawn])
        result[name] = {"difference": value, "low": low, "high": high}
    return result


def _cells(columns: list[np.ndarray], classes: int, multi: bool) -> tuple[list[csr_array], np.ndarray]:
    """Return the distinct rows as one indicator matrix (cells, classes) for each column, and how often each occurs."""
    joined = np.concatenate([np.asarray(column).reshape(len(column), -1) for column in columns], axis=1)
    distinct, counts = np.unique(joined.astype(np.int64), axis=0, return_counts=True)
    parts = np.split(distinct, len(columns), axis=1)
    return [csr_array(part if multi else part == np.arange(classes), dtype=np.float64) for part in parts], counts


def _resample(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each cell occurs among resampled rows: drawing rows is drawing cells from a multinomial."""
    generator = np.random.default_rng(seed)
    shares = counts / counts.sum()
    for _ in range(resamples):
        yield generator.multinomial(counts.sum(), shares)


def _scorer(given: csr_array, predicted: csr_array) -> Callable[[np.ndarray], dict[str, float]]:
    """Return what scores cells, given how often each occurs: accuracy and macro-F1, where 0/0 = 0."""
    right = abs(given - predicted).sum(axis=1) == 0
    both, either = given.multiply(predicted).tocsr(), (given + predicted).tocsr()

    def scores(counts: np.ndarray) -> dict[str, float]:
        hits, total = counts @ both, counts @ either
        f1 = np.divide(2 * hits, total, out=np.zeros(len(hits)), where=total > 0)
        return {"accuracy": float(counts @ right / counts.sum()), "f1_macro": float(f1.mean())}

    return scores


def _interval(values: list[float]) -> list[float]:
    return np.percentile(values, _BOUNDS).tolist()
