"""From the recipe's `data` section to rows of training tokens, evaluation documents and the token ledger."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kit.console import warn
from kit.data.blocks import CollateRows, TokenRows, TrainPart, select_blocks
from kit.data.ledger import LedgerRow, account
from kit.data.sources import read_documents, source_fingerprint
from kit.data.splits import also_in, choose_documents, held_out
from kit.data.store import Encode, TokenStore, open_store
from kit.errors import UserError
from kit.files import hash_array, hash_values
from kit.recipe.models import DataSection, EvaluationSet, Source, ValidationFraction

DEFAULT_SET = "domain"


@dataclass(frozen=True)
class TokenCoding:
    """What the data needs to know of a tokenizer.

    Attributes:
        key: hash of the tokenizer.
        encode: texts to token ids, without special tokens of its own accord.
        vocab_size: number of token ids.
        eos_token_id: written after each document.
        context_token_id: stands before each document, never scored: BOS, else EOS.
        pad_token_id: fills rows up; masked by position, never by id.
    """

    key: str
    encode: Encode
    vocab_size: int
    eos_token_id: int
    context_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class EvaluationDocuments:
    """The documents of one evaluation set."""

    name: str
    stores: tuple[tuple[TokenStore, np.ndarray], ...]

    @property
    def key(self) -> str:
        """Hash of the documents and of the tokenizer that encoded them."""
        return hash_values([(store.key, hash_array(documents)) for store, documents in self.stores])

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the documents' texts: uint64 (documents,)."""
        return np.concatenate([store.hashes[documents] for store, documents in self.stores])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' texts."""
        return int(sum(store.num_bytes[documents].sum() for store, documents in self.stores))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, EOS included: int64 (documents,)."""
        return np.concatenate([store.offsets[d + 1] - store.offsets[d] for store, d in self.stores])

    def tokens(self, index: int, start: int, end: int) -> np.ndarray:
        """Return tokens `start` to `end` of one document, whose last token is EOS: int64 (end - start,)."""
        for store, documents in self.stores:
            if index < len(documents):
                begin = store.offsets[documents[index]]
                return store.tokens[begin + start : begin + end].astype(np.int64)
            index -= len(documents)
        raise IndexError(index)


@dataclass(frozen=True)
class Corpus:
    """Everything that a causal LM trains and is measured on.

    Attributes:
        rows: the training rows of one epoch.
        collate: makes a batch of rows.
        sets: the evaluation sets by name.
        ledger: the account of every training source.
        key: hash of all of it.
    """

    rows: TokenRows
    collate: CollateRows
    sets: dict[str, EvaluationDocuments]
    ledger: list[LedgerRow]
    key: str


def build_corpus(data: DataSection, sets: Mapping[str, EvaluationSet], coding: TokenCoding, seed: int) -> Corpus:
    """Tokenise all sources (or find them tokenised), split them, and lay out the rows of an epoch.

    Raises:
        UserError: a source cannot be read or a split is empty.
    """
    stores = [_open(data, source, coding) for source in data.train]
    splits = [_split(data.validation, store) for store in stores]
    for store, (_, held) in zip(stores, splits, strict=True):
        if isinstance(data.validation, ValidationFraction) and not len(held):
            warn(
                f"data source `{store.name}`: none of its {store.num_documents:,} documents is held out for validation"
            )
    evaluation = _evaluation_sets(data, sets, coding, stores, splits)
    # A document that is measured on must not be trained on, wherever else it occurs: measurements would flatter.
    measured = [s.hashes for name, s in evaluation.items() if (sets.get(name) is None or sets[name].split != "train")]
    kept = [docs[~also_in(store.hashes[docs], measured)] for store, (docs, _) in zip(stores, splits, strict=True)]
    read = [_count_tokens(store, docs) for store, (docs, _) in zip(stores, splits, strict=True)]
    for store, documents in zip(stores, kept, strict=True):
        if not len(documents):
            raise UserError(
                f"data source `{store.name}`: no document of its {store.num_documents:,} is left for training once "
                f"validation and evaluation sets have theirs"
            )
    blocks = select_blocks(
        [_count_tokens(store, docs) for store, docs in zip(stores, kept, strict=True)],
        [source.weight for source in data.train],
        data.block_size,
        seed,
    )
    parts = [TrainPart(s, d, b, data.block_size) for s, d, b in zip(stores, kept, blocks, strict=True)]
    ledger = [
        account(part, data.packing, len(train), tokens, len(held))
        for part, (train, held), tokens in zip(parts, splits, read, strict=True)
    ]
    return Corpus(
        rows=TokenRows(parts, data.packing, coding.context_token_id, coding.pad_token_id),
        collate=CollateRows(data.packing, coding.pad_token_id),
        sets=evaluation,
        ledger=ledger,
        key=hash_values(
            [(p.store.key, hash_array(p.documents), hash_array(p.blocks)) for p in parts],
            data.block_size,
            data.packing,
            {name: documents.key for name, documents in evaluation.items()},
        ),
    )


def training_documents(data: DataSection) -> Iterator[str]:
    """Yield the texts of the training split, for whatever has to be learned from them before tokens exist."""
    import xxhash

    for source in data.train:
        for text in read_documents(source):
            digest = np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", errors="surrogatepass"))], dtype=np.uint64)
            validation = data.validation
            if (
                not isinstance(validation, ValidationFraction)
                or not held_out(digest, validation.fraction, validation.seed).any()
            ):
                yield text


def sources_key(data: DataSection, sets: Mapping[str, EvaluationSet]) -> str:
    """Return a hash of the content of every source that is trained or measured on."""
    validation = data.validation if isinstance(data.validation, tuple) else ()
    own = [wanted for wanted in sets.values() if wanted.split is None]
    return hash_values([source_fingerprint(source) for source in (*data.train, *validation, *own)])


def training_documents_key(data: DataSection) -> str:
    """Return a hash of what `training_documents` yields."""
    validation = data.validation
    split = validation.model_dump() if isinstance(validation, ValidationFraction) else None
    return hash_values([source_fingerprint(source) for source in data.train], split)


def _open(data: DataSection, source: Source, coding: TokenCoding) -> TokenStore:
    return open_store(
        data.store_dir,
        source.name,
        source_fingerprint(source),
        coding.key,
        lambda: read_documents(source),
        coding.encode,
        coding.eos_token_id,
        coding.vocab_size,
    )


def _split(
    validation: ValidationFraction | tuple[Source, ...] | None, store: TokenStore
) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of a source that train and those that are held out."""
    everything = np.arange(store.num_documents)
    if not isinstance(validation, ValidationFraction):
        return everything, everything[:0]
    out = held_out(store.hashes, validation.fraction, validation.seed)
    return everything[~out], everything[out]


def _evaluation_sets(
    data: DataSection,
    sets: Mapping[str, EvaluationSet],
    coding: TokenCoding,
    stores: list[TokenStore],
    splits: list[tuple[np.ndarray, np.ndarray]],
) -> dict[str, EvaluationDocuments]:
    if not sets and data.validation is not None:
        sets = {DEFAULT_SET: EvaluationSet(split="validation")}
    result = {}
    for name, wanted in sets.items():
        if wanted.split == "train":
            pairs = [(store, train) for store, (train, _) in zip(stores, splits, strict=True)]
        elif wanted.split == "validation" and isinstance(data.validation, ValidationFraction):
            pairs = [(store, held) for store, (_, held) in zip(stores, splits, strict=True)]
        else:
            sources = data.validation if wanted.split == "validation" else (wanted,)
            opened = [_open(data, source, coding) for source in sources]
            pairs = [(store, _documents_of(wanted, store)) for store in opened]
        chosen = _choose(pairs, wanted.max_documents)
        if not sum(len(documents) for _, documents in chosen):
            total = sum(store.num_documents for store in (stores if wanted.split else opened))
            what = f"the split `{wanted.split}`" if wanted.split else f"the fraction {wanted.fraction}"
            what += f" of {total:,} documents"
            raise UserError(
                f"evaluation set `{name}` is empty: {what} holds no document. Cut "
                f"the sources into more documents (`sample_by`, `separator`), or give `data.validation` its own files"
            )
        result[name] = EvaluationDocuments(name, tuple(chosen))
    return result


def _documents_of(wanted: EvaluationSet, store: TokenStore) -> np.ndarray:
    """Return the documents of a source that an evaluation set takes: all, or those that a split would hold out."""
    everything = np.arange(store.num_documents)
    return everything if wanted.fraction is None else everything[held_out(store.hashes, wanted.fraction, wanted.seed)]


def _choose(pairs: list[tuple[TokenStore, np.ndarray]], most: int | None) -> list[tuple[TokenStore, np.ndarray]]:
    """Take at most `most` documents over all stores, by their hash."""
    if most is None:
        return pairs
    hashes = np.concatenate([store.hashes[documents] for store, documents in pairs])
    chosen = choose_documents(hashes, np.arange(len(hashes)), most)
    result, start = [], 0
    for store, documents in pairs:
        inside = chosen[(chosen >= start) & (chosen < start + len(documents))] - start
        result.append((store, documents[inside]))
        start += len(documents)
    return result


def _count_tokens(store: TokenStore, documents: np.ndarray) -> int:
    return int((store.offsets[documents + 1] - store.offsets[documents]).sum())
