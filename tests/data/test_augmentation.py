"""Noise of characters and words: as much as was asked for, the same each time, from the text alone."""

from collections import Counter
from itertools import pairwise

import pytest

from kit.data.augmentation import noisy_copy
from kit.recipe.classification import Augment

GOLDEN = "the quict ofx bron jumps yver tee lazy"
TEXT = " ".join(f"word{i:04d}" for i in range(2000))
ODD = ["", " ", "a", "  a", "a ", "a\tb\n\nc  ", "äöü ß", "日本語 の 文", "👍🏽 x", "aaaa aaaa", "\u00a0a\u2003b"]


def test_the_noise_depends_on_text_seed_and_copy_alone():
    noise = Augment(characters=0.3, words=0.2)
    first = noisy_copy(TEXT, noise, 0)
    noisy_copy("another text in between", noise, 0)
    assert noisy_copy(TEXT, noise, 0) == first != TEXT
    assert noisy_copy(TEXT, noise, 1) != first
    assert noisy_copy(TEXT, Augment(characters=0.3, words=0.2, seed=1), 0) != first


def test_a_copy_is_the_same_in_every_version():
    assert noisy_copy("the quick brown fox jumps over the lazy dog", Augment(characters=0.5, words=0.3), 0) == GOLDEN


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_of_words_with_a_changed_character_is_the_one_asked_for(share):
    before, after = TEXT.split(" "), noisy_copy(TEXT, Augment(characters=share), 0).split(" ")
    assert len(before) == len(after)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    # Two of the neighbours may be equal, or the character that replaces another the same.
    assert share * 0.8 * 2000 < len(changed) <= min(1, share * 1.1) * 2000
    assert {len(b) - len(a) for a, b in changed} == {-1, 0, 1}
    assert set("".join(after)) <= set("".join(before))


def test_words_are_left_out_or_swapped_and_none_is_new():
    before, after = TEXT.split(" "), noisy_copy(TEXT, Augment(words=0.2), 0).split(" ")
    lost = Counter(before) - Counter(after)
    assert not Counter(after) - Counter(before)
    assert 140 < sum(lost.values()) < 260
    assert sum(a > b for a, b in pairwise(after)) > 100


def test_white_space_stays_as_it_is_where_characters_alone_change():
    text = "  one\ttwo\n\nthree  four "
    copy = noisy_copy(text, Augment(characters=1.0), 0)
    assert "".join(c for c in copy if c.isspace()) == "".join(c for c in text if c.isspace())


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("copy", range(20))
def test_odd_texts_survive_any_noise(text, copy):
    noisy = noisy_copy(text, Augment(characters=1.0, words=1.0), copy)
    assert bool(noisy.strip()) == bool(text.strip())
