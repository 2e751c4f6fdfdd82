"""Which documents train and which are held out, decided by a hash of each document's text."""

from collections.abc import Sequence

import numpy as np

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)
# No seed that a recipe would have: what is chosen has nothing to do with what is held out.
_CHOICE = 0x63686F696365


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which documents are held out: bool (documents,).

    The decision depends on the document's own text and the seed alone. So equal texts never stand on both sides,
    every process agrees, and adding documents moves none of the others.

    Args:
        hashes: uint64 (documents,), of the texts.
        fraction: expected share of documents to hold out.
        seed: another seed holds out others.
    """
    return document_order_keys(hashes, seed) < np.uint64(fraction * 2.0**64)


def document_order_keys(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return one uniformly distributed uint64 per document, from its hash and a seed.

    The mixing is splitmix64's finaliser (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
    """
    with np.errstate(over="ignore"):
        z = hashes ^ (np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & int(_MASK)))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def choose_documents(hashes: np.ndarray, documents: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most `most` of `documents`, chosen by their hash, in their own order."""
    if most is None or len(documents) <= most:
        return documents
    keys = document_order_keys(hashes[documents], _CHOICE)
    return np.sort(documents[np.argsort(keys, kind="stable")[:most]])


def also_in(hashes: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return which documents have the text of one of `others`: bool (documents,)."""
    if not others:
        return np.zeros(len(hashes), dtype=bool)
    return np.isin(hashes, np.concatenate(others))
