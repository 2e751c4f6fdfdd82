"""Splits of labelled rows: shares to within a row, classes alike, nothing on two sides, in any order of the file."""

import numpy as np
import pytest

from kit.data.label_splits import TEST, TRAIN, VALIDATION, find_components, row_order_keys, split_rows

SEEDS = [0, 1, 2, 123, 2**40]
SHARES = [0.7, 0.1, 0.2]


def hashes(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def one_hot(labels):
    return labels[:, None] == np.arange(labels.max() + 1)


def sizes(parts):
    return np.bincount(parts, minlength=3)


def within_one(counts, wanted):
    return (np.abs(counts - wanted) < 1 + 1e-6).all()


def test_rows_with_a_text_or_a_group_in_common_are_one_component():
    texts = np.array([7, 7, 8, 9, 10, 10, 11], dtype=np.uint64)
    groups = [None, "a", "a", "b", "b", None, None]
    components = find_components(texts, groups)
    assert components[0] == components[1] == components[2]
    assert components[3] == components[4] == components[5]
    assert len({components[0], components[3], components[6]}) == 3


def test_an_empty_group_is_a_group_and_none_is_not():
    components = find_components(np.arange(4, dtype=np.uint64), ["", "", None, None])
    assert components[0] == components[1]
    assert len(set(components.tolist())) == 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fractions", [SHARES, [0.8, 0.0, 0.2], [0.34, 0.33, 0.33], [0.2, 0.1, 0.7]])
def test_parts_and_their_classes_have_their_shares_to_within_a_row(seed, fractions):
    labels = np.random.default_rng(seed % 1000).choice(7, 997, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02])
    parts = split_rows(hashes(997, 1), [None] * 997, one_hot(labels), fractions, seed)
    assert within_one(sizes(parts), 997 * np.array(fractions))
    for label in range(7):
        assert within_one(sizes(parts[labels == label]), (labels == label).sum() * np.array(fractions))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [20, 57, 1000])
def test_without_strata_the_shares_alone_are_kept(seed, rows):
    parts = split_rows(hashes(rows), [None] * rows, None, SHARES, seed)
    assert within_one(sizes(parts), rows * np.array(SHARES))


def test_strata_spread_a_class_that_chance_would_not():
    labels = np.zeros(1000, dtype=int)
    labels[:30] = 1
    of_seeds = [
        (split_rows(hashes(1000), [None] * 1000, indicators, SHARES, seed)[:30] == VALIDATION).sum()
        for indicators in (one_hot(labels), None)
        for seed in range(20)
    ]
    assert set(of_seeds[:20]) == {3}
    assert len(set(of_seeds[20:])) > 2


@pytest.mark.parametrize("seed", SEEDS)
def test_no_text_and_no_group_stands_on_two_sides(seed):
    rng = np.random.default_rng(seed % 1000)
    texts = hashes(300)[rng.integers(0, 300, 800)]
    groups = [f"g{g}" if g < 100 else None for g in rng.integers(0, 200, 800)]
    parts = split_rows(texts, groups, one_hot(rng.integers(0, 3, 800)), SHARES, seed)
    for names in (texts.tolist(), groups):
        sides = {}
        for name, part in zip(names, parts.tolist(), strict=True):
            assert name is None or sides.setdefault(name, part) == part


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_several_rows_keep_shares_to_within_a_group(seed):
    groups = np.repeat(np.arange(200), 5)
    labels = np.tile(np.arange(5), 200)
    parts = split_rows(hashes(1000), [str(g) for g in groups], one_hot(labels), SHARES, seed)
    assert (np.abs(sizes(parts) - 1000 * np.array(SHARES)) <= 5).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_that_occur_often_are_spread_like_those_that_occur_once(seed):
    """Placing large components where most is lacking would put all of them on one side."""
    texts = np.concatenate([np.repeat(hashes(100), 3), hashes(700, 5)])
    parts = split_rows(texts, [None] * 1000, np.ones((1000, 1), dtype=bool), SHARES, seed)
    assert (np.abs(sizes(parts[:300]) - 300 * np.array(SHARES)) <= 6).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_rows_makes_no_difference(seed):
    rng = np.random.default_rng(seed % 1000)
    texts = hashes(400)[rng.integers(0, 300, 500)]
    groups = [str(g) if g < 50 else None for g in rng.integers(0, 300, 500)]
    matrix = rng.random((500, 4)) < 0.3
    parts = split_rows(texts, groups, matrix, SHARES, seed)
    order = rng.permutation(500)
    again = split_rows(texts[order], [groups[i] for i in order], matrix[order], SHARES, seed)
    assert (again == parts[order]).all()


def test_another_seed_divides_otherwise():
    labels = one_hot(np.arange(300) % 3)
    first, second = (split_rows(hashes(300), [None] * 300, labels, SHARES, seed) for seed in (0, 1))
    assert (first != second).any()
    assert (first == split_rows(hashes(300), [None] * 300, labels, SHARES, 0)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_several_labels_a_row_are_spread_alike_and_so_is_none(seed):
    rng = np.random.default_rng(seed % 1000)
    matrix = rng.random((2000, 6)) < np.array([0.4, 0.2, 0.1, 0.05, 0.02, 0.01])
    parts = split_rows(hashes(2000), [None] * 2000, matrix, SHARES, seed)
    assert (np.abs(sizes(parts) - 2000 * np.array(SHARES)) <= 12).all()
    for has in [*matrix.T, ~matrix.any(axis=1)]:
        assert (np.abs(sizes(parts[has]) - has.sum() * np.array(SHARES)) <= 3 + 0.03 * has.sum()).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fractions", [SHARES, [0.1, 0.1, 0.8]])
def test_the_only_row_of_a_class_trains(seed, fractions):
    labels = np.concatenate([np.zeros(100, dtype=int), np.arange(1, 6)])
    parts = split_rows(hashes(105), [None] * 105, one_hot(labels), fractions, seed)
    assert (parts[100:] == TRAIN).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_class_has_a_training_row_though_groups_hold_several_rare_ones(seed):
    rng = np.random.default_rng(seed % 1000)
    labels = np.concatenate([np.zeros(200, dtype=int), np.arange(1, 60), np.arange(1, 30)])
    groups = [str(g) for g in rng.integers(0, 40, len(labels))]
    parts = split_rows(hashes(len(labels)), groups, one_hot(labels), [0.34, 0.33, 0.33], seed)
    assert set(labels[parts == TRAIN]) == set(range(60))


def test_a_part_without_a_share_gets_nothing():
    parts = split_rows(hashes(50), [str(i // 10) for i in range(50)], one_hot(np.arange(50) % 2), [0.9, 0.0, 0.1], 0)
    assert not (parts == VALIDATION).any()
    assert (parts == TEST).any()


def test_copies_of_a_text_have_keys_of_their_own_whatever_their_order():
    texts = np.array([5, 5, 5, 6], dtype=np.uint64)
    classes = np.array([0, 0, 1, 0])
    keys = row_order_keys(texts, classes, 3)
    assert len(set(keys[[0, 1, 3]].tolist())) == 3
    assert sorted(row_order_keys(texts[::-1], classes[::-1], 3).tolist()) == sorted(keys.tolist())
    assert (row_order_keys(texts, classes, 4) != keys).all()
