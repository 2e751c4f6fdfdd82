"""Documents from a source, whatever its kind, read as a stream so that memory does not grow with the corpus."""

import glob
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from kit.console import warn
from kit.data import builtin, datasets_library, readers
from kit.data.columns import LeftOut, TextOfRow, bad_text
from kit.data.splits import choose_documents, held_out
from kit.errors import UserError, suggest
from kit.files import hash_values
from kit.recipe.data import Source

EMPTY = "empty"
SHORT = "shorter than min_characters"
LONG = "longer than max_characters"
NOT_CHOSEN = "beyond max_documents"
_FIRST_ROWS = 100

# Of these a source's documents are made; where it lies and what share it has make no difference.
_CONTENT_KEYS = [name for name in Source.model_fields if name not in ("path", "dataset", "revision", "max_tokens")]
_OF_TEXT = {"encoding", "sample_by", "separator"}
_OF_ROWS = {"text_column", "template"}
_OF_FIELDS = {"encoding", "delimiter", "quoting", "column_names"}
_KEYS_OF_FORMAT = {
    "text": _OF_TEXT,
    "jsonl": _OF_ROWS | {"encoding"},
    "csv": _OF_ROWS | _OF_FIELDS,
    "tsv": _OF_ROWS | _OF_FIELDS,
    "parquet": _OF_ROWS,
}


def read_documents(source: Source) -> Iterator[str | LeftOut]:
    """Yield the documents of a source in a stable order: of text files without line breaks around them, of rows as is.

    What the source's filters leave out is yielded as `LeftOut`, so that whoever stores the documents counts it.

    Raises:
        UserError: the source cannot be read.
    """
    if source.max_documents is None:
        yield from _documents(source)
    elif source.dataset:
        yield from _first_documents(source)
    else:
        yield from _chosen_documents(source)


def hash_text(text: str) -> int:
    """Return the 64-bit xxHash of a text, by which documents are split, chosen and compared."""
    return xxhash.xxh3_64_intdigest(text.encode())


def source_fingerprint(source: Source) -> str:
    """Return a hash of the source's content and of how it is made into documents, not of where it lies."""
    settings = {name: getattr(source, name) for name in _CONTENT_KEYS}
    # An evaluation set chooses among those that it holds out.
    settings["chosen_from"] = _fraction(source) if source.max_documents else None
    if source.builtin:
        content = builtin.corpus_fingerprint(source.builtin, source.packages)
    elif source.dataset:
        content = datasets_library.dataset_fingerprint(source)
    else:
        content = [(_format(source, path), readers.hash_content(path)) for path in resolve_files(source)]
    return hash_values(settings, content)


def resolve_files(source: Source) -> list[Path]:
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


def _format(source: Source, path: Path) -> str:
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


def watch(source: Source) -> Callable[[], None]:
    """Return a function that refuses a source whose files have changed since: its key and its content would differ."""
    before = _file_states(source)

    def check_unchanged() -> None:
        if _file_states(source) != before:
            raise UserError(f"data source `{source.name}`: changed while it was read; start again once it is at rest")

    return check_unchanged


def _file_states(source: Source) -> list[tuple[int, int]]:
    files = resolve_files(source) if source.path else datasets_library.local_files(source) if source.dataset else []
    states = [path.stat() for path in files]
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _first_documents(source: Source) -> Iterator[str | LeftOut]:
    """Yield the first `max_documents` documents, of those that an evaluation set holds out; no more is read."""
    left, fraction = source.max_documents, _fraction(source)
    for document in _documents(source):
        if isinstance(document, LeftOut):
            yield document
        elif not fraction or held_out(np.array([hash_text(document)], dtype=np.uint64), *fraction).any():
            yield document
            left -= 1
            if not left:
                return


def _chosen_documents(source: Source) -> Iterator[str | LeftOut]:
    """Yield `max_documents` different documents, chosen by their hash; the others are read, but go no further."""
    hashes = np.unique(np.fromiter((hash_text(d) for d in _documents(source) if isinstance(d, str)), dtype=np.uint64))
    if _fraction(source):
        hashes = hashes[held_out(hashes, *_fraction(source))]
    wanted = set(hashes[choose_documents(hashes, np.arange(len(hashes)), source.max_documents)].tolist())
    for document in _documents(source):
        if isinstance(document, LeftOut):
            yield document
        elif (digest := hash_text(document)) in wanted:
            wanted.remove(digest)
            yield document
        else:
            yield LeftOut(NOT_CHOSEN)


def _fraction(source: Source) -> tuple[float, int] | None:
    fraction = getattr(source, "fraction", None)
    return (fraction, source.seed) if fraction is not None else None


def _documents(source: Source) -> Iterator[str | LeftOut]:
    skip = source.on_bad_text == "skip"
    for where, text in _texts(source):
        if isinstance(text, LeftOut):
            yield text
        elif not text.strip():
            yield LeftOut(EMPTY, where)
        elif len(text) < source.min_characters:
            yield LeftOut(SHORT, where)
        elif source.max_characters is not None and len(text) > source.max_characters:
            yield LeftOut(LONG, where)
        elif len(text) > readers.LONGEST_DOCUMENT:
            yield bad_text(where, f"the text has more than {readers.LONGEST_DOCUMENT:,} characters", skip)
        elif "\0" in text:
            yield bad_text(where, "the text holds a NUL character; is it a binary file, or another encoding?", skip)
        else:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = ascii(text[error.start])[1:-1]
                yield bad_text(where, f"the text holds {half}, half of a surrogate pair", skip)
            else:
                yield text


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
    format, encoding = _format(source, path), source.encoding
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
    elif format == "parquet":
        text_of_row = _same_columns(TextOfRow(source, readers.parquet_columns(path), str(path)), columns, path)
        yield from _texts_of_rows(readers.read_parquet(path, text_of_row.columns), text_of_row)
    else:
        if format == "jsonl":
            rows = readers.read_jsonl(path, encoding)
        else:
            rows = readers.read_csv(path, encoding, format, source.delimiter, source.quoting, source.column_names)
        first = list(islice(rows, _FIRST_ROWS))
        if first:
            found: dict[str, bool] = {}
            for _, row in first:
                # What is null in one row may hold text in another.
                found |= {n: (v is None or isinstance(v, str)) and found.get(n, True) for n, v in row.items()}
            text_of_row = _same_columns(TextOfRow(source, found, first[0][0]), columns, path)
            yield from _texts_of_rows(iter(first), text_of_row)
            yield from _texts_of_rows(rows, text_of_row)


def _same_columns(text_of_row: TextOfRow, columns: list[str], path: Path) -> TextOfRow:
    """Refuse to find the text of one source's files in columns of different names."""
    if columns and columns != text_of_row.columns:
        raise UserError(
            f"{path}: the text would be column `{text_of_row.columns[0]}`, in the files before `{columns[0]}`; name it "
            f"with `text_column`, or make a source of each"
        )
    columns[:] = text_of_row.columns
    return text_of_row


def _texts_of_rows(rows: readers.Rows, text_of_row: TextOfRow) -> Iterator[tuple[str, str | LeftOut]]:
    for where, row in rows:
        yield where, text_of_row(where, row)
