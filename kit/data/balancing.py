"""What is done about classes of different size: rows left out, rows repeated, or rows that weigh more."""

import numpy as np

from kit.data.label_splits import row_order_keys
from kit.data.labels import LabelSet
from kit.errors import UserError, did_you_mean
from kit.recipe.classification import Balance


def check_balance(balance: Balance | None, labels: LabelSet) -> None:
    """Check that what the recipe asks for goes with the labels.

    Raises:
        UserError: rows of several labels are to be left out or repeated; a class without a weight, or a weight without
            a class.
    """
    if balance is None:
        return
    if labels.multi and balance.method != "class-weights":
        raise UserError(
            f"data.balance: `{balance.method}` needs exactly one label a row, but rows have any number of them: a row "
            f"that is left out or repeated for one label is so for its others too; use `class-weights`"
        )
    if balance.weights is None:
        return
    if unknown := sorted(set(balance.weights) - set(labels.names)):
        raise UserError(f"data.balance.weights: no class `{unknown[0]}`{did_you_mean(unknown[0], labels.names)}")
    if missing := [name for name in labels.names if name not in balance.weights]:
        raise UserError(
            f"data.balance.weights: no weight for class `{missing[0]}`; expected one for each of {len(labels.names):,} "
            f"classes (1 leaves a class as it is)"
        )


def undersample(hashes: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows to keep, as many of each class as the smallest has, in their order: int64 (kept,).

    Args:
        hashes: uint64 (rows,), of the texts, by which rows are chosen; their order makes no difference.
        labels: int64 (rows,).
        seed: another seed keeps others.
    """
    classes, counts = np.unique(labels, return_counts=True)
    keys = row_order_keys(hashes, labels, seed)
    kept = [_first(np.flatnonzero(labels == label), keys, int(counts.min())) for label in classes]
    return np.sort(np.concatenate(kept))


def oversample(hashes: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows of an epoch in their order, those of smaller classes repeated: int64 (classes × largest,).

    Each row of a class is repeated alike, but for a remainder that is chosen by the rows' texts.

    Args:
        hashes: uint64 (rows,), of the texts.
        labels: int64 (rows,).
        seed: another seed chooses another remainder.
    """
    classes, counts = np.unique(labels, return_counts=True)
    keys = row_order_keys(hashes, labels, seed)
    chosen = []
    for label, count in zip(classes, counts.tolist(), strict=True):
        rows = np.flatnonzero(labels == label)
        whole, rest = divmod(int(counts.max()), count)
        chosen += [np.tile(rows, whole), _first(rows, keys, rest)]
    return np.sort(np.concatenate(chosen))


def _first(rows: np.ndarray, keys: np.ndarray, number: int) -> np.ndarray:
    return rows[np.argsort(keys[rows], kind="stable")[:number]]


def class_weights(labels: np.ndarray, label_set: LabelSet, balance: Balance | None) -> np.ndarray | None:
    """Return the weight of each class: float64 (classes,), or None where all rows weigh the same.

    By default, with exactly one label a row, rows / (classes × rows of the class); with any number, rows without the
    label / rows with it, which weighs the rows that have it (torch's `pos_weight`).

    Args:
        labels: of the training rows: int64 (rows,), or bool (rows, classes).
        label_set: their names.
        balance: as the recipe has it; every class has a row.
    """
    if balance is None or balance.method != "class-weights":
        return None
    if balance.weights is not None:
        return np.array([balance.weights[name] for name in label_set.names], dtype=np.float64)
    counts = label_set.matrix(labels).sum(axis=0, dtype=np.float64)
    if label_set.multi:
        # Never 0, with which a label that every row has would not be learned at all.
        return np.maximum(len(labels) - counts, 1.0) / counts
    return len(labels) / (len(counts) * counts)


def row_weights(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return what each row counts in the loss: float32 (rows,), or (rows, classes) where a row has several labels.

    Args:
        labels: int64 (rows,), or bool (rows, classes).
        weights: of the classes; None for 1 throughout.
    """
    if weights is None:
        return np.ones(labels.shape, dtype=np.float32)
    if labels.ndim == 2:
        return np.where(labels, weights, 1.0).astype(np.float32)
    return weights[labels].astype(np.float32)
