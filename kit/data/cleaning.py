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
NEAR_EVALUATED = "near-duplicate of evaluation"
OVERLAP = "overlaps evaluation"

_FORMAT = 3  # raise it whenever other documents are found
_MOST_EXAMPLES = 3
_EXCERPT_TOKENS = 40
_EXCERPT_CHARACTERS = 100
# What a search finds, in order of the documents; of what they share, the set and the place of the first n-gram.
_NEAR = np.dtype([("document", np.int64), ("earlier", np.int64), ("similarity", np.float64)])
_SHARED = np.dtype([("document", np.int64), ("shared", np.int64), ("set", np.int64), ("at", np.int64)])

Decode = Callable[[Sequence[int]], str]
Selections = Sequence[tuple[TokenStore, np.ndarray]]
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


def clean(
    documents: Selections, measured: Mapping[str, Selections], data: DataSection, decode: Decode
) -> list[Cleaned]:
    """Leave out of each source's training documents what the recipe does not want there.

    Args:
        documents: of each source, its store and the documents of its training split.
        measured: the documents of each evaluation set that is no part of the training split.
        data: says which causes apply.
        decode: token ids to text.
    """
    corpus = _TrainingDocuments([Cleaned(store, chosen) for store, chosen in documents], decode)
    # A document that is measured on must not be trained on, wherever else it occurs: measurements would flatter.
    hashes = {name: np.concatenate([s.hashes[d] for s, d in pairs]) for name, pairs in measured.items()}
    texts = corpus.hashes
    evaluated = np.flatnonzero(also_in(texts, list(hashes.values())))

    def holding_sets(index: int) -> Example:
        return {"sets": [name for name, of_set in hashes.items() if texts[index] in of_set]}

    corpus.drop({ALSO_EVALUATED: evaluated}, holding_sets)
    if data.exact_duplicates == "drop":
        _drop_exact_duplicates(corpus)
    if data.near_duplicates is not None:
        _drop_near_duplicates(corpus, measured, data.near_duplicates, data.store_dir)
    if data.evaluation_overlap is not None:
        _drop_overlap(corpus, measured, data.evaluation_overlap, data.store_dir)
    return corpus.sources


class _TrainingDocuments:
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

    def drop(self, indices_of: Mapping[str, np.ndarray], explain: Callable[[int], Example]) -> None:
        """Take documents out of their sources, by cause; `explain` says of an example what it was compared to."""
        start, gone = 0, []
        for source in self.sources:
            everything = []
            for cause, indices in indices_of.items():
                inside = indices[(indices >= start) & (indices < start + len(source.documents))]
                if len(inside):
                    examples = [{"text": self.excerpt(i), **explain(i)} for i in inside[:_MOST_EXAMPLES].tolist()]
                    source.dropped[cause], source.examples[cause] = source.documents[inside - start], examples
                    everything.append(inside - start)
            start += len(source.documents)
            gone.append(np.concatenate([np.zeros(0, dtype=np.int64), *everything]))
        for source, positions in zip(self.sources, gone, strict=True):  # at the end: `explain` counts the old way
            source.documents = np.delete(source.documents, positions)


def _drop_exact_duplicates(corpus: _TrainingDocuments) -> None:
    """Leave out documents with the text of an earlier one."""
    hashes = corpus.hashes
    if not len(hashes):
        return
    unique, first, times = np.unique(hashes, return_index=True, return_counts=True)
    later = np.ones(len(hashes), dtype=bool)
    later[first] = False
    corpus.drop(
        {EXACT_DUPLICATE: np.flatnonzero(later)},
        lambda index: {"times": int(times[np.searchsorted(unique, hashes[index])])},
    )


def _drop_near_duplicates(
    corpus: _TrainingDocuments, measured: Mapping[str, Selections], settings: NearDuplicates, store_dir: str
) -> None:
    """Leave out documents that are almost equal to one of an evaluation set, or to an earlier one."""
    # The documents of evaluation sets come first: training documents are compared with them, and never the other way.
    evaluated = _TrainingDocuments([Cleaned(*pair) for pairs in measured.values() for pair in pairs], corpus.decode)
    of_sets = np.cumsum([sum(len(chosen) for _, chosen in pairs) for pairs in measured.values()])
    fixed = len(evaluated)

    def place(index: int) -> tuple[_TrainingDocuments, int]:
        return (evaluated, index) if index < fixed else (corpus, index - fixed)

    def text_of(index: int) -> str:
        documents, own_index = place(index)
        return documents.text(own_index)

    def find() -> list[tuple[int, int, float]]:
        found = find_near_duplicates(fixed + len(corpus), text_of, settings.threshold, settings.ngram, fixed)
        return [(document - fixed, earlier, similarity) for document, earlier, similarity in found]

    key = [NEAR_DUPLICATE, corpus.key, evaluated.key, settings.model_dump()]
    found = _found_once(store_dir, key, _NEAR, find)

    def explain(index: int) -> Example:
        pair = found[np.searchsorted(found["document"], index)]
        documents, earlier = place(int(pair["earlier"]))
        example = {"like": documents.excerpt(earlier), "similarity": round(float(pair["similarity"]), 3)}
        if documents is evaluated:
            example["set"] = list(measured)[int(np.searchsorted(of_sets, earlier, side="right"))]
        return example

    like_evaluated = found["earlier"] < fixed
    corpus.drop(
        {
            NEAR_EVALUATED: found["document"][like_evaluated],
            NEAR_DUPLICATE: found["document"][~like_evaluated],
        },
        explain,
    )


def _drop_overlap(
    corpus: _TrainingDocuments, measured: Mapping[str, Selections], settings: EvaluationOverlap, store_dir: str
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

    corpus.drop({OVERLAP: found["document"]}, explain)


def _ngrams_of(documents: Selections, n: int, decode: Decode) -> np.ndarray:
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
