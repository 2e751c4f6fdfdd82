"""From a row of columns to its text (one column, named or found, or a template over several) and to its labels."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from kit.console import say
from kit.data.readers import format_of
from kit.errors import UserError, suggest
from kit.recipe.classification import LabeledSource
from kit.recipe.data import Origin

BAD_TEXT = "unusable text"
NO_LABEL = "no label"
LABEL_COLUMNS = ("label", "labels")
# Nothing that a model's configuration could store: NUL, and half a surrogate pair.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class LeftOut:
    """A document that is not read.

    Attributes:
        cause: why.
        where: file and line, or row; empty where it does not matter.
    """

    cause: str
    where: str = ""


class TextOfRow:
    """Makes the text of a document from a row.

    Args:
        source: `text_column`, `template` and `on_bad_text` are honoured.
        columns: the columns that there are, and which of them hold text.
        where: what a message names.
        others: columns that hold something else, such as the label.

    Raises:
        UserError: a named column does not exist, or none was named and there is more than one to choose from.
    """

    def __init__(self, source: Origin, columns: Mapping[str, bool], where: str, others: Collection[str] = ()) -> None:
        """Decide which columns make the text."""
        if source.template is not None:
            self._parts = [(literal, name) for literal, name, _, _ in Formatter().parse(source.template)]
        else:
            self._parts = [("", source.text_column or _find_text_column(source, columns, where, others))]
        self._plain = source.template is None
        self._skip = source.on_bad_text == "skip"
        for name in self.columns:
            require_column(name, "template" if source.template is not None else "text_column", columns, where)

    @property
    def columns(self) -> list[str]:
        """The columns that make the text."""
        return [name for _, name in self._parts if name is not None]

    def __call__(self, where: str, row: Mapping[str, Any]) -> str | LeftOut:
        """Return the text of a row, or why there is none.

        Raises:
            UserError: there is none, and `on_bad_text` is `error`.
        """
        pieces = []
        for literal, name in self._parts:
            pieces.append(literal)
            if name is not None:
                piece = self.text_in(where, row, name, numbers=not self._plain)
                if isinstance(piece, LeftOut):
                    return piece
                pieces.append(piece)
        return "".join(pieces)

    def text_in(self, where: str, row: Mapping[str, Any], name: str, numbers: bool = False) -> str | LeftOut:
        """Return the text in one column of a row, or why there is none.

        Raises:
            UserError: there is none, and `on_bad_text` is `error`.
        """
        value = row.get(name)
        # A number in a template is as good as its digits; a whole document that is a number is a mistake.
        if not isinstance(value, str) and (not numbers or isinstance(value, bool) or not _is_number(value)):
            found = "is missing" if name not in row else f"holds {_kind(value)}"
            return bad_text(where, f"column `{name}` {found}; expected text", self._skip)
        return str(value)


def bad_text(where: str, what: str, skip: bool) -> LeftOut:
    """Return a row's text as left out, or refuse it, as `on_bad_text` says.

    Raises:
        UserError: `skip` is false.
    """
    if not skip:
        raise UserError(f"{where}: {what} (`on_bad_text: skip` leaves such rows out and counts them)")
    return LeftOut(BAD_TEXT, where)


def require_column(name: str, key: str, columns: Collection[str], where: str, hint: str = "") -> None:
    """Refuse the name that `key` gives where there is no such column."""
    if name not in columns:
        raise UserError(
            f"{where}: no column `{name}` (`{key}`); columns: {_listed(columns)}{_near(name, columns)}{hint}"
        )


def _find_text_column(source: Origin, columns: Mapping[str, bool], where: str, others: Collection[str]) -> str:
    if "text" in columns and "text" not in others:
        return "text"
    texts = [name for name, is_text in columns.items() if is_text and name not in others]
    if len(texts) == 1:
        beside = f" beside {_listed(others)}" if others else ""
        tell_once(f"{source.name}: the text is column `{texts[0]}`, the only one that holds any{beside}")
        return texts[0]
    has_header = source.path and (source.format or format_of(Path(source.path))) in ("csv", "tsv")
    hint = "; where the first row is no header, name the columns with `column_names`" if has_header else ""
    raise UserError(
        f"{where}: which column holds the text? Name it with `text_column`, or several in a `template`; columns: "
        f"{_listed(columns)}{hint}"
    )


@cache
def tell_once(message: str) -> None:
    """Print a line about a source, once however many files it has and however often it is read."""
    say(message)


class LabelsOfRow:
    """Finds the labels of a source's rows, which have to be alike: one or a list, text or numbers.

    Attributes:
        columns: that hold labels; those of the file that is read, after `find`.
        stripped: labels with white space around them.
    """

    def __init__(self, source: LabeledSource) -> None:
        """Start a source."""
        self.columns: list[str] = []
        self.stripped = 0
        self._source = source
        self._class_names: list[str] | None = None
        self._first: dict[str, str] = {}  # of each kind of value: where it was seen first

    @property
    def multi(self) -> bool:
        """Whether a row may have any number of labels."""
        return bool(self._source.label_columns or self._source.label_separator or "a list" in self._first)

    def find(
        self, columns: Collection[str], where: str, hint: str = "", class_names: Mapping[str, list[str]] | None = None
    ) -> None:
        """Decide which columns hold labels.

        Args:
            columns: the columns that there are.
            where: what a message names.
            hint: what a message that there is no such column ends with.
            class_names: what the integers of a column stand for.

        Raises:
            UserError: there is no such column.
        """
        source = self._source
        if source.label is not None:
            return
        if source.label_columns or source.label_column:
            key = "label_columns" if source.label_columns else "label_column"
            self.columns = list(source.label_columns or [source.label_column])
            for name in self.columns:
                require_column(name, key, columns, where, hint)
        else:
            self.columns = [name for name in LABEL_COLUMNS if name in columns][:1]
        if not self.columns:
            raise UserError(
                f"{where}: which column holds the label? Name it with `label_column` (by default `label` or `labels`); "
                f"columns: {_listed(columns)}{_near('label', columns)}{hint}"
            )
        self._class_names = None if source.label_columns else (class_names or {}).get(self.columns[0])

    def __call__(self, where: str, row: Mapping[str, Any]) -> tuple[str, ...] | LeftOut:
        """Return the labels of a row, or that it has none.

        Raises:
            UserError: it has none, and `on_bad_label` is `error`; or they are not what labels are.
        """
        source = self._source
        if source.label is not None:
            return (source.label,)
        if source.label_columns:
            flags = {name: self._flag(where, name, row.get(name)) for name in self.columns}
            for name, flag in flags.items():
                if flag is None:
                    return self._bad_label(where, name, row)
            return tuple(name for name, flag in flags.items() if flag)
        (column,) = self.columns
        value = row.get(column)
        if source.label_separator is not None and isinstance(value, str):
            parts = (self._name(where, column, part) for part in value.split(source.label_separator))
            return tuple(dict.fromkeys(part for part in parts if part is not None))
        if isinstance(value, list):
            if source.label_separator is not None:
                raise UserError(f"{where}: column `{column}` holds a list, where `label_separator` expects text")
            self._agree("a list", ("a single label",), where, column)
            names = tuple(dict.fromkeys(self._name(where, column, item) for item in value))
        else:
            names = (self._name(where, column, value),)
            if names[0] is not None and source.label_separator is None:
                self._agree("a single label", ("a list",), where, column)
        return self._bad_label(where, column, row) if None in names else names

    def _bad_label(self, where: str, column: str, row: Mapping[str, Any]) -> LeftOut:
        if self._source.on_bad_label == "skip":
            return LeftOut(NO_LABEL, where)
        value = row.get(column)
        if column not in row:
            found = "is missing"
        elif isinstance(value, str):
            found = "is empty"
        elif isinstance(value, list):
            found = "holds a list with a label that is null or empty"
        else:
            found = f"holds {_kind(value)}"
        raise UserError(
            f"{where}: no label: column `{column}` {found} (`on_bad_label: skip` leaves such rows out and counts them)"
        )

    def _name(self, where: str, column: str, value: Any) -> str | None:
        """Return a label as text, or None where it is missing."""
        if value is None or value != value:  # NaN, as which some libraries store what is missing
            return None
        if isinstance(value, str):
            name = value.strip()
            if not name:
                return None
            if bad := _UNUSABLE.search(name):
                raise UserError(f"{where}: column `{column}` holds a label with {ascii(bad[0])[1:-1]} in it")
            self.stripped += name != value
            self._agree("text", ("numbers", "booleans"), where, column)
            return name
        if isinstance(value, bool):
            self._agree("booleans", ("text", "numbers"), where, column)
            return "true" if value else "false"
        if not isinstance(value, int):
            raise UserError(f"{where}: column `{column}` holds {self._no_label(value)}")
        self._agree("numbers", ("text", "booleans"), where, column)
        if self._class_names is None:
            return str(value)
        if value == -1:  # as the library writes a row without label
            return None
        if not 0 <= value < len(self._class_names):
            raise UserError(f"{where}: column `{column}` holds {value}; it has {len(self._class_names)} labels")
        return self._class_names[value]

    def _no_label(self, value: Any) -> str:
        """Say why a value is no label."""
        if not isinstance(value, float):
            return f"{_kind(value)}; expected text or an integer"
        integer = (
            "; integers become such numbers where a column has missing values, as pandas reads it: write them as "
            "integers (`astype('Int64')`)"
            if value.is_integer()
            else ""
        )
        text = f"; float against string labels: {self._first['text']} holds text" if "text" in self._first else ""
        return f"{value}, a floating-point number; expected text or an integer{text}{integer}"

    def _agree(self, kind: str, others: tuple[str, ...], where: str, column: str) -> None:
        """Remember where values of a kind began; refuse them beside others."""
        if kind in self._first:
            return
        self._first[kind] = where
        for other in others:
            if other in self._first:
                raise UserError(
                    f"{where}: column `{column}` holds {kind}, and at {self._first[other]} {other}; write all labels "
                    f"of a source alike"
                )

    def _flag(self, where: str, column: str, value: Any) -> bool | None:
        """Return whether a column of 0 and 1 says yes, or None where its value is missing."""
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            return None
        digits = str(int(value)) if isinstance(value, int) else value.strip() if isinstance(value, str) else ""
        if digits not in ("0", "1"):
            shown = f"`{value[:40]}`" if isinstance(value, str) else value
            raise UserError(f"{where}: column `{column}` (`label_columns`) holds {shown}; expected 0 or 1")
        return digits == "1"


def _listed(columns: Collection[str]) -> str:
    return ", ".join(f"`{column[:40]}`" for column in columns) or "none"


def _near(name: str, columns: Collection[str]) -> str:
    # A name with a delimiter in it is several that were not told apart.
    return suggest(name, [column for column in columns if set(column).isdisjoint(",;|\t")])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _kind(value: Any) -> str:
    return (
        "null"
        if value is None
        else {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)
    )
