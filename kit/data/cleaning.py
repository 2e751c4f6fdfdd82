"""Training documents that are left out because of what else is in the corpus: duplicates, and text of evaluation sets.

Everything here is a choice of documents over token stores. Texts are decoded from them, so that no source is read twice
for it, and a stream not at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kit.console import progress
from kit.data.near_duplicates import find_near_duplicates
from kit.data.ngrams import are_in, ngram_hashes, words_of
from kit.data.splits import also_in
from kit.data.store import TokenStore
from kit.files import build_once, hash_array, hash_values
from kit.recipe.data import DataSection, EvaluationOverlap, NearDuplicates

ALSO_EVALUATED = "also in evaluation"
EXACT_DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near-duplicate"
OVERLAP = "overlaps evaluation"

_FORMAT = 2  # raise it whenever other documents are found
_MOST_EXAMPLES = 3
_EXCERPT_TOKENS = 40
_EXCERPT_CHARACTERS = 100
# What a search finds, in order of the documents; of what they share, the set and the place of the first n-gram.
_NEAR = np.dtype([("document", np.int64), ("earlier", np.int64), ("similarity", np.float64)])
_SHARED = np.dtype([("document", np.int64), ("shared", np.int64), ("set", np.int64), ("at", np.int64)])

Decode = Callable[[Sequence[int]], str]
Documents = Sequence[tuple[TokenStore, np.ndarray]]
Example = dict[str, Any]


@dataclass
class Cleaned:
    """What is left of one source's training documents, and what went.

    Attributes:
        store: the source's token store.
        documents: int64 (n,), the documents that train.
        dropped: by cause the documents that do not.
        examples: by cause a few of them, with what they were compared to.
    """

    store: TokenStore
    documents: np.ndarray
    dropped: dict[str, np.ndarray] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)


def clean(documents: Documents, measured: Mapping[str, Documents], data: DataSection, decode: Decode) -> list[Cleaned]:
    """Leave out of each source's training documents what the recipe does not want there.

    Args:
        documents: of each source, its store and the documents of its training split.
        measured: the documents of each evaluation set that is no part of the training split.
        data: says which causes apply.
        decode: token ids to text.
    """
    corpus = _Documents([Cleaned(store, chosen) for store, chosen in documents], decode)
    # A document that is measured on must not be trained on, wherever else it occurs: measurements would flatter.
    hashes = {name: np.concatenate([s.hashes[d] for s, d in pairs]) for name, pairs in measured.items()}
    texts = corpus.hashes
    evaluated = np.flatnonzero(also_in(texts, list(hashes.values())))

    def holding_sets(index: int) -> Example:
        return {"sets": [name for name, of_set in hashes.items() if texts[index] in of_set]}

    corpus.drop(ALSO_EVALUATED, evaluated, holding_sets)
    if data.exact_duplicates == "drop":
        _drop_exact_duplicates(corpus)
    if data.near_duplicates is not None:
        _drop_near_duplicates(corpus, data.near_duplicates, data.store_dir)
    if data.evaluation_overlap is not None:
        _drop_overlap(corpus, measured, data.evaluation_overlap, data.store_dir)
    return corpus.sources


class _Documents:
    """The training documents of all sources under one running number, which changes with every `drop`."""

    def __init__(self, sources: list[Cleaned], decode: Decode) -> None:
        self.sources = sources
        self.decode = decode

    @property
    def hashes(self) -> np.ndarray:
        return np.concatenate([source.store.hashes[source.documents] for source in self.sources])

    @property
    def key(self) -> str:
        return hash_values([(source.store.key, hash_array(source.documents)) for source in self.sources])

    def __len__(self) -> int:
        return sum(len(source.documents) for source in self.sources)

    def tokens(self, index: int) -> np.ndarray:
        for source in self.sources:
            if index < len(source.documents):
                return source.store.document(int(source.documents[index]))
            index -= len(source.documents)
        raise IndexError(index)

    def text(self, index: int) -> str:
        return self.decode(self.tokens(index).tolist())

    def excerpt(self, index: int) -> str:
        beginning = self.decode(self.tokens(index)[:_EXCERPT_TOKENS].tolist())
        text = " ".join(beginning.rstrip("\ufffd").split())  # the last character may be cut
        return text if len(text) <= _EXCERPT_CHARACTERS else text[: _EXCERPT_CHARACTERS - 1] + "…"

    def drop(self, cause: str, indices: np.ndarray, explain: Callable[[int], Example]) -> None:
        """Take documents out of their sources; `explain` says of an example what it was compared to."""
        start, changed = 0, []
        for source in self.sources:
            inside = indices[(indices >= start) & (indices < start + len(source.documents))]
            if len(inside):
                examples = [{"text": self.excerpt(i), **explain(i)} for i in inside[:_MOST_EXAMPLES].tolist()]
                changed.append((source, inside - start, examples))
            start += len(source.documents)
        for source, positions, examples in changed:  # at the end: `explain` still counts the old way
            source.dropped[cause] = source.documents[positions]
            source.examples[cause] = examples
            source.documents = np.delete(source.documents, positions)


def _drop_exact_duplicates(corpus: _Documents) -> None:
    """Leave out documents with the text of an earlier one."""
    hashes = corpus.hashes
    if not len(hashes):
        return
    unique, first, times = np.unique(hashes, return_index=True, return_counts=True)
    later = np.ones(len(hashes), dtype=bool)
    later[first] = False
    corpus.drop(
        EXACT_DUPLICATE,
        np.flatnonzero(later),
        lambda index: {"times": int(times[np.searchsorted(unique, hashes[index])])},
    )


def _drop_near_duplicates(corpus: _Documents, settings: NearDuplicates, store_dir: str) -> None:
    """Leave out documents that are almost equal to an earlier one."""

    def find() -> list[tuple[int, int, float]]:
        return find_near_duplicates(len(corpus), corpus.text, settings.threshold, settings.ngram)

    found = _found_once(store_dir, [NEAR_DUPLICATE, corpus.key, settings.model_dump()], _NEAR, find)

    def explain(index: int) -> Example:
        pair = found[np.searchsorted(found["document"], index)]
        return {"like": corpus.excerpt(int(pair["earlier"])), "similarity": round(float(pair["similarity"]), 3)}

    corpus.drop(NEAR_DUPLICATE, found["document"], explain)


def _drop_overlap(
    corpus: _Documents, measured: Mapping[str, Documents], settings: EvaluationOverlap, store_dir: str
) -> None:
    """Leave out documents that share word n-grams with an evaluation set."""
    n, names = settings.ngram, list(measured)

    def find() -> list[tuple[int, int, int, int]]:
        of_sets = [_ngrams_of(pairs, n, corpus.decode) for pairs in measured.values()]
        evaluated = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *of_sets]))
        found = []
        for index in progress(range(len(corpus)), "looking for evaluation text", total=len(corpus)):
            ngrams = ngram_hashes(words_of(corpus.text(index)), n)
            shared = np.flatnonzero(are_in(ngrams, evaluated))
            if len(shared) < settings.min_shared:
                continue
            different = len(np.unique(ngrams[shared]))
            if different >= settings.min_shared:
                at = int(shared[0])
                where = next(i for i, of_set in enumerate(of_sets) if are_in(ngrams[at : at + 1], of_set)[0])
                found.append((index, different, where, at))
        return found

    sets = [[(store.key, hash_array(chosen)) for store, chosen in pairs] for pairs in measured.values()]
    found = _found_once(store_dir, [OVERLAP, corpus.key, settings.model_dump(), sets], _SHARED, find)

    def explain(index: int) -> Example:
        _, shared, where, at = found[np.searchsorted(found["document"], index)].tolist()
        return {"set": names[where], "shared": shared, "ngram": " ".join(words_of(corpus.text(index))[at : at + n])}

    corpus.drop(OVERLAP, found["document"], explain)


def _ngrams_of(documents: Documents, n: int, decode: Decode) -> np.ndarray:
    """Return the hashes of all word n-grams of some documents, sorted."""
    texts = (decode(store.document(i).tolist()) for store, chosen in documents for i in chosen.tolist())
    return np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *(ngram_hashes(words_of(t), n) for t in texts)]))


def _found_once(
    store_dir: str, derived_from: list[Any], dtype: np.dtype, find: Callable[[], list[tuple[Any, ...]]]
) -> np.ndarray:
    """Return what `find` finds, from the store where it has been found before."""
    folder = Path(store_dir) / "cleaning" / hash_values("cleaning", _FORMAT, derived_from)
    build_once(folder, lambda temporary: np.save(temporary / "found.npy", np.array(find(), dtype=dtype)))
    return np.load(folder / "found.npy")
