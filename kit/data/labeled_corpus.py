"""From the recipe's labelled sources to rows of training examples, evaluation sets and the ledger of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kit.console import say, warn
from kit.data import row_ledger
from kit.data.augmentation import noisy_copy
from kit.data.balancing import check_balance, class_weights, oversample, row_weights
from kit.data.labeled_examples import (
    CollateLabeled,
    Encoded,
    EncodedTexts,
    EncodeTexts,
    LabeledRows,
    SequenceCoding,
    encode_texts,
    join_texts,
)
from kit.data.labeled_parts import LabeledPart, check_classes, divide, read_part
from kit.data.labels import LabelSet, encode, label_set
from kit.data.row_ledger import RowLedger
from kit.data.sampling import EpochBatches
from kit.data.sources import source_fingerprint
from kit.data.splits import choose_documents
from kit.errors import UserError
from kit.files import hash_values
from kit.recipe.classification import Augment, LabeledDataSection, LabeledEvaluationSection, LabeledSource

if TYPE_CHECKING:
    from transformers import TrainingArguments

_MOST_WEIGHTS = 20
_NO_LIMIT = "as many tokens as the model has positions, since `data.max_length` is not given"


@dataclass(frozen=True)
class LabeledSet:
    """A set of labelled texts that is measured, or that a baseline learns from.

    Attributes:
        name: of the set.
        texts: the texts.
        pairs: their second texts, or None.
        labels: int64 (rows,), or bool (rows, classes).
        where: file and line, or row, of each.
        rows: the same as tokens, each with weight 1.
    """

    name: str
    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    where: list[str]
    rows: LabeledRows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def first(self, number: int) -> "LabeledSet":
        """Return at most `number` rows, the first."""
        rows = LabeledRows(self.rows.texts, *(a[:number] for a in (self.rows.chosen, self.labels, self.rows.weights)))
        pairs = None if self.pairs is None else self.pairs[:number]
        return LabeledSet(self.name, self.texts[:number], pairs, self.labels[:number], self.where[:number], rows)

    @cached_property
    def key(self) -> str:
        """Hash of texts, labels and tokens."""
        return hash_values(self.texts, self.pairs, self.rows.key)


@dataclass(frozen=True)
class LabeledCorpus:
    """Everything that a classifier trains and is measured on.

    Attributes:
        rows: the training rows of one epoch, repeated and noisy ones included.
        collate: makes a batch of rows.
        sets: the evaluation sets: validation, train_sample, test, then those that the recipe names.
        final_sets: those that are measured at the end alone.
        train: the training part before rows are repeated or copied.
        origins: int64 (rows,), which of them each of `rows` is or was made from.
        labels: the classes.
        class_weights: float64 (classes,), or None where all rows weigh the same.
        ledger: the account of each part, the training part first.
        group_by_length: whether rows of similar length make a batch.
        max_tokens_per_batch: positions of such a batch at most, or None.
        limit: what decides how much of a text is read, in words.
        encode: of `SequenceCoding`, for texts that are in no set.
        key: hash of all of it.
    """

    rows: LabeledRows
    collate: CollateLabeled
    encode: EncodeTexts
    sets: dict[str, LabeledSet]
    final_sets: tuple[str, ...]
    train: LabeledSet
    origins: np.ndarray
    labels: LabelSet
    class_weights: np.ndarray | None
    ledger: list[RowLedger]
    group_by_length: bool
    max_tokens_per_batch: int | None
    limit: str
    key: str

    def batches(self, args: "TrainingArguments") -> EpochBatches:
        """Return the micro-batches of this process."""
        return self.rows.batches(
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
            args.world_size,
            args.process_index,
            self.group_by_length,
            self.max_tokens_per_batch,
        )

    def name_rows(self, rows: Sequence[int], most: int) -> tuple[list[str], int]:
        """Return in words where some rows were read, at most so many of them, and how many there are."""
        copies = self.rows.chosen >= len(self.train)
        lines = [
            f"row {row}: {self.train.where[self.origins[row]]}{' (a noisy copy)' if copies[row] else ''}"
            for row in rows[:most]
        ]
        return lines, len(rows)

    def collate_encoded(self, texts: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Return a batch of texts without labels, as `SequenceCoding.encode` returns them."""
        rows = [{"input_ids": ids} | ({} if types is None else {"token_type_ids": types}) for ids, types, _ in texts]
        return self.collate(rows)

    def report(self) -> None:
        """Print the rows of each class in each part, and what was left out, repeated, cut or weighted."""
        row_ledger.print_row_ledger(self.ledger, self.limit)
        if self.class_weights is not None:
            weights = sorted(zip(self.class_weights.tolist(), self.labels.names, strict=True))
            if len(weights) > _MOST_WEIGHTS:
                weights = [weights[0], weights[-1]]
            of = "" if len(weights) == len(self.labels.names) else f" of {len(self.labels.names):,} classes from, to"
            say(f"class weights{of}: " + ", ".join(f"{name} {weight:.4g}" for weight, name in weights))
        if (most := self.max_tokens_per_batch) and (longer := int((self.rows.lengths > most).sum())):
            warn(f"{longer:,} training rows have more than `data.max_tokens_per_batch` {most:,}: each is a batch alone")

    def ledger_as_json(self) -> list[dict[str, Any]]:
        """Return the ledger as it is saved."""
        return row_ledger.ledger_as_json(self.ledger)


def labeled_sources_key(data: LabeledDataSection, evaluation: LabeledEvaluationSection) -> str:
    """Return a hash of the content of every source that is trained or measured on."""
    sources = _sources(data, evaluation)
    return hash_values([(name, [source_fingerprint(source) for source in of]) for name, of in sources.items()])


def build_labeled_corpus(
    data: LabeledDataSection, evaluation: LabeledEvaluationSection, coding: SequenceCoding
) -> LabeledCorpus:
    """Read all sources, split, clean and balance them, and lay out the rows of an epoch and the evaluation sets.

    Args:
        data: the recipe's section.
        evaluation: the recipe's section.
        coding: of the tokenizer.

    Raises:
        UserError: a source cannot be read, a part is empty, or a class has no training row.
    """
    parts = {name: read_part(name, sources) for name, sources in _sources(data, evaluation).items()}
    labels = label_set(parts["train"].rows, data.label_names, data.min_rows_per_label)
    check_balance(data.balancing, labels)
    for name, part in parts.items():
        part.labels = encode(part.rows, labels, name)
        if not labels.multi:
            part.drop(f"class of fewer than {data.min_rows_per_label:,} rows", part.labels < 0)
        if not len(part):
            causes = row_ledger.causes_of(part.ledger.dropped)
            raise UserError(f"{name}: no row is left ({causes}); lower `data.min_rows_per_label`")
    read = labels.matrix(parts["train"].labels).sum(axis=0)
    parts = divide(data, parts, labels)
    check_classes(parts, labels, read)
    train = parts.pop("train")
    seen = _labeled_set(train, "train", _encode_part(train, coding))
    weights = class_weights(train.labels, labels, data.balancing)
    rows, origins = _epoch(train, seen, data, coding, weights)
    train.ledger.enter_rows(rows.labels, labels, rows.lengths, rows.uncut)
    measured = {name: _labeled_set(part, name, _encode_part(part, coding)) for name, part in parts.items()}
    if evaluation.train_sample:
        sampled = choose_documents(train.hashes, np.arange(len(train)), evaluation.train_sample)
        parts["train_sample"] = sample = train.take(sampled, RowLedger("train_sample"))
        measured["train_sample"] = _labeled_set(sample, "train_sample", seen.rows.texts, sampled)
    order = ("validation", "train_sample", "test", *evaluation.sets)
    sets = {name: measured[name] for name in order if name in measured}
    for name, of_set in sets.items():
        parts[name].ledger.enter_rows(of_set.labels, labels, of_set.rows.lengths, of_set.rows.uncut)
    return LabeledCorpus(
        rows=rows,
        collate=CollateLabeled(coding.pad_token_id, coding.padding_side, coding.positions),
        encode=coding.encode,
        sets=sets,
        final_sets=tuple(name for name in sets if name not in ("validation", "train_sample")),
        train=seen,
        origins=origins,
        labels=labels,
        class_weights=weights,
        ledger=[train.ledger, *(parts[name].ledger for name in sets)],
        group_by_length=data.group_by_length,
        max_tokens_per_batch=data.max_tokens_per_batch,
        limit=f"`data.max_length: {data.max_length}`" if data.max_length else _NO_LIMIT,
        key=hash_values(
            rows.key, seen.key, [(name, s.key) for name, s in sets.items()], labels.names, labels.multi, coding.key
        ),
    )


def _sources(data: LabeledDataSection, evaluation: LabeledEvaluationSection) -> dict[str, Sequence[LabeledSource]]:
    parts = {name: sources for name in ("train", "validation", "test") if (sources := getattr(data, name))}
    return parts | {name: (source,) for name, source in evaluation.sets.items()}


def _encode_part(part: LabeledPart, coding: SequenceCoding) -> EncodedTexts:
    return encode_texts(part.texts, part.pairs, [row.where for row in part.rows], coding)


def _labeled_set(part: LabeledPart, name: str, texts: EncodedTexts, chosen: np.ndarray | None = None) -> LabeledSet:
    chosen = np.arange(len(part)) if chosen is None else chosen
    rows = LabeledRows(texts, chosen, part.labels, row_weights(part.labels, None))
    return LabeledSet(name, part.texts, part.pairs, part.labels, [row.where for row in part.rows], rows)


def _epoch(
    train: LabeledPart, seen: LabeledSet, data: LabeledDataSection, coding: SequenceCoding, weights: np.ndarray | None
) -> tuple[LabeledRows, np.ndarray]:
    """Return the training rows of an epoch, and which row each is or was made from: int64 (rows,).

    Each row as it is, those that balance repeats, and noisy copies of both.
    """
    texts, chosen = seen.rows.texts, np.arange(len(train))
    if data.balancing and data.balancing.method == "oversample":
        chosen = oversample(train.hashes, train.labels, data.balancing.seed)
        train.ledger.repeated = len(chosen) - len(train)
    rows = chosen
    if data.augment is not None:
        # A row that is repeated gets other copies each time.
        repeats = np.arange(len(chosen)) - np.searchsorted(chosen, chosen)
        numbers = (repeats[:, None] * data.augment.copies + np.arange(data.augment.copies)).ravel()
        copied = np.repeat(chosen, data.augment.copies)
        texts = join_texts(texts, _noisy_copies(train, copied, numbers, data.augment, coding))
        chosen = np.concatenate([chosen, len(train) + np.arange(len(copied))])
        rows = np.concatenate([rows, copied])
    labels = train.labels[rows]
    return LabeledRows(texts, chosen, labels, row_weights(labels, weights)), rows


def _noisy_copies(
    train: LabeledPart, copied: np.ndarray, numbers: np.ndarray, augment: Augment, coding: SequenceCoding
) -> EncodedTexts:
    """Return a noisy copy of each of the rows `copied`, the one of that number, and count them."""
    rows = [train.rows[index] for index in copied.tolist()]
    texts = [noisy_copy(row.text, augment, number) for row, number in zip(rows, numbers.tolist(), strict=True)]
    pairs = None
    if train.pairs is not None:
        pairs = [noisy_copy(row.pair, augment, number) for row, number in zip(rows, numbers.tolist(), strict=True)]
    compared = zip(rows, texts, pairs or [None] * len(rows), strict=True)
    train.ledger.copies = len(rows)
    train.ledger.unchanged_copies = sum((row.text, row.pair) == (text, pair) for row, text, pair in compared)
    return encode_texts(texts, pairs, [row.where for row in rows], coding)
