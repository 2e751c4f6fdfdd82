"""From the recipe's `data` section to rows of training tokens, evaluation documents and the token ledger."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.console import say, warn
from kit.data.blocks import CollateRows, TokenRows, TrainPart, select_blocks
from kit.data.cleaning import ALSO_EVALUATED, Cleaned, Selections, clean
from kit.data.columns import LeftOut
from kit.data.ledger import LedgerRow, account, enter_shares, ledger_as_json
from kit.data.naming import name_documents
from kit.data.packing import lay_out
from kit.data.sampling import EpochBatches
from kit.data.sources import hash_text, read_documents, source_fingerprint, watch
from kit.data.splits import choose_documents, held_out
from kit.data.store import TokenStore, open_store
from kit.data.tokenising import Encode
from kit.errors import UserError
from kit.files import hash_array, hash_values
from kit.recipe.data import DataSection, Source, ValidationFraction
from kit.recipe.models import EvaluationSet

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULT_SET = "domain"
_LITTLE_TEXT = 1_000_000  # bytes
_CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class TokenCoding:
    """What the data needs to know of a tokenizer.

    Attributes:
        key: hash of the tokenizer.
        encode: texts to token ids, without special tokens of its own accord; can be pickled.
        decode: the token ids of a document to its text.
        vocab_size: number of token ids.
        eos_token_id: written after each document.
        context_token_id: stands before each document, never scored: BOS, else EOS.
        pad_token_id: fills rows up; masked by position, never by id.
    """

    key: str
    encode: Encode
    decode: Callable[[Sequence[int]], str]
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
        return np.concatenate([store.lengths(d) for store, d in self.stores])

    def first(self, documents: int) -> "EvaluationDocuments":
        """Return the set's first documents alone."""
        stores, left = [], documents
        for store, chosen in self.stores:
            stores.append((store, chosen[:left]))
            left -= len(stores[-1][1])
        return EvaluationDocuments(self.name, tuple(stores))

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
        ledger: the account of every training source, those of replay last.
        key: hash of all of it.
    """

    rows: TokenRows
    collate: CollateRows
    sets: dict[str, EvaluationDocuments]
    ledger: list[LedgerRow]
    key: str

    def batches(self, args: "TrainingArguments") -> EpochBatches:
        """Return the micro-batches of this process."""
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochBatches(len(self.rows), args.train_batch_size, seed, args.world_size, args.process_index)

    def name_rows(self, rows: Sequence[int], most: int) -> tuple[list[str], int]:
        """Return in words which documents lie in some rows, at most so many of them, and how many there are."""
        return name_documents(self.rows, rows, most)

    def ledger_as_json(self) -> list[dict[str, Any]]:
        """Return the ledger as it is saved."""
        return ledger_as_json(self.ledger)

    @property
    def training(self) -> Selections:
        """The documents of which an epoch holds something, by store."""
        return [(part.store, part.chosen_documents) for part in self.rows.parts]

    def training_tokens(self) -> Iterator[np.ndarray]:
        """Yield what an epoch holds, once each, without the EOS behind documents: runs of token ids."""
        for part in self.rows.parts:
            for document, first, end in part.chosen_pieces():
                yield part.store.document(document)[first:end]


def build_corpus(data: DataSection, sets: Mapping[str, EvaluationSet], coding: TokenCoding, seed: int) -> Corpus:
    """Tokenise all sources (or find them tokenised), split and clean them, and lay out the rows of an epoch.

    Raises:
        UserError: a source cannot be read or a split is empty.
    """
    replay = data.replay.sources if data.replay else ()
    stores = [_open(data, source, coding) for source in (*data.train, *replay)]
    # Replay is held out only where it is measured on.
    splits_replay = any(wanted.data_split == "replay" for wanted in sets.values())
    splits = [
        _split(data.validation if index < len(data.train) or splits_replay else None, store)
        for index, store in enumerate(stores)
    ]
    if not sets and data.validation is not None:
        sets = {DEFAULT_SET: EvaluationSet(split="validation")}
    held = [(store, out) for store, (_, out) in zip(stores, splits, strict=True)]
    of_splits = {"validation": held[: len(data.train)], "replay": held[len(data.train) :]}
    evaluation = {
        name: _evaluation_set(name, wanted, data, coding, of_splits)
        for name, wanted in sets.items()
        if wanted.data_split != "train"
    }
    training = [(store, train) for store, (train, _) in zip(stores, splits, strict=True)]
    cleaned = clean(training, {name: documents.stores for name, documents in evaluation.items()}, data, coding.decode)
    for source in cleaned:
        _check_left(source)
    of_splits["train"] = [(source.store, source.documents) for source in cleaned[: len(data.train)]]
    evaluation = {
        name: evaluation.get(name) or _evaluation_set(name, wanted, data, coding, of_splits)
        for name, wanted in sets.items()
    }
    parts = _mix(data, cleaned, seed)
    ledger = [
        account(part, data.packing, source, train, len(out))
        for part, source, (train, out) in zip(parts, cleaned, splits, strict=True)
    ]
    enter_shares(ledger, [source.weight for source in data.train], data.replay.share if data.replay else None)
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


def recode(chosen: Selections, data: DataSection, coding: TokenCoding) -> Selections:
    """Return the same documents as another tokenizer encodes them.

    Raises:
        UserError: a source has changed since.
    """
    result = []
    for store, documents in chosen:
        # Another tokenizer would read more of a source up to `max_tokens`, or less.
        limited = store.source.max_tokens is not None
        other = _open(data, store.source, coding, first=store.num_documents if limited else None)
        if not np.array_equal(other.hashes, store.hashes):
            raise UserError(f"data source `{store.name}`: changed while it was read; start again once it is at rest")
        result.append((other, documents))
    return result


def _mix(data: DataSection, cleaned: list[Cleaned], seed: int) -> list[TrainPart]:
    """Choose the blocks of each source that make an epoch."""
    domain = cleaned[: len(data.train)]
    num_bytes = sum(int(source.store.num_bytes[source.documents].sum()) for source in domain)
    if num_bytes < _LITTLE_TEXT:
        warn(f"the training text has {num_bytes:,} bytes; below {_LITTLE_TEXT:,} a model learns it by heart")
    layouts = [lay_out(s.store.lengths(s.documents), data.block_size, data.packing) for s in cleaned]
    sizes = [layout.sizes for layout in layouts]
    blocks = select_blocks(
        sizes[: len(domain)],
        [source.weight for source in data.train],
        seed,
        replay=(sizes[len(domain) :], data.replay.share if data.replay else 0.0),
    )
    return [
        TrainPart(source.store, source.documents, layout, chosen, data.block_size)
        for source, layout, chosen in zip(cleaned, layouts, blocks, strict=True)
    ]


def _check_left(source: Cleaned) -> None:
    """Check that a source has documents left to train on.

    Raises:
        UserError: it has not; why, is told by cause.
    """
    if len(source.documents):
        return
    name, dropped = source.store.name, source.dropped
    if set(dropped) == {ALSO_EVALUATED}:
        sets = sorted({name for example in source.examples[ALSO_EVALUATED] for name in example["sets"]})
        raise UserError(
            f"data source `{name}`: all of its {len(dropped[ALSO_EVALUATED]):,} training documents are also in the "
            f"evaluation set `{sets[0]}`; measure on other documents, or hold some out with `data.validation: "
            f"{{fraction: …}}`"
        )
    causes = [f"{cause}: {len(documents):,}" for cause, documents in dropped.items()]
    if held := source.store.num_documents - sum(map(len, dropped.values())):
        causes.insert(0, f"held out: {held:,}")
    raise UserError(
        f"data source `{name}`: none of its {source.store.num_documents:,} documents is left for training "
        f"({'; '.join(causes)})"
    )


def training_documents(data: DataSection) -> Iterator[str]:
    """Yield the texts of the training split, for whatever has to be learned from them before tokens exist.

    Of a source with `max_tokens` no more is read than so many tokens may take.
    """
    validation = data.validation
    for source in data.train:
        characters = 0
        for text in read_documents(source):
            if isinstance(text, LeftOut):
                continue
            characters += len(text)
            if source.max_tokens is not None and characters > _CHARACTERS_PER_TOKEN * source.max_tokens:
                break
            if isinstance(validation, ValidationFraction):
                digest = np.array([hash_text(text)], dtype=np.uint64)
                if held_out(digest, validation.fraction, validation.seed).any():
                    continue
            yield text


def sources_key(data: DataSection, sets: Mapping[str, EvaluationSet]) -> str:
    """Return a hash of the content of every source that is trained or measured on."""
    validation = data.validation if isinstance(data.validation, tuple) else ()
    replay = data.replay.sources if data.replay else ()
    own = [wanted for wanted in sets.values() if wanted.data_split is None]
    return hash_values([source_fingerprint(source) for source in (*data.train, *replay, *validation, *own)])


def training_documents_key(data: DataSection) -> str:
    """Return a hash of what `training_documents` yields."""
    validation = data.validation
    split = validation.model_dump() if isinstance(validation, ValidationFraction) else None
    return hash_values([(source_fingerprint(source), source.max_tokens) for source in data.train], split)


def _open(data: DataSection, source: Source, coding: TokenCoding, first: int | None = None) -> TokenStore:
    """Return the store of a source: of all that `max_tokens` lets in, or of its first documents."""
    check_unchanged = watch(source)  # before the fingerprint, which may take a while
    content = source_fingerprint(source)
    store = open_store(
        data.store_dir,
        source.name,
        content if first is None else hash_values(content, "first", first),
        coding.key,
        lambda: _first_texts(read_documents(source), first),
        coding.encode,
        coding.eos_token_id,
        coding.vocab_size,
        source.max_tokens if first is None else None,
        data.num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        check_unchanged,
    )
    # How many documents a dataset has beyond its first ones is not read.
    first_ones = source.dataset is not None and store.num_documents == source.max_documents
    return replace(store, source=source, stopped=store.stopped or first_ones)


def _first_texts(documents: Iterable[str | LeftOut], number: int | None) -> Iterator[str | LeftOut]:
    """Yield documents up to the text of this number, and what is left out before it."""
    left = number
    for document in documents:
        if isinstance(document, str) and left is not None:
            left -= 1
        yield document
        if left == 0:
            return


def _split(
    validation: ValidationFraction | tuple[Source, ...] | None, store: TokenStore
) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents of a source that train and those that are held out.

    Raises:
        UserError: the source is a single document.
    """
    everything = np.arange(store.num_documents)
    if not isinstance(validation, ValidationFraction):
        return everything, everything[:0]
    if len(everything) == 1:
        raise UserError(
            f"data source `{store.name}`: is one document, of which no fraction can be held out; cut it into documents "
            f"with `sample_by` or `separator`, or give `data.validation` files of its own"
        )
    out = held_out(store.hashes, validation.fraction, validation.seed)
    if not out.any():
        warn(f"data source `{store.name}`: none of its {len(everything):,} documents is held out for validation")
    return everything[~out], everything[out]


def _evaluation_set(
    name: str, wanted: EvaluationSet, data: DataSection, coding: TokenCoding, of_splits: Mapping[str, Selections]
) -> EvaluationDocuments:
    """Return the documents of an evaluation set: of a split, or of sources of its own."""
    split = wanted.data_split
    if split and not (split == "validation" and isinstance(data.validation, tuple)):
        pairs = of_splits[split]
    else:
        opened = [_open(data, source, coding) for source in (data.validation if split else (wanted,))]
        pairs = [(store, _documents_of(wanted, store)) for store in opened]
    chosen = _choose(pairs, wanted.max_documents)
    if not sum(len(documents) for _, documents in chosen):
        what = f"the split `{split}`" if split else f"the fraction {wanted.fraction}"
        what += f" of {sum(store.num_documents for store, _ in pairs):,} documents"
        raise UserError(
            f"evaluation set `{name}` is empty: {what} holds no document. Cut "
            f"the sources into more documents (`sample_by`, `separator`), or give `data.validation` its own files"
        )
    documents = EvaluationDocuments(name, tuple(chosen))
    different = len(np.unique(documents.hashes))
    if different < len(documents.lengths):
        say(f"evaluation set `{name}`: {len(documents.lengths):,} documents, of which {different:,} are different")
    return documents


def _documents_of(wanted: EvaluationSet, store: TokenStore) -> np.ndarray:
    """Return the documents of a source that an evaluation set takes: all, or those that a split would hold out."""
    everything = np.arange(store.num_documents)
    return everything if wanted.fraction is None else everything[held_out(store.hashes, wanted.fraction, wanted.seed)]


def _choose(pairs: Selections, most: int | None) -> Selections:
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
