"""The metric of `evaluate` behind the figures of a classifier: it needs no network, and scikit-learn alone."""

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    hamming_loss,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

_BINS = 15
# As scikit-learn's `log_loss` has it: one row alone cannot make the mean infinite.
_LEAST_PROBABILITY = np.finfo(np.float64).eps


class ClassificationMetric(evaluate.Metric):
    """All figures at once; what they mean says `kit.evaluation.classification_metrics`."""

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
