"""Every figure against plain Python or scikit-learn's own functions, on cases small enough to follow by hand."""

import math
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.metrics import log_loss, matthews_corrcoef, roc_auc_score

from kit.evaluation.classification_metrics import (
    absent_classes,
    classification_figures,
    confusion,
    decide,
    per_class_figures,
)
from tests.evaluation.rows import in_two_processes

NAMES = ["ant", "bee", "cat", "dog"]


def distribution(rows, classes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), size=rows)


# ---- plain Python, from the definitions


def naive_f1s(given, predicted, classes):
    """Return (precision, recall, F1) of each class; rows are sets of classes."""
    found = []
    for label in range(classes):
        hits = sum(label in g and label in p for g, p in zip(given, predicted, strict=True))
        said, is_it = sum(label in p for p in predicted), sum(label in g for g in given)
        precision, recall = hits / said if said else 0.0, hits / is_it if is_it else 0.0
        found.append((precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0))
    return found


def naive_ece(tops, rights):
    bins = {}
    for top, right in zip(tops, rights, strict=True):
        number = next(n for n in range(15) if top <= np.linspace(0, 1, 16)[n + 1])
        bins.setdefault(number, []).append((top, right))
    return sum(
        len(held) / len(tops) * abs(sum(r for _, r in held) / len(held) - sum(t for t, _ in held) / len(held))
        for held in bins.values()
    )


def naive_auc(scores, has):
    """Return the share of pairs (with, without) that are in the right order; a tie is half a pair."""
    pairs = [(a, b) for a, x in zip(scores, has, strict=True) if x for b, y in zip(scores, has, strict=True) if not y]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def assert_macro(figures, naive, supports):
    for index, key in enumerate(["precision_macro", "recall_macro", "f1_macro"]):
        assert figures[key] == pytest.approx(sum(each[index] for each in naive) / len(naive)), key
    weighted = sum(each[2] * support for each, support in zip(naive, supports, strict=True)) / sum(supports)
    assert figures["f1_weighted"] == pytest.approx(weighted)


# ---- one label


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_what_their_definitions_give(seed):
    probabilities = distribution(80, 4, seed)
    labels = np.random.default_rng(seed).integers(0, 3, size=80)  # no row is a dog
    figures = classification_figures(probabilities, labels, NAMES, multi=False)
    top = [max(range(4), key=lambda c: row[c]) for row in probabilities.tolist()]
    naive = naive_f1s([{label} for label in labels], [{label} for label in top], 4)
    assert_macro(figures, naive, [Counter(labels.tolist())[label] for label in range(4)])
    rights = [p == g for p, g in zip(top, labels, strict=True)]
    assert figures["accuracy"] == pytest.approx(sum(rights) / 80)
    nats = [-math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert figures["nll"] == pytest.approx(math.fsum(nats) / 80)
    assert figures["ece"] == pytest.approx(naive_ece(probabilities.max(axis=1), rights))
    areas = [naive_auc(probabilities[:, label], labels == label) for label in range(3)]
    assert figures["roc_auc"] == pytest.approx(sum(areas) / 3)
    assert figures["roc_auc_classes"] == 3
    assert figures["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, top))
    assert figures["rows"] == 80


def test_a_class_that_nobody_has_or_predicts_counts_as_0():
    labels = np.array([0, 0, 1, 1])
    figures = classification_figures(np.eye(4)[labels], labels, NAMES, multi=False)
    assert figures["accuracy"] == 1
    assert figures["f1_macro"] == figures["precision_macro"] == figures["recall_macro"] == 0.5
    assert figures["f1_weighted"] == 1
    assert figures["roc_auc_classes"] == 2


def test_two_classes():
    probabilities, labels = distribution(50, 2), np.random.default_rng(3).integers(2, size=50)
    figures = classification_figures(probabilities, labels, ["ham", "spam"], multi=False)
    assert figures["roc_auc"] == pytest.approx(naive_auc(probabilities[:, 1], labels == 1))
    assert figures["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert "roc_auc_classes" not in figures


def test_area_of_two_classes_is_not_defined_with_one_of_them():
    figures = classification_figures(distribution(5, 2), np.zeros(5, dtype=int), ["a", "b"], multi=False)
    assert "roc_auc" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_all_wrong():
    labels = np.array([0, 1, 0, 1])
    figures = classification_figures(np.eye(2)[1 - labels], labels, ["a", "b"], multi=False)
    assert {figures[key] for key in ("accuracy", "f1_macro", "f1_weighted", "roc_auc")} == {0}
    assert (figures["matthews_correlation"], figures["ece"]) == (-1, 1)
    assert figures["nll"] == pytest.approx(-math.log(np.finfo(float).eps))  # not infinite


def test_one_row_is_quiet_and_has_no_undefined_figure():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = classification_figures(np.array([[0.2, 0.5, 0.3]]), np.array([1]), ["a", "b", "c"], multi=False)
    assert (right["accuracy"], right["f1_macro"], right["matthews_correlation"]) == (1, pytest.approx(1 / 3), 0)
    assert right["ece"] == pytest.approx(0.5)
    assert "roc_auc" not in right


def test_ties_go_to_the_first_class():
    probabilities = np.full((3, 4), 0.25)
    assert decide(probabilities, multi=False).tolist() == [0, 0, 0]
    figures = classification_figures(probabilities, np.array([0, 1, 2]), NAMES, multi=False)
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["roc_auc"] == 0.5
    assert figures["matthews_correlation"] == 0
    assert figures["ece"] == pytest.approx(1 / 3 - 0.25)


def test_a_probability_on_an_edge_belongs_to_the_bin_below():
    edge = np.linspace(0, 1, 16)[9]  # 0.6
    inside = np.array([0.55, edge])  # one bin: (|0 - 0.55| + ...) would not cancel if they were apart
    probabilities = np.stack([inside, 1 - inside], axis=1)
    figures = classification_figures(probabilities, np.array([1, 0]), ["a", "b"], multi=False)
    assert figures["ece"] == pytest.approx(abs(1 - 0.55 - edge) / 2)


def test_perfectly_calibrated_rows_have_no_error():
    probabilities = np.tile([0.75, 0.25], (4, 1))
    assert classification_figures(probabilities, np.array([0, 0, 0, 1]), ["a", "b"], multi=False)["ece"] == 0


# ---- several labels


@pytest.mark.parametrize("thresholds", [None, np.array([0.2, 0.5, 0.9, 0.4])])
def test_figures_of_several_labels(thresholds):
    rng = np.random.default_rng(1)
    probabilities, labels = rng.random((60, 4)), rng.random((60, 4)) < [0.5, 0.2, 0.8, 0]
    figures = classification_figures(probabilities, labels, NAMES, multi=True, thresholds=thresholds)
    limits = [0.5] * 4 if thresholds is None else thresholds
    predicted = [{c for c in range(4) if row[c] >= limits[c]} for row in probabilities]
    given = [set(np.flatnonzero(row).tolist()) for row in labels]
    assert_macro(figures, naive_f1s(given, predicted, 4), labels.sum(axis=0).tolist())
    assert figures["accuracy"] == pytest.approx(sum(g == p for g, p in zip(given, predicted, strict=True)) / 60)
    wrong = sum(len(g ^ p) for g, p in zip(given, predicted, strict=True))
    assert figures["hamming_loss"] == pytest.approx(wrong / 240)
    hits = sum(len(g & p) for g, p in zip(given, predicted, strict=True))
    assert figures["f1_micro"] == pytest.approx(2 * hits / (sum(map(len, given)) + sum(map(len, predicted))))
    areas = [roc_auc_score(labels[:, c], probabilities[:, c]) for c in range(3)]
    assert figures["roc_auc"] == pytest.approx(np.mean(areas))
    assert figures["roc_auc_classes"] == 3
    decisions = [(p, bool(y)) for p, y in zip(probabilities.ravel(), labels.ravel(), strict=True)]
    assert figures["nll"] == pytest.approx(-np.mean([math.log(p if y else 1 - p) for p, y in decisions]))
    ece = naive_ece([max(p, 1 - p) for p, _ in decisions], [(p >= 0.5) == y for p, y in decisions])
    assert figures["ece"] == pytest.approx(ece)
    assert "matthews_correlation" not in figures


def test_a_probability_at_its_threshold_is_predicted():
    assert decide(np.array([[0.5, 0.49]]), multi=True).tolist() == [[True, False]]
    assert decide(np.array([[0.5, 0.3]]), multi=True, thresholds=np.array([0.6, 0.3])).tolist() == [[False, True]]


def test_two_labels_that_go_together_are_not_two_classes():
    labels = np.array([[1, 1], [0, 0], [1, 1]], dtype=bool)
    figures = classification_figures(labels.astype(float), labels, ["a", "b"], multi=True)
    assert (figures["accuracy"], figures["f1_macro"], figures["hamming_loss"], figures["roc_auc"]) == (1, 1, 0, 1)


def test_rows_without_any_label():
    labels = np.zeros((3, 2), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_figures(np.full((3, 2), 0.1), labels, ["a", "b"], multi=True)
    assert (figures["accuracy"], figures["f1_macro"], figures["f1_micro"]) == (1, 0, 0)
    assert "roc_auc" not in figures


# ---- nonsense, and where it computes


@pytest.mark.parametrize(
    ("probabilities", "names"),
    [(np.empty((0, 2)), ["a", "b"]), (np.array([[0.5, math.nan]]), ["a", "b"]), (np.ones((1, 1)), ["a"])],
)
def test_nonsense_has_no_figures(probabilities, names):
    labels = np.zeros(len(probabilities), dtype=int)
    with pytest.raises(ValueError, match="figures need rows"):
        classification_figures(probabilities, labels, names, multi=False)


def _figures():
    figures = classification_figures(distribution(90, 4), np.arange(90) % 4, NAMES, multi=False)
    return np.array([figures[key] for key in sorted(figures)])


def test_processes_and_threads_do_not_disturb_each_other(tmp_path):
    alone = _figures()
    with ThreadPoolExecutor(4) as pool:
        assert all((found == alone).all() for found in pool.map(lambda _: _figures(), range(8)))
    assert all((found == alone).all() for found in in_two_processes(_figures, tmp_path))


def test_nothing_is_left_on_the_disk_and_no_network_is_used(tmp_path, monkeypatch):
    import socket
    import tempfile

    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.chdir(tmp_path / "home")
    _figures()
    assert not os.listdir(tmp_path / "home")
    assert not os.listdir(tmp_path / "tmp")


def test_random_numbers_outside_stay():
    state = np.random.get_state()[1].copy()
    _figures()
    assert (np.random.get_state()[1] == state).all()


def test_figures_are_plain_numbers():
    figures = classification_figures(distribution(9, 4), np.arange(9) % 4, NAMES, multi=False)
    assert {type(value) for value in figures.values()} == {int, float}


# ---- each class


def test_each_class_and_the_confusion_matrix():
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 1])
    assert confusion(predicted, labels, NAMES, multi=False) == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    found = per_class_figures(predicted, labels, NAMES, multi=False)
    assert found["ant"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert found["bee"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 0.4, "support": 2})
    assert found["cat"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert found["dog"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert absent_classes(found) == ["cat"]


def test_each_label_of_several():
    labels = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
    predicted = np.array([[1, 1], [0, 1], [0, 0]], dtype=bool)
    found = per_class_figures(predicted, labels, ["a", "b"], multi=True)
    assert found["a"] == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert found["b"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3, "support": 1})
    assert confusion(predicted, labels, ["a", "b"], multi=True) is None
