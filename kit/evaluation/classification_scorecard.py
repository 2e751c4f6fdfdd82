"""The scorecard of a classifier: before, baselines and after on the same rows, and where it goes wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kit.console import say, table, warn
from kit.evaluation.classification_metrics import absent_classes
from kit.evaluation.intervals import paired_difference

Figures = Mapping[str, float | int]

_SIZES = {"rows", "roc_auc_classes"}
# More make no table that anybody reads; the file holds them all.
_MOST_CLASSES, _MOST_COLUMNS, _MOST_LISTED = 30, 10, 10
_LONGEST_NAME = 24
_BASELINES = {"tfidf_logreg": "TF-IDF", "zero_shot": "zero-shot"}
_SHOWN = {"accuracy": "{:.1%}", "f1_macro": "{:.3f}", "ece": "{:.3f}"}
_TITLES = {"accuracy": "accuracy", "f1_macro": "macro-F1", "ece": "ECE"}


def make_classification_scorecard(
    before: Mapping[str, Figures],
    after: Mapping[str, Figures],
    baselines: Mapping[str, Mapping[str, Figures]],
    details: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all that is known of every set, as `scorecard.json` holds it.

    Args:
        before: figures of each set, see `classification_figures`, with the head as it was before training.
        after: those of the trained model; with sets, such as the test, that only it was measured on.
        baselines: of each set, of each baseline.
        details: of each set of the trained model: `intervals` (`bootstrap_intervals`), `against_tfidf`
            (`paired_difference`), `per_class` (`per_class_figures`) and `confusion`; any may be missing.
        notes: what is to be known of the baselines.
    """
    sets = {}
    for name, new in after.items():
        card: dict[str, Any] = {"after": dict(new)}
        if name in before:
            old = before[name]
            delta = {key: new[key] - old[key] for key in old if key in new and key not in _SIZES}
            card = {"before": dict(old), "after": dict(new), "delta": delta}
        if name in baselines:
            card["baselines"] = {baseline: dict(figures) for baseline, figures in baselines[name].items()}
        sets[name] = {**card, **details.get(name, {})}
    return {"task": "sequence-classification", "sets": sets, **({"notes": list(notes)} if notes else {})}


def with_differences(
    details: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]],
    labels: Mapping[str, np.ndarray],
    *resampled: Any,
) -> dict[str, dict[str, Any]]:
    """Return details of each set with `against_tfidf` in the place of `predicted`.

    Args:
        details: with what the classifier predicted.
        baselines: of each set, of each baseline what it `predicted`.
        labels: of each set.
        resampled: the last arguments of `paired_difference`.
    """
    result = {}
    for name, found in details.items():
        result[name] = {key: value for key, value in found.items() if key != "predicted"}
        other = baselines.get(name, {}).get("tfidf_logreg", {}).get("predicted")
        if other is not None:
            pair = np.array(found["predicted"]), np.array(other)
            result[name]["against_tfidf"] = paired_difference(labels[name], *pair, *resampled)
    return result


def print_classification_scorecard(scorecard: Mapping[str, Any]) -> None:
    """Print the table of all sets, then of the test (else validation, else the first set) where it goes wrong."""
    sets = scorecard["sets"]
    if not sets:
        return
    baselines = list(dict.fromkeys(key for card in sets.values() for key in card.get("baselines", {})))
    title = "Scorecard (lower ECE is better)"
    columns = ["set", "figure", "before", *(_BASELINES.get(key, key) for key in baselines), "after", "95 % interval"]
    table(title, columns, [_row(name, card, baselines) for name, card in sets.items()])
    for note in scorecard.get("notes", ()):
        say(note)
    for name, card in sets.items():
        _say_against_tfidf(name, card)
    for name, card in sets.items():
        if absent := absent_classes(card.get("per_class", {})):
            listed = ", ".join(map(cut_name, absent[:_MOST_LISTED])) + (", …" if len(absent) > _MOST_LISTED else "")
            warn(
                f"{name}: no row for {len(absent)} of the {len(card['per_class'])} classes ({listed}): each counts in "
                f"macro-F1, with 0"
            )
        predicted = [cut_name(c) for c, n in zip(card.get("per_class", ()), _predicted(card), strict=False) if n]
        if len(predicted) == 1 and card["after"]["rows"] > 1:
            warn(f"{name}: every row is predicted to be `{predicted[0]}`")
    shown = next((name for name in ("test", "validation") if name in sets), next(iter(sets)))
    if per_class := sets[shown].get("per_class"):
        print_confusion(shown, sets[shown].get("confusion"), list(per_class))
        _print_per_class(shown, per_class)


def _row(name: str, card: Mapping[str, Any], baselines: Sequence[str]) -> list[str]:
    """Return the cells of a set, with a line for each figure in all but the first."""
    measured = [card.get("before", {}), *(card.get("baselines", {}).get(baseline, {}) for baseline in baselines)]
    cells = ["\n".join(_shown(key, found.get(key)) for key in _SHOWN) for found in [*measured, card["after"]]]
    intervals = [card.get("intervals", {}).get(key, [None]) for key in _SHOWN]
    bounds = [" to ".join(_shown(key, bound) for bound in found) for key, found in zip(_SHOWN, intervals, strict=True)]
    titles = _TITLES | ({"accuracy": "exact match"} if "f1_micro" in card["after"] else {})
    return [f"{name}\n{card['after']['rows']:,} rows", "\n".join(titles.values()), *cells, "\n".join(bounds)]


def _predicted(card: Mapping[str, Any]) -> list[int]:
    """Return how many rows were predicted to be of each class; nothing for any number of labels."""
    return np.array(card["confusion"]).sum(axis=0).tolist() if card.get("confusion") else []


def _shown(key: str, value: float | None) -> str:
    return "–" if value is None else _SHOWN[key].format(value)


def _say_against_tfidf(name: str, card: Mapping[str, Any]) -> None:
    """Say in red where the model loses to the logistic regression, in plain words where it does not."""
    for key, found in card.get("against_tfidf", {}).items():
        value, low, high = found["difference"], found["low"], found["high"]
        significant = "significantly" if low > 0 or high < 0 else "not significantly"
        if value == 0:
            said = f"{name}: {_TITLES[key]} equals that of TF-IDF with logistic regression"
        else:
            than = "below" if value < 0 else "above"
            said = f"{name}: {_TITLES[key]} {abs(value):.3f} {than} TF-IDF with logistic regression, {significant}"
        style = "bold red" if value < 0 else None
        say(f"{said} (95 % interval of the difference: {low:+.3f} to {high:+.3f})", style=style)


def cut_name(name: str) -> str:
    """Return a class's name on one line, cut where it is long."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def print_confusion(title: str, confusion: Sequence[Sequence[int]] | None, names: Sequence[str]) -> None:
    """Print a confusion matrix, whose columns bear the numbers of its rows; of many classes the worst pairs."""
    if confusion is None:
        return
    if len(names) <= _MOST_COLUMNS:
        columns = ["given \\ predicted", *(str(number) for number in range(len(names)))]
        rows = [
            [f"{number} {cut_name(name)}", *(f"{count:,}" if count else "·" for count in counts)]
            for number, (name, counts) in enumerate(zip(names, confusion, strict=True))
        ]
        table(f"Confusion on {title}", columns, rows)
        return
    pairs = [
        (count, given, predicted)
        for given, counts in enumerate(confusion)
        for predicted, count in enumerate(counts)
        if count and given != predicted
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if pairs:
        rows = [[cut_name(names[given]), cut_name(names[predicted]), f"{count:,}"] for count, given, predicted in pairs]
        table(f"Most frequent confusions on {title}", ["given", "predicted", "rows"], rows[:_MOST_LISTED])


def _print_per_class(title: str, per_class: Mapping[str, Figures]) -> None:
    order = list(per_class)
    if len(order) > _MOST_CLASSES:
        order = sorted(order, key=lambda name: per_class[name]["f1"])[:_MOST_CLASSES]
        title += f", the {_MOST_CLASSES} worst of {len(per_class)}"
    rows = [
        [cut_name(name), *(f"{per_class[name][key]:.3f}" for key in ("precision", "recall", "f1"))]
        + [f"{per_class[name]['support']:,}"]
        for name in order
    ]
    table(f"Classes of {title}", ["class", "precision", "recall", "F1", "rows"], rows)


def print_classification_figures(title: str, sets: Mapping[str, Figures]) -> None:
    """Print the figures of one model on several sets; one that is not defined stays empty."""
    figures = {
        "accuracy": ("accuracy", "{:.1%}"), "macro-F1": ("f1_macro", "{:.3f}"),
        "weighted F1": ("f1_weighted", "{:.3f}"), "precision": ("precision_macro", "{:.3f}"),
        "recall": ("recall_macro", "{:.3f}"),
        "micro-F1": ("f1_micro", "{:.3f}"), "Hamming": ("hamming_loss", "{:.3f}"),
        "MCC": ("matthews_correlation", "{:.3f}"), "AUROC": ("roc_auc", "{:.3f}"), "nats": ("nll", "{:.4f}"),
        "ECE": ("ece", "{:.3f}"), "rows": ("rows", "{:,}"),
    }  # fmt: skip
    known = {column: (key, form) for column, (key, form) in figures.items() if any(key in f for f in sets.values())}
    rows = [
        [name, *(form.format(found[key]) if key in found else "" for key, form in known.values())]
        for name, found in sets.items()
    ]
    if rows:
        table(title, ["set", *known], rows)
