"""Files as streams of texts or rows: plain or compressed, in any encoding, with the place of every fault.

A reader yields (where, text) or (where, row); `where` names file and line for messages. What is held in memory is one
document and one read, never the file.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from kit.errors import UserError
from kit.files import hash_file

# What a tokenizer takes at once: it needs some fifty bytes of memory for a character, and no text that was written as
# one document is longer.
LONGEST_DOCUMENT = 50_000_000
BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
DEFAULT_DELIMITERS = {"csv": ",", "tsv": "\t"}
_READ_CHARACTERS = 1 << 20
_ROWS = 1024

_COMPRESSED: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    # pyarrow's, which reads the frames of a file one after the other and notices a missing end; others do neither.
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
}
_SIGNATURES = {
    b"\x1f\x8b": "gzip data; name it `….gz`",
    b"BZh": "bzip2 data; name it `….bz2`",
    b"\xfd7zXZ": "xz data; name it `….xz`",
    b"\x28\xb5\x2f\xfd": "zstd data; name it `….zst`",
    b"PAR1": "a Parquet file; set `format: parquet`",
    b"PK\x03\x04": "a zip archive or an office document; extract its text first",
    b"%PDF": "a PDF; extract its text first",
    b"\xff\xfe\x00\x00": "UTF-32 text; set `encoding: utf-32`",
    b"\x00\x00\xfe\xff": "UTF-32 text; set `encoding: utf-32`",
    b"\xff\xfe": "UTF-16 text; set `encoding: utf-16`",
    b"\xfe\xff": "UTF-16 text; set `encoding: utf-16`",
}

Located = Iterator[tuple[str, str]]
Rows = Iterator[tuple[str, dict[str, Any]]]


def format_of(path: Path) -> str:
    """Return the format that a file's name tells, compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def holds_json_lines(path: Path, encoding: str) -> bool:
    """Tell whether the first line of a file is a JSON object."""
    with _open_text(path, encoding) as file:
        line = file.readline(_READ_CHARACTERS).strip()
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def hash_content(path: Path) -> str:
    """Return the hash of a file's bytes; an unchanged file is read once a run, however many ask."""
    state = path.stat()
    return _hash_unchanged(path, state.st_size, state.st_mtime_ns)


@cache
def _hash_unchanged(path: Path, size: int, mtime_ns: int) -> str:
    return hash_file(path)


# ---- Text ----


def read_whole(path: Path, encoding: str) -> Located:
    """Yield the file as one document."""
    with _open_text(path, encoding, newline=None) as file:
        text = file.read(LONGEST_DOCUMENT + 1)
    _check_length(str(path), text)
    yield str(path), text.strip("\r\n")


def read_lines(path: Path, encoding: str) -> Located:
    """Yield every line, without its line break."""
    with _open_text(path, encoding) as file:
        for number, line in _numbered_lines(path, file):
            yield f"{path}:{number}", line.rstrip("\r\n")


def read_pieces(path: Path, encoding: str, separator: re.Pattern) -> Located:
    """Yield the pieces between matches of `separator`; line breaks are read as LF, whichever the file has."""
    number = 1
    with _open_text(path, encoding, newline=None) as file:
        for text, line_breaks in _pieces(path, file, separator):
            before = len(text) - len(text.lstrip("\n"))
            yield f"{path}:{number + before}", text.strip("\n")
            number += line_breaks


def _pieces(path: Path, file: TextIO, separator: re.Pattern) -> Iterator[tuple[str, int]]:
    """Yield each piece with the number of line breaks in it and in the separator after it."""
    rest, searched = "", 0
    while chunk := file.read(_READ_CHARACTERS):
        rest += chunk
        # Blanks at the end may be the beginning of one more blank line: a match that reaches them may still grow.
        certain = len(rest.rstrip())
        start = 0
        for match in separator.finditer(rest, searched):
            if match.end() >= certain:
                break
            yield rest[start : match.start()], rest.count("\n", start, match.end())
            start = match.end()
        rest = rest[start:]
        _check_length(str(path), rest)
        # What was no certain match ended behind `certain`, and no match but one of blanks is longer than its pattern.
        searched = max(0, certain - start - len(separator.pattern))
    start = 0
    for match in separator.finditer(rest):
        yield rest[start : match.start()], rest.count("\n", start, match.end())
        start = match.end()
    if rest:
        yield rest[start:], 0


def _numbered_lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(LONGEST_DOCUMENT + 1):
        number += 1
        _check_length(f"{path}:{number}", line)
        yield number, line


def _check_length(where: str, text: str) -> None:
    if len(text) > LONGEST_DOCUMENT:
        raise UserError(
            f"{where}: a document of more than {LONGEST_DOCUMENT:,} characters; cut the file into documents with "
            f"`sample_by` or `separator`, or break its lines"
        )


# ---- Rows ----


def read_jsonl(path: Path, encoding: str) -> Rows:
    """Yield the object on every line."""
    with _open_text(path, encoding) as file:
        for number, line in _numbered_lines(path, file):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                array = ", and the file begins with an array" if number == 1 and line.lstrip().startswith("[") else ""
                raise UserError(
                    f"{where}: not JSON: {error.msg} at character {error.pos + 1}; expected one object a line{array}"
                ) from None
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise UserError(f"{where}: cannot be read as JSON: {error}") from None
            if not isinstance(row, dict):
                hint = "; write an array as one object a line" if isinstance(row, list) else ""
                raise UserError(f"{where}: found {type(row).__name__}; expected an object with named fields{hint}")
            yield where, row


def read_csv(
    path: Path,
    encoding: str,
    format: str,
    delimiter: str | None = None,
    quoting: bool | None = None,
    column_names: tuple[str, ...] | None = None,
) -> Rows:
    """Yield the rows of a CSV or TSV file.

    Args:
        path: the file.
        encoding: of the file.
        format: `csv` or `tsv`, which has other defaults.
        delimiter: separates fields; by default a comma or a tab.
        quoting: `"` around a field lets it hold delimiters and line breaks; by default in CSV (RFC 4180), not in TSV
            (text/tab-separated-values), where quotes belong to the text.
        column_names: the columns of a file without a header row.
    """
    guessed = delimiter is None
    delimiter = delimiter or DEFAULT_DELIMITERS[format]
    quoting = format == "csv" if quoting is None else quoting
    rows = split_fields(path, encoding, delimiter, quoting, len(column_names) if column_names else None)
    if column_names is None:
        where, names, line = next(rows, ("", [], ""))
        if not names:
            return
        _check_header(where, names, line, delimiter, guessed)
    else:
        names = column_names
    for where, fields, line in rows:
        if len(fields) != len(names):
            raise UserError(uneven_fields(where, fields, names, line))
        yield where, dict(zip(names, fields, strict=True))


def uneven_fields(where: str, fields: Sequence[str], names: Sequence[str], line: str) -> str:
    """Return the message about a row that has another number of fields than there are columns."""
    return (
        f"{where}: {len(fields)} fields where {len(names)} are expected ({_listed(names)}); the line begins "
        f"`{line[:80]}`; set `delimiter` or `quoting`, or mend the line"
    )


def split_fields(
    path: Path, encoding: str, delimiter: str, quoting: bool, width: int | None = None
) -> Iterator[tuple[str, list[str], str]]:
    """Yield (where, fields, first line) of every row of a CSV or TSV file, the header included.

    Args:
        path: the file.
        encoding: of the file.
        delimiter: separates fields.
        quoting: whether `"` around a field quotes it.
        width: without quoting, the most fields that a row has: the last takes the rest of its line.
    """
    with _open_text(path, encoding) as file:
        yield from (_quoted_fields(path, file, delimiter) if quoting else _plain_fields(path, file, delimiter, width))


def _quoted_fields(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield (where, fields, first line) of every row of a file in which fields may be quoted."""
    csv.field_size_limit(LONGEST_DOCUMENT)
    first: list[str] = []

    def lines() -> Iterator[str]:
        for _, line in _numbered_lines(path, file):
            if not first:
                first.append(line.rstrip("\r\n"))
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first.clear()
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quoted field that does not end" if "unexpected end" in str(error) else str(error)
            raise UserError(
                f'{where}: {reason}; the line begins `{first[0][:80]}`; set `quoting: false` where `"` is a part of '
                f"the text, or `delimiter`"
            ) from None
        if fields:
            yield where, fields, first[0]


def _plain_fields(path: Path, file: TextIO, delimiter: str, width: int | None) -> Iterator[tuple[str, list[str], str]]:
    """Yield (where, fields, line) of every row of a file without quoting; a given `width` bounds the fields."""
    for number, raw in _numbered_lines(path, file):
        line = raw.rstrip("\r\n")
        if line:
            yield f"{path}:{number}", line.split(delimiter, width - 1 if width else -1), line


def _check_header(where: str, names: list[str], line: str, delimiter: str, guessed: bool) -> None:
    others = [other for other in (",", ";", "\t", "|") if other != delimiter and other in line]
    if guessed and len(names) == 1 and others:
        raise UserError(
            f"{where}: the header `{line[:80]}` is one column where fields are separated by {delimiter!r}; is the "
            f"`delimiter` {others[0]!r}?"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{where}: the header holds {_listed(twice)} more than once; where it is no header, give `column_names`"
        )


def _listed(names: Any) -> str:
    shown = ", ".join(f"`{name[:40]}`" for name in list(names)[:20])
    return shown + (", …" if len(names) > 20 else "")


def parquet_columns(path: Path) -> dict[str, bool]:
    """Return the columns of a Parquet file, and which of them hold text."""
    with _explained(path, "utf-8"):
        return columns_of(pq.read_schema(path))


def columns_of(schema: pa.Schema) -> dict[str, bool]:
    """Return the columns of an Arrow schema, and which of them hold text."""

    def is_text(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    return {field.name: is_text(field.type) for field in schema}


def read_parquet(path: Path, columns: list[str]) -> Rows:
    """Yield the rows of a Parquet file with the columns that are asked for."""
    with _explained(path, "utf-8"), pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                after = f"{path}, rows {number + 1} to {number + len(batch)}"
                raise UserError(f"{after}: a column of text holds bytes that are not UTF-8") from None
            for row in rows:
                number += 1
                yield f"{path}, row {number}", row


# ---- Opening ----


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, through its compression if its name tells one."""
    opener = _COMPRESSED.get(path.suffix.lower())
    return opener(path) if opener else open(path, "rb")


@contextmanager
def _open_text(path: Path, encoding: str, newline: str | None = "") -> Iterator[TextIO]:
    # A byte order mark is none of the text's characters.
    name = "utf-8-sig" if _is_utf8(encoding) else encoding
    with _explained(path, encoding), io.TextIOWrapper(open_binary(path), name, newline=newline) as file:
        yield file


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


@contextmanager
def _explained(path: Path, encoding: str) -> Iterator[None]:
    """Turn what goes wrong in reading a file into a UserError with its place."""
    try:
        yield
    except UnicodeError as error:
        raise _not_decodable(path, encoding, error) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged or not what its name says: {' '.join(str(error).split())[:200]}") from None
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{path}: damaged or not what its name says: {' '.join(str(error).split())[:200]}") from None


def _not_decodable(path: Path, encoding: str, error: UnicodeError) -> UserError:
    with open_binary(path) as file:
        start = file.read(9)
    for signature, found in _SIGNATURES.items():
        if start.startswith(signature) and not found.endswith(f"`encoding: {codecs.lookup(encoding).name}`"):
            return UserError(f"{path}: looks like {found}")
    if start[4:] == b"\0\0\0\0{":  # the length of a header that is JSON
        return UserError(f"{path}: looks like a safetensors file, not text")
    # The decoder of a stream counts from its own buffer, so the place is found again in the raw lines.
    with open_binary(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_DOCUMENT), b""), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as exact:
                if not _is_utf8(encoding):
                    break
                return UserError(
                    f"{path}:{number}: byte 0x{line[exact.start]:02x} is not UTF-8; say which encoding it is, for "
                    f"example with `encoding: latin-1` (of Windows, `cp1252`)"
                )
    return UserError(f"{path}: is not {encoding} ({getattr(error, 'reason', error)})")
