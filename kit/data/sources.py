"""Documents from files: text and JSONL, read as streams so that memory does not grow with the corpus."""

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path

from kit.data import builtin
from kit.errors import UserError, did_you_mean
from kit.files import hash_file, hash_values
from kit.recipe.models import Source

_JSONL_SUFFIXES = {".jsonl", ".ndjson"}
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_READ_CHARACTERS = 1 << 20


def resolve_files(source: Source) -> list[Path]:
    """Return the files that `source.path` names, sorted; a pattern or a file that matches nothing is an error."""
    if Path(source.path).is_file():
        return [Path(source.path)]  # the name may hold `[` or `*`
    # A set: where a pattern holds `**` twice, glob finds a file more than once.
    matches = sorted({Path(p) for p in glob.glob(source.path, recursive=True) if Path(p).is_file()})
    if not matches:
        kind = "pattern matches no file" if glob.has_magic(source.path) else _why_missing(Path(source.path))
        raise UserError(f"data source `{source.path}`: {kind} (resolved to {Path(source.path).absolute()})")
    return matches


def _why_missing(path: Path) -> str:
    if path.is_dir():
        return "is a folder; name the files in it, such as `" + str(path / "*.txt") + "`"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return "no such file" + did_you_mean(path.name, siblings)


def source_fingerprint(source: Source) -> str:
    """Return a hash of the source's content and of how it is cut into documents, not of where it lies."""
    if source.builtin:
        return builtin.corpus_fingerprint(source.builtin, source.packages)
    cut = [_format(source, path) for path in resolve_files(source)]
    return hash_values(
        [hash_file(path) for path in resolve_files(source)], cut, source.sample_by, source.separator, source.text_column
    )


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents of a source in a stable order, verbatim but for the line breaks around them.

    Empty documents are yielded too: whoever stores the documents counts them.
    """
    if source.builtin:
        yield from builtin.read_corpus(source.builtin, source.packages)
        return
    for path in resolve_files(source):
        if _format(source, path) == "jsonl":
            yield from _read_jsonl(path, source.text_column)
        elif source.separator is not None:
            # The file is read with its line breaks as `\n`, whichever they are; so is the separator.
            separator = source.separator.replace("\r\n", "\n").replace("\r", "\n")
            yield from _split_stream(path, re.compile(re.escape(separator)))
        elif source.sample_by == "paragraph":
            yield from _split_stream(path, _BLANK_LINES)
        elif source.sample_by == "line":
            yield from (line.rstrip("\r\n") for line in _lines(path))
        else:
            yield _read_text(path).strip("\r\n")


def _format(source: Source, path: Path) -> str:
    return source.format or ("jsonl" if path.suffix in _JSONL_SUFFIXES else "text")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    # The decoder of a stream counts from its own buffer, so the place is found again in the raw file.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as exact:
            byte = line[exact.start]
            return UserError(
                f"{path}:{number}: byte 0x{byte:02x} is not UTF-8; convert the file first, for example with "
                f"`iconv -f latin1 -t utf-8`"
            )
    return UserError(f"{path}: is not UTF-8 ({error.reason})")


def _split_stream(path: Path, separator: re.Pattern) -> Iterator[str]:
    """Yield the pieces of a file between matches of `separator`, holding one piece and one read in memory."""
    rest = ""
    with open(path, encoding="utf-8-sig") as file:
        try:
            while chunk := file.read(_READ_CHARACTERS):
                rest += chunk
                pieces = _complete_pieces(rest, separator)
                if pieces:
                    # The last match may grow with the next read (blank lines follow blank lines): keep it.
                    rest = rest[pieces[-1][1] :]
                    yield from (text for text, _ in pieces)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None
    if rest:
        yield from (piece.strip("\r\n") for piece in separator.split(rest))


def _complete_pieces(text: str, separator: re.Pattern) -> list[tuple[str, int]]:
    """Return (piece, start of what follows it) for each piece of `text` whose separator has certainly ended."""
    pieces, start = [], 0
    # Blanks at the end may be the beginning of one more blank line.
    certain = len(text.rstrip())
    for match in separator.finditer(text):
        if match.end() >= certain:
            break
        pieces.append((text[start : match.start()].strip("\r\n"), match.end()))
        start = match.end()
    return pieces


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise UserError(f"{path}:{number}: cannot be read as JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: found {type(row).__name__}; expected an object with a field `{column}`")
        if column not in row:
            raise UserError(f"{path}:{number}: no field `{column}`{did_you_mean(column, row)} (`text_column` names it)")
        if not isinstance(row[column], str):
            raise UserError(f"{path}:{number}: field `{column}` holds {type(row[column]).__name__}; expected text")
        try:
            row[column].encode()
        except UnicodeEncodeError as error:
            half = ascii(row[column][error.start])[1:-1]
            raise UserError(f"{path}:{number}: field `{column}` holds {half}, half of a surrogate pair") from None
        yield row[column]
