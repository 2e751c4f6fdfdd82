"""The token store: the documents of one source as a single memory-mapped token array with document offsets.

A store holds every document of its source, whatever the split: which documents train and which are held out is
arithmetic over the stored hashes (`kit.data.splits`), blocks are arithmetic over the offsets (`kit.data.blocks`). It is
keyed by content, tokenizer and format, written once, and used by every later run.

    tokens.bin        token ids, each document followed by EOS; uint16 where the vocabulary fits, else uint32
    offsets.npy       int64 (documents + 1): where each document starts
    bytes.npy         int64 (documents): UTF-8 bytes of each document's text
    hashes.npy        uint64 (documents): xxHash of each document's text
    complete.json     the marker, written last: sizes and checksums, and what the store was made from
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit.console import progress
from kit.data.columns import LeftOut
from kit.data.tokenising import Encode, EncodedBatch, encode_documents
from kit.errors import UserError
from kit.files import build_once, hash_values
from kit.recipe.data import Source

_FORMAT = 2  # raise it whenever the files below or their meaning change
_MOST_EXAMPLES = 3
_ARRAYS = ("offsets", "num_bytes", "hashes")


@dataclass(frozen=True)
class TokenStore:
    """One source, tokenised.

    Attributes:
        name: the source's name in tables and messages.
        key: hash of content, tokenizer and format.
        tokens: token ids of all documents, each followed by EOS; memory-mapped, as the arrays below are.
        offsets: int64 (documents + 1,).
        num_bytes: int64 (documents,), UTF-8 bytes of each text as it was given to the tokenizer.
        hashes: uint64 (documents,), of each text.
        left_out: documents that are not stored: by cause their number (`documents`) and where some are (`examples`).
        stopped: `max_tokens` ended the reading before the source did.
        source: what was tokenised.
    """

    name: str
    key: str
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    left_out: dict[str, dict[str, Any]]
    stopped: bool = False
    source: Source | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.num_bytes)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, without its EOS."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Return the tokens of each of some documents, their EOS included: int64 (documents,)."""
        return self.offsets[documents + 1] - self.offsets[documents]

    def count_tokens(self, documents: np.ndarray) -> int:
        """Count the tokens of some documents, their EOS included."""
        return int(self.lengths(documents).sum())

    # A worker process maps the files again: pickling the arrays themselves would copy the whole corpus into each.
    def __getstate__(self) -> dict[str, Any]:
        arrays = {name: str(getattr(self, name).filename) for name in _ARRAYS}
        return {**self.__dict__, **arrays, "tokens": (str(self.tokens.filename), self.tokens.dtype.str)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        filename, dtype = state["tokens"]
        arrays = {name: np.load(state[name], mmap_mode="r") for name in _ARRAYS}
        self.__dict__.update({**state, **arrays, "tokens": np.memmap(filename, dtype=dtype, mode="r")})


def open_store(
    store_dir: str | Path,
    name: str,
    content_key: str,
    tokenizer_key: str,
    documents: Callable[[], Iterable[str | LeftOut]],
    encode: Encode,
    eos_token_id: int,
    vocab_size: int,
    max_tokens: int | None = None,
    num_proc: int = 1,
    check_unchanged: Callable[[], None] = lambda: None,
) -> TokenStore:
    """Return the token store of a source, building it first where it is missing or damaged.

    Args:
        store_dir: the folder of all stores.
        name: the source's name, for the progress line.
        content_key: hash of the source's content.
        tokenizer_key: hash of the tokenizer.
        documents: yields the texts, and what is left out of them; called only to build.
        encode: texts to token ids, without special tokens of its own accord.
        eos_token_id: written after each document.
        vocab_size: decides the width of a stored token.
        max_tokens: the first documents that have together at most so many tokens; no limit where None.
        num_proc: processes that encode.
        check_unchanged: called when all is read, to refuse a source that is no longer what `content_key` says.

    Raises:
        UserError: the source holds no document that could be stored.
    """
    key = hash_values("token store", _FORMAT, content_key, tokenizer_key, max_tokens)
    folder = Path(store_dir) / "tokens" / key
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32).name

    def build(temporary: Path) -> dict[str, Any]:
        left_out = _LeftOutDocuments()
        texts = progress(left_out.texts(documents()), f"tokenising {name}")
        batches = encode_documents(texts, encode, eos_token_id, dtype, num_proc, max_tokens)
        stopped = _write_store(temporary, name, batches, max_tokens, left_out)
        check_unchanged()
        return {"name": name, "dtype": dtype, "left_out": left_out.by_cause, "stopped": stopped}

    marker = build_once(folder, build)
    return TokenStore(
        name=name,
        key=key,
        tokens=np.memmap(folder / "tokens.bin", dtype=marker["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        num_bytes=np.load(folder / "bytes.npy", mmap_mode="r"),
        hashes=np.load(folder / "hashes.npy", mmap_mode="r"),
        left_out=marker["left_out"],
        stopped=marker["stopped"],
    )


class _LeftOutDocuments:
    """Counts what is left out by cause, up to the last document that is stored: more is read than `max_tokens` takes.

    Attributes:
        by_cause: for each cause the number of documents, and where the first of them are.
    """

    def __init__(self) -> None:
        self.by_cause: dict[str, dict[str, Any]] = {}
        self._ahead: deque[tuple[int, dict[str, dict[str, Any]]]] = deque()

    def texts(self, documents: Iterable[str | LeftOut]) -> Iterator[str]:
        """Yield the texts among `documents`, and keep the others with the number of texts before them."""
        number = 0
        for document in documents:
            if isinstance(document, str):
                number += 1
                yield document
            else:
                if not self._ahead or self._ahead[-1][0] != number:
                    self._ahead.append((number, {}))
                _enter(self._ahead[-1][1], document.cause, 1, [document.where] if document.where else [])

    def count(self, stored: int) -> None:
        """Count what stands before document `stored`, from 0."""
        while self._ahead and self._ahead[0][0] <= stored:
            for cause, entry in self._ahead.popleft()[1].items():
                _enter(self.by_cause, cause, entry["documents"], entry["examples"])


def _enter(by_cause: dict[str, dict[str, Any]], cause: str, documents: int, examples: list[str]) -> None:
    entry = by_cause.setdefault(cause, {"documents": 0, "examples": []})
    entry["documents"] += documents
    entry["examples"] += examples[: _MOST_EXAMPLES - len(entry["examples"])]


def _write_store(
    folder: Path, name: str, batches: Iterator[EncodedBatch], max_tokens: int | None, left_out: _LeftOutDocuments
) -> bool:
    """Write the store's files; return whether `max_tokens` ended it."""
    lengths, num_bytes, hashes = [np.zeros(1, dtype=np.int64)], [], []
    total, documents, stopped = 0, 0, False
    with open(folder / "tokens.bin", "wb") as file:
        for batch in batches:
            if max_tokens is not None and total + len(batch.tokens) > max_tokens:
                batch = batch.first(int(np.searchsorted(total + np.cumsum(batch.lengths), max_tokens, side="right")))
                stopped = True
            file.write(batch.tokens)  # not `tofile`, which hides why a write fails
            total += len(batch.tokens)
            documents += len(batch.lengths)
            left_out.count(documents)
            lengths.append(batch.lengths)
            num_bytes.append(batch.num_bytes)
            hashes.append(batch.hashes)
            if stopped:
                break
    left_out.count(documents)
    if not total:
        causes = "; ".join(f"{cause}: {entry['documents']:,}" for cause, entry in left_out.by_cause.items())
        why = (
            f"the first document alone has more than `max_tokens: {max_tokens}`" if stopped else causes or "it is empty"
        )
        raise UserError(f"data source `{name}`: no document is left in it ({why})")
    np.save(folder / "offsets.npy", np.cumsum(np.concatenate(lengths)))
    np.save(folder / "bytes.npy", np.concatenate(num_bytes))
    np.save(folder / "hashes.npy", np.concatenate(hashes))
    return stopped
