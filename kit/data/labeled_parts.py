"""The parts of labelled data (training, validation, test, further sets): read, cleaned, divided, and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kit.console import warn
from kit.data.balancing import undersample
from kit.data.columns import LeftOut
from kit.data.label_splits import TEST, TRAIN, VALIDATION, split_rows
from kit.data.labeled_rows import LabeledRow, read_labeled_rows
from kit.data.labels import LabelSet
from kit.data.row_ledger import RowLedger, SourceAccount, causes_of, excerpt
from kit.data.sources import hash_text, watch
from kit.errors import UserError
from kit.recipe.classification import LabeledDataSection, LabeledSource

EXACT_DUPLICATE = "exact duplicate"
UNDERSAMPLED = "undersampled"
ALSO_IN = "also in {}"

_MOST_EXAMPLES = 2


@dataclass
class LabeledPart:
    """Rows of one part, and the account of them.

    Attributes:
        rows: as they were read.
        ledger: where rows that go are entered.
        labels: int64 (rows,), or bool (rows, classes).
        hashes: uint64 (rows,), of text and second text.
    """

    rows: list[LabeledRow]
    ledger: RowLedger
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The texts."""
        return [row.text for row in self.rows]

    @property
    def pairs(self) -> list[str] | None:
        """The second texts, or None."""
        return [row.pair for row in self.rows] if self.rows[0].pair is not None else None

    def take(self, chosen: np.ndarray, ledger: RowLedger) -> "LabeledPart":
        """Return some of the rows, under another account."""
        rows = [self.rows[index] for index in chosen.tolist()]
        return LabeledPart(rows, ledger, self.labels[chosen], self.hashes[chosen])

    def keep(self, chosen: np.ndarray) -> None:
        """Keep some of the rows."""
        kept = self.take(chosen, self.ledger)
        self.rows, self.labels, self.hashes = kept.rows, kept.labels, kept.hashes

    def drop(self, cause: str, which: np.ndarray) -> None:
        """Leave rows out, and count them: bool (rows,)."""
        if which.any():
            self.ledger.drop(cause, [self.rows[index] for index in np.flatnonzero(which).tolist()])
            self.keep(np.flatnonzero(~which))


def read_part(name: str, sources: Sequence[LabeledSource]) -> LabeledPart:
    """Read all rows of a part.

    Raises:
        UserError: a source cannot be read, changes meanwhile, or there is no usable row.
    """
    part = LabeledPart([], RowLedger(name))
    for source in sources:
        check_unchanged = watch(source)
        account = SourceAccount(source.name)
        for row in read_labeled_rows(source):
            if isinstance(row, LeftOut):
                account.leave_out(row)
            else:
                account.read += 1
                part.rows.append(row)
        check_unchanged()
        part.ledger.sources.append(account)
    if not part.rows:
        causes = causes_of(*(account.left_out for account in part.ledger.sources))
        names = ", ".join(f"`{source.name}`" for source in sources)
        raise UserError(f"{name}: no usable row in {names} ({causes or 'no row at all'})")
    alone = next((row for row in part.rows if (row.pair is None) != (part.rows[0].pair is None)), None)
    if alone:
        with_pair, without = (part.rows[0], alone) if alone.pair is None else (alone, part.rows[0])
        raise UserError(
            f"{name}: {with_pair.where} has a second text (`text_pair_column`), {without.where} has none; expected one "
            f"in all rows or in none"
        )
    # No text that is read holds NUL.
    texts = (row.text if row.pair is None else f"{row.text}\0{row.pair}" for row in part.rows)
    part.hashes = np.fromiter((hash_text(text) for text in texts), dtype=np.uint64, count=len(part))
    return part


def divide(data: LabeledDataSection, parts: Mapping[str, LabeledPart], labels: LabelSet) -> dict[str, LabeledPart]:
    """Return all parts, those included that are split off the training rows, which are cleaned and undersampled.

    Args:
        data: says how.
        parts: those that have sources of their own, with their labels.
        labels: the classes.

    Raises:
        UserError: a part has no row.
    """
    train, balance = parts["train"], data.balancing
    _check_alike(parts)
    _warn_of_contradictions([parts[name] for name in ("train", "validation", "test") if name in parts])
    if data.exact_duplicates == "drop":
        for name in ("train", "validation", "test"):
            if name in parts:
                parts[name].drop(EXACT_DUPLICATE, _later_copies(parts[name]))
    if balance and balance.method == "undersample" and balance.rows == "all":
        _undersample(train, balance.seed)
    # Before anything is split off: validation is to choose without having seen the test.
    for name in parts:
        if name != "train":
            train.drop(ALSO_IN.format(name), np.isin(train.hashes, parts[name].hashes))
    result = {**parts, **_split_off(data, train, labels)} if len(train) else parts
    if not len(train):
        raise UserError(
            f"train: none of {sum(account.read for account in train.ledger.sources):,} rows is left "
            f"({causes_of(train.ledger.dropped)}); measure on other rows than those that train"
        )
    _warn_of_overlap(result)
    if balance and balance.method == "undersample" and balance.rows == "train":
        _undersample(train, balance.seed)
    return result


def check_classes(parts: Mapping[str, LabeledPart], labels: LabelSet, read: np.ndarray) -> None:
    """Check that each class has rows to learn from; one without rows to be measured on is told.

    Args:
        parts: all of them.
        labels: the classes.
        read: int64 (classes,), rows of each that `data.train` has.

    Raises:
        UserError: a class has no training row.
    """
    matrices = {name: labels.matrix(part.labels) for name, part in parts.items()}
    for number, name in enumerate(labels.names):
        if not matrices["train"][:, number].any():
            raise UserError(
                f"class `{name}` has no training row: what `data.train` has of it ({int(read[number]):,}) is measured "
                f"on or left out ({causes_of(parts['train'].ledger.dropped) or 'split off'}); give more rows of it"
            )
    for part, matrix in matrices.items():
        absent = [name for name, rows in zip(labels.names, matrix.sum(axis=0), strict=True) if not rows]
        if absent:
            listed = ", ".join(f"`{name}`" for name in absent[:5]) + (", …" if len(absent) > 5 else "")
            warn(
                f"{part}: has no row of {len(absent):,} of {len(labels.names):,} classes, not measured there: {listed}"
            )
    if "validation" not in parts:
        warn("there are no validation rows, so nothing chooses the model: give `data.validation` or `data.split`")


def _check_alike(parts: Mapping[str, LabeledPart]) -> None:
    paired = parts["train"].pairs is not None
    for name, part in parts.items():
        if (part.pairs is not None) != paired:
            has, lacks = ("train", name) if paired else (name, "train")
            raise UserError(f"{has}: has second texts (`text_pair_column`), {lacks} has none; expected both or neither")


def _later_copies(part: LabeledPart) -> np.ndarray:
    """Return the rows whose text and labels occurred before: bool (rows,)."""
    seen: set[tuple[int, bytes]] = set()
    copies = np.zeros(len(part), dtype=bool)
    for index, digest in enumerate(part.hashes.tolist()):
        example = (digest, part.labels[index].tobytes())
        copies[index] = example in seen
        seen.add(example)
    return copies


def _undersample(part: LabeledPart, seed: int) -> None:
    out = np.ones(len(part), dtype=bool)
    out[undersample(part.hashes, part.labels, seed)] = False
    part.drop(UNDERSAMPLED, out)


def _split_off(data: LabeledDataSection, train: LabeledPart, labels: LabelSet) -> dict[str, LabeledPart]:
    """Take validation and test from the training rows, unless they have sources of their own."""
    shares = {
        name: 0.0 if getattr(data, name) is not None else getattr(data.split, name) for name in ("validation", "test")
    }
    if not any(shares.values()):
        return {}
    fractions = [1 - sum(shares.values()), *shares.values()]
    indicators = labels.matrix(train.labels) if data.split.stratify else None
    groups = [row.group for row in train.rows]
    of_row = split_rows(train.hashes, groups, indicators, fractions, data.split.seed)
    total, parts = len(train), {}
    for name, number in (("validation", VALIDATION), ("test", TEST)):
        if shares[name]:
            chosen = np.flatnonzero(of_row == number)
            if not len(chosen):
                raise UserError(
                    f"data.split.{name}: {shares[name]:g} of {total:,} rows, of which equal texts and groups stay "
                    f"together and each class has one that trains, leaves {name} without a row; give more rows, or "
                    f"`data.split.{name}: 0` to go without"
                )
            parts[name] = train.take(chosen, RowLedger(name))
            train.ledger.split_off[name] = len(chosen)
    train.keep(np.flatnonzero(of_row == TRAIN))
    return parts


def _warn_of_contradictions(parts: Sequence[LabeledPart]) -> None:
    """Tell of equal texts with different labels."""
    labels_of: dict[int, dict[bytes, LabeledRow]] = {}
    for part in parts:
        for index, digest in enumerate(part.hashes.tolist()):
            labels_of.setdefault(digest, {}).setdefault(part.labels[index].tobytes(), part.rows[index])
    found = [list(rows.values()) for rows in labels_of.values() if len(rows) > 1]
    if found:
        examples = "; ".join(
            f"`{excerpt(rows[0].text)}` is "
            + " and ".join(f"`{', '.join(row.labels) or 'no label'}` ({row.where})" for row in rows[:2])
            for rows in found[:_MOST_EXAMPLES]
        )
        warn(f"{len(found):,} texts occur with different labels: {examples}")


def _warn_of_overlap(parts: Mapping[str, LabeledPart]) -> None:
    """Tell of what stands on two sides and was left there."""
    if {"validation", "test"} <= set(parts):
        both = np.isin(parts["test"].hashes, parts["validation"].hashes)
        if both.any():
            row = parts["test"].rows[int(both.argmax())]
            warn(
                f"test: {int(both.sum()):,} of {len(both):,} rows are also in validation, which chooses the model, "
                f"such as `{excerpt(row.text)}` ({row.where})"
            )
    groups = {row.group for row in parts["train"].rows} - {None}
    for name, part in parts.items():
        shared = groups & {row.group for row in part.rows} if name != "train" else ()
        if shared:
            warn(
                f"{name}: {len(shared):,} of its groups also train, such as `{min(shared)}`; only `data.split` keeps "
                f"groups on one side, not sources of a part"
            )
