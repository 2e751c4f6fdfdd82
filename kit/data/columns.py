"""From a row of columns to the text of a document: one column, named or found, or a template over several."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from kit.console import say
from kit.data.readers import format_of
from kit.errors import UserError, suggest
from kit.recipe.data import Source

BAD_TEXT = "unusable text"


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

    Raises:
        UserError: a named column does not exist, or none was named and there is more than one to choose from.
    """

    def __init__(self, source: Source, columns: Mapping[str, bool], where: str) -> None:
        """Decide which columns make the text."""
        if source.template is not None:
            self._parts = [(literal, name) for literal, name, _, _ in Formatter().parse(source.template)]
        else:
            self._parts = [("", source.text_column or _find_text_column(source, columns, where))]
        self._plain = source.template is None
        self._skip = source.on_bad_text == "skip"
        for name in self.columns:
            if name not in columns:
                key = "template" if source.template is not None else "text_column"
                listed = ", ".join(f"`{column[:40]}`" for column in columns) or "none"
                raise UserError(f"{where}: no column `{name}` (`{key}`); columns: {listed}{suggest(name, columns)}")

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
                value = row.get(name)
                # A number in a template is as good as its digits; a whole document that is a number is a mistake.
                if not isinstance(value, str) and (self._plain or isinstance(value, bool) or not _is_number(value)):
                    found = "is missing" if name not in row else f"holds {_kind(value)}"
                    return bad_text(where, f"column `{name}` {found}; expected text", self._skip)
                pieces.append(str(value))
        return "".join(pieces)


def bad_text(where: str, what: str, skip: bool) -> LeftOut:
    """Return a row's text as left out, or refuse it, as `on_bad_text` says.

    Raises:
        UserError: `skip` is false.
    """
    if not skip:
        raise UserError(f"{where}: {what} (`on_bad_text: skip` leaves such rows out and counts them)")
    return LeftOut(BAD_TEXT, where)


def _find_text_column(source: Source, columns: Mapping[str, bool], where: str) -> str:
    if "text" in columns:
        return "text"
    texts = [name for name, is_text in columns.items() if is_text]
    if len(texts) == 1:
        _announce(source.name, texts[0])
        return texts[0]
    listed = ", ".join(f"`{name[:40]}`" for name in columns) or "none"
    has_header = source.path and (source.format or format_of(Path(source.path))) in ("csv", "tsv")
    hint = "; where the first row is no header, name the columns with `column_names`" if has_header else ""
    raise UserError(
        f"{where}: which column holds the text? Name it with `text_column`, or several in a `template`; columns: "
        f"{listed}{hint}"
    )


@cache
def _announce(source: str, column: str) -> None:
    say(f"{source}: the text is column `{column}`, the only one that holds any")  # once, however many files there are


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _kind(value: Any) -> str:
    return (
        "null"
        if value is None
        else {"str": "text", "list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)
    )
