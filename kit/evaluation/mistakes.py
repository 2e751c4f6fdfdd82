"""The most confident mistakes of a classifier: often it is the label that is wrong."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kit.evaluation.classification_metrics import decide


def confident_mistakes(
    probabilities: np.ndarray,
    labels: np.ndarray,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    where: Sequence[str],
    names: Sequence[str],
    multi: bool,
    most: int,
    thresholds: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return rows that were predicted wrong, the most confident mistake first.

    Each has `where`, `text`, `text_pair` (if it has one), `label`, `predicted`, `probability` (of what was predicted)
    and `label_probability` (of what is given). With `multi`, `labels` and `predicted` are lists, and the probabilities
    are those of the row's most confident wrong decision, that for or against `about`.

    Args:
        probabilities: float64 (rows, classes).
        labels: int64 (rows,), or with `multi` bool (rows, classes).
        texts: of the rows.
        pairs: second texts, or None.
        where: file and line of each row.
        names: of the classes.
        multi: whether a row has any number of labels.
        most: rows to return at most.
        thresholds: with `multi`: of each label, (classes,); by default 0.5.
    """
    predicted = decide(probabilities, multi, thresholds)
    if multi:
        # Of each decision: the probability of what was decided where that was wrong, else -1.
        decided = np.where(predicted, probabilities, 1 - probabilities)
        decided = np.where(predicted != labels, decided, -1.0)
        about, confidence = decided.argmax(axis=1), decided.max(axis=1)
    else:
        confidence = np.where(predicted != labels, probabilities.max(axis=1), -1.0)
    mistakes = []
    for row in np.argsort(-confidence, kind="stable")[:most].tolist():
        if confidence[row] < 0:
            break
        pair = {"text_pair": pairs[row]} if pairs is not None and pairs[row] is not None else {}
        if multi:
            said = {
                "labels": _named(labels[row], names),
                "predicted": _named(predicted[row], names),
                "about": names[about[row]],
            }
            of_label = 1 - confidence[row]
        else:
            said = {"label": names[labels[row]], "predicted": names[predicted[row]]}
            of_label = probabilities[row, labels[row]]
        figures = {"probability": float(confidence[row]), "label_probability": float(of_label)}
        mistakes.append({"where": where[row], "text": texts[row], **pair, **said, **figures})
    return mistakes


def _named(has_label: np.ndarray, names: Sequence[str]) -> list[str]:
    return [name for name, has in zip(names, has_label, strict=True) if has]


def prediction_lines(
    name: str,
    probabilities: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    where: Sequence[str],
    names: Sequence[str],
    multi: bool,
) -> str:
    """Return a line of JSON for each row of a set: where it is, its labels, what is predicted, how probable that is.

    So it is on record which rows a set has, and another model can be compared on the same ones.
    """
    lines = []
    for likely, found, given, place in zip(probabilities, predicted, labels, where, strict=True):
        if multi:
            row = {"labels": _named(given, names), "predicted": _named(found, names)}
        else:
            row = {"label": names[given], "predicted": names[found], "probability": round(float(likely[found]), 6)}
        lines.append(json.dumps({"set": name, "where": place, **row}, ensure_ascii=False) + "\n")
    return "".join(lines)
