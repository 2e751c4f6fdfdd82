"""What the frozen-prefix cache has to know of a run's data: how much there is to keep, and what makes its batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kit.data.corpus import Corpus
from kit.data.labeled_corpus import LabeledCorpus
from kit.files import hash_values
from kit.training.prefix_rows import Collate


@dataclass(frozen=True)
class PrefixData:
    """What a cache has to know of the data.

    Attributes:
        rows: the training rows.
        collate: makes a batch of them.
        positions: of all training rows, of which each counts once however often an epoch holds it.
        length: positions of a training row, on average.
        evaluated: positions of all evaluation sets that are measured on the way.
        key: hash of all rows, and of what decides which of them make a batch.
        store_dir: where stores lie.
    """

    rows: torch.utils.data.Dataset
    collate: Collate
    positions: int
    length: int
    evaluated: int
    key: str
    store_dir: str


def prefix_data(corpus: Corpus | LabeledCorpus, measured_by: Any, store_dir: str) -> PrefixData:
    """Return what a cache has to know of a corpus.

    Args:
        corpus: of the run.
        measured_by: what else decides how the evaluation sets are cut into rows, as the task gives it.
        store_dir: where stores lie.
    """
    rows, batching = corpus.rows, []
    if isinstance(corpus, LabeledCorpus):
        _, first = np.unique(rows.chosen, return_index=True)
        distinct, positions = len(first), rows.lengths[first].sum()
        evaluated = sum(of.rows.lengths.sum() for name, of in corpus.sets.items() if name not in corpus.final_sets)
        batching = [corpus.group_by_length, corpus.max_tokens_per_batch]
    else:
        parts = [(part, np.unique(part.blocks)) for part in rows.parts]
        if rows.packing:
            distinct = sum(len(blocks) for _, blocks in parts)
            positions = sum(len(blocks) * part.block_size for part, blocks in parts)
        else:
            distinct = sum(int(np.diff(part.layout.blocks)[blocks].sum()) for part, blocks in parts)
            positions = sum(part.count_tokens(blocks) for part, blocks in parts)
        evaluated = sum(of.lengths.sum() for of in corpus.sets.values())
    key = hash_values(corpus.key, measured_by, batching)  # the key of a corpus of tokens has its blocks and packing
    length = max(1, int(positions) // max(1, distinct))
    return PrefixData(rows, corpus.collate, int(positions), length, int(evaluated), key, store_dir)
