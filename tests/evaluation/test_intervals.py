"""Bootstrap intervals against a plain loop over resampled rows and against scipy's."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from kit.evaluation.intervals import bootstrap_intervals, paired_difference


def rows(number, classes, right, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=number)
    return labels, *(
        np.where(rng.random(number) < share, labels, rng.integers(classes, size=number)) for share in right
    )


def accuracy(labels, predicted):
    return np.mean([(given == said).all() for given, said in zip(labels, predicted, strict=True)])


def macro_f1(labels, predicted, classes):
    found = []
    for label in range(classes):
        given, said = (
            column[:, label].astype(bool) if column.ndim == 2 else column == label for column in (labels, predicted)
        )
        found.append(2 * (given & said).sum() / (given.sum() + said.sum()) if (given | said).any() else 0)
    return np.mean(found)


def test_this_files_macro_f1_is_scikit_learns():
    labels, predicted = rows(60, 3, [0.5], seed=0)
    expected = f1_score(labels, predicted, labels=range(4), average="macro", zero_division=0)
    assert macro_f1(labels, predicted, 4) == pytest.approx(expected)


def by_rows(labels, columns, score, resamples=1500, seed=5):
    """Resample rows, one resample at a time, and score each column."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(labels), size=len(labels)) for _ in range(resamples)]
    return np.array([[score(labels[rows], column[rows]) for column in columns] for rows in drawn])


@pytest.mark.parametrize(("classes", "multi"), [(3, False), (2, False), (3, True)])
def test_intervals_are_those_of_resampled_rows(classes, multi):
    labels, predicted = rows(120, classes, [0.7], seed=1)
    if multi:
        rng = np.random.default_rng(2)
        labels = rng.random((120, classes)) < 0.4
        predicted = labels ^ (rng.random((120, classes)) < 0.15)
    found = bootstrap_intervals(labels, predicted, classes, multi, resamples=4000, seed=0)
    exact = by_rows(labels, [predicted], accuracy)[:, 0]
    assert found["accuracy"] == pytest.approx(np.percentile(exact, [2.5, 97.5]), abs=0.01)
    f1 = by_rows(labels, [predicted], lambda a, b: macro_f1(a, b, classes))[:, 0]
    assert found["f1_macro"] == pytest.approx(np.percentile(f1, [2.5, 97.5]), abs=0.015)
    assert found["f1_macro"][1] - found["f1_macro"][0] > 0.04  # wide enough for the tolerance to mean something


def test_accuracy_agrees_with_scipy():
    labels, predicted = rows(200, 4, [0.6], seed=3)
    expected = bootstrap(((labels == predicted).astype(float),), np.mean, n_resamples=9999, method="percentile", rng=0)
    found = bootstrap_intervals(labels, predicted, 4, False, resamples=9999)["accuracy"]
    assert found == pytest.approx(list(expected.confidence_interval), abs=0.006)


def test_a_paired_difference_is_that_of_resampled_rows():
    labels, a, b = rows(150, 3, [0.8, 0.6], seed=4)
    found = paired_difference(labels, a, b, 3, False, resamples=4000)
    assert found["accuracy"]["difference"] == pytest.approx((a == labels).mean() - (b == labels).mean())
    assert found["f1_macro"]["difference"] == pytest.approx(macro_f1(labels, a, 3) - macro_f1(labels, b, 3))
    for name, score in [("accuracy", accuracy), ("f1_macro", lambda x, y: macro_f1(x, y, 3))]:
        scores = by_rows(labels, [a, b], score)
        bounds = np.percentile(scores[:, 0] - scores[:, 1], [2.5, 97.5])
        assert [found[name]["low"], found[name]["high"]] == pytest.approx(bounds, abs=0.02)


def test_pairing_cancels_what_both_get_wrong():
    """Two classifiers that differ on two rows of 400: unpaired intervals would be ten times as wide."""
    labels, a = rows(400, 2, [0.5], seed=6)
    b = a.copy()
    b[:2] = 1 - b[:2]
    paired = paired_difference(labels, a, b, 2, False)["accuracy"]
    single = bootstrap_intervals(labels, a, 2, False)["accuracy"]
    assert paired["high"] - paired["low"] < 0.2 * (single[1] - single[0])


def test_the_same_classifier_differs_by_nothing():
    labels, a = rows(50, 3, [0.7], seed=7)
    nothing = {"difference": 0, "low": 0, "high": 0}
    assert paired_difference(labels, a, a, 3, False) == {"accuracy": nothing, "f1_macro": nothing}


def test_the_other_way_round_is_the_negative():
    labels, a, b = rows(90, 3, [0.8, 0.5], seed=8)
    there, back = paired_difference(labels, a, b, 3, False), paired_difference(labels, b, a, 3, False)
    for name in there:
        assert there[name]["difference"] == -back[name]["difference"]
        assert there[name]["low"] == pytest.approx(-back[name]["high"], abs=0.03)


@pytest.mark.parametrize(("right", "value"), [(True, 1.0), (False, 0.0)])
def test_what_has_no_spread_has_no_width(right, value):
    labels = np.array([0, 1] * 10)
    found = bootstrap_intervals(labels, labels if right else 1 - labels, 2, False)
    assert found["accuracy"] == [value, value]
    assert found["f1_macro"] == [value, value]


def test_a_class_absent_from_the_set_counts():
    labels = np.array([0, 1] * 200)
    assert bootstrap_intervals(labels, labels, 4, False)["f1_macro"] == [0.5, 0.5]


def test_one_row():
    assert bootstrap_intervals(np.array([1]), np.array([1]), 2, False) == {"accuracy": [1, 1], "f1_macro": [0.5, 0.5]}


def test_seed_and_order_of_rows():
    labels, predicted = rows(60, 3, [0.6], seed=9)
    found = bootstrap_intervals(labels, predicted, 3, False, seed=1)
    assert bootstrap_intervals(labels, predicted, 3, False, seed=1) == found
    assert bootstrap_intervals(labels[::-1], predicted[::-1], 3, False, seed=1) == found
    assert bootstrap_intervals(labels, predicted, 3, False, seed=2) != found
