"""What `kit check` says of a vocabulary that can be used but may not be what was meant; nothing of it is an error."""

import re
import sys

import pytest

from kit import cli
from kit.check import check
from kit.model import vocabulary
from tests.material import WORDS, make_model, make_tokenizer


@pytest.fixture
def shown(write_recipe, capsys):
    """A function from sections of a recipe to what `kit check` shows, each white space as one space."""

    def of(**sections):
        capsys.readouterr()
        check(str(write_recipe(**sections)), [])
        return " ".join(capsys.readouterr().out.split())

    return of


def steps(text):
    """The plan that was shown, which hangs on how the text is cut into tokens."""
    return re.search(r"(\S+) rows = \S+ steps per epoch", text)[1]


def test_tokens_that_exist_are_named_and_change_nothing(shown):
    plain = shown()
    text = shown(vocabulary={"tokens": ["the", "tokens"], "special_tokens": ["<eos>"]})
    assert "vocabulary: in the tokenizer already, and left as they are: <eos>, the" in text
    text = shown(vocabulary={"tokens": ["the"]})
    assert "embeddings: 320 rows become 320" in text
    assert "Added tokens" not in text
    assert steps(text) == steps(plain)


def test_many_tokens_that_exist_are_named_in_part(shown, monkeypatch):
    monkeypatch.setattr(vocabulary, "_SHOWN", 2)
    text = shown(vocabulary={"tokens": ["the", "into", "cuts", "attention"]})
    assert "left as they are: the, into and 2 more" in text


def test_an_ordinary_token_that_becomes_special(shown):
    plain = shown()
    text = shown(vocabulary={"special_tokens": ["<eos>", "a"]})
    assert "left as they are: <eos> " in text
    assert "warning: ordinary tokens become special ones, to be cut out of texts before all else: a " in text
    assert steps(text) != steps(plain)


def test_tokens_that_never_occur_are_named(shown):
    text = shown(vocabulary={"tokens": ["kinase", "checkpoint", "ligand"]})
    assert "checkpoint" in WORDS
    assert re.search(r"warning: 2 of 3 added tokens never occur in the training text, .*: kinase, ligand ", text)


def test_forms_of_one_character_are_two_words(shown):
    """The tiny tokenizer has no normaliser, so that composed and decomposed letters differ, as they do in the text."""
    text = shown(vocabulary={"tokens": ["naïve", "nai\u0308ve"]})
    assert "warning: 1 of 2 added tokens never occur" in text


def test_growing_by_more_than_half(shown):
    words = [f"q{a}{b}x" for a in "abcdefghi" for b in "abcdefghi"]
    text = shown(vocabulary={"tokens": words})
    assert "warning: the vocabulary grows from 320 tokens by 162, more than half of it" in text
    assert "more than half" not in shown(vocabulary={"tokens": words[:70]})


def test_rows_that_the_model_has_to_spare_are_used_first(shown, tmp_path):
    model = make_model(vocab_size=330)
    model.save_pretrained(tmp_path / "padded")
    make_tokenizer().save_pretrained(tmp_path / "padded")
    section = {"tokens": ["kinase", "ligand"], "pad_to_multiple_of": 1}
    text = shown(model={"name_or_path": str(tmp_path / "padded")}, vocabulary=section)
    assert "embeddings: 330 rows become 330, 6 of them without a token" in text
    assert "320, 321" in text
    assert "322, 323" in text


@pytest.mark.parametrize(("option", "value"), [("--count", "0"), ("--count", "many"), ("--min-occurrences", "0")])
def test_mining_options_that_mean_nothing(write_recipe, tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kit", "vocabulary", "mine", str(write_recipe()), option, value])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
