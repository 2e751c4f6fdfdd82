"""Rows of training tokens by index arithmetic over token stores: packed blocks, or one row per document piece.

A document of n tokens is a chain of n + 1 pairs (input, target): the context token (BOS, else EOS) predicts the first
token, each token the next, the last one EOS. A source is the concatenation of its documents' pairs, of which a layout
(`kit.data.packing`) makes blocks. So every pair of a block carries loss, and a document that is cut goes on elsewhere
with its last token as context: no target is lost and none is scored twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from kit.data.packing import Layout
from kit.data.store import TokenStore

IGNORE_INDEX = -100  # of torch's cross-entropy


@dataclass(frozen=True)
class TrainPart:
    """What one source contributes to an epoch.

    Attributes:
        store: the source's token store.
        documents: int64 (n,), the documents that train.
        layout: which pieces of these documents each block consists of.
        blocks: int64 (blocks of an epoch,), which of the layout's blocks an epoch holds; more than once where the
            source's weight asks for more than it has.
        block_size: pairs per block.
    """

    store: TokenStore
    documents: np.ndarray
    layout: Layout
    blocks: np.ndarray
    block_size: int

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of each document in the part's chain of pairs, and the chain's length: int64 (n + 1,)."""
        return np.concatenate([[0], np.cumsum(self.store.lengths(self.documents))]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents, EOS included: as many as the chain has pairs."""
        return int(self.starts[-1])

    def count_tokens(self, blocks: np.ndarray) -> int:
        """Count the label positions in `blocks`."""
        return int(self.layout.sizes[blocks].sum())

    def chosen_pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield the (document, first pair, end pair) that the blocks of an epoch consist of, each block once."""
        blocks = np.unique(self.blocks)
        if len(blocks) == len(self.layout.sizes):  # all of them
            lengths = np.diff(self.starts)
            yield from zip(self.documents.tolist(), [0] * len(lengths), lengths.tolist(), strict=True)
            return
        for block in blocks.tolist():
            yield from self.pieces(*self.layout.blocks[block : block + 2].tolist())

    @property
    def chosen_documents(self) -> np.ndarray:
        """The documents of which an epoch holds something: int64 (n,)."""
        return np.unique(np.fromiter((document for document, _, _ in self.chosen_pieces()), dtype=np.int64))

    def pieces(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return the (document, first pair, end pair) of pieces `first` to `last` of the layout."""
        pieces = self.layout.pieces[first:last]
        indices = np.searchsorted(self.starts, pieces[:, 0], side="right") - 1
        inside = pieces - self.starts[indices, None]
        return [(d, *piece) for d, piece in zip(self.documents[indices].tolist(), inside.tolist(), strict=True)]


def select_blocks(
    sizes: Sequence[np.ndarray],
    weights: Sequence[float | None],
    seed: int,
    replay: tuple[Sequence[np.ndarray], float] = ((), 0.0),
) -> list[np.ndarray]:
    """Choose the blocks of each source that make one epoch.

    Sources without a weight are read once. A source with weight w gets the share w of the epoch's tokens, to the
    nearest block: the first blocks of a seeded shuffle of its own, after all of them as often as it takes. The sources
    of replay get their share together, to the nearest block, and divide it by their size.

    Args:
        sizes: tokens in each block of each source: int64 (blocks,).
        weights: share of each, None for the sources that divide the rest; shares, that of replay included, add up to
            less than 1, or, where every source has one, to 1.
        seed: of the shuffle.
        replay: the same of each source of replay, and the share of all of them.

    Returns:
        For each source, then for each source of replay, int64 (blocks of an epoch,).
    """
    replayed, share = replay
    num_tokens, to_replay = [int(s.sum()) for s in sizes], sum(int(s.sum()) for s in replayed)
    free = sum(tokens for tokens, weight in zip(num_tokens, weights, strict=True) if weight is None)
    weighted = sum(weight for weight in weights if weight is not None) + share
    total = free / (1 - weighted) if free else sum(num_tokens) + to_replay
    chosen = []
    for index, (of_blocks, weight) in enumerate(zip(sizes, weights, strict=True)):
        order = np.arange(len(of_blocks))
        if weight is not None:
            order, _ = _draw_blocks(of_blocks, total * weight, [seed, index], least=1)
        chosen.append(order)
    due = 0.0
    for index, of_blocks in enumerate(replayed, start=len(sizes)):
        # What rounding to blocks leaves over or takes too much passes on to the next source.
        due += total * share * int(of_blocks.sum()) / to_replay
        order, drawn = _draw_blocks(of_blocks, due, [seed, index], least=0)
        due -= drawn
        chosen.append(order)
    return chosen


def _draw_blocks(sizes: np.ndarray, wanted: float, seed: list[int], least: int) -> tuple[np.ndarray, int]:
    """Return the blocks of a source that hold nearest to `wanted` tokens, but at least `least`, and their tokens."""
    order = np.random.default_rng(seed).permutation(len(sizes)).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(sizes[order])])
    # Counted in tokens: a small source repeats its part-filled last block with all the others.
    repeats, rest = divmod(max(0.0, wanted), int(sums[-1]))
    count = int(np.abs(sums - rest).argmin())
    count = count if repeats else max(least, count)
    return np.concatenate([np.tile(order, int(repeats)), order[:count]]), int(repeats * sums[-1] + sums[count])


class TokenRows(Dataset):
    """The rows of an epoch; nothing but the memory-mapped tokens is held.

    Row i is a dictionary of int64 arrays of one length T ≤ `block_size`: `input_ids`, `shift_labels` (the token that
    each position has to predict, already shifted, -100 where there is none) and `position_ids`, which restart at 0
    with every piece of a document. Packed rows have T = `block_size`; what a block lacks is padding.
    """

    def __init__(
        self, parts: Sequence[TrainPart], packing: bool | str, context_token_id: int, pad_token_id: int
    ) -> None:
        """Lay out the rows of `parts`; `context_token_id` stands before every document, never scored."""
        self.parts = list(parts)
        self.packing = packing
        self.context_token_id = context_token_id
        self.pad_token_id = pad_token_id
        self._rows = [_packed_rows(p) if packing else _single_rows(p) for p in self.parts]
        self._ends = np.cumsum([len(rows) for rows in self._rows])
        self._starts = self._ends - [len(rows) for rows in self._rows]

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one row; index -1 is a row without any label, for ranks that have none left."""
        if index == -1:
            return self._row([], 1)
        part, first, last = self._place(index)
        pieces = [self._pairs(part.store, *piece) for piece in part.pieces(first, last)]
        return self._row(pieces, part.block_size if self.packing else len(pieces[0][0]))

    def documents(self, index: int) -> tuple[TokenStore, list[int]]:
        """Return the store of a row, and which of its documents lie in the row."""
        part, first, last = self._place(index)
        return part.store, [document for document, _, _ in part.pieces(first, last)]

    def _place(self, index: int) -> tuple[TrainPart, int, int]:
        """Return what a row holds: its part, and which pieces of the part's layout."""
        which = int(np.searchsorted(self._ends, index, side="right"))
        first, last = self._rows[which][index - self._starts[which]]
        return self.parts[which], int(first), int(last)

    def _pairs(self, store: TokenStore, document: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        begin = int(store.offsets[document])
        targets = store.tokens[begin + first : begin + end].astype(np.int64)
        inputs = np.empty_like(targets)
        inputs[0] = store.tokens[begin + first - 1] if first else self.context_token_id
        inputs[1:] = targets[:-1]
        return inputs, targets

    def _row(self, pieces: list[tuple[np.ndarray, np.ndarray]], length: int) -> dict[str, np.ndarray]:
        input_ids = np.full(length, self.pad_token_id, dtype=np.int64)
        shift_labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.zeros(length, dtype=np.int64)
        at = size = 0
        for inputs, targets in pieces:
            size = len(targets)
            input_ids[at : at + size] = inputs
            shift_labels[at : at + size] = targets
            position_ids[at : at + size] = np.arange(size)
            at += size
        # Padding goes on as part of the last piece, which cannot see what follows it: a row of one piece has no border
        # then, and needs no mask.
        position_ids[at:] = np.arange(size, size + length - at)
        return {"input_ids": input_ids, "shift_labels": shift_labels, "position_ids": position_ids}


def _packed_rows(part: TrainPart) -> np.ndarray:
    """Return the first piece of each packed row in the part's layout, and the one after its last: int64 (rows, 2)."""
    return np.stack([part.layout.blocks[part.blocks], part.layout.blocks[part.blocks + 1]], axis=1)


def _single_rows(part: TrainPart) -> np.ndarray:
    """Return the same of rows that hold one piece each: int64 (rows, 2)."""
    pieces = np.concatenate([part.blocks[:0], *(np.arange(a, b) for a, b in _packed_rows(part).tolist())])
    return np.stack([pieces, pieces + 1], axis=1)


class CollateRows:
    """Collate rows into a batch of int64 tensors (rows, longest row), padding on the right.

    A packed batch carries `position_ids` and no attention mask: given a mask, transformers would no longer see from
    the restarting positions where one document ends and the next begins, and documents would attend to each other.
    A batch of single rows needs neither: what follows a causal position cannot reach it.
    """

    def __init__(self, packing: bool | str, pad_token_id: int) -> None:
        """Collate packed rows or single ones; `pad_token_id` fills up shorter rows."""
        self.packing = packing
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `shift_labels` and, where rows are packed, `position_ids`."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "shift_labels": IGNORE_INDEX}
        if self.packing:
            fill["position_ids"] = 0
        batch = {name: torch.full((len(rows), longest), value, dtype=torch.long) for name, value in fill.items()}
        for index, row in enumerate(rows):
            for name, tensor in batch.items():
                tensor[index, : len(row[name])] = torch.from_numpy(row[name])
        return batch
