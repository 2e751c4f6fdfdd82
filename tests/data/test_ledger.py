"""The ledger against rows that are counted one by one: read + repeated = trained + context + dropped."""

import random
from collections import Counter

import numpy as np
import pytest

from kit.data.blocks import IGNORE_INDEX, TokenRows, TrainPart, select_blocks
from kit.data.cleaning import ALSO_EVALUATED, EXACT_DUPLICATE, NEAR_DUPLICATE, OVERLAP, Cleaned
from kit.data.ledger import LedgerRow, account, check_dropped, enter_shares, ledger_as_json, print_ledger
from kit.data.packing import lay_out
from kit.errors import UserError


def random_parts(rng, make_store, block_size, packing):
    """Sources of ragged documents, some with a weight; some documents do not train."""
    weights = rng.choice([[None], [None, None], [None, 0.4], [0.9, 0.1], [None, 0.05, 0.7]])
    stores = [
        make_store([rng.randint(1, 3 * block_size) for _ in range(rng.randint(1, 15))], first_token=10_000 * (i + 1))
        for i in range(len(weights))
    ]
    documents = [np.array(sorted(rng.sample(range(s.num_documents), rng.randint(1, s.num_documents)))) for s in stores]
    layouts = [lay_out(s.lengths(d), block_size, packing) for s, d in zip(stores, documents, strict=True)]
    blocks = select_blocks([layout.sizes for layout in layouts], weights, seed=rng.randint(0, 9))
    return [TrainPart(*part, block_size) for part in zip(stores, documents, layouts, blocks, strict=True)]


def pieces_of(part):
    """Number of pieces of each document, told by where each of the layout's pieces begins."""
    owner = np.repeat(np.arange(len(part.documents)), part.store.lengths(part.documents))
    return Counter(owner[start] for start, _ in part.layout.pieces.tolist())


@pytest.mark.parametrize("packing", [True, "best-fit", False])
def test_it_says_what_the_rows_hold(make_store, packing):
    rng = random.Random(1)
    for _ in range(60):
        block_size = rng.choice([2, 8, 16])
        for part in random_parts(rng, make_store, block_size, packing):
            rows = TokenRows([part], packing, context_token_id=1, pad_token_id=2)
            labels = np.concatenate([rows[i]["shift_labels"] for i in range(len(rows))])
            inputs = np.concatenate([rows[i]["input_ids"] for i in range(len(rows))])
            is_target = labels != IGNORE_INDEX
            times = Counter(zip(inputs[is_target].tolist(), labels[is_target].tolist(), strict=True))
            everything = len(part.store.tokens)

            training = np.arange(part.store.num_documents)
            gone = {"also in evaluation": np.setdiff1d(training, part.documents)}
            cleaned = Cleaned(part.store, part.documents, gone, {"also in evaluation": []})
            row = account(part, packing, cleaned, training, held_out=0)

            assert row.read == everything
            assert row.trained == is_target.sum()
            assert row.padding == (~is_target).sum()
            assert row.context == 0
            assert row.cut == sum(n > 1 for n in pieces_of(part).values())
            assert row.read + row.repeated == row.trained + row.context + row.total_dropped
            assert row.repeated == sum(n - 1 for n in times.values())
            assert row.dropped.get("beyond its share", 0) == part.num_tokens - len(times)
            assert row.dropped.get("also in evaluation", 0) == everything - part.num_tokens


def test_causes_without_tokens_are_not_listed(make_store):
    store = make_store([10, 20])
    part = TrainPart(store, np.arange(2), lay_out(np.array([11, 21]), 8, True), np.arange(4), 8)
    row = account(part, True, Cleaned(store, np.arange(2)), np.arange(2), 0)
    assert (row.documents, row.held_out, row.read) == (2, 0, 32)
    assert row.dropped == row.dropped_documents == {}


def test_an_account_that_does_not_add_up_is_no_account(make_store):
    store = make_store([10, 20, 5])
    part = TrainPart(store, np.arange(2), lay_out(np.array([11, 21]), 8, True), np.arange(4), 8)
    with pytest.raises(AssertionError, match="does not add up"):
        account(part, True, Cleaned(store, np.arange(2)), np.arange(3), 0)


def row(read=1000, **dropped):
    names = {
        "evaluated": "also in evaluation", "share": "beyond its share", "exact": "exact duplicate",
        "near": "near-duplicate", "overlap": "overlaps evaluation",
    }  # fmt: skip
    causes = {names[cause]: tokens for cause, tokens in dropped.items()}
    trained = read - sum(dropped.values())
    return LedgerRow("source.txt", 10, 1, {}, read, 0, trained, 0, 3, 2, causes)


def test_dropping_more_than_allowed_is_refused_with_the_numbers():
    with pytest.raises(UserError) as caught:
        check_dropped([row(), row(read=10_000, evaluated=1_234)], max_dropped=0.1)
    message = str(caught.value)
    assert "`source.txt`: 1,234 of 10,000 tokens (12.3%)" in message
    assert "also in evaluation: 1,234" in message
    assert "at most 10.0%" in message
    allowed = float(message.rsplit("data.max_dropped: ")[1].rstrip("`"))
    check_dropped([row(read=10_000, evaluated=1_234)], allowed)  # what the message advises works


def test_dropping_what_is_allowed_is_not_refused():
    check_dropped([row(evaluated=10)], 0.01)
    with pytest.raises(UserError):
        check_dropped([row(evaluated=11)], 0.01)
    check_dropped([row()], 0.0)


@pytest.mark.parametrize("cause", ["share", "exact", "near", "overlap"])
def test_what_the_recipe_asks_to_leave_out_is_no_drop(cause):
    check_dropped([row(**{cause: 900})], 0)
    with pytest.raises(
        UserError, match=r"50 of 1,000 tokens \(5\.0%\) would not be trained on \(also in evaluation: 50\)"
    ):
        check_dropped([row(**{cause: 900}, evaluated=50)], 0.01)


def test_the_table_shows_sums_and_causes(capsys):
    print_ledger([row(read=5_000, evaluated=23, share=1_100), row()])
    printed = capsys.readouterr().out
    for part in (
        "source.txt",
        "5,000",
        "3,877",
        "1,123",
        "= 23 also in evaluation",
        "+ 1,100 beyond its share",
        "padding",
    ):
        assert part in printed, printed
    assert "repeated" not in printed


def test_the_saved_ledger_adds_up():
    (saved,) = ledger_as_json([row(read=5_000, evaluated=23, share=1_100)])
    assert saved["read"] + saved["repeated"] == saved["trained"] + saved["context"] + sum(saved["dropped"].values())
    assert saved["dropped"] == {"also in evaluation": 23, "beyond its share": 1_100}


def test_everything_that_was_left_out_is_told_with_an_example(capsys):
    full = row(read=5_000, evaluated=23, exact=100, near=60, overlap=7)
    examples = {
        ALSO_EVALUATED: {"text": "text a", "sets": ["domain", "general"]},
        EXACT_DUPLICATE: {"text": "text b", "times": 1_234},
        NEAR_DUPLICATE: {"text": "text c", "like": "text d", "similarity": 0.912},
        OVERLAP: {"text": "text e", "set": "general", "shared": 36, "ngram": "words that are shared"},
    }
    full.dropped_documents = {cause: {"documents": 2, "examples": [example]} for cause, example in examples.items()}
    full.left_out = {"empty": {"documents": 4, "examples": ["a.txt:3"]}}
    full.stopped = True
    small = LedgerRow("small.txt", 10, 1, {}, 100, 400, 500, 0, 3, 2, share=0.3, wanted_share=0.25)
    replay = [
        LedgerRow(f"r{i}", 10, 1, {}, 90, 0, 90, 0, 3, 2, share=0.05, wanted_share=0.2, is_replay=True) for i in "12"
    ]
    print_ledger([full, small, *replay])
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "such as" in line] == [
        "2 also in evaluation, such as `text a`: in `domain`, `general`",
        "2 exact duplicate, such as `text b`: 1,234 times in all",
        "2 near-duplicate, such as `text c`: 0.91 like `text d`",
        "2 overlaps evaluation, such as `text e`: 36 n-grams of `general`, such as `words that are shared`",
    ]
    printed = "\n".join(lines)
    for part in (
        "shares: small.txt 30.00% (asked for 25.00%), replay 10.00% (asked for 20.00%)", "r1 (replay)", "+ 4 empty",
        "first ones only", "left out of the 10 documents of source.txt:", "small.txt: its share has it read 5 times",
    ):  # fmt: skip
        assert part in printed, printed
    assert printed.count("times an epoch") == 1


@pytest.mark.parametrize("replay", [None, 0.2])
def test_shares_are_those_of_the_label_positions(replay):
    rows = [row(read=3_000), row(read=1_000), row(read=1_000)]
    enter_shares(rows, [None, 0.3] if replay else [None, 0.3, None], replay)
    assert [r.share for r in rows] == [0.6, 0.2, 0.2]
    assert [r.wanted_share for r in rows] == [None, 0.3, replay]
    assert [r.is_replay for r in rows] == [False, False, bool(replay)]
