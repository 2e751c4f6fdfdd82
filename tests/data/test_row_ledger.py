"""The ledger of rows: every row and token is somewhere, and what is printed says where."""

import json

import numpy as np
import pytest

from kit.data.columns import LeftOut
from kit.data.labeled_rows import LabeledRow
from kit.data.labels import LabelSet
from kit.data.row_ledger import RowLedger, SourceAccount, causes_of, excerpt, ledger_as_json, print_row_ledger

LABELS = LabelSet(("no", "yes"))


def row(number, text="a text"):
    return LabeledRow(f"f.csv:{number}", text, ("no",))


def entered(part="train", read=6, **account):
    ledger = RowLedger(part, [SourceAccount("f.csv", read)], **account)
    ledger.enter_rows(np.array([0, 0, 1]), LABELS, np.array([4, 5, 5]), np.array([4, 9, 20]))
    return ledger


def test_a_part_has_its_classes_and_what_was_cut():
    ledger = entered(read=3)
    assert ledger.classes == {"no": 2, "yes": 1}
    assert (ledger.tokens, ledger.truncated, ledger.tokens_cut, ledger.longest) == (33, 2, 19, (20, 5))


def test_several_labels_count_for_each_and_none_is_counted():
    ledger = RowLedger("test")
    matrix = np.array([[1, 1], [0, 1], [0, 0]], dtype=bool)
    ledger.enter_rows(matrix, LabelSet(("no", "yes"), multi=True), np.ones(3, dtype=int), np.ones(3, dtype=int))
    assert (ledger.rows, ledger.classes, ledger.unlabeled) == (3, {"no": 1, "yes": 2}, 1)


def test_an_account_that_does_not_add_up_is_a_fault():
    entered(read=6, split_off={"test": 4}, repeated=1)
    with pytest.raises(AssertionError, match="does not add up"):
        entered(read=6, split_off={"test": 4})


def test_causes_keep_a_few_examples_and_all_counts():
    ledger, account = RowLedger("train"), SourceAccount("f.csv")
    ledger.drop("exact duplicate", [row(1), row(2)])
    ledger.drop("exact duplicate", [row(3), row(4)])
    for number in range(5):
        account.leave_out(LeftOut("empty", f"f.csv:{number}"))
    account.leave_out(LeftOut("beyond max_documents"))
    assert ledger.dropped["exact duplicate"]["rows"] == 4
    assert [example["where"] for example in ledger.dropped["exact duplicate"]["examples"]] == [
        "f.csv:1", "f.csv:2", "f.csv:3",
    ]  # fmt: skip
    assert account.left_out["empty"] == {"rows": 5, "examples": ["f.csv:0", "f.csv:1", "f.csv:2"]}
    assert account.left_out["beyond max_documents"] == {"rows": 1, "examples": []}
    assert causes_of(ledger.dropped, account.left_out) == "exact duplicate: 4; empty: 5; beyond max_documents: 1"


def test_what_is_printed_tells_of_everything_once(capsys):
    train = RowLedger("train", [SourceAccount("f.csv", 5)], repeated=1, copies=2, unchanged_copies=1)
    train.sources[0].leave_out(LeftOut("no label", "f.csv:9"))
    train.drop("also in test", [row(number, "[b]two\nlines") for number in range(5)])
    train.enter_rows(np.array([0, 0, 1]), LABELS, np.array([4, 5, 5]), np.array([4, 9, 20]))
    print_row_ledger([train, entered("test", read=3)], "`data.max_length: 5`")
    out = capsys.readouterr().out
    assert [line.split()[1:] for line in out.splitlines() if "│ no " in line or "│ yes" in line] == [
        ["no", "│", "2", "66.7%", "│", "2", "66.7%", "│"],
        ["yes", "│", "1", "33.3%", "│", "1", "33.3%", "│"],
    ]
    for line in (
        "not read of f.csv: 1 no label: f.csv:9\n",
        "left out of train: 5 also in test, such as `[b]two lines` (f.csv:0)\n",
        "train: 1 rows of smaller classes are repeated (`data.balance: oversample`)\n",
        "train: 2 noisy copies (`data.augment`), of which 1 came out equal to their row\n",
        "test: 2 of 3 rows are cut (`data.max_length: 5`): 19 of 33 tokens (57.6%) are not read; the longest has 20, "
        "of which 5 are read (25%)\n",
    ):
        assert out.count(line) == 1


def test_very_many_classes_are_summed_up(capsys):
    labels = LabelSet(tuple(f"class{n:03d}" for n in range(100)))
    ledger = RowLedger("train")
    numbers = np.concatenate([np.arange(100), np.full(5, 70)])
    ledger.enter_rows(numbers, labels, np.ones(105, dtype=int), np.ones(105, dtype=int))
    print_row_ledger([ledger], "")
    out = capsys.readouterr().out
    assert "class070" in out
    assert "60 others" in out
    assert "class099" not in out


def test_the_saved_ledger_is_json():
    saved = json.loads(json.dumps(ledger_as_json([entered(read=3)])))
    assert saved[0]["classes"] == {"no": 2, "yes": 1}
    assert saved[0]["sources"] == [{"source": "f.csv", "read": 3, "left_out": {}}]


def test_excerpts_are_short_and_on_one_line():
    assert excerpt("a\n b") == "a b"
    assert len(excerpt("word " * 100)) == 60
