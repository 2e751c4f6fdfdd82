"""The tokens that a recipe declares, in itself or in a file, read and looked at before any tokenizer gets them."""

import re
from collections.abc import Iterable
from pathlib import Path

from kit.errors import UserError, suggest
from kit.recipe.vocabulary import AddedToken, TokensFile, VocabularySection

_COMMENT = re.compile(r"(^|\s)#.*$")
_LONGEST = 500  # characters of a token: what is longer is text, from a file that holds no list


def read_tokens(section: VocabularySection) -> tuple[list[AddedToken], list[AddedToken]]:
    """Return the special tokens and the ordinary ones that a recipe's `vocabulary` section declares.

    Raises:
        UserError: the file is missing or no UTF-8; a token is only whitespace, very long or declared twice, holds NUL,
            or is an ordinary word with line breaks or with whitespace at its ends.
    """
    special = _listed("special_tokens", section.special_tokens)
    if isinstance(section.tokens, TokensFile):
        ordinary = _read_file(section.tokens.from_file)
    else:
        ordinary = _listed("tokens", section.tokens)
    seen = {}
    for number, (where, declared) in enumerate([*special, *ordinary]):
        token = declared.content
        if expected := _expected_instead(token, number < len(special)):
            found = repr(token) if len(token) <= _LONGEST else f"{len(token):,} characters"
            raise UserError(f"{where}: found {found}; expected a {expected}")
        if declared.description and not declared.description.strip():
            raise UserError(
                f"{where}.description: found {declared.description!r}; expected a phrase that says something"
            )
        if token in seen:
            raise UserError(f"{where}: `{token}` is declared already, in {seen[token]}")
        seen[token] = where
    return [token for _, token in special], [token for _, token in ordinary]


def _expected_instead(token: str, special: bool) -> str | None:
    """Return what is expected in the place of a token that cannot be one; None where it can."""
    if len(token) > _LONGEST:
        return f"token of at most {_LONGEST:,}"
    if not token.strip():
        return "token that is more than whitespace"
    if "\0" in token:
        return "token without NUL characters"
    if not special and token != token.strip():
        return "word without whitespace at its ends"
    if not special and len(token.splitlines()) > 1:
        return "word without line breaks"
    return None


def with_tokens_read(section: VocabularySection | None) -> VocabularySection | None:
    """Return the section with the tokens of its file in the place of the file's name.

    Raises:
        UserError: see `read_tokens`.
    """
    if section is None or not isinstance(section.tokens, TokensFile):
        return section
    tokens = tuple(token.content for token in read_tokens(section)[1])
    return section.model_copy(update={"tokens": tokens})


def _listed(key: str, tokens: Iterable[str | AddedToken]) -> list[tuple[str, AddedToken]]:
    declared = (AddedToken(content=token) if isinstance(token, str) else token for token in tokens)
    return [(f"vocabulary.{key}.{number}", token) for number, token in enumerate(declared)]


def _read_file(name: str) -> list[tuple[str, AddedToken]]:
    """Return the tokens of a file with the places where they stand; whitespace around them is none of theirs."""
    tokens = []
    for number, line in enumerate(_read_bytes(name).split(b"\n"), start=1):
        if b"\0" in line:
            raise UserError(f"{name}:{number}: holds NUL characters, as UTF-16 text does; save the file in UTF-8")
        try:
            text = _COMMENT.sub("", line.decode("utf-8")).strip()
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} is not UTF-8"
            raise UserError(f"{name}:{number}: {found}; save the file in UTF-8") from None
        if text:
            tokens.append((f"{name}:{number}", AddedToken(content=text)))
    if not tokens:
        raise UserError(
            f"vocabulary.tokens.from_file: {name} holds no tokens; expected one a line, `#` begins a comment"
        )
    return tokens


def _read_bytes(name: str) -> bytes:
    """Return the content of a file of tokens, without the byte order mark of UTF-8."""
    key, path = "vocabulary.tokens.from_file", Path(name).expanduser()
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = suggest(path.name, siblings) or "; `kit vocabulary mine` writes such a file"
        raise UserError(f"{key}: {name}: no such file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{key}: {name}: is a folder; expected a file with one token a line") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise UserError(f"{key}: {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}:1: UTF-16 text; save the file in UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf")
