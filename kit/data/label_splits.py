"""Which labelled rows train, validate and test: equal texts and groups together, classes spread alike."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kit.data.splits import document_order_keys

TRAIN, VALIDATION, TEST = range(3)
_ROUNDING = 1e-9  # of shares of rows, which are no exact numbers


def row_order_keys(hashes: np.ndarray, classes: np.ndarray, seed: int) -> np.ndarray:
    """Return a uniformly distributed key for each row, by its text and not by its place: uint64 (rows,).

    Rows with equal text and class have different keys, so that a choice by keys does not take or leave all of them.
    """
    order = np.lexsort((classes, hashes))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (np.diff(hashes[order]) != 0) | (np.diff(classes[order]) != 0)
    copies = np.empty(len(order), dtype=np.uint64)
    copies[order] = np.arange(len(order)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
    return document_order_keys(document_order_keys(hashes, seed) + copies, seed)


def find_components(hashes: np.ndarray, groups: Sequence[str | None]) -> np.ndarray:
    """Return which rows stay together, as they share a text or a group, or a chain of them: int64 (rows,).

    Args:
        hashes: uint64 (rows,), of the texts.
        groups: of each row, or None.
    """
    different, texts = np.unique(hashes, return_inverse=True)
    grouped = [row for row, group in enumerate(groups) if group is not None]
    numbers = {name: len(different) + n for n, name in enumerate(dict.fromkeys(groups[row] for row in grouped))}
    ends = np.array([numbers[groups[row]] for row in grouped], dtype=np.int64)
    nodes = len(different) + len(numbers)
    graph = coo_array((np.ones(len(grouped), dtype=bool), (texts[grouped], ends)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][texts].astype(np.int64)


def split_rows(
    hashes: np.ndarray,
    groups: Sequence[str | None],
    indicators: np.ndarray | None,
    fractions: Sequence[float],
    seed: int,
) -> np.ndarray:
    """Return the part of each row, whatever the order of the rows: int64 (rows,), `TRAIN`, `VALIDATION` or `TEST`.

    Where no rows stay together, each part has its share of the rows to within one, and of each class too where a row
    has exactly one. Each class has a row that trains, if it has any.

    Args:
        hashes: uint64 (rows,), of the texts.
        groups: of each row, or None.
        indicators: bool (rows, classes), which labels a row has; None to take no heed of them.
        fractions: share of the rows of each part; they add up to 1.
        seed: another seed divides otherwise.
    """
    components = find_components(hashes, groups)
    sizes = np.bincount(components)
    keys = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(keys, components, document_order_keys(hashes, seed))
    if indicators is None:
        indicators = np.ones((len(hashes), 1), dtype=bool)
    elif (unlabeled := ~indicators.any(axis=1)).any():
        indicators = np.column_stack([indicators, unlabeled])  # spread like a label
    counts = np.zeros((len(sizes), indicators.shape[1]), dtype=np.int32)
    np.add.at(counts, components, indicators)
    # The large ones first, while there is room to even them out.
    order = np.lexsort((keys, -sizes))
    parts = np.empty(len(sizes), dtype=np.int64)
    parts[order] = _stratify(counts[order], sizes[order], np.asarray(fractions, dtype=np.float64))
    return parts[components]


def _stratify(counts: np.ndarray, sizes: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Return the part of each component by iterative stratification, the rarest label first.

    Sechidis, Tsoumakas & Vlahavas 2011, doi:10.1007/978-3-642-23808-6_10; there the part that lacks most of a label
    gets the next. Here it is the part that lags most behind its share, so that large components are spread like small
    ones, and the rows that rounding leaves over go where rows are lacking over all labels.

    Args:
        counts: (components, labels), rows with each label.
        sizes: (components,), rows.
        fractions: (parts,).
    """
    parts = np.full(len(sizes), -1, dtype=np.int64)
    given = np.zeros((len(fractions), counts.shape[1]), dtype=np.int64)
    remaining = counts.sum(axis=0, dtype=np.int64)
    wanted = np.outer(fractions, remaining)
    rows = [0] * len(fractions)
    # Each label is learned: its smallest component trains, unless another one does already. Its rows are entered
    # together with the others of the label.
    entered_later = np.zeros(len(remaining), dtype=np.int64)
    for label in np.argsort(remaining, kind="stable").tolist():
        if remaining[label] and not given[TRAIN, label]:
            member = int(np.flatnonzero(counts[:, label])[-1])
            parts[member] = TRAIN
            given[TRAIN] += counts[member]
            entered_later[label] = sizes[member]
    remaining -= given[TRAIN]
    while remaining.any():
        label = int(np.where(remaining > 0, remaining, np.iinfo(np.int64).max).argmin())
        entered = (remaining == 0) | (np.arange(len(remaining)) == label)
        rows[TRAIN] += int(entered_later[entered].sum())
        entered_later[entered] = 0
        members = np.flatnonzero((parts < 0) & (counts[:, label] > 0))
        of_label, due, left = given[:, label].tolist(), wanted[:, label].tolist(), int(sizes[members].sum())
        for member in members.tolist():
            part = _next_part(int(counts[member, label]), of_label, due, rows, left, fractions)
            parts[member] = part
            of_label[part] += int(counts[member, label])
            rows[part] += int(sizes[member])
            left -= int(sizes[member])
        np.add.at(given, parts[members], counts[members])
        remaining -= counts[members].sum(axis=0, dtype=np.int64)
    return parts


def _next_part(
    size: int, given: list[int], wanted: list[float], rows: list[int], left: int, fractions: np.ndarray
) -> int:
    """Return the part that gets the next component.

    Args:
        size: its rows with the label.
        given: rows with the label that each part has.
        wanted: those that it should have in the end.
        rows: rows that each part has.
        left: rows of the components with the label that have no part yet.
        fractions: share of each part.
    """
    parts = range(len(given))
    if fitting := [part for part in parts if wanted[part] - given[part] > size - _ROUNDING]:
        seen = sum(given) + size
        return max(fitting, key=lambda part: fractions[part] * seen - given[part])
    lacking = [part for part in parts if wanted[part] - given[part] > _ROUNDING]
    due = sum(rows) + left
    candidates = lacking or [part for part in parts if fractions[part] > 0]
    return max(candidates, key=lambda part: (round(fractions[part] * due - rows[part], 6), not rows[part]))
