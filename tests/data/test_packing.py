"""Layouts: every pair in exactly one block, whole documents wherever they fit, and rows that are at least 99 % full."""

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from kit.data.blocks import IGNORE_INDEX, CollateRows, TokenRows, TrainPart
from kit.data.corpus import build_corpus
from kit.data.packing import count_cut, lay_out
from kit.recipe.data import DataSection
from tests.data.test_cleaning import BYTES
from tests.material import make_model

cross_entropy = partial(torch.nn.functional.cross_entropy, reduction="sum")

SHAPES = {
    "short": lambda rng, size: rng.randint(1, max(1, size // 8)),
    "any": lambda rng, size: rng.randint(1, 3 * size),
    "more than half": lambda rng, size: -(-6 * size // 10),
    "around a block": lambda rng, size: rng.choice([size - 1, size, size + 1, 2 * size, 2 * size + 1, 1]),
    "mixed": lambda rng, size: rng.choice([1, 2, size // 2, size // 2 + 1, rng.randint(1, size), 5 * size + 3]) or 1,
}


def naive_best_fit(sizes, block_size):
    """Best-fit decreasing, one piece after another: the rooms that are left, sorted."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(block_size - size)
    return sorted(rooms)


def pieces_of(lengths, layout):
    """(document, first, end) of each piece, worked out without the layout's own arithmetic."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return [(owner[a], a - starts[owner[a]], b - starts[owner[a]]) for a, b in layout.pieces.tolist()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [1, 2, 8, 64])
@pytest.mark.parametrize("packing", [True, False, "best-fit"])
def test_every_pair_lies_in_exactly_one_block(packing, block_size, shape):
    rng = random.Random(block_size)
    for number in (1, 2, 50, 300):
        lengths = np.array([SHAPES[shape](rng, block_size) for _ in range(number)])
        layout = lay_out(lengths, block_size, packing)
        covered = np.zeros(lengths.sum(), dtype=int)
        owner = np.repeat(np.arange(number), lengths)
        for start, end in layout.pieces.tolist():
            assert start < end
            assert owner[start] == owner[end - 1]
            covered[start:end] += 1
        assert (covered == 1).all()
        assert (layout.blocks[0], layout.blocks[-1]) == (0, len(layout.pieces))
        in_blocks = [layout.pieces[a:b] for a, b in zip(layout.blocks[:-1], layout.blocks[1:], strict=True)]
        assert layout.sizes.tolist() == [int((block[:, 1] - block[:, 0]).sum()) for block in in_blocks]
        assert ((layout.sizes >= 1) & (layout.sizes <= block_size)).all()
        pieces = Counter(document for document, _, _ in pieces_of(lengths, layout))
        assert count_cut(lengths, layout) == sum(number > 1 for number in pieces.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [2, 8, 64, 512])
def test_best_fit_is_as_full_as_it_can_be_or_at_least_99_percent(block_size, shape):
    rng = random.Random(block_size)
    for number in (1, 3, 40, 2_000):
        lengths = np.array([SHAPES[shape](rng, block_size) for _ in range(number)])
        sizes = lay_out(lengths, block_size, "best-fit").sizes
        fill = lengths.sum() / (len(sizes) * block_size)
        assert fill >= 0.99 or len(sizes) == -(-lengths.sum() // block_size)


@pytest.mark.parametrize("block_size", [8, 64])
def test_where_whole_documents_fill_the_rows_it_is_best_fit_decreasing(block_size):
    rng = random.Random(block_size)
    compared = 0
    for _ in range(100):
        lengths = np.array([rng.randint(1, rng.choice([8, block_size])) for _ in range(rng.randint(1, 400))])
        rooms = naive_best_fit(lengths.tolist(), block_size)
        if len(rooms) > max(-(-lengths.sum() // block_size), int(lengths.sum() / (0.99 * block_size))):
            continue
        compared += 1
        layout = lay_out(lengths, block_size, "best-fit")
        assert sorted((block_size - layout.sizes).tolist()) == rooms
        assert count_cut(lengths, layout) == 0
    assert compared > 20


def test_only_documents_longer_than_a_block_are_cut_where_short_ones_fill_the_holes():
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 40) for _ in range(2_000)] + [rng.randint(65, 500) for _ in range(50)])
    layout = lay_out(lengths, 64, "best-fit")
    pieces = pieces_of(lengths, layout)
    assert {document for document, first, _ in pieces if first} == set(range(2_000, 2_050))
    assert all(first % 64 == 0 for _, first, _ in pieces)
    assert count_cut(lengths, layout) == 50 < count_cut(lengths, lay_out(lengths, 64, True))


def test_documents_of_0_6_blocks_are_cut_no_oftener_than_99_percent_ask_for():
    """Each block holds one of them whole: all that the least number of blocks leaves over has to be cut."""
    lengths = np.full(1_000, 60)
    layout = lay_out(lengths, 100, "best-fit")
    assert len(layout.sizes) == int(60_000 / 99)
    assert count_cut(lengths, layout) == 1_000 - len(layout.sizes)


def test_the_emptiest_blocks_are_poured_into_the_holes_in_few_fragments():
    """200 blocks with 20 free and 143 with 40 free take in 157 documents of 60: 143 × (40 + 20) and 14 × 3 × 20."""
    lengths = np.array([60] * 300 + [80] * 200)
    layout = lay_out(lengths, 100, "best-fit")
    assert len(layout.sizes) == int(34_000 / 99) == 343
    fragments = Counter(document for document, _, _ in pieces_of(lengths, layout))
    assert all(fragments[document] == 1 for document in range(300, 500))
    assert Counter(fragments[document] for document in range(300)) == {1: 143, 2: 143, 3: 14}


def test_best_fit_rows_are_the_same_whenever_they_are_laid_out():
    lengths = np.array([random.Random(5).randint(1, 900) for _ in range(500)])
    one, other = (lay_out(lengths, 512, "best-fit") for _ in range(2))
    assert np.array_equal(one.pieces, other.pieces)
    assert np.array_equal(one.blocks, other.blocks)


@pytest.mark.parametrize("length", [300, 307])
def test_a_million_documents_take_steps_by_size_not_by_document(monkeypatch, length):
    """Seconds, not hours: what is counted is how often blocks are taken, which is once for many documents."""
    from kit.data import packing

    taken = []
    take = packing._Rooms.take
    monkeypatch.setattr(packing._Rooms, "take", lambda *args: taken.append(1) or take(*args))
    lengths = np.random.default_rng(0).integers(1, length, 1_000_000)
    layout = lay_out(lengths, 512, "best-fit")
    assert lengths.sum() / (512 * len(layout.sizes)) >= 0.99
    assert len(taken) < 20_000


def test_a_best_fit_row_goes_through_the_model_as_its_documents_do_alone(make_store):
    """Also the rest of a document of two blocks: it goes on after its own last token, at position 0."""
    store = make_store([3, 13, 2, 4, 1])
    layout = lay_out(store.lengths(np.arange(5)), 8, "best-fit")
    part = TrainPart(store, np.arange(5), layout, np.arange(len(layout.sizes)), 8)
    rows = TokenRows([part], "best-fit", context_token_id=1, pad_token_id=2)
    batch = CollateRows("best-fit", 2)([rows[i] for i in range(len(rows))])
    model = make_model("llama", 64).double().eval()
    positions = {name: batch[name] for name in ("input_ids", "position_ids")}
    packed = cross_entropy(model(**positions, use_cache=False).logits.flatten(0, 1), batch["shift_labels"].flatten())
    alone = 0
    for document, first, end in pieces_of(store.lengths(np.arange(5)), layout):
        tokens = [1, *store.tokens[store.offsets[document] : store.offsets[document + 1]].tolist()]
        ids = torch.tensor([tokens[first : end + 1]])
        alone += cross_entropy(model(input_ids=ids[:, :-1], use_cache=False).logits[0], ids[0, 1:])
    assert batch["shift_labels"].ne(IGNORE_INDEX).sum() == len(store.tokens)
    assert torch.allclose(packed, alone, rtol=1e-12)


# ---- The recipe's corpus ----


@pytest.fixture
def build(tmp_path):
    """A function that builds a corpus of bytes from a data section's values."""

    def build(train, **data):
        values = {"train": train, "block_size": 64, "store_dir": str(tmp_path / "store"), **data}
        return build_corpus(DataSection.model_validate(values), {}, BYTES, 0)

    return build


def test_weights_and_replay_choose_among_best_fit_blocks(build, write):
    lines = ["\n".join(f"{name} {'word ' * (i % 11)}{i}" for i in range(400)) for name in ("a", "b", "c")]
    one, two, three = (write(text, f"{i}.txt") for i, text in enumerate(lines))
    train = [{"path": str(one), "sample_by": "line"}, {"path": str(two), "sample_by": "line", "weight": 0.3}]
    replay = {"share": 0.2, "sources": [{"path": str(three), "sample_by": "line"}]}
    corpora = {packing: build(train, replay=replay, packing=packing) for packing in (True, "best-fit")}
    for corpus in corpora.values():
        shares = [row.share for row in corpus.ledger]
        assert shares[1:] == pytest.approx([0.3, 0.2], abs=64 / sum(row.trained for row in corpus.ledger))
        assert corpus.ledger[1].dropped or corpus.ledger[1].repeated
    assert corpora[True].key != corpora["best-fit"].key
    assert corpora["best-fit"].key == build(train, replay=replay, packing="best-fit").key
    assert corpora["best-fit"].ledger[0].cut < corpora[True].ledger[0].cut


def test_another_packing_into_as_many_rows_is_another_corpus(build, write):
    path = write("\n".join(letter * (length - 1) for letter, length in zip("abcd", (40, 40, 24, 24), strict=True)))
    one, other = (build([{"path": str(path), "sample_by": "line"}], packing=packing) for packing in (True, "best-fit"))
    assert len(one.rows) == len(other.rows) == 2
    assert (one.ledger[0].cut, other.ledger[0].cut) == (1, 0)
    assert one.key != other.key


def test_the_table_shows_fill_and_cuts(build, write, capsys):
    from kit.data.ledger import print_ledger

    path = write("\n".join(f"{'word ' * (i % 11)}{i}" for i in range(400)))
    corpus = build([{"path": str(path), "sample_by": "line"}], packing="best-fit")
    [row] = corpus.ledger
    capsys.readouterr()
    print_ledger(corpus.ledger)
    printed = capsys.readouterr().out
    assert "cut" in printed
    assert f"{row.padding:,}" in printed
    assert f"{row.padding / (len(corpus.rows) * 64):.2%}" in printed
    assert row.padding / (len(corpus.rows) * 64) <= 0.01
