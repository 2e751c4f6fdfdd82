"""The baselines are strong, quiet, deterministic, and stand whatever the labels are."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from kit.evaluation.baselines import join_pairs, majority, tfidf_logreg

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = [["bark", "bone", "leash"], ["purr", "mouse", "whiskers"], ["fin", "water", "bowl"]]


def animals(rows, seed=0):
    """Return texts of common words and one that tells the class, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=rows)
    texts = [f"it is a {rng.choice(['big', 'small'])} one with a {rng.choice(WORDS[label])} !" for label in labels]
    return texts, labels


def classify(train_texts, train_labels, texts, classes, multi, **options):
    """Return the probabilities of one set."""
    found = tfidf_logreg(train_texts, train_labels, {"other": ["a"], "x": texts}, multi, classes=classes, **options)
    assert list(found) == ["other", "x"]
    return found["x"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_majority_gives_the_shares_of_the_training_rows():
    found = majority(np.array([2, 0, 2, 2]), 4, 3, multi=False)
    assert found.tolist() == [[0.25, 0, 0.75, 0]] * 3
    assert majority(np.array([1, 0]), 2, 1, multi=False).argmax() == 0


def test_majority_of_several_labels():
    found = majority(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=bool), 3, 2, multi=True)
    assert found == pytest.approx(np.array([[1, 1 / 3, 0]] * 2))


def test_words_are_learnt_and_repeat():
    texts, labels = animals(200)
    others, expected = animals(50, seed=1)
    found = classify(texts, labels, others, 3, False)
    assert found.shape == (50, 3)
    assert found.sum(axis=1) == pytest.approx(np.ones(50))
    assert (found.argmax(axis=1) == expected).all()
    assert (classify(texts, labels, others, 3, False) == found).all()


def test_classes_are_those_of_the_training_rows():
    texts, labels = animals(30)
    assert tfidf_logreg(texts, labels, {"x": texts}, False)["x"].shape == (30, 3)
    assert tfidf_logreg(texts, labels[:, None] == np.arange(5), {"x": texts}, True)["x"].shape == (30, 5)


def test_punctuation_marks_and_word_order_count():
    texts, labels = ["yes it is !", "is it yes ?", "a not b", "b not a"] * 5, np.array([0, 1, 2, 3] * 5)
    assert classify(texts, labels, texts[:4], 4, False).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_several_labels():
    texts, labels = animals(200)
    has = labels[:, None] == np.arange(3)
    has[:, 0] |= labels == 1
    found = classify(texts, has, texts, 3, True)
    assert ((found >= 0.5) == has).all()


def test_labels_that_no_training_row_or_every_one_has():
    texts, labels = animals(60)
    has = np.stack([labels == 0, np.zeros(60), np.ones(60)], axis=1).astype(bool)
    assert classify(texts, has, texts[:5], 3, True)[:, 1:].tolist() == [[0, 1]] * 5
    found = classify(texts, labels, texts[:5], 5, False)
    assert found.shape == (5, 5)
    assert (found[:, 3:] == 0).all()
    assert classify(texts, np.full(60, 1), texts[:2], 3, False).tolist() == [[0, 1, 0]] * 2


@pytest.mark.parametrize(("seed", "best"), [(3, 1), (2, 100), (12, 10)])
def test_validation_chooses_how_strongly_to_regularise(seed, best):
    rng = np.random.default_rng(seed)
    texts, labels = animals(40, seed)
    labels = np.where(rng.random(40) < 0.4, rng.integers(3, size=40), labels)
    others, expected = animals(100, seed + 1000)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]").fit(texts)
    train, rows = vectorizer.transform(texts), vectorizer.transform(others)
    each = {c: LogisticRegression(C=c, max_iter=1000).fit(train, labels).predict_proba(rows) for c in (10, 1, 100)}
    scores = {c: f1_score(expected, found.argmax(axis=1), average="macro") for c, found in each.items()}
    assert max(scores, key=scores.get) == best
    found = classify(texts, labels, others, 3, False, validation=(others, expected))
    assert found == pytest.approx(each[best], abs=1e-6)


def test_equals_on_validation_leave_the_default():
    texts, labels = animals(60)
    default = tfidf_logreg(texts, labels, {"x": texts}, False)["x"]
    chosen = tfidf_logreg(texts, labels, {"x": texts}, False, validation=(texts, labels))["x"]
    assert (chosen == default).all()


@pytest.mark.parametrize("multi", [False, True])
def test_class_weights_move_the_boundary(multi):
    texts, labels = ["a b"] * 30 + ["a c"] * 3, np.array([0] * 30 + [1] * 3)
    labels = labels[:, None] == np.arange(2) if multi else labels
    plain = classify(texts, labels, ["a"], 2, multi)[0, 1]
    assert classify(texts, labels, ["a"], 2, multi, class_weight="balanced")[0, 1] > plain + 0.05
    assert classify(texts, labels, ["a"], 2, multi, class_weight={1: 30.0, 7: 3.0})[0, 1] > plain + 0.1


def test_pairs_are_joined():
    assert join_pairs(["a", "b"], ["c", None]) == ["a\nc", "b"]
    assert join_pairs(["a", "b"], None) == ["a", "b"]


# ---- the floors that fine-tuned models have to beat


def spam():
    lines = (DATA / "sms_spam/SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    labels, texts = zip(*(line.split("\t", 1) for line in lines if line), strict=True)
    return train_test_split(texts, labels, test_size=0.2, random_state=0, stratify=labels)


def trec():
    parts = []
    for part in ("train", "test"):
        lines = (DATA / f"trec/TREC.{part}.all").read_text(encoding="latin-1").split("\n")
        labels, texts = zip(*(line.split(" ", 1) for line in lines if line), strict=True)
        parts.append((texts, labels))
    return parts[0][0], parts[1][0], parts[0][1], parts[1][1]


def citations():
    parts = []
    for part in ("train", "test"):
        rows = [
            json.loads(line) for line in (DATA / f"sci_cite/{part}.txt").read_text(encoding="utf-8").split("\n") if line
        ]
        parts.append(([row["text"] for row in rows], [row["label"] for row in rows]))
    return parts[0][0], parts[1][0], parts[0][1], parts[1][1]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")
@pytest.mark.parametrize(("load", "floor"), [(spam, 0.957), (trec, 0.887), (citations, 0.81)])
def test_floors(load, floor):
    texts, others, labels, expected = load()
    names = sorted(set(labels))
    found = classify(texts, np.array([names.index(label) for label in labels]), others, len(names), False)
    assert f1_score([names.index(label) for label in expected], found.argmax(axis=1), average="macro") > floor
