"""The most confident mistakes come first, and nothing that is right is among them."""

import numpy as np
import pytest

from kit.evaluation.mistakes import confident_mistakes

NAMES = ["ham", "spam", "news"]
TEXTS = ["one", "two", "three", "four"]
WHERE = ["a.csv:2", "a.csv:3", "a.csv:4", "a.csv:5"]
PROBABILITIES = np.array([[0.6, 0.3, 0.1], [0.1, 0.9, 0.0], [0.05, 0.95, 0.0], [0.2, 0.1, 0.7]])
LABELS = np.array([1, 0, 1, 0])


def test_the_most_confident_comes_first():
    found = confident_mistakes(PROBABILITIES, LABELS, TEXTS, None, WHERE, NAMES, False, 10)
    assert found == [
        {"where": "a.csv:3", "text": "two", "label": "ham", "predicted": "spam",
         "probability": 0.9, "label_probability": 0.1},
        {"where": "a.csv:5", "text": "four", "label": "ham", "predicted": "news",
         "probability": 0.7, "label_probability": 0.2},
        {"where": "a.csv:2", "text": "one", "label": "spam", "predicted": "ham",
         "probability": 0.6, "label_probability": 0.3},
    ]  # fmt: skip


@pytest.mark.parametrize("most", [0, 1, 3, 4])
def test_no_more_than_asked_for(most):
    found = confident_mistakes(PROBABILITIES, LABELS, TEXTS, None, WHERE, NAMES, False, most)
    assert len(found) == min(most, 3)


def test_equals_stay_in_the_order_of_the_rows():
    found = confident_mistakes(PROBABILITIES[[1, 1]], LABELS[[1, 1]], TEXTS, None, WHERE, NAMES, False, 2)
    assert [mistake["text"] for mistake in found] == ["one", "two"]


def test_second_texts_stand_beside():
    found = confident_mistakes(PROBABILITIES, LABELS, TEXTS, ["x", None, "y", "z"], WHERE, NAMES, False, 10)
    assert [mistake.get("text_pair", "none") for mistake in found] == ["none", "z", "x"]


def test_several_labels_tell_the_worst_decision_of_a_row():
    probabilities = np.array([[0.9, 0.2], [0.6, 0.05], [0.1, 0.9]])
    labels = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    found = confident_mistakes(probabilities, labels, TEXTS, None, WHERE, ["a", "b"], True, 10)
    assert [(m["text"], m["labels"], m["predicted"], m["about"]) for m in found] == [
        ("two", ["b"], ["a"], "b"),  # surer that it is no b (0.95) than that it is an a (0.6)
        ("three", [], ["b"], "b"),
    ]
    assert [m["probability"] for m in found] == pytest.approx([0.95, 0.9])
    assert [m["label_probability"] for m in found] == pytest.approx([0.05, 0.1])


def test_thresholds_decide_what_is_a_mistake():
    probabilities, labels = np.array([[0.4, 0.1]]), np.array([[1, 0]], dtype=bool)
    assert len(confident_mistakes(probabilities, labels, TEXTS, None, WHERE, ["a", "b"], True, 5)) == 1
    assert (
        confident_mistakes(probabilities, labels, TEXTS, None, WHERE, ["a", "b"], True, 5, np.array([0.3, 0.5])) == []
    )


def test_a_perfect_classifier_makes_none():
    labels = np.array([0, 2])
    assert confident_mistakes(np.eye(3)[labels], labels, TEXTS, None, WHERE, NAMES, False, 10) == []
