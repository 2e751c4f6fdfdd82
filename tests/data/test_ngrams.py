"""Word n-grams against plain Python: tuples of words in place of hashes."""

import random

import numpy as np
import pytest

from kit.data.ngrams import are_in, ngram_hashes, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's  3rd—life:\n(ÉTÉ)!", ["the", "cat", "s", "3rd", "life", "été"]),
        ("*bold* _emphasis_ __init__", ["bold", "emphasis", "init"]),
        ("日本語のテスト", list("日本語のテスト")),
        ("GPT模型v2", ["gpt", "模", "型", "v2"]),
        ("データ・モデル。", list("データモデル")),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("...—!?", []),
        ("", []),
    ],
)
def test_words_have_no_case_and_no_punctuation(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_two_hashes_are_equal_where_the_runs_of_words_are(n):
    rng = random.Random(n)
    words = [rng.choice("abc") * rng.randint(1, 2) for _ in range(2_000)]
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    hashes = ngram_hashes(words, n)
    assert hashes.dtype == np.uint64
    assert len(hashes) == len(runs)
    assert len({*zip(runs, hashes.tolist(), strict=True)}) == len(set(runs)) == len(set(hashes.tolist()))


def test_a_text_of_fewer_words_has_no_run():
    assert len(ngram_hashes(["a", "b"], 3)) == len(ngram_hashes([], 1)) == 0
    assert len(ngram_hashes(["a", "b", "c"], 3)) == 1


def test_hashes_are_spread():
    """MinHash takes them for uniform."""
    hashes = ngram_hashes([str(i) for i in range(20_000)], 3).astype(np.float64) / 2.0**64
    assert abs(hashes.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5


@pytest.mark.parametrize("others", [[], [4], [1, 4, 9], [2**64 - 1]])
def test_being_among_others(others):
    ngrams, others = np.array([0, 4, 9, 4, 10, 2**64 - 1], dtype=np.uint64), np.array(others, dtype=np.uint64)
    assert are_in(ngrams, others).tolist() == np.isin(ngrams, others).tolist()
    assert are_in(ngrams[:0], others).tolist() == []
