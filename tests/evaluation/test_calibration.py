"""A temperature and thresholds against a search over every candidate."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import f1_score, log_loss

from kit.evaluation.calibration import fit_temperature, tune_thresholds


def drawn(temperature, rows=4000, classes=3, seed=0):
    """Return logits and labels that were drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * 2
    shares = softmax(logits / temperature, axis=1).cumsum(axis=1)
    return logits, (rng.random((rows, 1)) > shares).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    assert fit_temperature(*drawn(temperature), multi=False) == pytest.approx(temperature, rel=0.1)


def test_no_temperature_of_a_grid_is_better():
    logits, labels = drawn(2.0, rows=50)
    found = fit_temperature(logits, labels, multi=False)
    best = log_loss(labels, softmax(logits / found, axis=1))
    for other in np.geomspace(0.05, 20, 500):
        assert best <= log_loss(labels, softmax(logits / other, axis=1)) + 1e-9


def test_temperature_of_several_labels():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5000, 3)) * 3
    labels = rng.random((5000, 3)) < expit(logits / 2.5)
    assert fit_temperature(logits, labels, multi=True) == pytest.approx(2.5, rel=0.1)


def test_temperature_scales_with_the_logits():
    logits, labels = drawn(1.0)
    assert fit_temperature(4 * logits, labels, False) == pytest.approx(4 * fit_temperature(logits, labels, False), 1e-4)


@pytest.mark.parametrize("gap", [2, 5, 40, 1000])
def test_temperature_stays_1_where_none_is_the_best(gap, capsys):
    """Where every row is right, a head that is ever more sure fits ever better: nothing is learned from that."""
    logits = np.array([[float(gap), 0.0], [0.0, float(gap)]])
    assert fit_temperature(logits, np.array([0, 1]), multi=False) == 1.0
    assert "no temperature can be fitted to 2 rows: every row of it is predicted right" in capsys.readouterr().out
    assert fit_temperature(logits, np.array([1, 0]), multi=False) == 1.0
    assert "the best lies outside" in capsys.readouterr().out
    assert fit_temperature(logits - gap / 2, np.array([[1, 0], [0, 1]]), multi=True) == 1.0


def test_thresholds_are_as_good_as_any():
    rng = np.random.default_rng(2)
    labels = rng.random((40, 5)) < [0.5, 0.1, 0.9, 0.3, 0.2]
    probabilities = np.round(rng.random((40, 5)) * 0.6 + 0.3 * labels, 2)  # with ties
    found = tune_thresholds(probabilities, labels)
    for label in range(5):
        is_it, said = labels[:, label], probabilities[:, label]
        best = max(f1_score(is_it, said >= other, zero_division=0) for other in np.arange(0.005, 1, 0.01))
        assert f1_score(is_it, said >= found[label]) == best
        assert not np.isclose(probabilities[:, label], found[label], atol=1e-6).any() or found[label] == 0.5


@pytest.mark.parametrize(
    ("probabilities", "labels", "expected"),
    [
        ([0.1, 0.2, 0.8], [0, 0, 1], 0.5),  # anything between 0.2 and 0.8 is perfect
        ([0.1, 0.2, 0.3], [0, 1, 1], 0.15),
        ([0.7, 0.8, 0.9], [0, 0, 1], 0.85),
        ([0.6, 0.7, 0.8], [0, 1, 1], 0.65),
        ([0.1, 0.2, 0.9], [0, 0, 0], 0.5),  # no row to tune it on
        ([0.1, 0.2], [1, 1], 0.05),  # every row has it
        ([0.4, 0.4, 0.4], [1, 0, 1], 0.2),
    ],
)
def test_thresholds_by_hand(probabilities, labels, expected):
    found = tune_thresholds(np.array([probabilities]).T, np.array([labels], dtype=bool).T)
    assert found.tolist() == pytest.approx([expected])


def test_no_rows_keep_the_default():
    assert tune_thresholds(np.empty((0, 2)), np.empty((0, 2), dtype=bool)).tolist() == [0.5, 0.5]
