"""Tokens that a recipe declares, in a list or a file: every mistake is told with its place."""

import pytest
from pydantic import ValidationError

from kit.errors import UserError
from kit.model.declared_tokens import read_tokens
from kit.recipe.vocabulary import VocabularySection


def section(**values):
    return VocabularySection(**values)


def test_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mined\nkinase  # 321\n\n  C#\nnaïveté\r\n", encoding="utf-8-sig")
    special, ordinary = read_tokens(section(tokens={"from_file": str(file)}, special_tokens=["<|user|>"]))
    assert [token.content for token in special] == ["<|user|>"]
    assert [token.content for token in ordinary] == ["kinase", "C#", "naïveté"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kinase\nnaïveté\n".encode("latin-1"), r"words.txt:2: byte 0xef is not UTF-8; save"),
        ("kinase\n".encode("utf-16"), r"words.txt:1: UTF-16 text; save the file in UTF-8"),
        ("a\nkinase\n".encode("utf-16-le"), r"words.txt:1: holds NUL characters, as UTF-16 text does"),
        (b"kinase\n" + b"of a text " * 99, r"words.txt:2: found 989 characters; expected a token of at most 500"),
        (b"kinase\rligand\r", r"words.txt:1: found 'kinase.rligand'; expected a word without line breaks"),
        (b"kinase\n# a\nkinase\n", r"words.txt:3: `kinase` is declared already, in .*words.txt:1"),
        (b"# nothing\n", "holds no tokens"),
        (None, "no such file; `kit vocabulary mine` writes"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_tokens(section(tokens={"from_file": str(file)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": ["  "]}, r"tokens.0: found '  '; .*more than whitespace"),
        (
            {"tokens": [{"content": "kinase", "description": " "}]},
            r"tokens.0.description: found ' '; expected a phrase",
        ),
        ({"special_tokens": ["<a>", "a\0"]}, r"special_tokens.1: found 'a.x00'; expected a token without NUL"),
        ({"special_tokens": ["\n"]}, r"special_tokens.0: .*more than whitespace"),
        ({"tokens": ["a", " kinase"]}, r"tokens.1: found ' kinase'; .*without whitespace at its ends"),
        (
            {"tokens": ["kinase", "b", "kinase"]},
            r"tokens\.2: `kinase` is declared already, in vocabulary.tokens\.0",
        ),
        (
            {"tokens": ["<x>"], "special_tokens": [{"content": "<x>"}]},
            r"tokens.0: .* vocabulary.special_tokens.0",
        ),
    ],
)
def test_bad_tokens(values, message):
    with pytest.raises(UserError, match=message):
        read_tokens(section(**values))


def test_an_empty_token_is_refused_by_the_recipe():
    with pytest.raises(ValidationError):
        section(tokens=[""])
