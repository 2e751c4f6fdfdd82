"""Near-duplicates against every pair compared, with plain sets of tuples of words in place of hashes.

The texts are docstrings, which share phrases and formulas as real corpora do, and edited copies of them.
"""

import random
import textwrap
from itertools import pairwise

import pytest

from kit.data.builtin import read_corpus
from kit.data.near_duplicates import find_near_duplicates

NGRAM = 5


def shingles(text, n=NGRAM):
    """The set of a text's word n-grams; a shorter text is one n-gram of all its words."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    if not words:
        return set()
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def compare_all(texts, threshold, n=NGRAM):
    """What `find_near_duplicates` is to find, by comparing each text with every earlier one that is kept."""
    sets, kept, found = [shingles(text, n) for text in texts], [], []
    for i, one in enumerate(sets):
        similar = []
        for j in kept:
            shared = len(one & sets[j])
            if shared and shared / (len(one) + len(sets[j]) - shared) >= threshold:
                similar.append((shared / (len(one) + len(sets[j]) - shared), -j))
        if similar:
            found.append((i, -max(similar)[1], max(similar)[0]))
        elif one:
            kept.append(i)
    return found


def find(texts, threshold, n=NGRAM):
    return find_near_duplicates(len(texts), texts.__getitem__, threshold, n)


def edited(text, rng):
    """A copy with some words replaced, inserted and deleted; its lines, its case and its punctuation are others."""
    words = text.split()
    for _ in range(rng.randint(0, max(1, len(words) // 25))):
        at = rng.randrange(len(words))
        words[at : at + rng.randint(0, 1)] = rng.choice([[], ["anew"], ["quite", "other"]])
        words = words or ["anew"]
    words = [rng.choice([word, word, word.upper(), f"{word},", f"({word})", f"_{word}_"]) for word in words]
    return textwrap.fill(" ".join(words), rng.randint(20, 100))


@pytest.fixture(scope="module")
def texts():
    """Docstrings and edited copies, up to three of one and in any order."""
    rng = random.Random(0)
    originals = sorted(text for text in read_corpus("docstrings", ("accelerate",)) if len(text.split()) > 20)
    originals = rng.sample(originals, min(200, len(originals)))
    copies = [edited(text, rng) for text in originals for _ in range(rng.choice([0, 1, 1, 3]))]
    together = originals + copies
    rng.shuffle(together)
    return together


@pytest.mark.parametrize(("threshold", "n"), [(0.5, 5), (0.65, 3), (0.8, 5), (0.9, 5), (0.97, 1), (1, 5)])
def test_all_pairs_from_the_threshold_on_are_found_and_none_below(texts, threshold, n):
    expected = compare_all(texts, threshold, n)
    assert find(texts, threshold, n) == expected
    assert 10 < len(expected) < len(texts)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.8, 0.9])
def test_a_pair_exactly_at_the_threshold_is_found_and_one_n_gram_below_is_not(threshold):
    """Of 100 n-grams, a copy that ends earlier shares as many as it has."""
    words = [f"w{i}" for i in range(104)]
    for first in range(0, 2000, 100):  # other words each time, so that other hashes
        shifted = [f"w{first}x{word}" for word in words]
        at = " ".join(shifted[: round(100 * threshold) + 4])
        below = " ".join(shifted[: round(100 * threshold) + 3])
        assert find([" ".join(shifted), at, below], threshold) == [
            (1, 0, threshold),
            # The shorter one is compared with what is kept, not with what went.
        ]


def test_of_a_chain_those_go_that_are_like_one_that_is_kept():
    """In a ~ b ~ c ~ d, a and c are too far apart: b goes for a, so c stays, and d goes for c."""
    words = [f"w{i}" for i in range(200)]
    chain = [" ".join(words[start : start + 104]) for start in (0, 10, 20, 30)]
    similar = [len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b)) for a, b in pairwise(chain)]
    assert similar == [90 / 110] * 3
    assert find(chain, 0.8) == [(1, 0, 90 / 110), (3, 2, 90 / 110)]


def test_the_earlier_one_is_kept_and_the_most_similar_is_named():
    words = [f"w{i}" for i in range(104)]
    full, nine, eight = (" ".join(words[:n]) for n in (104, 94, 85))
    assert [f[:2] for f in find([eight, full, nine], 0.85)] == [(2, 0)]
    assert [f[:2] for f in find([full, nine, eight], 0.85)] == [(1, 0)]
    assert [f[:2] for f in find([full, eight, nine], 0.85)] == [(2, 0)], "0.90 like either: the earlier one"


def test_text_without_spaces_between_words():
    rng = random.Random(3)
    text = "".join(rng.choice("学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠") for _ in range(300))
    copy = text[:150] + "，" + text[150:-4] + "。\n"
    other = "".join(rng.sample(text, len(text)))
    (found,) = find([text, other, copy], 0.9)
    assert found[:2] == (2, 0)


def test_very_short_texts():
    texts = ["", "...", "Yes.", "No.", "yes!", "Thank you", "thank you.", "Thank you very much", "!!!", "—"]
    assert find(texts, 0.8) == [(4, 2, 1.0), (6, 5, 1.0)]
    assert find([], 0.8) == []
    assert find([""], 0.8) == []


def test_one_that_is_much_longer_is_read_in_parts():
    rng = random.Random(1)
    words = [f"w{rng.randrange(10**6)}" for _ in range(20_000)]
    near = " ".join(words[:5_000] + ["inserted"] + words[5_000:])
    (found,) = find([" ".join(words), near], 0.8)
    assert found[2] > 0.99


def test_many_that_are_alike_but_for_a_form_are_told_apart():
    """Half of each letter is the same; no two are near-duplicates."""
    form = " ".join(f"form{i}" for i in range(50))
    texts = [form + " " + " ".join(f"d{i}w{j}" for j in range(50)) for i in range(200)]
    assert find(texts, 0.8) == []
    assert len(find([*texts, *texts], 0.8)) == 200


def test_a_text_is_read_again_only_where_it_may_be_a_duplicate():
    texts = [" ".join(f"d{i}w{j}" for j in range(60)) for i in range(100)]
    read = []
    assert find_near_duplicates(100, lambda i: read.append(i) or texts[i], 0.8, 5) == []
    assert read == list(range(100))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_pairs_at_the_threshold_are_hardly_ever_missed(threshold):
    """MinHash proposes candidates: bands that are too wide miss some, and so does a filter that is too strict."""
    texts = []
    for i in range(500):
        words = [f"d{i}w{j}" for j in range(104)]
        texts += [" ".join(words), " ".join(words[: round(100 * threshold) + 4])]
    assert find(texts, threshold) == [(2 * i + 1, 2 * i, threshold) for i in range(500)]
