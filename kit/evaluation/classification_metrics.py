"""The figures of a classifier, through a metric of `evaluate` that needs no network and scikit-learn."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def decide(probabilities: np.ndarray, multi: bool, thresholds: np.ndarray | None = None) -> np.ndarray:
    """Return what is predicted: int64 (rows,), or with `multi` bool (rows, classes).

    Args:
        probabilities: float64 (rows, classes).
        multi: each label whose probability reaches its threshold, instead of the most probable one (the first of
            several equals).
        thresholds: with `multi`: of each label, (classes,); by default 0.5.
    """
    if multi:
        return probabilities >= (0.5 if thresholds is None else np.asarray(thresholds))
    return probabilities.argmax(axis=1)


def classification_figures(
    probabilities: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    multi: bool,
    thresholds: np.ndarray | None = None,
) -> dict[str, float | int]:
    """Return the figures of a set of rows; one that is not defined is left out.

    - `accuracy`: share of rows whose label, with `multi` whose every label, is predicted right.
    - `f1_macro`, `precision_macro`, `recall_macro`: means over every class of `names`; of one that is neither given
      nor predicted they are 0. `f1_weighted`: the mean weighted by rows of the class.
    - `f1_micro`, `hamming_loss`: with `multi`: F1 of all label decisions together, share of wrong decisions.
    - `matthews_correlation`: not with `multi`; 0 where only one class is given or only one predicted.
    - `roc_auc`: of two classes the area under the ROC curve of the second; else the mean over classes, each against
      the rest. A class that no row or every row has is left out of it; `roc_auc_classes` says how many were not.
    - `nll`: mean of -ln p of the given label, in nats; with `multi` of each decision, over all of them. A
      probability counts as at least 2.2e-16.
    - `ece`: expected calibration error with 15 equal-width bins of the top probability (Naeini et al. 2015; Guo et
      al. 2017): the mean over rows of |accuracy - mean probability| of the row's bin. With `multi` over all label
      decisions, whose top probability is that of the likelier of yes and no, whatever the thresholds.
    - `rows`: number of rows.

    Args:
        probabilities: float64 (rows, classes).
        labels: int64 (rows,), or with `multi` bool (rows, classes).
        names: of the classes.
        multi: whether a row has any number of labels.
        thresholds: with `multi`: of each label, (classes,); by default 0.5.

    Raises:
        ValueError: there are no rows or fewer than two classes, or a probability is not a number.
    """
    if not len(labels) or len(names) < 2 or not np.isfinite(probabilities).all():
        raise ValueError(f"figures need rows, classes and finite probabilities: found {probabilities.shape}")
    predictions = decide(probabilities, multi, thresholds).astype(np.int64)
    # The import of evaluate takes a second, which a causal LM's start can do without.
    from kit.evaluation.classification_metric import ClassificationMetric

    # evaluate makes a folder for each metric, even one that holds its rows in memory.
    with tempfile.TemporaryDirectory() as folder:
        metric = ClassificationMetric("multi" if multi else "single", keep_in_memory=True, cache_dir=folder)
        figures = metric.compute(
            predictions=predictions,
            references=np.asarray(labels).astype(np.int64),
            classes=np.arange(len(names)),
            probabilities=probabilities,
        )
    return {**figures, "rows": len(labels)}


def per_class_figures(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], multi: bool
) -> dict[str, dict[str, float | int]]:
    """Return `precision`, `recall`, `f1` and `support` (rows that have it) of each class; 0/0 counts as 0.

    Args:
        predicted: int64 (rows,), or with `multi` bool (rows, classes); see `decide`.
        labels: what is given, likewise.
        names: of the classes.
        multi: whether a row has any number of labels.
    """
    from sklearn.metrics import precision_recall_fscore_support  # a second, which a causal LM's run is spared

    columns = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(names)), zero_division=0)
    kinds = {"precision": float, "recall": float, "f1": float, "support": int}
    return {
        name: {key: kind(column[index]) for (key, kind), column in zip(kinds.items(), columns, strict=True)}
        for index, name in enumerate(names)
    }


def absent_classes(per_class: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the classes that no row of a set has: their F1 is 0, and lowers the macro figures."""
    return [name for name, figures in per_class.items() if not figures["support"]]


def confusion(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], multi: bool) -> list[list[int]] | None:
    """Return how often class i was predicted to be class j, (classes, classes); None with `multi`."""
    from sklearn.metrics import confusion_matrix

    return None if multi else confusion_matrix(labels, predicted, labels=np.arange(len(names))).tolist()
