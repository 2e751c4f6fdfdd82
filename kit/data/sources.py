"""Documents from a source, whatever its kind, read as a stream so that memory does not grow with the corpus."""

import glob
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from kit.console import warn
from kit.data import builtin, datasets_library, readers
from kit.data.columns import LeftOut, TextOfRow, bad_text
from kit.data.splits import choose_documents, held_out
from kit.errors import UserError, suggest
from kit.files import hash_values
from kit.recipe.classification import LabeledSource
from kit.recipe.data import Origin, Source

T = TypeVar("T")
M = TypeVar("M")

EMPTY = "empty"
SHORT = "shorter than min_characters"
LONG = "longer than max_characters"
NOT_CHOSEN = "beyond max_documents"
_FIRST_ROWS = 100

# Where a source lies, and how much of it is taken once it is read.
_NOT_CONTENT = ("path", "dataset", "revision", "max_tokens")
_OF_TEXT = {"encoding", "sample_by", "separator"}
_OF_ROWS = {"text_column", "template", "text_pair_column", "label_column", "label_columns", "group_column"}
_OF_FIELDS = {"encoding", "delimiter", "quoting", "column_names"}
_KEYS_OF_FORMAT = {
    "text": _OF_TEXT,
    "jsonl": _OF_ROWS | {"encoding"},
    "csv": _OF_ROWS | _OF_FIELDS,
    "tsv": _OF_ROWS | _OF_FIELDS,
    "parquet": _OF_ROWS,
}


def read_documents(source: Source) -> Iterator[str | LeftOut]:
    """Return the documents of a source in a stable order: of text files without line breaks around them, of rows as is.

    What the source's filters leave out is yielded as `LeftOut`, so that whoever stores the documents counts it.

    Raises:
        UserError: the source cannot be read.
    """
    located = located_documents(source)
    return (document if isinstance(document, LeftOut) else document[1] for document in located)


def located_documents(source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    """Return what `read_documents` does, each text with its file and line, or row.

    Raises:
        UserError: the source cannot be read.
    """
    return at_most(source, lambda: _documents(source), lambda document: hash_text(document[1]))


def at_most(source: Origin, read: Callable[[], Iterator[T | LeftOut]], hash_of: Callable[[T], int]) -> Iterator:
    """Return what `read` yields, of documents or rows no more than `max_documents`."""
    if source.max_documents is None:
        return read()
    return (_first_documents if source.dataset else _chosen_documents)(source, read, hash_of)


def hash_text(text: str) -> int:
    """Return the 64-bit xxHash of a text, by which documents are split, chosen and compared."""
    return xxhash.xxh3_64_intdigest(text.encode())


def source_fingerprint(source: Origin) -> str:
    """Return a hash of the source's content and of how it is made into documents, not of where it lies."""
    # What a training source or an evaluation set has beside makes no difference.
    kind = LabeledSource if isinstance(source, LabeledSource) else Source
    settings = {name: getattr(source, name) for name in kind.model_fields if name not in _NOT_CONTENT}
    # An evaluation set chooses among those that it holds out.
    settings["chosen_from"] = _fraction(source) if source.max_documents else None
    if source.builtin:
        content = builtin.corpus_fingerprint(source.builtin, source.packages)
    elif source.dataset:
        content = datasets_library.dataset_fingerprint(source)
    else:
        content = [(format_of_file(source, path), readers.hash_content(path)) for path in resolve_files(source)]
    return hash_values(settings, content)


def resolve_files(source: Origin) -> list[Path]:
    """Return the files that `source.path` names, sorted; a pattern or a file that matches nothing is an error."""
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]  # the name may hold `[` or `*`
    # A set: where a pattern holds `**` twice, glob finds a file more than once.
    matches = sorted({Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()})
    if not matches:
        kind = "pattern matches no file" if glob.has_magic(source.path) else _why_missing(path)
        raise UserError(f"data source `{source.path}`: {kind} (resolved to {path.absolute()})")
    return matches


def _why_missing(path: Path) -> str:
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        instead = f"name it as `dataset: {path}`" if saved else f"name the files in it, such as `{path / '*.txt'}`"
        return f"is a folder; {instead}"
    siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    return "no such file" + suggest(path.name, siblings)


def format_of_file(source: Origin, path: Path) -> str:
    """Return the format of one of a source's files; keys that say nothing about it are refused."""
    format = source.format or readers.format_of(path)
    every_key = set().union(*_KEYS_OF_FORMAT.values())
    # A recipe that is written back names the defaults too.
    written = {key for key in source.written() if getattr(source, key) != type(source).model_fields[key].default}
    if ignored := sorted((every_key - _KEYS_OF_FORMAT[format]) & written):
        raise UserError(
            f"data source `{source.path}`: `{ignored[0]}` says nothing about {path.name}, which is {format} "
            f"(`format` says otherwise)"
        )
    return format


def watch(source: Origin) -> Callable[[], None]:
    """Return a function that refuses a source whose files have changed since: its key and its content would differ."""
    before = _file_states(source)

    def check_unchanged() -> None:
        if _file_states(source) != before:
            raise UserError(f"data source `{source.name}`: changed while it was read; start again once it is at rest")

    return check_unchanged


def _file_states(source: Origin) -> list[tuple[int, int]]:
    files = resolve_files(source) if source.path else datasets_library.local_files(source) if source.dataset else []
    states = [path.stat() for path in files]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _first_documents(source: Origin, read: Callable, hash_of: Callable) -> Iterator:
    """Yield the first `max_documents` documents, of those that an evaluation set holds out; no more is read."""
    left, fraction = source.max_documents, _fraction(source)
    for document in read():
        if isinstance(document, LeftOut):
            yield document
        elif not fraction or held_out(np.array([hash_of(document)], dtype=np.uint64), *fraction).any():
            yield document
            left -= 1
            if not left:
                return


def _chosen_documents(source: Origin, read: Callable, hash_of: Callable) -> Iterator:
    """Yield `max_documents` different documents, chosen by their hash; the others are read, but go no further."""
    hashes = np.unique(np.fromiter((hash_of(d) for d in read() if not isinstance(d, LeftOut)), dtype=np.uint64))
    if _fraction(source):
        hashes = hashes[held_out(hashes, *_fraction(source))]
    wanted = set(hashes[choose_documents(hashes, np.arange(len(hashes)), source.max_documents)].tolist())
    for document in read():
        if isinstance(document, LeftOut):
            yield document
        elif (digest := hash_of(document)) in wanted:
            wanted.remove(digest)
            yield document
        else:
            yield LeftOut(NOT_CHOSEN)


def _fraction(source: Origin) -> tuple[float, int] | None:
    fraction = getattr(source, "fraction", None)
    return (fraction, source.seed) if fraction is not None else None


def _documents(source: Source) -> Iterator[tuple[str, str] | LeftOut]:
    for where, text in _texts(source):
        kept = text if isinstance(text, LeftOut) else filter_text(source, where, text)
        yield kept if isinstance(kept, LeftOut) else (where, kept)


def filter_text(source: Origin, where: str, text: str) -> str | LeftOut:
    """Return a text, or why the source's filters leave it out.

    Raises:
        UserError: it is nothing that a tokenizer takes, and `on_bad_text` is `error`.
    """
    if not text.strip():
        return LeftOut(EMPTY, where)
    if len(text) < source.min_characters:
        return LeftOut(SHORT, where)
    if source.max_characters is not None and len(text) > source.max_characters:
        return LeftOut(LONG, where)
    return usable_text(where, text, source.on_bad_text == "skip")


def usable_text(where: str, text: str, skip: bool) -> str | LeftOut:
    """Return a text, or that it is nothing that a tokenizer takes.

    Raises:
        UserError: it is not, and `skip` is false.
    """
    if len(text) > readers.LONGEST_DOCUMENT:
        return bad_text(where, f"the text has more than {readers.LONGEST_DOCUMENT:,} characters", skip)
    if "\0" in text:
        return bad_text(where, "the text holds a NUL character; is it a binary file, or another encoding?", skip)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        return bad_text(where, f"the text holds {half}, half of a surrogate pair", skip)
    return text


def _texts(source: Source) -> Iterator[tuple[str, str | LeftOut]]:
    """Yield (where, text) of every document, before any filter."""
    if source.builtin:
        for number, text in enumerate(builtin.read_corpus(source.builtin, source.packages), start=1):
            yield f"{source.name}, document {number}", text
    elif source.dataset:
        dataset, columns = datasets_library.open_dataset(source)
        text_of_row = TextOfRow(source, columns, f"data source `{source.name}`")
        yield from _texts_of_rows(datasets_library.read_rows(source, dataset, text_of_row.columns), text_of_row)
    else:
        columns: list[str] = []
        for path in resolve_files(source):
            yield from _texts_of_file(source, path, columns)


def _texts_of_file(source: Source, path: Path, columns: list[str]) -> Iterator[tuple[str, str | LeftOut]]:
    """Yield (where, text) of every document of a file; `columns` gets the columns that made the text of the first."""
    format, encoding = format_of_file(source, path), source.encoding
    if format == "text" and source.format is None and readers.holds_json_lines(path, encoding):
        warn(f"{path} looks like JSON lines but is read as text; `format: jsonl` reads a column of it")
    if format == "text" and source.separator is not None:
        # The file is read with its line breaks as `\n`, whichever they are; so is the separator.
        separator = source.separator.replace("\r\n", "\n").replace("\r", "\n")
        yield from readers.read_pieces(path, encoding, re.compile(re.escape(separator)))
    elif format == "text":
        yield from {
            "line": readers.read_lines,
            "paragraph": lambda *a: readers.read_pieces(*a, readers.BLANK_LINES),
            "document": readers.read_whole,
        }[source.sample_by](path, encoding)
    else:
        text_of_row, rows = open_rows(source, path, format, lambda *found: TextOfRow(source, *found))
        if text_of_row:
            same_columns(text_of_row.columns, columns, path)
            yield from _texts_of_rows(rows, text_of_row)


def open_rows(
    source: Origin, path: Path, format: str, make: Callable[[dict[str, bool], str], M], **dialect: Any
) -> tuple[M | None, readers.Rows]:
    """Return what `make` makes of a file's columns, and the file's rows with `columns` of it; of no row, None.

    Args:
        source: of the file.
        path: the file.
        format: of the file, not `text`.
        make: gets the columns, with which of them hold text, and what a message names.
        dialect: `delimiter` and `quoting`, where they are other than the source's.
    """
    if format == "parquet":
        made = make(readers.parquet_columns(path), str(path))
        return made, readers.read_parquet(path, made.columns)
    if format == "jsonl":
        rows = readers.read_jsonl(path, source.encoding)
    else:
        dialect = {"delimiter": source.delimiter, "quoting": source.quoting} | dialect
        rows = readers.read_csv(path, source.encoding, format, column_names=source.column_names, **dialect)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        return None, iter(())
    found: dict[str, bool] = {}
    for _, row in first:
        # What is null in one row may hold text in another.
        found |= {n: (v is None or isinstance(v, str)) and found.get(n, True) for n, v in row.items()}
    return make(found, first[0][0]), chain(first, rows)


def same_columns(found: list[str], before: list[str], path: Path, what: str = "text") -> None:
    """Refuse to find the text, or the label, of one source's files in columns of different names."""
    if before and before != found:
        raise UserError(
            f"{path}: the {what} would be column `{found[0]}`, in the files before `{before[0]}`; name it with "
            f"`{what}_column`, or make a source of each"
        )
    before[:] = found


def _texts_of_rows(rows: readers.Rows, text_of_row: TextOfRow) -> Iterator[tuple[str, str | LeftOut]]:
    for where, row in rows:
        yield where, text_of_row(where, row)
