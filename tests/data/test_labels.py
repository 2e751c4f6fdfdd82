"""The labels that a classifier tells apart: their order, their names, and what is refused or warned of."""

import random

import numpy as np
import pytest

from kit.data.labeled_rows import LabeledRow
from kit.data.labels import LabelSet, encode, label_set
from kit.errors import UserError


def rows_of(*labels, file="train.csv"):
    """Return a row for each label, or list of labels."""
    return [
        LabeledRow(
            f"{file}:{n}", f"t{n}", tuple(label) if isinstance(label, list) else (label,), isinstance(label, list)
        )
        for n, label in enumerate(labels, 1)
    ]


def refusal(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


# ---- Order and names ----


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["spam", "ham", "Ham!", "no"], ("Ham!", "ham", "no", "spam")),
        (["10", "9", "-1", "0"], ("-1", "0", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "01", "10"], ("01", "1", "10")),
        (["10.0", "9.0"], ("10.0", "9.0")),
    ],
)
def test_integers_are_in_their_order_and_text_is_sorted(labels, names):
    for seed in range(5):
        shuffled = random.Random(seed).choices(labels, k=50) + labels
        assert label_set(rows_of(*shuffled)).names == names


def test_labels_are_renamed_in_the_order_of_the_data():
    found = label_set(rows_of("1", "0", "2"), {"0": "negative", "2": "a"})
    assert found == LabelSet(("negative", "1", "a"), False, {"0": 0, "1": 1, "2": 2})
    assert encode(rows_of("2", "0", "1"), found, "test").tolist() == [2, 0, 1]


def test_a_swap_of_names_is_allowed():
    found = label_set(rows_of("a", "b"), {"a": "b", "b": "a"})
    assert found.names == ("b", "a")
    assert encode(rows_of("a", "b"), found, "train").tolist() == [0, 1]


@pytest.mark.parametrize("label_names", [{"a": "x", "b": "x"}, {"a": "b"}, {"b": "a"}])
def test_labels_of_one_name_are_one_class_and_that_is_told(label_names, capsys):
    found = label_set(rows_of("a", "b", "c"), label_names)
    joined = next(iter(label_names.values()))
    assert found.names == (joined, "c")
    assert encode(rows_of("c", "b", "a"), found, "test").tolist() == [1, 0, 0]
    assert f"class `{joined}` holds the labels `a`, `b`" in capsys.readouterr().out


def test_classes_of_few_rows_are_left_out_once_their_labels_are_joined(capsys):
    rows = rows_of("a", "a", "b", "c", "c", "d")
    found = label_set(rows, {"d": "b"}, min_rows=2)
    assert found.names == ("a", "b", "c")
    found = label_set(rows, {}, min_rows=2)
    assert found.names == ("a", "c")
    assert encode(rows, found, "train").tolist() == [0, 0, -1, 1, 1, -1]
    assert "`x` does not occur in the training rows" in refusal(encode, rows_of("x"), found, "test")


def test_few_rows_of_all_classes_or_of_one_among_several_labels_are_refused():
    message = refusal(label_set, rows_of("a", "a", "b"), {}, 2)
    assert message.startswith("data.min_rows_per_label: found 2, which 1 of 2 labels reach (`a: 2`, `b: 1`)")
    assert "not left out for a rare one" in refusal(label_set, rows_of(["a"], ["a", "b"]), {}, 2)


def test_a_name_for_a_label_that_does_not_occur_is_refused():
    message = refusal(label_set, rows_of("ham", "spam"), {"spma": "Spam"})
    assert message == (
        "data.label_names: no training row has the label `spma`; found: `ham`, `spam`; did you mean `spam`?"
    )


# ---- Nothing to tell apart ----


def test_one_class_alone_is_refused():
    message = refusal(label_set, rows_of("ham", "ham"))
    assert message == "data.train: all of the 2 rows have the label `ham`; a classifier needs rows of at least two"
    assert "all of the 2 rows have the label `0`" in refusal(label_set, rows_of("0", "0"))


def test_of_any_number_of_labels_one_is_enough():
    assert label_set(rows_of(["a"], [])) == LabelSet(("a",), True, {"a": 0})
    assert "no row has a label; a classifier needs rows of at least one" in refusal(label_set, rows_of([], []))


def test_no_rows_are_refused():
    assert "no row is left to train on" in refusal(label_set, [])


# ---- Sources that disagree ----


def test_one_label_beside_any_number_is_refused_with_both_places():
    message = refusal(label_set, [*rows_of("a", "b", file="one.csv"), *rows_of(["a"], file="many.jsonl")])
    assert "any number of labels at many.jsonl:1, and exactly one label at one.csv:1" in message
    message = refusal(encode, rows_of(["a"], file="test.csv"), label_set(rows_of("a", "b")), "test")
    assert message == "test.csv:1: rows of test have any number of labels, the training rows exactly one label"
    message = refusal(encode, rows_of("a", file="test.csv"), label_set(rows_of(["a"])), "test")
    assert message == "test.csv:1: rows of test have exactly one label, the training rows any number of labels"


# ---- Warnings ----


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            ["0", "1", "3"],
            "labels are `0`, `1`, `3`: 2 does not occur in the training rows; the classifier has 3 outputs",
        ),
        (["0", "1000000000000"], "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, … does not occur"),
        (["1.0", "0.0"], "integers written as floating-point numbers"),
        (["Spam", "spam", "ham"], "labels `Spam` (1 rows) and `spam` (1 rows) look alike"),
        (["caf\u00e9", "cafe\u0301"], "look alike"),
        (
            [f"label {n}" for n in range(30)],
            "30 labels in 30 training rows: is `label_column` the column that was meant?",
        ),
    ],
)
def test_what_is_odd_is_warned_of(capsys, labels, said):
    label_set(rows_of(*labels))
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels", [["1", "2", "3"], ["-1", "0", "1"], ["ham", "spam"], ["0", "x", "3"], ["1.5", "2.0"]]
)
def test_what_is_not_odd_is_not(capsys, labels):
    label_set(rows_of(*labels))
    assert capsys.readouterr().out == ""


# ---- Arrays ----


def test_labels_become_numbers():
    found = label_set(rows_of("b", "a"))
    encoded = encode(rows_of("a", "b", "b"), found, "test")
    assert (encoded.dtype, encoded.tolist()) == (np.int64, [0, 1, 1])
    assert found.matrix(encoded).tolist() == [[True, False], [False, True], [False, True]]
    assert encode([], found, "test").shape == (0,)


def test_any_number_of_labels_become_indicators():
    found = label_set(rows_of(["b"], ["a", "c"]))
    encoded = encode(rows_of(["c", "b"], [], ["a"]), found, "test")
    assert encoded.dtype == bool
    assert encoded.tolist() == [[False, True, True], [False] * 3, [True, False, False]]
    assert encode([], found, "test").shape == (0, 3)


def test_a_label_set_of_a_saved_model_has_its_names_alone():
    assert encode(rows_of("y", "x"), LabelSet(("x", "y")), "test").tolist() == [1, 0]


def test_a_label_that_training_never_saw_is_refused():
    found = label_set(rows_of("ham", "spam"))
    message = refusal(encode, rows_of("ham", "Spam", "spam", "Spam", file="test.csv"), found, "test")
    assert message == (
        "test.csv:2: label `Spam` does not occur in the training rows, but in 2 rows of test; did you mean `spam`?"
    )
    message = refusal(encode, rows_of("zzz", file="test.csv"), found, "test")
    assert message.endswith("but in 1 row of test; valid: ham, spam")
    assert "did you mean `1`?" in refusal(encode, rows_of("1.0"), label_set(rows_of("0", "1")), "test")
    assert "did you mean `aa`?" in refusal(encode, rows_of(["aaa"]), label_set(rows_of(["aa"])), "test")
