"""Labelled rows from a source, whatever its kind, read as a stream."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kit.data import builtin, datasets_library, readers
from kit.data.columns import LABEL_COLUMNS, LabelsOfRow, LeftOut, TextOfRow, require_column, tell_once
from kit.data.sniffing import sniff_dialect
from kit.data.sources import (
    at_most,
    filter_text,
    format_of_file,
    hash_text,
    open_rows,
    resolve_files,
    same_columns,
    usable_text,
)
from kit.errors import UserError
from kit.files import hash_values
from kit.recipe.classification import LabeledSource

_FIRST_LINES = 100


@dataclass(frozen=True)
class LabeledRow:
    """One row, as it was read.

    Attributes:
        where: file and line, or row.
        text: the text.
        labels: the labels as they are called; exactly one unless `multi`.
        multi: whether a row of this source may have any number of labels.
        pair: a second text that belongs to the first.
        group: rows of one group stay on one side of a split.
    """

    where: str
    text: str
    labels: tuple[str, ...]
    multi: bool = False
    pair: str | None = None
    group: str | None = None


def read_labeled_rows(source: LabeledSource) -> Iterator[LabeledRow | LeftOut]:
    """Return the rows of a source in a stable order.

    What the source's filters leave out is yielded as `LeftOut`, so that whoever keeps the rows counts it.

    Raises:
        UserError: the source cannot be read, or a row has no label or text, or none that can be used.
    """
    return at_most(source, lambda: _rows(source), _hash_row)


def _hash_row(row: LabeledRow) -> int:
    return hash_text(hash_values(row.text, row.pair, row.labels))


class _RowMaker:
    """Makes labelled rows of the columns of one file or dataset."""

    def __init__(
        self,
        source: LabeledSource,
        labels_of_row: LabelsOfRow,
        columns: Mapping[str, bool],
        where: str,
        hint: str = "",
        class_names: Mapping[str, list[str]] | None = None,
    ) -> None:
        labels_of_row.find(columns, where, hint, class_names)
        named = {"text_pair_column": source.text_pair_column, "group_column": source.group_column}
        for key, name in named.items():
            if name is not None:
                require_column(name, key, columns, where, hint)
        beside = [*labels_of_row.columns, *filter(None, named.values())]
        self._text_of_row = TextOfRow(source, columns, where, beside)
        if both := set(self._text_of_row.columns) & set(labels_of_row.columns):
            raise UserError(f"{where}: column `{min(both)}` is the label; it cannot be a part of the text too")
        self._source, self._labels_of_row = source, labels_of_row
        self.columns = list(dict.fromkeys([*self._text_of_row.columns, *beside]))

    def __call__(self, where: str, row: Mapping[str, Any]) -> LabeledRow | LeftOut:
        source = self._source
        pair = group = None
        text = self._text_of_row(where, row)
        if not isinstance(text, LeftOut):
            text = filter_text(source, where, text)
        if isinstance(text, LeftOut):
            return text
        if source.text_pair_column is not None:
            pair = self._text_of_row.text_in(where, row, source.text_pair_column)
            pair = pair if isinstance(pair, LeftOut) else usable_text(where, pair, source.on_bad_text == "skip")
            if isinstance(pair, LeftOut):
                return pair
        if source.group_column is not None:
            group = row.get(source.group_column)
            if group is None or group != group or not str(group).strip():
                raise UserError(f"{where}: column `{source.group_column}` (`group_column`) is empty; expected a group")
            group = str(group).encode(errors="backslashreplace").decode()
        labels = self._labels_of_row(where, row)
        if isinstance(labels, LeftOut):
            return labels
        return LabeledRow(where, text, labels, self._labels_of_row.multi, pair, group)


def _rows(source: LabeledSource) -> Iterator[LabeledRow | LeftOut]:
    labels_of_row = LabelsOfRow(source)
    if source.builtin:
        yield from _builtin_rows(source)
    elif source.dataset:
        dataset, columns = datasets_library.open_dataset(source)
        where, names = f"data source `{source.name}`", _class_names(dataset.features)
        row_of = _RowMaker(source, labels_of_row, columns, where, class_names=names)
        for where, row in datasets_library.read_rows(source, dataset, row_of.columns):
            yield row_of(where, row)
    else:
        before: tuple[list[str], list[str]] = [], []
        for path in resolve_files(source):
            yield from _rows_of_file(source, path, labels_of_row, before)
    if labels_of_row.stripped:
        tell_once(f"{source.name}: white space around {labels_of_row.stripped:,} labels was removed")


def _builtin_rows(source: LabeledSource) -> Iterator[LabeledRow | LeftOut]:
    """Yield the texts of each package, labelled with it; a text that two packages share is a row of both."""
    for package in source.packages or (None,):
        documents = builtin.read_corpus(source.builtin, (package,) if package else ())
        for number, text in enumerate(documents, start=1):
            where = (
                f"{source.builtin}: {package}, document {number}" if package else f"{source.name}, document {number}"
            )
            text = text if isinstance(text, LeftOut) else filter_text(source, where, text)
            yield text if isinstance(text, LeftOut) else LabeledRow(where, text, (source.label or package,))


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what the integers of a dataset's columns stand for, in lists too."""
    found = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(feature.names) for name, feature in found.items() if type(feature).__name__ == "ClassLabel"}


def _rows_of_file(
    source: LabeledSource, path: Path, labels_of_row: LabelsOfRow, before: tuple[list[str], list[str]]
) -> Iterator[LabeledRow | LeftOut]:
    """Yield the rows of a file; `before` gets the columns of text and of labels in the first."""
    format, hint, dialect = format_of_file(source, path), "", {}
    if format == "text":
        columns, rows = _text_rows(source, path)
        row_of = _RowMaker(source, labels_of_row, dict.fromkeys(columns, True), str(path))
    else:
        if format in readers.DEFAULT_DELIMITERS:
            sniffed = sniff_dialect(path, source, format, _wanted(source))
            if sniffed is None:
                return
            dialect, hint = {"delimiter": sniffed.delimiter, "quoting": sniffed.quoting}, sniffed.hint
        row_of, rows = open_rows(
            source, path, format, lambda *found: _RowMaker(source, labels_of_row, *found, hint), **dialect
        )
        if row_of is None:
            return
    same_columns(row_of.columns[:1], before[0], path)
    same_columns(labels_of_row.columns, before[1], path, "label")
    for where, row in rows:
        yield row_of(where, row)


def _wanted(source: LabeledSource) -> Collection[str]:
    """Return columns of which a header has to hold one."""
    if source.label is not None:
        return ()
    return source.label_columns or (LABEL_COLUMNS if source.label_column is None else (source.label_column,))


def _text_rows(source: LabeledSource, path: Path) -> tuple[list[str], readers.Rows]:
    """Return columns and rows of a text file: lines of a label and a text or, with a `label`, of texts."""
    if source.format is None and readers.holds_json_lines(path, source.encoding):
        raise UserError(f"{path}: looks like JSON lines, not lines of a label and a text; set `format: jsonl`")
    lines = readers.read_lines(path, source.encoding)
    if source.label is not None:
        return ["text"], ((where, {"text": line}) for where, line in lines)
    filled = (line for _, line in readers.read_lines(path, source.encoding) if line.strip())
    first = list(islice(filled, _FIRST_LINES))
    tabs = sum("\t" in line for line in first)
    if 0 < tabs < len(first):
        raise UserError(
            f"{path}: {tabs} of the first {len(first)} lines hold a tab: is it between label and text? Name `format: "
            f'tsv`, `column_names: [label, text]` and `delimiter`, "\\t" or " "'
        )
    separator, name = ("\t", "tab") if tabs else (" ", "space")
    if first and first[0].lower().split() == ["label", "text"]:
        raise UserError(f"{path}:1: `{first[0]}` is a header; set `format: tsv`, and `delimiter` where it is no tab")
    tell_once(f"{source.name}: lines of a label and a text, with a {name} between them")
    return ["label", "text"], _label_text_rows(lines, separator, name)


def _label_text_rows(lines: readers.Located, separator: str, name: str) -> readers.Rows:
    for where, line in lines:
        if line.strip():
            if "\0" in line:
                raise UserError(f"{where}: holds NUL, as no text does; expected lines of a label and a text")
            label, found, text = line.partition(separator)
            if not found:
                raise UserError(f"{where}: no {name} in `{line[:80]}`; expected a label, a {name} and a text")
            if "\t" in label:
                raise UserError(
                    f"{where}: a tab in `{line[:80]}`, where lines before have a space between label and text; mend "
                    f"the line, or name `format: tsv`, `column_names: [label, text]` and `delimiter`"
                )
            yield where, {"label": label, "text": text}
