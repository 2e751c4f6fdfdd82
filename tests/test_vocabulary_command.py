"""`kit vocabulary mine`: what it promises is measured, on the training text alone; no file of the user's is lost."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from kit import vocabulary
from kit.data.sources import hash_text
from kit.data.splits import held_out
from kit.errors import UserError
from kit.model.declared_tokens import read_tokens
from kit.model.tokenizer import encoder
from kit.model.vocabulary import extend_tokenizer, with_words
from kit.recipe.vocabulary import VocabularySection
from tests.material import make_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
FIGURES = re.compile(r"tokens +([\d,]+) → ([\d,]+) .*\n.*tokens per word +([\d.]+) → ([\d.]+)\n.* ([\d.]+) → ([\d.]+)")


@pytest.fixture
def mine(tmp_path):
    """A function that mines a recipe, by default into words.txt, and returns that file."""

    def run(recipe, *overrides, output="words.txt", count=20, min_occurrences=5, overwrite=False):
        vocabulary.mine(
            str(recipe),
            list(overrides),
            output=str(tmp_path / output) if output else None,
            count=count,
            min_occurrences=min_occurrences,
            overwrite=overwrite,
        )
        return tmp_path / (output or "")

    return run


def words_of(path):
    return [token.content for token in read_tokens(VocabularySection(tokens={"from_file": str(path)}))[1]]


def training_texts(path):
    """The documents of a corpus file that a tenth held out leaves."""
    texts = path.read_text(encoding="utf-8").split("\n\n\n")
    out = held_out(np.array([hash_text(text) for text in texts], dtype=np.uint64), 0.1, 0)
    assert 0 < out.sum() < len(texts)
    return [text for text, held in zip(texts, out, strict=True) if not held], texts


def tokens_of(texts, tokenizer):
    return sum(map(len, encoder(tokenizer)(texts)))


def figures_of(text):
    """The figures before and after, as they are shown or written: tokens, tokens per word, bytes per token."""
    return [float(figure.replace(",", "")) for figure in FIGURES.search(text).groups()]


# ---- what is measured


def test_figures_are_those_of_the_extended_tokenizer(write_recipe, mine, corpus_file, capsys):
    path = mine(write_recipe())
    texts, _ = training_texts(corpus_file)
    words = words_of(path)
    assert 5 < len(words) <= 20
    tokenizer = make_tokenizer()
    before = tokens_of(texts, tokenizer)
    extend_tokenizer(tokenizer, VocabularySection(tokens=words))
    after = tokens_of(texts, tokenizer)
    number, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    expected = [before, after, before / number, after / number, size / before, size / after]
    assert after < 0.8 * before
    assert figures_of(path.read_text(encoding="utf-8")) == pytest.approx(expected, abs=6e-4)
    shown = capsys.readouterr().out
    assert figures_of(shown) == pytest.approx(expected, abs=6e-4)
    assert f"with these {len(words)} words" in shown
    assert "about" not in shown + path.read_text(encoding="utf-8")


def test_held_out_documents_do_not_count(write_recipe, mine, corpus_file):
    texts, everything = training_texts(corpus_file)
    path = mine(write_recipe())
    counted = {
        word: int(number.replace(",", ""))
        for word, number in re.findall(r"^(\S+) +# ([\d,]+) times", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    train, both = (Counter(word for text in some for word in text.split()) for some in (texts, everything))
    assert counted == {word: train[word] for word in counted}
    assert all(train[word] < both[word] for word in counted)


def test_the_same_bytes_again(write_recipe, mine):
    recipe = write_recipe()
    first = mine(recipe).read_bytes()
    assert mine(recipe, overwrite=True).read_bytes() == first
    assert mine(recipe, output="other.txt").read_bytes().replace(b"other.txt", b"words.txt") == first


def test_python_docs(write_recipe, mine, capsys):
    corpus, model = DATA / "python_docs" / "corpus.txt", DATA / "base_novels"
    if not corpus.is_file() or not model.is_dir():
        pytest.skip("../shared/data is not on this machine")
    source = {"path": str(corpus), "separator": "\n\n\n", "max_documents": 40}
    path = mine(write_recipe(model={"name_or_path": str(model)}, data={"train": [source]}), count=200)
    assert len(words_of(path)) == 200
    before, after = figures_of(path.read_text(encoding="utf-8"))[:2]
    recipe = vocabulary.resolve_recipe(str(path.parent / "recipe.yaml"), [])
    texts = list(vocabulary.training_documents(recipe.data))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokens_of(texts, tokenizer) == before
    extend_tokenizer(tokenizer, VocabularySection(tokens={"from_file": str(path)}), "gpt2")
    assert tokens_of(texts, tokenizer) == after < 0.95 * before
    assert "in the tokenizer already" not in capsys.readouterr().out


# ---- the recipe's own vocabulary


def test_what_the_recipe_declares_is_not_mined_again(write_recipe, mine, capsys):
    plain = words_of(mine(write_recipe(), output="plain.txt", count=1_000))
    declared = plain[:3]
    section = {"special_tokens": ["<|x|>"], "tokens": [declared[0], declared[1], {"content": declared[2]}]}
    path = mine(write_recipe(vocabulary=section), count=1_000)
    assert set(words_of(path)) == set(plain[3:])
    shown = capsys.readouterr().out
    assert "tokens with what the recipe declares" in shown
    assert "what the recipe lists now, 3, goes into the file too" in shown


def test_the_file_that_the_recipe_names_is_what_is_written(write_recipe, mine, tmp_path, capsys):
    path = tmp_path / "named.txt"
    section = {"special_tokens": ["<|x|>"], "tokens": {"from_file": str(path)}}
    recipe = write_recipe(vocabulary=section)
    mine(recipe, "data.block_size=16", output=None)
    assert words_of(path)
    assert f"next: review it, then: kit train {recipe} data.block_size=16" in capsys.readouterr().out
    assert "changed by data.block_size=16" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"named\.txt: exists already.*--overwrite"):
        mine(recipe, output=None)
    first = path.read_bytes()
    path.write_text("tensor  # all that was left\n")
    with pytest.raises(UserError, match=r"named\.txt: exists already, and mining did not write it"):
        mine(recipe, output=None, overwrite=True)
    path.write_bytes(first)
    capsys.readouterr()
    mine(recipe, "data.block_size=16", output=None, overwrite=True)  # what the file holds does not count
    assert path.read_bytes() == first
    assert f"321 tokens with what the recipe declares but the words of {path})" in capsys.readouterr().out


def test_mined_words_come_on_top_of_a_file_that_the_recipe_names(write_recipe, mine, tmp_path, capsys):
    plain = mine(write_recipe(), output="plain.txt", count=1_000)
    named = mine(write_recipe(), output="named.txt", count=5)
    recipe = write_recipe(vocabulary={"tokens": {"from_file": str(named)}})
    capsys.readouterr()
    other = mine(recipe, count=5)
    assert words_of(plain)[:10] == words_of(named) + words_of(other)
    shown = capsys.readouterr().out
    number = len(with_words(make_tokenizer(), words_of(named)))
    assert f"{number} tokens with what the recipe declares)" in shown
    assert f"{number} tokens with what the recipe declares;" in other.read_text(encoding="utf-8")
    assert f"vocabulary: {{tokens: {{from_file: {other}}}}}" in shown
    assert f"the words of {named}, on top of which these come, go into it too" in shown


def test_a_named_file_that_does_not_exist_declares_nothing(write_recipe, mine, tmp_path, capsys):
    recipe = write_recipe(vocabulary={"tokens": {"from_file": str(tmp_path / "missing.txt")}})
    assert words_of(mine(recipe, count=5)) == words_of(mine(write_recipe(), output="plain.txt", count=5))
    shown = capsys.readouterr().out
    assert "320 tokens)" in shown
    assert "what the recipe declares" not in shown
    assert "go into it too" not in shown


def test_rows_that_are_to_train_alone_need_not_be_there_yet(write_recipe, mine, tmp_path):
    section = {"tokens": {"from_file": str(tmp_path / "words.txt")}}
    recipe = write_recipe(vocabulary=section, freezing={"trainable": {"new_tokens": True}})
    assert words_of(mine(recipe, output=None) / "words.txt")


def test_the_default_is_named_after_the_recipe(write_recipe, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mine(write_recipe(), output=None)
    assert words_of("recipe_words.txt")
    assert "vocabulary: {tokens: {from_file: recipe_words.txt}}" in capsys.readouterr().out


def test_a_tokenizer_that_is_trained(write_recipe, mine, tmp_path, capsys):
    fresh = {
        "name_or_path": None,
        "from_config": {"model_type": "gpt2", "n_layer": 1},
        "tokenizer": {"vocab_size": 280},
    }
    path = mine(write_recipe(model=fresh))
    assert words_of(path)
    assert str(tmp_path / "store") not in capsys.readouterr().out + path.read_text(encoding="utf-8")


# ---- what ends it


@pytest.mark.parametrize(
    ("output", "overwrite", "message"),
    [
        ("recipe.yaml", False, r"recipe\.yaml: exists already, .*`--output`.*`--overwrite`"),
        ("recipe.yaml", True, r"recipe\.yaml: exists already, and mining did not write it; .*`--output`"),
        (".", True, "is a folder"),
        ("missing/words.txt", False, "its folder does not exist"),
        ("recipe.yaml/words.txt", False, "its folder does not exist"),
        ("/dev/null", True, "is a device"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_read(write_recipe, mine, monkeypatch, output, overwrite, message):
    monkeypatch.setattr(vocabulary, "training_documents", lambda data: pytest.fail("the text was read"))
    monkeypatch.setattr(vocabulary, "_tokenizer", lambda recipe: pytest.fail("the tokenizer was loaded"))
    recipe = write_recipe()
    before = recipe.read_bytes()
    with pytest.raises(UserError, match=message):
        mine(recipe, output=output, overwrite=overwrite)
    assert recipe.read_bytes() == before
    assert Path("/dev/null").is_char_device()


def test_nothing_to_mine(write_recipe, mine, tmp_path):
    with pytest.raises(UserError, match=r"no word that occurs 1,000,000 times .*\(138 documents\).*Lower `--min-occ"):
        mine(write_recipe(), min_occurrences=1_000_000)
    assert not (tmp_path / "words.txt").exists()


def test_several_processes_are_refused(write_recipe, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="found 2 processes; expected one"):
        mine(write_recipe())
    assert not (tmp_path / "words.txt").exists()


def test_text_that_changes_meanwhile(write_recipe, mine, tmp_path, monkeypatch):
    texts = iter([["a vocabulary " * 20], ["a vocabulary " * 21]])
    monkeypatch.setattr(vocabulary, "training_documents", lambda data: iter(next(texts)))
    with pytest.raises(UserError, match="changed while it was read"):
        mine(write_recipe())
    assert not (tmp_path / "words.txt").exists()


# ---- a tokenizer with candidates


def with_normaliser():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def test_with_words_adds_what_can_be_added_in_silence(capsys):
    """The normaliser changes one, byte-level decoding would lose the letters of the next, the last is there already."""
    good, bad = ["kinase", "IL-6", "naïveté"], ["naivete\u0301", "Größe-2", "the"]
    tokenizer, exact = with_normaliser(), with_normaliser()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for word in bad[:2]:
        with pytest.raises(UserError):
            extend_tokenizer(with_normaliser(), VocabularySection(tokens=[word]))
    extended = with_words(tokenizer, [bad[0], good[0], *bad[1:], *good[1:]])
    extend_tokenizer(exact, VocabularySection(tokens=good))
    assert extended.get_vocab() == exact.get_vocab()
    texts = ["the kinase of IL-6, Größe-2 (naïveté)", "kinases"]
    assert encoder(extended)(texts) == encoder(exact)(texts)
    assert encoder(tokenizer)(texts) == encoder(with_normaliser())(texts)
    assert Tokenizer.from_str(json.dumps(state)).to_str() == tokenizer.backend_tokenizer.to_str()
    assert with_words(tokenizer, []).get_vocab() == tokenizer.get_vocab()
    with_words(tokenizer, [f"{a}{b}{b}qz" for a in "bcdfghjkl" for b in "bcdfghjklm"])
    assert capsys.readouterr().out == ""
