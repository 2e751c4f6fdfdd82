"""The figures of a classifier, through a metric of `evaluate` that needs no network and scikit-learn."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    hamming_loss,
    matthews_corrcoef,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    roc_auc_score,
)

_BINS = 15
# As scikit-learn's `log_loss` has it: one row alone cannot make the mean infinite.
_LEAST_PROBABILITY = np.finfo(np.float64).eps


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
    # evaluate makes a folder for each metric, even one that holds its rows in memory.
    with tempfile.TemporaryDirectory() as folder:
        metric = _ClassificationMetric("multi" if multi else "single", keep_in_memory=True, cache_dir=folder)
        figures = metric.compute(
            predictions=predictions,
            references=np.asarray(labels).astype(np.int64),
            classes=np.arange(len(names)),
            probabilities=probabilities,
        )
    return {**figures, "rows": len(labels)}


class _ClassificationMetric(evaluate.Metric):
    """All figures at once; what they mean says `classification_figures`."""

    def _info(self) -> evaluate.MetricInfo:
        label = Value("int64") if self.config_name == "single" else ListOf(Value("int64"))
        return evaluate.MetricInfo(
            description="Figures of a classifier.",
            citation="",
            inputs_description="Labels as they are predicted and given, and the probabilities.",
            features=Features({"predictions": label, "references": label}),
        )

    def _compute(
        self, predictions: list, references: list, classes: np.ndarray, probabilities: np.ndarray
    ) -> dict[str, float | int]:
        predicted, given = np.asarray(predictions), np.asarray(references)
        options = {"labels": classes, "zero_division": 0}
        figures = {
            "accuracy": accuracy_score(given, predicted),
            "f1_macro": f1_score(given, predicted, average="macro", **options),
            "f1_weighted": f1_score(given, predicted, average="weighted", **options),
            "precision_macro": precision_score(given, predicted, average="macro", **options),
            "recall_macro": recall_score(given, predicted, average="macro", **options),
        }
        if given.ndim == 2:
            figures["f1_micro"] = f1_score(given, predicted, average="micro", **options)
            figures["hamming_loss"] = hamming_loss(given, predicted)
            likelier = np.maximum(probabilities, 1 - probabilities).ravel()
            correct = ((probabilities >= 0.5) == given.astype(bool)).ravel()
            of_given = np.where(given, probabilities, 1 - probabilities)
        else:
            # scikit-learn says the same of one class alone, but with a warning.
            one_class = (given == given[0]).all() and (predicted == given[0]).all()
            figures["matthews_correlation"] = 0.0 if one_class else matthews_corrcoef(given, predicted)
            likelier, correct = probabilities.max(axis=1), predicted == given
            of_given = np.take_along_axis(probabilities, given[:, None], axis=1)
        figures |= _areas(given, probabilities)
        figures["nll"] = -np.log(of_given.clip(min=_LEAST_PROBABILITY)).mean()
        figures["ece"] = _calibration_error(likelier, correct)
        return {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}


def _areas(given: np.ndarray, probabilities: np.ndarray) -> dict[str, float | int]:
    classes = probabilities.shape[1]
    if given.ndim == 1 and classes == 2:
        return {"roc_auc": roc_auc_score(given, probabilities[:, 1])} if 0 < given.sum() < len(given) else {}
    has = given if given.ndim == 2 else given[:, None] == np.arange(classes)
    told_apart = [column for column in range(classes) if 0 < has[:, column].sum() < len(has)]
    areas = [roc_auc_score(has[:, column], probabilities[:, column]) for column in told_apart]
    return {"roc_auc": np.mean(areas), "roc_auc_classes": len(areas)} if areas else {}


def _calibration_error(top: np.ndarray, correct: np.ndarray) -> float:
    bins = np.digitize(top, np.linspace(0, 1, _BINS + 1)[1:-1], right=True)
    surplus = np.bincount(bins, weights=correct.astype(np.float64) - top, minlength=_BINS)
    return np.abs(surplus).sum() / len(top)


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
    return None if multi else confusion_matrix(labels, predicted, labels=np.arange(len(names))).tolist()
