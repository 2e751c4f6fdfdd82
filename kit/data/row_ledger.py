"""The ledger of labelled rows: what was read, and where every row and every token of it went."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kit.console import say, table
from kit.data.columns import LeftOut
from kit.data.labeled_rows import LabeledRow
from kit.data.labels import LabelSet

SAMPLE = "train_sample"
_MOST_EXAMPLES = 3
_EXCERPT_CHARACTERS = 60
_MOST_CLASSES = 40


@dataclass
class SourceAccount:
    """What was read of one source.

    Attributes:
        source: its name.
        read: rows with text and label.
        left_out: rows without, or filtered: by cause their number as `rows`, and where some of them are.
    """

    source: str
    read: int = 0
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leave_out(self, left_out: LeftOut) -> None:
        """Count a row that is not read."""
        entry = self.left_out.setdefault(left_out.cause, {"rows": 0, "examples": []})
        entry["rows"] += 1
        if left_out.where and len(entry["examples"]) < _MOST_EXAMPLES:
            entry["examples"].append(left_out.where)


@dataclass
class RowLedger:
    """One part's account: ``read + repeated + copies = rows + split off + dropped``, where it has sources of its own.

    Attributes:
        part: its name.
        sources: the sources that it was read from; none where it was split off or is a sample.
        rows: rows that it has; of the training part, those of an epoch.
        classes: rows of each class; where a row has several labels, it counts for each.
        unlabeled: rows without any label.
        split_off: rows that other parts got, by part.
        dropped: rows that were left out after reading, by cause: their number as `rows`, and `examples`.
        repeated: rows that an epoch has once more, as their class is small.
        copies: noisy copies of rows.
        unchanged_copies: those that came out equal to their row.
        tokens: tokens of the rows, special tokens included, before any is cut.
        truncated: rows that are longer than what the model reads of them.
        tokens_cut: tokens of those that it does not read.
        longest: tokens of the longest row before it is cut, and what is read of it.
    """

    part: str
    sources: list[SourceAccount] = field(default_factory=list)
    rows: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    unlabeled: int = 0
    split_off: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    repeated: int = 0
    copies: int = 0
    unchanged_copies: int = 0
    tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    longest: tuple[int, int] = (0, 0)

    def drop(self, cause: str, rows: Sequence[LabeledRow]) -> None:
        """Count rows that are left out after reading."""
        entry = self.dropped.setdefault(cause, {"rows": 0, "examples": []})
        entry["rows"] += len(rows)
        room = _MOST_EXAMPLES - len(entry["examples"])
        entry["examples"] += [{"where": row.where, "text": excerpt(row.text)} for row in rows[:room]]

    def enter_rows(self, labels: np.ndarray, label_set: LabelSet, lengths: np.ndarray, uncut: np.ndarray) -> None:
        """Enter what the part has in the end.

        Args:
            labels: int64 (rows,), or bool (rows, classes).
            label_set: their names.
            lengths: int64 (rows,), tokens that are read.
            uncut: int64 (rows,), tokens before any is cut.
        """
        matrix = label_set.matrix(labels)
        self.rows = len(labels)
        self.classes = dict(zip(label_set.names, matrix.sum(axis=0).tolist(), strict=True))
        self.unlabeled = int((~matrix.any(axis=1)).sum())
        self.tokens, self.tokens_cut = int(uncut.sum()), int((uncut - lengths).sum())
        self.truncated = int((uncut > lengths).sum())
        longest = int(uncut.argmax())
        self.longest = (int(uncut[longest]), int(lengths[longest]))
        read = sum(source.read for source in self.sources) + self.repeated + self.copies
        left = sum(self.split_off.values()) + sum(entry["rows"] for entry in self.dropped.values())
        if self.sources and read != self.rows + left:
            raise AssertionError(f"the ledger of rows does not add up: {self}")


def excerpt(text: str) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text[: 4 * _EXCERPT_CHARACTERS].split())
    return line if len(line) <= _EXCERPT_CHARACTERS else line[: _EXCERPT_CHARACTERS - 1] + "…"


def causes_of(*counts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in words how many rows each cause left out."""
    total: Counter[str] = Counter()
    for by_cause in counts:
        total.update({cause: entry["rows"] for cause, entry in by_cause.items()})
    return "; ".join(f"{cause}: {rows:,}" for cause, rows in total.items())


def print_row_ledger(ledger: Sequence[RowLedger], limit: str) -> None:
    """Print the rows of each class in each part, and a line for everything that was left out, repeated or cut.

    Args:
        ledger: the accounts, the training part first.
        limit: what decides how much of a text is read, in words.
    """
    rows = [["rows", *(f"{part.rows:,}" for part in ledger)], *_class_rows(ledger)]
    table("Labelled rows", ["class", *(part.part for part in ledger)], rows)
    for part in ledger:
        for line in _lines(part):
            say(line)
        if part.truncated and part.part != SAMPLE:  # whose rows are among those of the training part
            longest, read = part.longest
            say(
                f"{part.part}: {part.truncated:,} of {part.rows:,} rows are cut ({limit}): {part.tokens_cut:,} of "
                f"{part.tokens:,} tokens ({part.tokens_cut / part.tokens:.1%}) are not read; the longest has "
                f"{longest:,}, of which {read:,} are read ({read / longest:.0%})"
            )


def _class_rows(ledger: Sequence[RowLedger]) -> Iterable[list[str]]:
    """Yield rows of the table: the classes in their order; of very many, those with the most training rows."""
    names = list(ledger[0].classes)
    shown = names
    if len(names) > _MOST_CLASSES:
        largest = sorted(names, key=lambda name: -ledger[0].classes[name])[:_MOST_CLASSES]
        shown = [name for name in names if name in set(largest)]
    for name in shown:
        yield [name, *(_cell(part.classes[name], part.rows) for part in ledger)]
    if others := [name for name in names if name not in set(shown)]:
        yield [f"{len(others):,} others", *(f"{sum(p.classes[name] for name in others):,}" for p in ledger)]
    if any(part.unlabeled for part in ledger):
        yield ["(no label)", *(_cell(part.unlabeled, part.rows) for part in ledger)]


def _cell(rows: int, total: int) -> str:
    return f"{rows:,}  {rows / total:6.1%}"


def _lines(part: RowLedger) -> Iterable[str]:
    for source in part.sources:
        for cause, entry in source.left_out.items():
            more = ", …" if entry["rows"] > len(entry["examples"]) else ""
            where = f": {', '.join(entry['examples'])}{more}" if entry["examples"] else ""
            yield f"not read of {source.source}: {entry['rows']:,} {cause}{where}"
    for cause, entry in part.dropped.items():
        example = entry["examples"][0]
        yield f"left out of {part.part}: {entry['rows']:,} {cause}, such as `{example['text']}` ({example['where']})"
    if part.repeated:
        yield f"{part.part}: {part.repeated:,} rows of smaller classes are repeated (`data.balance: oversample`)"
    if part.copies:
        equal = f", of which {part.unchanged_copies:,} came out equal to their row" if part.unchanged_copies else ""
        yield f"{part.part}: {part.copies:,} noisy copies (`data.augment`){equal}"


def ledger_as_json(ledger: Sequence[RowLedger]) -> list[dict[str, Any]]:
    """Return the ledger as it is saved."""
    return [asdict(part) for part in ledger]
