"""Where documents are cut and which pieces share a row: layouts over a source's chain of pairs (`kit.data.blocks`).

A layout is arithmetic over the documents' lengths; no token is read, and no object is made per document.
"""

from dataclasses import dataclass

import numpy as np

_LEAST_FILL = 0.99


@dataclass(frozen=True)
class Layout:
    """The blocks of a source: pieces of documents, at most `block_size` pairs together.

    Attributes:
        pieces: start and end of each piece in the source's chain of pairs, block after block: int64 (pieces, 2).
        blocks: where in `pieces` each block begins, and their number: int64 (blocks + 1,).
    """

    pieces: np.ndarray
    blocks: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Pairs in each block: int64 (blocks,)."""
        ends = np.concatenate([[0], np.cumsum(self.pieces[:, 1] - self.pieces[:, 0])])
        return np.diff(ends[self.blocks])


def lay_out(lengths: np.ndarray, block_size: int, packing: bool | str) -> Layout:
    """Cut documents into pieces and deal these out to blocks; every pair lies in exactly one.

    Args:
        lengths: pairs of each document, at least 1: int64 (documents,).
        block_size: pairs that a block holds at most.
        packing: as `data.packing`; without packing documents are cut at the same places as with `true`.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return _best_fit(starts, block_size) if packing == "best-fit" else _cut_chain(starts, block_size)


def count_cut(lengths: np.ndarray, layout: Layout) -> int:
    """Count the documents that lie in more than one piece."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    inside = layout.pieces[:, 0][~np.isin(layout.pieces[:, 0], starts)]
    return len(np.unique(np.searchsorted(starts, inside, side="right")))


def _cut_chain(starts: np.ndarray, block_size: int) -> Layout:
    """Cut the chain every `block_size` pairs: no block but the last has a hole, and every border may cut a document."""
    borders = np.arange(0, starts[-1], block_size)
    cuts = np.unique(np.concatenate([starts, borders]))
    return Layout(np.stack([cuts[:-1], cuts[1:]], axis=1), np.searchsorted(cuts, np.append(borders, starts[-1])))


def _best_fit(starts: np.ndarray, block_size: int) -> Layout:
    """Pack documents whole where they fit: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    Documents of more than a block are cut at its multiples; only the rest is packed. Where more than 1 % of all
    positions would stay empty, as with many documents of 0.6 blocks, the emptiest blocks are dissolved and poured into
    the holes of the others, as few as it takes: only their pieces are cut once more.
    """
    lengths = np.diff(starts)
    # A document of exactly n blocks has n pieces of that size, and no rest.
    per_document = -(-lengths // block_size)
    first = np.arange(per_document.sum()) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    begin = np.repeat(starts[:-1], per_document) + first * block_size
    end = np.minimum(begin + block_size, np.repeat(starts[1:], per_document))
    block_of, num_blocks = _assign(end - begin, block_size)

    total = int(starts[-1])
    most = max(-(-total // block_size), int(total / (_LEAST_FILL * block_size)))
    if num_blocks > most:
        begin, end, block_of = _dissolve(begin, end, block_of, num_blocks - most, block_size)
    order = np.lexsort((begin, block_of))
    pieces = np.stack([begin[order], end[order]], axis=1)
    return Layout(pieces, np.append(np.flatnonzero(np.diff(block_of[order], prepend=-1)), len(pieces)))


def _assign(sizes: np.ndarray, block_size: int) -> tuple[np.ndarray, int]:
    """Return the block of each piece by best-fit decreasing, and the number of blocks.

    Pieces of one size go into all blocks of one room at a time: the block that a piece is put into stays the one with
    the least room for the next piece of that size. So the steps are counted in sizes and rooms, not in pieces.
    """
    order = np.argsort(-sizes, kind="stable")
    block_of = np.empty(len(sizes), dtype=np.int64)
    rooms = _Rooms()
    placed = num_blocks = 0
    values, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = rooms.least(size)
            if room is None:
                room, new = block_size, -(-left // (block_size // size))
                blocks = np.arange(num_blocks, num_blocks + new)
                num_blocks += new
            else:
                blocks = rooms.take(room, -(-left // (room // size)))
            each = room // size
            number = min(left, each * len(blocks))
            block_of[order[placed : placed + number]] = np.repeat(blocks, each)[:number]
            placed, left = placed + number, left - number
            in_last = number - each * (len(blocks) - 1)
            rooms.put(room - each * size, blocks[:-1])
            rooms.put(room - in_last * size, blocks[-1:])
    return block_of, num_blocks


def _dissolve(
    begin: np.ndarray, end: np.ndarray, block_of: np.ndarray, number: int, block_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pour the pieces of the emptiest blocks into the holes of the others, whole where there is room, else cut.

    Returns:
        Start, end and block of each piece; the numbers of the dissolved blocks are used no more.
    """
    filled = np.bincount(block_of, weights=end - begin).astype(np.int64)
    dissolved = np.zeros(len(filled), dtype=bool)
    dissolved[np.argsort(filled, kind="stable")[:number]] = True
    rooms = _Rooms()
    for room in np.unique(block_size - filled[~dissolved]).tolist():
        rooms.put(room, np.flatnonzero(~dissolved & (filled == block_size - room)))
    moves = dissolved[block_of]
    poured: list[tuple[int, int, int]] = []
    left = np.stack([begin[moves], end[moves]], axis=1)
    for start, stop in left[np.argsort(left[:, 0] - left[:, 1], kind="stable")].tolist():
        while start < stop:
            # In as few fragments as can be: into the tightest hole for all of it, else into the widest one.
            room = rooms.least(stop - start) or rooms.widest()
            [block] = rooms.take(room, 1).tolist()
            size = min(room, stop - start)
            poured.append((start, start + size, block))
            rooms.put(room - size, np.array([block]))
            start += size
    kept = np.stack([begin[~moves], end[~moves], block_of[~moves]], axis=1)
    return tuple(np.concatenate([kept, np.array(poured, dtype=np.int64)]).T)


class _Rooms:
    """Blocks by the room that is left in them."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[np.ndarray]] = {}
        self._present = 0  # bit r: there are blocks with room r

    def put(self, room: int, blocks: np.ndarray) -> None:
        """Enter blocks; full ones are of no more use."""
        if room and len(blocks):
            self._blocks.setdefault(room, []).append(blocks)
            self._present |= 1 << room

    def take(self, room: int, most: int) -> np.ndarray:
        """Take at most so many blocks that were entered with this room."""
        entered = self._blocks[room]
        blocks = entered.pop()
        if len(blocks) > most:
            entered.append(blocks[most:])
        if not entered:
            del self._blocks[room]
            self._present ^= 1 << room
        return blocks[:most]

    def least(self, size: int) -> int | None:
        """Return the least room in which `size` pairs have room."""
        enough = self._present >> size
        return size + (enough & -enough).bit_length() - 1 if enough else None

    def widest(self) -> int:
        """Return the largest room."""
        return self._present.bit_length() - 1
