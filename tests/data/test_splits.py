"""The split is a pure function of each document's text and the seed."""

import subprocess
import sys

import numpy as np
import pytest

from kit.data.splits import also_in, choose_documents, document_order_keys, held_out

NUMBER = 5000
HASHES = np.random.default_rng(0).integers(0, 2**64, NUMBER, dtype=np.uint64)


def test_adding_documents_moves_none():
    assert np.array_equal(held_out(HASHES, 0.1, 3)[:1000], held_out(HASHES[:1000], 0.1, 3))


def test_the_order_of_documents_does_not_matter():
    order = np.random.default_rng(1).permutation(NUMBER)
    assert np.array_equal(held_out(HASHES[order], 0.1, 3), held_out(HASHES, 0.1, 3)[order])


def test_duplicates_stand_on_one_side():
    first, second = np.split(held_out(np.concatenate([HASHES, HASHES]), 0.3, 0), 2)
    assert np.array_equal(first, second)
    assert 0 < first.sum() < NUMBER


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_the_fraction_is_held_within_five_standard_deviations(fraction, seed):
    bound = 5 * (NUMBER * fraction * (1 - fraction)) ** 0.5
    assert abs(held_out(HASHES, fraction, seed).sum() - NUMBER * fraction) < bound


def test_hashes_that_lie_close_are_spread():
    """Not every hash is as uniform as xxHash's; and 0 is one like any other."""
    close = np.arange(NUMBER, dtype=np.uint64)
    assert abs(held_out(close, 0.5, 0).sum() - NUMBER / 2) < 5 * (NUMBER / 4) ** 0.5


@pytest.mark.parametrize("other", [1, 2, -1, 10**30])
def test_seeds_hold_out_different_documents(other):
    a, b = held_out(HASHES, 0.5, 0), held_out(HASHES, 0.5, other)
    # Independent halves agree on half of the documents.
    assert abs((a == b).sum() - NUMBER / 2) < 5 * (NUMBER / 4) ** 0.5


def test_a_larger_fraction_holds_out_the_same_and_more():
    assert not (held_out(HASHES, 0.1, 7) & ~held_out(HASHES, 0.2, 7)).any()


@pytest.mark.parametrize("fraction", [1e-300, 1 - 2**-53])
def test_extreme_fractions(fraction):
    assert held_out(HASHES, fraction, 0).sum() == (0 if fraction < 0.5 else NUMBER)


def test_processes_agree():
    script = (
        "import numpy as np; from kit.data.splits import held_out;"
        f"h = np.random.default_rng(0).integers(0, 2**64, {NUMBER}, dtype=np.uint64);"
        "print(np.flatnonzero(held_out(h, 0.1, -2)).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == str(np.flatnonzero(held_out(HASHES, 0.1, -2)).tolist())


def test_order_keys_are_those_of_splitmix64():
    """Reference: the published output of splitmix64 seeded with 1234567 (Vigna's splitmix64.c)."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    step = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * i) % 2**64 for i in (1, 2, 3)], dtype=np.uint64)
    assert document_order_keys(states, seed=-1).tolist() == reference


def test_chosen_documents_keep_their_order_and_barely_change_when_some_are_added():
    everything = np.arange(NUMBER)
    chosen = choose_documents(HASHES, everything, 100)
    assert len(chosen) == 100
    assert (np.diff(chosen) > 0).all()
    before = choose_documents(HASHES, everything[:4000], 100)
    # What was chosen among fewer documents is only ever displaced by a new one.
    assert set(chosen) - set(before) <= set(range(4000, NUMBER))
    assert set(chosen) & set(before)
    assert np.array_equal(choose_documents(HASHES, everything, None), everything)
    assert np.array_equal(choose_documents(HASHES, everything[:7], 7), everything[:7])


def test_also_in_finds_equal_texts_only():
    assert also_in(HASHES[:4], [HASHES[2:3], HASHES[8:9], HASHES[:1]]).tolist() == [True, False, True, False]
    assert also_in(HASHES[:4], []).tolist() == [False] * 4
