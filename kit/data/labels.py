"""The labels of a classifier: their names, in a stable order, and rows of them as arrays."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kit.console import say, warn
from kit.data.labeled_rows import LabeledRow
from kit.errors import UserError, did_you_mean, suggest

_INTEGER = re.compile("0|-?[1-9][0-9]*")
_INTEGER_AS_FLOAT = re.compile(r"-?[0-9]+\.0")
_MOST_LISTED = 10
_SEPARATORS = "|;,/"
_MISSING_AS_TEXT = ("nan", "null", "<na>")  # as libraries write it


@dataclass(frozen=True)
class LabelSet:
    """The labels that a classifier tells apart.

    Attributes:
        names: of the labels, by their number.
        multi: whether a text may have any number of labels, not exactly one.
        numbers: of what the data call them; -1 for labels of too few rows, which are left out.
    """

    names: tuple[str, ...]
    multi: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)

    def names_of(self, labels: np.ndarray) -> list[str]:
        """Return the names of one row's labels: int64 (), or bool (classes,)."""
        return [self.names[number] for number in (np.flatnonzero(labels) if self.multi else [int(labels)])]

    def matrix(self, labels: np.ndarray) -> np.ndarray:
        """Return labels as indicators: bool (rows, classes).

        Args:
            labels: int64 (rows,), or with `multi` already bool (rows, classes).
        """
        return labels.astype(bool) if self.multi else labels[:, None] == np.arange(len(self.names))


def label_set(rows: Iterable[LabeledRow], label_names: Mapping[str, str] | None = None, min_rows: int = 1) -> LabelSet:
    """Return the labels of the training rows: integers in their order, anything else sorted as text.

    Args:
        rows: for training; other sets have no say in what a classifier tells apart.
        label_names: what labels of the data are to be called; several of one name are one class.
        min_rows: a class of fewer rows is left out.

    Raises:
        UserError: there is nothing to tell apart, sources disagree, or `label_names` does not fit.
    """
    counts: Counter[str] = Counter()
    kinds: dict[bool, str] = {}
    num_rows = most = 0
    for row in rows:
        num_rows += 1
        most = max(most, len(row.labels))
        counts.update(row.labels)
        _check_kind(row, kinds)
    if not num_rows:
        raise UserError("data.train: no row is left to train on")
    multi = True in kinds
    if len(counts) < (1 if multi else 2):
        all_rows = f"all of the {num_rows:,} rows have" if num_rows > 1 else "the only row has"
        found = f"{all_rows} the label {_listed(counts)}" if counts else "no row has a label"
        raise UserError(f"data.train: {found}; a classifier needs rows of at least {'one' if multi else 'two'}")
    if multi and most == 1:
        warn("a training row may have any number of labels, but none has more than one")
    integers = all(map(_INTEGER.fullmatch, counts))
    in_data = tuple(sorted(counts, key=int if integers else None))
    renamed = _renamed(in_data, label_names or {})
    classes: Counter[str] = Counter()
    for name in in_data:
        classes[renamed[name]] += counts[name]
    if multi and min(classes.values()) < min_rows:
        raise UserError("data.min_rows_per_label: rows with any number of labels are not left out for a rare one")
    if not multi and len(classes) == 1 < len(in_data):
        raise UserError(f"data.label_names: makes one class of all {len(in_data):,} labels; a classifier needs two")
    names = tuple(name for name, count in classes.items() if count >= min_rows)
    if len(names) < (1 if multi else 2):
        raise UserError(
            f"data.min_rows_per_label: found {min_rows:,}, which {len(names)} of {len(classes)} labels reach "
            f"({_listed([f'{name}: {count:,}' for name, count in classes.most_common()])}); a classifier needs two"
        )
    if len(names) < len(classes):
        rare = [f"{name}: {count:,}" for name, count in classes.most_common() if count < min_rows]
        say(f"left out, with fewer than {min_rows:,} rows (`data.min_rows_per_label`): {_listed(rare)}")
    of_class = {name: number for number, name in enumerate(names)}
    numbers = {name: of_class.get(renamed[name], -1) for name in in_data}
    _warn_of_oddities([name for name in in_data if numbers[name] >= 0], counts, num_rows, integers, renamed)
    return LabelSet(names, multi, numbers)


def encode(rows: Sequence[LabeledRow], labels: LabelSet, set_name: str) -> np.ndarray:
    """Return the labels of rows by their number: int64 (rows,), or bool (rows, classes) where there are any number.

    A label of too few rows is -1.

    Args:
        rows: of any set.
        labels: those of the training rows.
        set_name: for messages, such as `test`.

    Raises:
        UserError: a label does not occur in the training rows, or only one of the sets has any number of labels a row.
    """
    numbers = labels.numbers or {name: number for number, name in enumerate(labels.names)}
    encoded = (
        np.zeros((len(rows), len(labels.names)), dtype=bool) if labels.multi else np.empty(len(rows), dtype=np.int64)
    )
    for index, row in enumerate(rows):
        if row.multi != labels.multi:
            raise UserError(
                f"{row.where}: rows of {set_name} have {_kind(row.multi)}, the training rows {_kind(labels.multi)}"
            )
        for label in row.labels:
            if label not in numbers:
                raise _unseen(label, rows, numbers, set_name)
            if labels.multi:
                encoded[index, numbers[label]] = True
            else:
                encoded[index] = numbers[label]
    return encoded


def _check_kind(row: LabeledRow, kinds: dict[bool, str]) -> None:
    """Refuse rows with exactly one label beside rows with any number; `kinds` remembers where each began."""
    kinds.setdefault(row.multi, row.where)
    if len(kinds) > 1:
        raise UserError(
            f"data.train: rows have {_kind(True)} at {kinds[True]}, and {_kind(False)} at {kinds[False]}; all sources "
            f"have to be alike (`label_separator` or a list makes any number of one)"
        )


def _kind(multi: bool) -> str:
    return "any number of labels" if multi else "exactly one label"


def _warn_of_oddities(
    names: Sequence[str], counts: Mapping[str, int], num_rows: int, integers: bool, renamed: Mapping[str, str]
) -> None:
    if integers:
        present = set(map(int, names))
        gaps = max(present) - min(present) + 1 - len(present)
        missing = (number for number in range(min(present), max(present)) if number not in present)
        if gaps:
            some = ", ".join(str(number) for number, _ in zip(missing, range(_MOST_LISTED), strict=False))
            warn(
                f"labels are {_listed(names)}: {some}{', …' if gaps > _MOST_LISTED else ''} does not occur in the "
                f"training rows; the classifier has {len(names)} outputs, numbered from 0 in this order"
            )
    if all(map(_INTEGER_AS_FLOAT.fullmatch, names)):
        warn(f"labels are {_listed(names)}: integers written as floating-point numbers, as pandas does beside gaps")
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if renamed[other] != renamed[name]:
            warn(
                f"labels `{other}` ({counts[other]:,} rows) and `{name}` ({counts[name]:,} rows) look alike, and are "
                f"two classes; if they are one, give them one name in `data.label_names`"
            )
    for name in names:
        if name.casefold() in _MISSING_AS_TEXT:
            warn(f"label `{name}` ({counts[name]:,} rows) is a class, not a missing value, as it is written as text")
    for mark in _SEPARATORS:
        if joined := [n for n in names if mark in n and all(part.strip() in counts for part in n.split(mark))]:
            warn(
                f'labels {_listed(joined)} are made of others: are they several? `label_separator: "{mark}"` gives a '
                f"row each of them"
            )
    if len(names) > 20 and 2 * len(names) > num_rows:
        warn(f"{len(names):,} labels in {num_rows:,} training rows: is `label_column` the column that was meant?")


def _renamed(in_data: Sequence[str], label_names: Mapping[str, str]) -> dict[str, str]:
    """Return the class that each label of the data belongs to."""
    for name in label_names:
        if name not in in_data:
            raise UserError(
                f"data.label_names: no training row has the label `{name}`; found: {_listed(in_data)}"
                f"{suggest(name, in_data)}"
            )
    renamed = {name: label_names.get(name, name) for name in in_data}
    for joined, number in Counter(renamed.values()).items():
        if number > 1:
            say(f"class `{joined}` holds the labels {_listed([name for name in in_data if renamed[name] == joined])}")
    return renamed


def _unseen(label: str, rows: Sequence[LabeledRow], known: Collection[str], set_name: str) -> UserError:
    having = [row.where for row in rows if label in row.labels]
    integer = label.removesuffix(".0")
    hint = f"; did you mean `{integer}`?" if integer != label and integer in known else did_you_mean(label, known)
    rows_of = "1 row" if len(having) == 1 else f"{len(having):,} rows"
    return UserError(
        f"{having[0]}: label `{label}` does not occur in the training rows, but in {rows_of} of {set_name}{hint}"
    )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(f"`{name[:40]}`" for name in list(names)[:_MOST_LISTED])
    return shown + (f", … ({len(names):,} in all)" if len(names) > _MOST_LISTED else "")
