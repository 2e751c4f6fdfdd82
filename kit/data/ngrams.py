"""Documents as sets of word n-grams, for comparing texts that are almost equal or share a passage."""

import re
from functools import lru_cache

import numpy as np
import xxhash

from kit.data.splits import document_order_keys

# Case and punctuation make no difference (`_`, which `\w` takes for a letter, is punctuation here: it marks emphasis).
# Scripts that write no space between words count by the character.
_IDEOGRAPHS = "\u3040-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall(text.lower())


def ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """Return a 64-bit hash of each run of `n` words, in their order: uint64 (max(0, words - n + 1),)."""
    if len(words) < n:
        return np.zeros(0, dtype=np.uint64)
    of_words = np.fromiter(map(_hash_word, words), dtype=np.uint64, count=len(words))
    runs = np.zeros(len(words) - n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            runs = runs * _BASE + of_words[offset : len(words) - n + 1 + offset]
    return document_order_keys(runs, seed=0)


def are_in(ngrams: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which of some hashes are among `others`, which are sorted: bool (ngrams,)."""
    # Not `np.isin`, which looks at all the others anew with each document.
    at = np.searchsorted(others, ngrams)
    at[at == len(others)] = 0
    return others[at] == ngrams if len(others) else np.zeros(len(ngrams), dtype=bool)


@lru_cache(maxsize=1 << 17)
def _hash_word(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())
