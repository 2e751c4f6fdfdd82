"""Labels that are probably not what was meant: warned of, or refused, before anything trains."""

import pytest

from kit.data.labeled_rows import LabeledRow
from kit.data.labels import label_set
from kit.errors import UserError


def rows_of(*labels, multi=False):
    """Return a row for each label, or tuple of labels."""
    return [
        LabeledRow(f"a.csv:{number}", "text", (each,) if isinstance(each, str) else each, multi)
        for number, each in enumerate(labels, start=2)
    ]


def test_labels_made_of_others_are_probably_several(capsys):
    label_set(rows_of("x", "y", "x|y"))
    assert 'labels `x|y` are made of others: are they several? `label_separator: "|"` gives' in words(capsys)
    label_set(rows_of("x", "y", "and/or", "x;z"))
    assert "made of others" not in words(capsys)


@pytest.mark.parametrize("name", ["nan", "NaN", "NULL", "<NA>"])
def test_a_missing_value_that_was_written_as_text_is_told(capsys, name):
    label_set(rows_of("x", "y", name))
    assert f"label `{name}` (1 rows) is a class, not a missing value" in words(capsys)
    label_set(rows_of("x", "y", "none", "no"))
    assert "missing value" not in words(capsys)


def test_any_number_of_labels_that_is_never_more_than_one_is_told(capsys):
    label_set(rows_of("x", "y", (), multi=True))
    assert "may have any number of labels, but none has more than one" in words(capsys)
    label_set(rows_of("x", "y", ("x", "y"), multi=True))
    assert "more than one" not in words(capsys)
    label_set(rows_of("x", "y"))
    assert "more than one" not in words(capsys)


def test_one_name_for_all_labels_is_refused_for_what_it_is():
    with pytest.raises(UserError, match=r"^data\.label_names: makes one class of all 2 labels"):
        label_set(rows_of("x", "y"), {"x": "y"})
    assert label_set(rows_of("x", "y", multi=True), {"x": "y"}).names == ("y",)


def test_one_row_is_called_one():
    with pytest.raises(UserError, match=r"^data\.train: the only row has the label `x`; a classifier needs"):
        label_set(rows_of("x"))


def words(capsys):
    return " ".join(capsys.readouterr().out.split())
