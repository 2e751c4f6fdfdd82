"""What is fitted on validation after training: a temperature for the logits, thresholds for several labels."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from kit.console import warn

_TEMPERATURES = (0.05, 20.0)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, multi: bool) -> float:
    """Return the divisor of the logits that makes the labels most likely (Guo et al. 2017, arXiv:1706.04599).

    It changes no prediction of a single label. Where no temperature is the best, since every row is right and less is
    always more likely, or since it lies outside of 0.05 to 20, it stays 1, and that is told.

    Args:
        logits: float64 (rows, classes), of rows that the model was not trained on; at least one row.
        labels: int64 (rows,), or with `multi` bool (rows, classes).
        multi: whether a row has any number of labels.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    signs = 2.0 * labels - 1 if multi else None

    def nll(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if multi:
            return -log_expit(signs * scaled).mean()
        return -log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean()

    # Convex in 1 / temperature, so there is one minimum in its logarithm too.
    right = (logits > 0) == labels.astype(bool) if multi else logits.argmax(axis=1) == labels
    found = minimize_scalar(nll, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-8})
    if right.all() or np.isclose(found.x, np.log(_TEMPERATURES), atol=1e-3).any():
        why = "every row of it is predicted right" if right.all() else f"the best lies outside of {_TEMPERATURES}"
        warn(f"no temperature can be fitted to {len(labels):,} rows: {why}; it stays 1")
        return 1.0
    return float(np.exp(found.x))


def tune_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the threshold of each label that makes its F1 highest: float64 (classes,).

    Thresholds lie midway between neighbouring probabilities, or at 0.5; of several that are equally good, the one
    nearest to 0.5. A label that no row has keeps 0.5.

    Args:
        probabilities: float64 (rows, classes), of rows that the model was not trained on.
        labels: bool (rows, classes).
    """
    labels = np.asarray(labels, dtype=bool)
    return np.array([_threshold(*column) for column in zip(probabilities.T, labels.T, strict=True)])


def _threshold(probabilities: np.ndarray, has_label: np.ndarray) -> float:
    if not has_label.any():
        return 0.5
    values = np.unique(np.concatenate([[0.0], probabilities]))
    candidates = np.append((values[:-1] + values[1:]) / 2, 0.5)
    positive = np.sort(probabilities[has_label])
    hits = len(positive) - np.searchsorted(positive, candidates)
    predicted = len(probabilities) - np.searchsorted(np.sort(probabilities), candidates)
    f1 = 2 * hits / (predicted + len(positive))
    best = candidates[f1 == f1.max()]
    return float(best[np.abs(best - 0.5).argmin()])
