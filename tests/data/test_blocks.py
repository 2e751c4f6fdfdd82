"""Every token is a target exactly once, after the token before it; packed or not, wherever blocks are cut.

`make_store` gives each document tokens of its own, so the pairs (input, target) of a row tell where they come from.
"""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from kit.data.blocks import IGNORE_INDEX, CollateRows, TokenRows, TrainPart, select_blocks
from kit.data.packing import lay_out

EOS = 0
BLOCK_SIZES = (1, 2, 3, 8, 13, 64)


def all_blocks(store, block_size, documents=None, packing=True):
    """A part that reads all of its documents once."""
    documents = np.arange(store.num_documents) if documents is None else np.array(documents)
    layout = lay_out(store.lengths(documents), block_size, packing)
    return TrainPart(store, documents, layout, np.arange(len(layout.sizes)), block_size)


def block_sizes(tokens, block_size):
    """Tokens in the blocks of a chain of so many."""
    return np.minimum(block_size, tokens - np.arange(0, tokens, block_size))


def select(tokens, weights, block_size, seed, replay=((), 0.0)):
    sizes, replayed = ([block_sizes(n, block_size) for n in each] for each in (tokens, replay[0]))
    return select_blocks(sizes, weights, seed, (replayed, replay[1]))


def chain(part, context):
    """The pairs of a part's documents one after another, worked out naively: [(input, target, position)]."""
    pairs = []
    for document in part.documents:
        tokens = part.store.tokens[part.store.offsets[document] : part.store.offsets[document + 1]].tolist()
        pairs += zip([context, *tokens[:-1]], tokens, strict=True)
    return pairs


def pairs_of(row):
    labelled = row["shift_labels"] != IGNORE_INDEX
    return list(zip(row["input_ids"][labelled].tolist(), row["shift_labels"][labelled].tolist(), strict=True))


def random_lengths(rng, block_size):
    """Ragged document lengths without EOS: empty, of one token, about and of one block, of several blocks."""
    special = [0, 1, block_size - 2, block_size - 1, block_size, 2 * block_size - 1, 3 * block_size]
    lengths = [rng.choice([*special, rng.randint(0, 4 * block_size)]) for _ in range(rng.randint(1, 12))]
    return [max(0, length) for length in lengths]


@pytest.mark.parametrize("context", [EOS, 1], ids=["context=EOS", "context=BOS"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_target_is_scored_once_after_the_token_before_it(make_store, packing, block_size, context):
    rng = random.Random(block_size)
    for _ in range(15):
        stores = [make_store(random_lengths(rng, block_size), first_token=10_000 * i) for i in (1, 2, 3)]
        parts = [all_blocks(store, block_size) for store in stores]
        rows = TokenRows(parts, packing, context_token_id=context, pad_token_id=EOS)
        seen = Counter(pair for i in range(len(rows)) for pair in pairs_of(rows[i]))
        assert seen == Counter(pair for part in parts for pair in chain(part, context))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_packed_row_is_a_stretch_of_the_chain(make_store, block_size):
    rng = random.Random(block_size)
    for _ in range(15):
        part = all_blocks(make_store(random_lengths(rng, block_size)), block_size)
        rows, pairs = TokenRows([part], True, context_token_id=1, pad_token_id=2), chain(part, 1)
        assert len(rows) == -(-len(pairs) // block_size)
        for i in range(len(rows)):
            assert pairs_of(rows[i]) == pairs[i * block_size : (i + 1) * block_size]
            assert {len(array) for array in rows[i].values()} == {block_size}


@pytest.mark.parametrize("packing", [True, False])
def test_positions_count_from_the_start_of_each_document_piece(make_store, packing):
    rng = random.Random(7)
    for block_size in BLOCK_SIZES:
        part = all_blocks(make_store(random_lengths(rng, block_size)), block_size)
        rows = TokenRows([part], packing, context_token_id=1, pad_token_id=2)
        for i in range(len(rows)):
            expected, position = [], 0
            for _, target in pairs_of(rows[i]):
                expected.append(position)
                position = 0 if target == EOS else position + 1
            # Padding goes on as if it belonged to the last piece.
            first = expected[-1] + 1
            padding = len(rows[i]["position_ids"]) - len(expected)
            assert rows[i]["position_ids"].tolist() == [*expected, *range(first, first + padding)]


def test_single_rows_are_cut_at_the_same_places_as_packed_ones(make_store):
    rng = random.Random(11)
    for block_size in BLOCK_SIZES * 3:
        part = all_blocks(make_store(random_lengths(rng, block_size)), block_size)
        packed, single = (TokenRows([part], packing, 1, 2) for packing in (True, False))
        pieces = []
        for i in range(len(packed)):
            pairs = pairs_of(packed[i])
            starts = [at for at in range(len(pairs)) if packed[i]["position_ids"][at] == 0]
            pieces += [pairs[a:b] for a, b in zip(starts, [*starts[1:], len(pairs)], strict=True)]
        assert [pairs_of(single[i]) for i in range(len(single))] == pieces


def test_a_document_of_exactly_one_block_and_one_of_a_single_token(make_store):
    part = all_blocks(make_store([7, 1, 14]), block_size=8)
    rows = TokenRows([part], packing=False, context_token_id=1, pad_token_id=2)
    ids = [row["input_ids"].tolist() for row in (rows[i] for i in range(len(rows)))]
    # 8 pairs; 2 pairs; then 15 pairs, of which the running block has room for 6.
    assert ids == [[1, *range(10, 17)], [1, 17], [1, *range(18, 23)], list(range(23, 31)), [31]]
    assert rows[4]["shift_labels"].tolist() == [EOS]


def test_only_the_chosen_documents_are_read(make_store):
    part = all_blocks(make_store([3, 4, 5, 6, 2]), block_size=4, documents=[1, 4])
    rows = TokenRows([part], True, context_token_id=1, pad_token_id=2)
    assert [pair for i in range(len(rows)) for pair in pairs_of(rows[i])] == chain(part, 1)
    assert part.num_tokens == 5 + 3


def test_only_the_chosen_blocks_are_read_packed_or_not(make_store):
    store = make_store([9, 1, 30, 4, 17, 0, 6])
    full = chain(all_blocks(store, 8), 1)
    blocks = np.array([3, 0, 3, 9])  # repeated, shuffled, and the last one, which is not full
    expected = [pair for block in blocks for pair in full[block * 8 : block * 8 + 8]]
    assert len(full[72:]) == 2
    part = replace(all_blocks(store, 8), blocks=blocks)
    for packing in (True, False):
        rows = TokenRows([part], packing, 1, 2)
        assert [pair for i in range(len(rows)) for pair in pairs_of(rows[i])] == expected
    assert part.count_tokens(blocks) == len(expected) == 26


def test_padding_is_told_by_place_where_pad_is_eos(make_store):
    """Masking by id would take EOS out of the targets (transformers#23530)."""
    rows = TokenRows([all_blocks(make_store([3, 2]), block_size=16)], True, context_token_id=EOS, pad_token_id=EOS)
    assert rows[0]["shift_labels"].tolist() == [10, 11, 12, EOS, 13, 14, EOS] + [IGNORE_INDEX] * 9
    assert rows[0]["input_ids"].tolist() == [EOS, 10, 11, 12, EOS, 13, 14] + [EOS] * 9


@pytest.mark.parametrize("packing", [True, False])
def test_row_minus_one_has_no_label(make_store, packing):
    rows = TokenRows([all_blocks(make_store([3, 2]), block_size=4)], packing, 1, pad_token_id=2)
    assert {name: array.tolist() for name, array in rows[-1].items()} == {
        "input_ids": [2], "shift_labels": [IGNORE_INDEX], "position_ids": [0],
    }  # fmt: skip
    batch = CollateRows(packing, 2)([rows[-1]])
    assert batch["input_ids"].shape == (1, 1)
    assert not batch["shift_labels"].ne(IGNORE_INDEX).any()


def test_rows_end_where_they_should(make_store):
    rows = TokenRows([all_blocks(make_store([3, 2]), block_size=4)], True, 1, 2)
    assert len(rows) == 2
    with pytest.raises(IndexError):
        rows[2]


def test_a_packed_batch_carries_positions_and_never_a_mask(make_store):
    """Given a mask, transformers lets packed documents attend to each other."""
    rows = TokenRows([all_blocks(make_store([5, 9, 2]), block_size=8)], True, 1, 2)
    batch = CollateRows(True, 2)([rows[i] for i in range(len(rows))])
    assert set(batch) == {"input_ids", "shift_labels", "position_ids"}
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == [rows[i][name].tolist() for i in range(len(rows))]


def test_single_rows_are_padded_on_the_right_to_the_longest(make_store):
    rows = TokenRows([all_blocks(make_store([1, 4, 0]), block_size=64)], False, 1, pad_token_id=EOS)
    batch = CollateRows(False, EOS)([rows[i] for i in range(3)])
    ignored = IGNORE_INDEX
    assert set(batch) == {"input_ids", "shift_labels"}
    assert batch["input_ids"].tolist() == [[1, 10, 0, 0, 0], [1, 11, 12, 13, 14], [1, 0, 0, 0, 0]]
    assert batch["shift_labels"].tolist() == [
        [10, EOS, ignored, ignored, ignored], [11, 12, 13, 14, EOS], [EOS, ignored, ignored, ignored, ignored],
    ]  # fmt: skip


# ---- The mixture ----


def tokens_in(blocks, tokens, block_size):
    return int(np.minimum(block_size, tokens - blocks * block_size).sum())


def test_sources_without_weight_are_read_once_in_order():
    assert [b.tolist() for b in select([17, 8, 1], [None, None, None], 8, 0)] == [[0, 1, 2], [0], [0]]


def test_a_weight_is_a_share_of_the_tokens_within_one_block():
    """Counted in blocks, a source of one part-filled block would get a fraction of its share."""
    rng = random.Random(0)
    for seed in range(300):
        block_size = rng.choice([8, 64, 512])
        tokens = [rng.choice([1, block_size - 1, block_size + 1, rng.randint(1, 100 * block_size)]) for _ in range(3)]
        weight = rng.uniform(0.01, 0.9)
        chosen = select(tokens, [None, weight, None], block_size, seed)
        free, trained = tokens[0] + tokens[2], tokens_in(chosen[1], tokens[1], block_size)
        # Half a block is the nearest that whole blocks come; but the least is one block.
        bound = block_size / 2 if len(chosen[1]) > 1 else block_size
        assert abs(trained - weight * (free + trained)) <= bound, (tokens, weight, block_size)


def test_where_all_have_weights_the_epoch_is_as_long_as_all_sources():
    tokens, weights = [10_000, 500, 3_001], [0.2, 0.3, 0.5]
    chosen = select(tokens, weights, 16, 3)
    for blocks, n, weight in zip(chosen, tokens, weights, strict=True):
        assert abs(tokens_in(blocks, n, 16) - weight * sum(tokens)) <= 16


def test_blocks_are_repeated_evenly_and_dropped_without_repeats():
    chosen = select([1_000, 250, 8_000], [None, 0.6, 0.2], 8, 5)
    times = np.bincount(chosen[1])
    assert len(times) == -(-250 // 8)
    assert times.max() - times.min() <= 1
    assert times.min() > 1
    assert len(np.unique(chosen[2])) == len(chosen[2]) < 1_000
    assert chosen[2].max() < 1_000


def test_a_source_with_little_weight_gives_at_least_one_block():
    assert len(select([100, 10_000], [None, 1e-6], 8, 0)[1]) == 1


def test_the_choice_depends_on_the_seed_alone():
    def choose(seed):
        return [b.tolist() for b in select([100, 5_000, 5_000], [None, 0.3, 0.3], 8, seed)]

    assert choose(1) == choose(1)
    assert choose(1) != choose(2)
    assert choose(1)[1] != choose(1)[2]


def test_replay_has_its_share_together_within_a_block():
    """Rounded one source at a time, many small ones would add up to many blocks too few or too many."""
    rng = random.Random(2)
    for seed in range(300):
        block_size = rng.choice([8, 64, 512])
        train = [rng.randint(1, 200 * block_size) for _ in range(rng.randint(1, 3))]
        weights = rng.choice([[None] * len(train), [None, *[0.1] * (len(train) - 1)]])
        replayed = [rng.choice([1, block_size + 1, rng.randint(1, 50 * block_size)]) for _ in range(rng.randint(1, 9))]
        share = rng.uniform(0.01, 0.7)
        chosen = select(train, weights, block_size, seed, (replayed, share))
        trained = [tokens_in(b, n, block_size) for b, n in zip(chosen, train + replayed, strict=True)]
        drawn = trained[len(train) :]
        assert abs(sum(drawn) - share * sum(trained)) <= block_size
        for got, tokens in zip(drawn, replayed, strict=True):
            assert abs(got - sum(drawn) * tokens / sum(replayed)) <= 2 * block_size


def test_where_all_have_weights_replay_makes_up_the_rest():
    chosen = select([1_000, 9_000], [0.3, 0.3], 16, 0, ([3_000, 500], 0.4))
    tokens = [tokens_in(b, n, 16) for b, n in zip(chosen, [1_000, 9_000, 3_000, 500], strict=True)]
    total = 1_000 + 9_000 + 3_000 + 500
    for got, wanted in zip([*tokens[:2], sum(tokens[2:])], [0.3, 0.3, 0.4], strict=True):
        assert abs(got - wanted * total) <= 16


@pytest.mark.parametrize("packing", [True, False])
def test_a_source_of_which_no_block_is_drawn_has_no_rows(make_store, packing):
    """A share that is less than half a block in one of its sources."""
    stores = [make_store([30, 30], 100), make_store([3], 200), make_store([39], 300)]
    chosen = select([62], [None], 8, 0, ([4, 40], 0.1))
    assert [len(blocks) for blocks in chosen] == [8, 0, 1]
    parts = [replace(all_blocks(store, 8), blocks=blocks) for store, blocks in zip(stores, chosen, strict=True)]
    rows = TokenRows(parts, packing, 1, 2)
    targets = [target for i in range(len(rows)) for _, target in pairs_of(rows[i])]
    assert targets[:62] == [t for d in (range(100, 130), range(130, 160)) for t in (*d, EOS)]
    assert parts[1].count_tokens(parts[1].blocks) == 0
    assert 1 <= len(targets[62:]) <= 8
    assert all(target >= 300 or target == EOS for target in targets[62:])
