"""The ledger against rows that are counted one by one: read + repeated = trained + context + dropped."""

import random
from collections import Counter

import numpy as np
import pytest

from kit.data.blocks import IGNORE_INDEX, TokenRows, TrainPart, select_blocks
from kit.data.ledger import LedgerRow, account, check_dropped, ledger_as_json, print_ledger
from kit.errors import UserError


def random_parts(rng, make_store, block_size):
    """Sources of ragged documents, some with a weight; some documents do not train."""
    weights = rng.choice([[None], [None, None], [None, 0.4], [0.9, 0.1], [None, 0.05, 0.7]])
    stores = [
        make_store([rng.randint(1, 3 * block_size) for _ in range(rng.randint(1, 15))], first_token=10_000 * (i + 1))
        for i in range(len(weights))
    ]
    documents = [np.array(sorted(rng.sample(range(s.num_documents), rng.randint(1, s.num_documents)))) for s in stores]
    tokens = [int((s.offsets[d + 1] - s.offsets[d]).sum()) for s, d in zip(stores, documents, strict=True)]
    blocks = select_blocks(tokens, weights, block_size, seed=rng.randint(0, 9))
    return [TrainPart(*part, block_size) for part in zip(stores, documents, blocks, strict=True)]


@pytest.mark.parametrize("packing", [True, False])
def test_it_says_what_the_rows_hold(make_store, packing):
    rng = random.Random(1)
    for _ in range(60):
        block_size = rng.choice([2, 8, 16])
        for part in random_parts(rng, make_store, block_size):
            rows = TokenRows([part], packing, context_token_id=1, pad_token_id=2)
            labels = np.concatenate([rows[i]["shift_labels"] for i in range(len(rows))])
            inputs = np.concatenate([rows[i]["input_ids"] for i in range(len(rows))])
            is_target = labels != IGNORE_INDEX
            times = Counter(zip(inputs[is_target].tolist(), labels[is_target].tolist(), strict=True))
            everything = len(part.store.tokens)

            row = account(part, packing, part.store.num_documents, everything, held_out=0)

            assert row.read == everything
            assert row.trained == is_target.sum()
            assert row.padding == (~is_target).sum()
            assert row.context == 0
            assert row.read + row.repeated == row.trained + row.context + row.total_dropped
            assert row.repeated == sum(n - 1 for n in times.values())
            assert row.dropped.get("beyond its weight", 0) == part.num_tokens - len(times)
            assert row.dropped.get("also in evaluation", 0) == everything - part.num_tokens


def test_causes_without_tokens_are_not_listed(make_store):
    store = make_store([10, 20])
    part = TrainPart(store, np.arange(2), np.arange(4), 8)
    assert account(part, True, 2, 32, 0).dropped == {}


def row(read=1000, **dropped):
    names = {"evaluated": "also in evaluation", "weight": "beyond its weight"}
    causes = {names[cause]: tokens for cause, tokens in dropped.items()}
    trained = read - sum(dropped.values())
    return LedgerRow("source.txt", 10, 1, 0, read, 0, trained, 0, 3, causes)


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


def test_a_weight_permits_dropping():
    check_dropped([row(weight=900)], 0.01)
    with pytest.raises(UserError, match="50 of 1,000 tokens"):
        check_dropped([row(weight=900, evaluated=50)], 0.01)


def test_the_table_shows_sums_and_causes(capsys):
    print_ledger([row(read=5_000, evaluated=23, weight=1_100), row()])
    printed = capsys.readouterr().out
    for part in ("source.txt", "5,000", "3,877", "1,123", "also in evaluation", "beyond its weight", "padding"):
        assert part in printed, printed
    assert "repeated" not in printed


def test_the_saved_ledger_adds_up():
    (saved,) = ledger_as_json([row(read=5_000, evaluated=23, weight=1_100)])
    assert saved["read"] + saved["repeated"] == saved["trained"] + saved["context"] + sum(saved["dropped"].values())
    assert saved["dropped"] == {"also in evaluation": 23, "beyond its weight": 1_100}
