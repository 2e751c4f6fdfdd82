"""Documents that are almost equal to an earlier one: candidates by MinHash, each verified by its exact similarity."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from datasketch import MinHash

from kit.console import progress
from kit.data.ngrams import ngram_hashes, words_of

_PERMUTATIONS = 128
_SHINGLES_AT_ONCE = 1 << 13
_MOST_MISSED = 1e-4
_ALONE = -1
_FACTORS = np.random.default_rng(0).integers(0, 1 << 64, _PERMUTATIONS, dtype=np.uint64) | np.uint64(1)


def find_near_duplicates(
    count: int, text_of: Callable[[int], str], threshold: float, ngram: int, fixed: int = 0
) -> list[tuple[int, int, float]]:
    """Find the documents that are almost equal to an earlier one that is kept.

    Two documents are compared by the Jaccard similarity of their sets of word n-grams; one of fewer than `ngram` words
    is a single n-gram. Locality-sensitive hashing of MinHash signatures (Broder 1997, doi:10.1109/SEQUEN.1997.666900)
    proposes pairs, in bands so narrow that it misses three pairs in ten thousand at the threshold and fewer above it;
    pairs whose signatures differ too much are no candidates. What is left is compared exactly, so nothing below the
    threshold is ever taken. A document takes 8 bytes of memory for each band (25 at a threshold of 0.8) and 128 more,
    and its text is read a second time only where it has a candidate.

    Args:
        count: number of documents.
        text_of: the text of a document.
        threshold: similarity from which a document is a near-duplicate.
        ngram: words per n-gram.
        fixed: the first so many documents are kept, whatever they are like: others are compared with them.

    Returns:
        (document, the earlier one that it is almost equal to, similarity), in order of the documents.
    """

    def shingles_of(document: int) -> np.ndarray:
        words = words_of(text_of(document))
        return np.unique(ngram_hashes(words, min(ngram, max(1, len(words)))))

    bands, sketches, sizes = _sign(count, shingles_of, _rows_per_band(threshold))
    _group(bands)
    cached = lru_cache(maxsize=4096)(shingles_of)
    least = _least_equal(threshold)
    # Of each band: the documents that are kept, by their group.
    kept: list[dict[int, list[int]]] = [{} for _ in bands]
    found = []
    grouped = np.flatnonzero((sizes > 0) & (bands != _ALONE).any(axis=0)).tolist()  # size 0: punctuation alone
    for document in progress(grouped, "comparing near-duplicates", total=len(grouped)):
        groups = [(of, group) for of, group in zip(kept, bands[:, document].tolist(), strict=True) if group != _ALONE]
        earlier = set().union(*(of.get(group, ()) for of, group in groups)) if document >= fixed else ()
        others = np.array(sorted(earlier), dtype=np.int64)
        # Sets of different sizes cannot be more similar than this.
        bound = np.minimum(sizes[others], sizes[document]) / np.maximum(sizes[others], sizes[document])
        others = others[bound >= threshold]
        # Without it, documents that share a form of half their length would all be compared with each other.
        others = others[np.count_nonzero(sketches[others] == sketches[document], axis=1) >= least]
        similar = [(_jaccard(cached(document), cached(other)), -other) for other in others.tolist()]
        similarity, other = max(similar, default=(0.0, 0))
        if similarity >= threshold:
            found.append((document, -other, similarity))
        else:
            for of, group in groups:
                of.setdefault(group, []).append(document)
    return found


def _sign(count: int, shingles_of: Callable[[int], np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each document the hashes of its signature's bands, a byte of each value of it, and its n-grams' number.

    Returns:
        int64 (bands, documents), uint8 (documents, permutations), int32 (documents,).
    """
    empty = MinHash(num_perm=_PERMUTATIONS, scheme="affine64", hashfunc=int)
    # Not datasketch's index of them: its dictionaries take 8 kB a document.
    bands = np.zeros((_PERMUTATIONS // rows, count), dtype=np.int64)
    sketches = np.zeros((count, _PERMUTATIONS), dtype=np.uint8)  # a byte of each value: enough to tell most apart
    sizes = np.zeros(count, dtype=np.int32)
    for document in progress(range(count), "looking for near-duplicates", total=count):
        shingles = shingles_of(document)
        sizes[document] = len(shingles)
        if len(shingles):
            signature = empty.copy()
            for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
                signature.update_batch(shingles[start : start + _SHINGLES_AT_ONCE].tolist())
            bands[:, document] = _hash_bands(signature.hashvalues, rows).view(np.int64)
            sketches[document] = signature.hashvalues >> np.uint64(24) & np.uint64(0xFF)
    return bands, sketches, sizes


def _rows_per_band(threshold: float) -> int:
    """Return the largest number of rows at which a pair at the threshold is still missed hardly ever."""
    return max(
        rows
        for rows in range(1, _PERMUTATIONS + 1)
        if rows == 1 or (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MOST_MISSED
    )


def _least_equal(threshold: float) -> float:
    """Return how many values of two signatures are equal at the least: four standard deviations below the mean."""
    return _PERMUTATIONS * threshold - 4 * (_PERMUTATIONS * threshold * (1 - threshold)) ** 0.5


def _hash_bands(signature: np.ndarray, rows: int) -> np.ndarray:
    """Return one hash for each band of `rows` values of a signature: uint64 (bands,)."""
    bands = signature[: len(signature) // rows * rows].reshape(-1, rows)
    return (bands * _FACTORS[:rows]).sum(axis=1, dtype=np.uint64)


def _group(bands: np.ndarray) -> None:
    """Replace each band's hashes by the first document that has the same, or by `_ALONE` where no other has."""
    for band in bands:
        _, first, group, times = np.unique(band, return_index=True, return_inverse=True, return_counts=True)
        band[:] = np.where(times > 1, first, _ALONE)[group]


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
