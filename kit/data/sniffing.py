"""How the fields of a CSV or TSV file are separated and quoted, found out from its first records."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kit.data import readers
from kit.data.columns import tell_once
from kit.errors import UserError
from kit.recipe.data import Origin

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_RECORDS = 100


@dataclass(frozen=True)
class Dialect:
    """How a file is split.

    Attributes:
        delimiter: separates fields.
        quoting: whether `"` around a field quotes it.
        hint: the first rows as they are split, for a message that a column is not there.
    """

    delimiter: str
    quoting: bool
    hint: str


class _Attempt:
    """The first records of a file as one way splits them."""

    def __init__(self, path: Path, source: Origin, delimiter: str, quoting: bool) -> None:
        self.delimiter, self.quoting = delimiter, quoting
        self.records: list[tuple[str, list[str], str]] = []
        self.fault: UserError | None = None
        width = len(source.column_names) if source.column_names else None
        try:
            for record in islice(readers.split_fields(path, source.encoding, delimiter, quoting, width), _RECORDS):
                self.records.append(record)
        except UserError as error:
            self.fault = error
        self.names = list(source.column_names or (self.records[0][1] if self.records else ()))
        self.uneven = next((record for record in self.records if len(record[1]) != len(self.names)), None)
        # One column with a delimiter in its name is more probably several.
        one = len(self.names) == 1 and not source.column_names and source.delimiter is None
        joined = one and not set(_DELIMITERS).isdisjoint(self.names[0])
        self.fits = not (self.fault or self.uneven or joined)
        # The last of given columns takes the rest of an unquoted line: any delimiter early in it would fit.
        self.exact = quoting or not width or all(line.count(delimiter) == width - 1 for _, _, line in self.records)

    @property
    def hint(self) -> str:
        rows = (" | ".join(f"`{field[:40]}`" for field in fields[:6]) for _, fields, _ in self.records[:3])
        return f"; the first rows, split at {self.delimiter!r}: {'; '.join(rows)}" if self.records else ""


def sniff_dialect(path: Path, source: Origin, format: str, wanted: Collection[str] = ()) -> Dialect | None:
    """Return how a file is split where the source does not say, or None where the file is empty.

    What counts is first that the header holds a wanted column; then that all of the first records have the same number
    of fields; then that there are several; then what the format's name promises.

    Args:
        path: the file.
        source: its `delimiter`, `quoting` and `column_names` are honoured.
        format: `csv` or `tsv`.
        wanted: columns of which one has to be there.

    Raises:
        UserError: no way fits, or several fit alike.
    """
    default = source.delimiter or readers.DEFAULT_DELIMITERS[format]
    attempts = [
        _Attempt(path, source, delimiter, quoting)
        for delimiter in ([source.delimiter] if source.delimiter else _DELIMITERS)
        for quoting in ([source.quoting] if source.quoting is not None else [True, False])
    ]
    if not any(attempt.records or attempt.fault for attempt in attempts):
        return None

    def has_wanted(attempt: _Attempt) -> bool:
        return not wanted or not set(wanted).isdisjoint(attempt.names)

    def rank(attempt: _Attempt) -> tuple[bool, ...]:
        return has_wanted(attempt), attempt.fits, len(attempt.names) > 1, attempt.exact

    def quotes(attempt: _Attempt) -> bool:  # text/tab-separated-values has no quoting
        return format == "csv" and (source.delimiter is not None or attempt.delimiter != "\t")

    best = max(attempts, key=lambda a: (*rank(a), a.delimiter == default, a.quoting == quotes(a)))
    hint = best.hint
    if hint and source.column_names is None and not has_wanted(best):
        hint += _why_not_wanted(path, source, best)
    if best.fault or best.uneven:
        where, fields, line = best.uneven or ("", [], "")
        raise UserError(
            (str(best.fault) if best.fault else readers.uneven_fields(where, fields, best.names, line)) + hint
        )
    alike = {a.delimiter: a for a in attempts if rank(a) == rank(best) and (a is best or a.records != best.records)}
    if len(alike) > 1 and best.delimiter != default:
        raise UserError(
            f"{path}: fields may be separated by {' or '.join(_DELIMITERS[d] for d in alike)}; say which with "
            f"`delimiter`{''.join(attempt.hint for attempt in alike.values())}"
        )
    other = next((a for a in attempts if a.delimiter == best.delimiter and a.quoting != best.quoting and a.fits), None)
    if other:
        best = _settle_quoting(path, best, other)
    if source.delimiter is None or source.quoting is None:
        separated = _DELIMITERS.get(best.delimiter, repr(best.delimiter))
        marks = '`"` around a field quotes it' if best.quoting else '`"` is a part of the text'
        tell_once(f"{source.name}: fields are separated by {separated}, {marks} (`delimiter`, `quoting`)")
    return Dialect(best.delimiter, best.quoting, hint)


def _why_not_wanted(path: Path, source: Origin, best: _Attempt) -> str:
    """Say what may be the reason that no way of splitting gives a wanted column."""
    if readers.holds_json_lines(path, source.encoding):
        return "; these look like JSON lines: set `format: jsonl`"
    others = [mark for mark in _DELIMITERS if mark != source.delimiter and mark in best.names[0]]
    if source.delimiter and len(best.names) == 1 and others:
        return f"; `delimiter` is {source.delimiter!r}, but fields seem to be separated by {_DELIMITERS[others[0]]}"
    return "; where the first row is no header, name the columns with `column_names`"


def _settle_quoting(path: Path, best: _Attempt, other: _Attempt) -> _Attempt:
    """Return that of two attempts which is right about quotes, where the fields are as many either way."""
    quoted, plain = (best, other) if best.quoting else (other, best)
    if [where for where, *_ in quoted.records] != [where for where, *_ in plain.records]:
        if best is plain:
            return plain
        raise UserError(
            f'{path}: `"` may be a part of the text, or quote fields that have several lines; say which with '
            f"`quoting`{plain.hint}{quoted.hint}"
        )
    # A writer that quotes fields doubles the quotes in them.
    doubled = any(
        '"' in field and field != raw
        for (_, fields, _), (_, raws, _) in zip(quoted.records, plain.records, strict=True)
        for field, raw in zip(fields, raws, strict=True)
    )
    return quoted if doubled else best
