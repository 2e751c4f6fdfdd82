"""Classes of different size: as many rows of each, whole repeats, weights that make classes equal."""

import numpy as np
import pytest

from kit.data.balancing import check_balance, class_weights, oversample, row_weights, undersample
from kit.data.labels import LabelSet
from kit.errors import UserError
from kit.recipe.classification import Balance

TWO = LabelSet(("ham", "spam"))
MULTI = LabelSet(("a", "b", "c"), multi=True)
LABELS = np.array([0] * 10 + [1] * 4 + [2] * 7)
HASHES = np.random.default_rng(0).integers(0, 2**64, 21, dtype=np.uint64)


@pytest.mark.parametrize("seed", [0, 1, 123])
def test_undersampling_keeps_as_many_of_each_class_as_the_smallest_has(seed):
    kept = undersample(HASHES, LABELS, seed)
    assert np.bincount(LABELS[kept]).tolist() == [4, 4, 4]
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_undersampling_depends_on_texts_and_seed_not_on_places():
    order = np.random.default_rng(1).permutation(21)
    kept = set(HASHES[undersample(HASHES, LABELS, 5)].tolist())
    assert set(HASHES[order][undersample(HASHES[order], LABELS[order], 5)].tolist()) == kept
    assert set(HASHES[undersample(HASHES, LABELS, 6)].tolist()) != kept


def test_undersampling_neither_takes_nor_leaves_all_copies_of_a_text():
    hashes = np.repeat(np.array([1, 2], dtype=np.uint64), [200, 100])
    labels = np.repeat([0, 1], [200, 100])
    assert len(undersample(hashes, labels, 0)) == 200


@pytest.mark.parametrize("seed", [0, 1, 123])
def test_oversampling_repeats_each_row_alike_but_for_a_remainder(seed):
    rows = oversample(HASHES, LABELS, seed)
    assert np.bincount(LABELS[rows]).tolist() == [10, 10, 10]
    repeats = np.bincount(rows, minlength=21)
    assert set(repeats[:10]) == {1}
    assert sorted(repeats[10:14]) == [2, 2, 3, 3]
    assert sorted(repeats[14:]) == [1] * 4 + [2] * 3


def test_the_remainder_depends_on_texts_and_seed_not_on_places():
    order = np.random.default_rng(1).permutation(21)
    rows = sorted(HASHES[oversample(HASHES, LABELS, 5)].tolist())
    assert sorted(HASHES[order][oversample(HASHES[order], LABELS[order], 5)].tolist()) == rows
    assert sorted(HASHES[oversample(HASHES, LABELS, 6)].tolist()) != rows


def test_weights_of_classes_make_them_count_the_same():
    labels = np.array([0] * 90 + [1] * 10)
    weights = class_weights(labels, TWO, Balance(method="class-weights"))
    assert weights.tolist() == [100 / 180, 100 / 20]
    of_rows = row_weights(labels, weights)
    assert of_rows[labels == 0].sum() == pytest.approx(of_rows[labels == 1].sum())
    assert of_rows.sum() == pytest.approx(100)
    assert of_rows.dtype == np.float32


def test_with_several_labels_what_has_a_label_weighs_as_much_as_what_has_not():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]], dtype=bool)
    weights = class_weights(labels, MULTI, Balance(method="class-weights"))
    assert weights.tolist() == [3, 1, 0.25]  # a label that every row has keeps some weight
    assert row_weights(labels, weights).tolist() == [[3, 1, 0.25], [1, 1, 0.25], [1, 1, 0.25], [1, 1, 0.25]]


def test_weights_of_the_recipe_go_by_name():
    balance = Balance(method="class-weights", weights={"spam": 5.0, "ham": 2.0})
    check_balance(balance, TWO)
    assert class_weights(np.array([0, 1]), TWO, balance).tolist() == [2, 5]


@pytest.mark.parametrize("balance", [None, Balance(method="undersample"), Balance(method="oversample")])
def test_without_weights_all_rows_weigh_one(balance):
    assert class_weights(np.array([0, 1]), TWO, balance) is None
    assert row_weights(np.array([0, 1]), None).tolist() == [1, 1]
    assert row_weights(np.zeros((2, 3), dtype=bool), None).shape == (2, 3)


def test_weights_for_classes_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"no class `spma`; did you mean `spam`\?"):
        check_balance(Balance(method="class-weights", weights={"ham": 1.0, "spma": 2.0}), TWO)
    with pytest.raises(UserError, match="no weight for class `ham`; expected one for each of 2 classes"):
        check_balance(Balance(method="class-weights", weights={"spam": 2.0}), TWO)


@pytest.mark.parametrize("method", ["undersample", "oversample"])
def test_rows_of_several_labels_are_not_sampled(method):
    with pytest.raises(UserError, match=f"`{method}` needs exactly one label a row.*use `class-weights`"):
        check_balance(Balance(method=method), MULTI)
    check_balance(Balance(method=method), TWO)
