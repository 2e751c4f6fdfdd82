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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kit.console import progress
from kit.errors import UserError
from kit.files import build_once, hash_values

_FORMAT = 1  # raise it whenever the files below or their meaning change
_BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class TokenStore:
    """One source, tokenised.

    Attributes:
        name: the source's name in tables and messages.
        key: hash of content, tokenizer and format.
        tokens: token ids of all documents, each followed by EOS; memory-mapped.
        offsets: int64 (documents + 1,).
        num_bytes: int64 (documents,), UTF-8 bytes of each text as it was given to the tokenizer.
        hashes: uint64 (documents,), of each text.
        empty: number of documents without text, which are not stored.
    """

    name: str
    key: str
    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    empty: int

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.num_bytes)

    # A worker process opens the file again: pickling the array itself would copy the whole corpus into each.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": (str(self.tokens.filename), self.tokens.dtype.str)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        filename, dtype = state["tokens"]
        self.__dict__.update(state, tokens=np.memmap(filename, dtype=dtype, mode="r"))


Encode = Callable[[list[str]], list[list[int]]]


def open_store(
    store_dir: str | Path,
    name: str,
    content_key: str,
    tokenizer_key: str,
    documents: Callable[[], Iterable[str]],
    encode: Encode,
    eos_token_id: int,
    vocab_size: int,
) -> TokenStore:
    """Return the token store of a source, building it first where it is missing or damaged.

    Args:
        store_dir: the folder of all stores.
        name: the source's name, for the progress line.
        content_key: hash of the source's content.
        tokenizer_key: hash of the tokenizer.
        documents: yields the texts; called only to build.
        encode: texts to token ids, without special tokens of its own accord.
        eos_token_id: written after each document.
        vocab_size: decides the width of a stored token.

    Raises:
        UserError: the source holds no text.
    """
    key = hash_values("token store", _FORMAT, content_key, tokenizer_key)
    folder = Path(store_dir) / "tokens" / key

    def build(temporary: Path) -> dict[str, Any]:
        return _write_store(temporary, name, documents(), encode, eos_token_id, vocab_size)

    marker = build_once(folder, build)
    return TokenStore(
        name=name,
        key=key,
        tokens=np.memmap(folder / "tokens.bin", dtype=marker["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        num_bytes=np.load(folder / "bytes.npy"),
        hashes=np.load(folder / "hashes.npy"),
        empty=marker["empty"],
    )


def _write_store(
    folder: Path, name: str, documents: Iterable[str], encode: Encode, eos_token_id: int, vocab_size: int
) -> dict[str, Any]:
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    lengths: list[np.ndarray] = []
    num_bytes: list[int] = []
    hashes: list[int] = []
    empty = 0
    with open(folder / "tokens.bin", "wb") as file:
        batches = progress(_batches(documents), f"tokenising {name}", size=len)
        for batch in batches:
            texts = [text for text in batch if text.strip()]
            empty += len(batch) - len(texts)
            if not texts:
                continue
            for text in texts:
                raw = text.encode("utf-8", errors="surrogatepass")
                num_bytes.append(len(raw))
                hashes.append(xxhash.xxh3_64_intdigest(raw))
            lengths.append(_write_batch(file, encode(texts), eos_token_id, dtype))
    if not hashes:
        raise UserError(f"data source `{name}`: no text in it ({empty:,} empty documents)")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "bytes.npy", np.array(num_bytes, dtype=np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    return {"name": name, "dtype": np.dtype(dtype).name, "documents": len(hashes), "empty": empty}


def _write_batch(file, encoded: list[list[int]], eos_token_id: int, dtype: type) -> np.ndarray:
    """Append documents and their EOS to the token file; return the length of each, EOS included."""
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), dtype=np.int64, count=len(encoded))
    flat = np.empty(int(lengths.sum()), dtype=dtype)
    ends = np.cumsum(lengths)
    flat[ends - 1] = eos_token_id
    for ids, end, length in zip(encoded, ends, lengths, strict=True):
        flat[end - length : end - 1] = ids
    file.write(flat)  # not `tofile`, which hides why a write fails
    return lengths


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents so that the tokenizer's threads have work and memory stays bounded."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
