"""The scorecard of a classifier says what was measured, who is better, and what is missing."""

import json

import numpy as np
import pytest

from kit.evaluation import classification_scorecard
from kit.evaluation.classification_metrics import classification_figures, confusion, decide, per_class_figures
from kit.evaluation.classification_scorecard import (
    make_classification_scorecard,
    print_classification_figures,
    print_classification_scorecard,
)
from kit.evaluation.intervals import bootstrap_intervals, paired_difference


def figures(right, rows=200, classes=3, multi=False, seed=0):
    """Return probabilities, labels and figures of a classifier that is right on a share of the rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    said = np.where(np.arange(rows) < right * rows, labels, (labels + 1) % classes)
    probabilities = np.eye(classes)[said] * 0.8 + 0.2 / classes
    if multi:
        labels = np.eye(classes, dtype=bool)[labels]
    return probabilities, labels, classification_figures(probabilities, labels, names(classes), multi)


def names(classes):
    return [f"class {number}" for number in range(classes)]


def card_of(after, tfidf, classes=3, multi=False, sets=("validation", "test")):
    before = {name: figures(0.1, classes=classes, multi=multi)[2] for name in sets if name != "test"}
    probabilities, labels, found = figures(after, classes=classes, multi=multi)
    other, _, of_tfidf = figures(tfidf, classes=classes, multi=multi)
    a, b = decide(probabilities, multi), decide(other, multi)
    details = {
        "intervals": bootstrap_intervals(labels, a, classes, multi),
        "against_tfidf": paired_difference(labels, a, b, classes, multi),
        "per_class": per_class_figures(a, labels, names(classes), multi),
        "confusion": confusion(a, labels, names(classes), multi),
    }
    return make_classification_scorecard(
        before, dict.fromkeys(sets, found), {"test": {"tfidf_logreg": of_tfidf}}, {"test": details}
    )


@pytest.fixture
def said(monkeypatch):
    """What is said line by line, with its style."""
    lines = []
    monkeypatch.setattr(classification_scorecard, "say", lambda message, style=None: lines.append((message, style)))
    return lines


def test_what_it_holds():
    card = card_of(0.9, 0.5)
    assert card["task"] == "sequence-classification"
    assert list(card["sets"]) == ["validation", "test"]
    validation, test = card["sets"].values()
    assert validation.keys() == {"before", "after", "delta"}
    assert validation["delta"]["accuracy"] == pytest.approx(0.8)
    assert not validation["delta"].keys() & {"rows", "roc_auc_classes"}
    assert test.keys() == {"after", "baselines", "intervals", "against_tfidf", "per_class", "confusion"}
    assert test["against_tfidf"]["accuracy"]["difference"] == pytest.approx(0.4)
    assert json.loads(json.dumps(card)) == card


def test_a_model_that_loses_to_tfidf_is_said_in_red(said):
    print_classification_scorecard(card_of(0.5, 0.9))
    assert [style for _, style in said] == ["bold red"] * 2
    assert "test: accuracy 0.400 below TF-IDF with logistic regression, significantly" in said[0][0]
    assert "macro-F1" in said[1][0]


def test_one_that_is_hardly_worse_is_not_significantly_worse(said):
    print_classification_scorecard(card_of(0.90, 0.905))
    assert "accuracy 0.005 below TF-IDF with logistic regression, not significantly" in said[0][0]
    assert said[0][1] == "bold red"


@pytest.mark.parametrize(("after", "words"), [(0.9, "accuracy 0.400 above"), (0.5, "accuracy equals that of TF-IDF")])
def test_one_that_does_not_lose_is_said_plainly(after, words, said):
    print_classification_scorecard(card_of(after, 0.5))
    assert words in said[0][0]
    assert said[0][1] is None


def test_what_it_prints(capsys):
    print_classification_scorecard(card_of(0.9, 0.5))
    out = capsys.readouterr().out
    for words in ("validation", "200 rows", "90.0%", "50.0%", "macro-F1", "TF-IDF", "Confusion on test", "0 class 0"):
        assert words in out
    low, high = card_of(0.9, 0.5)["sets"]["test"]["intervals"]["accuracy"]
    assert f"{low:.1%} to {high:.1%}" in out
    assert "Classes of test" in out


def test_validation_is_shown_where_there_is_no_test(capsys):
    card = card_of(0.9, 0.5)
    card["sets"]["validation"] |= {key: card["sets"]["test"][key] for key in ("per_class", "confusion")}
    del card["sets"]["test"]
    print_classification_scorecard(card)
    assert "Confusion on validation" in capsys.readouterr().out


def test_absent_classes_are_said(capsys):
    labels = np.array([0, 0, 1, 1])
    found = classification_figures(np.eye(3)[labels], labels, names(3), multi=False)
    details = {"test": {"per_class": per_class_figures(labels, labels, names(3), multi=False)}}
    print_classification_scorecard(make_classification_scorecard({}, {"test": found}, {}, details))
    assert "warning: test: no row for 1 of the 3 classes (class 2)" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_hundred_classes_with_long_names(width, capsys, monkeypatch):
    monkeypatch.setattr("kit.console._console._width", width)
    card, long = card_of(0.6, 0.5, classes=100), [f"{'long ' * 30}\n{number}" for number in range(100)]
    per_class = card["sets"]["test"]["per_class"]
    card["sets"]["test"]["per_class"] = dict(zip(long, per_class.values(), strict=True))
    print_classification_scorecard(card)
    out = capsys.readouterr().out
    assert "Most frequent confusions on test" in out
    assert "the 30 worst of 100" in out
    assert len(out.splitlines()) < 350
    assert all(len(line) <= width for line in out.splitlines() if line.startswith(("│", "┃")))


def test_several_labels(capsys):
    print_classification_scorecard(card_of(0.9, 0.5, multi=True))
    out = capsys.readouterr().out
    assert "Confusion" not in out
    assert "Classes of test" in out


def test_brackets_in_a_name_are_no_markup(capsys):
    per_class = {"[red]a[/red]": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 4}}
    found = figures(1.0)[2]
    card = make_classification_scorecard({}, {"test": found}, {}, {"test": {"per_class": per_class}})
    print_classification_scorecard(card)
    assert "[red]a[/red]" in capsys.readouterr().out


def test_without_a_set(capsys):
    print_classification_scorecard(make_classification_scorecard({}, {}, {}, {}))
    print_classification_figures("Before training", {})
    assert not capsys.readouterr().out


def test_figures_of_sets_that_have_not_the_same(capsys):
    one = figures(0.9)[2]
    other = {key: value for key, value in one.items() if key != "roc_auc"}
    print_classification_figures("Before training", {"test": one, "odd": other})
    out = capsys.readouterr().out
    for words in ("Before training", "AUROC", "MCC", "90.0%", "odd"):
        assert words in out
    assert "Hamming" not in out
