"""Labelled texts as tokens: encoded once, laid out as rows, padded into batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from kit.console import progress
from kit.data.sampling import EpochBatches, LengthBatches
from kit.errors import UserError
from kit.files import hash_array, hash_values

_TEXTS_AT_ONCE = 1000

# Token ids with special tokens, cut to what is read; their types; how many there were before.
Encoded = tuple[list[int], list[int] | None, int]
EncodeTexts = Callable[[list[str], list[str] | None], list[Encoded]]


@dataclass(frozen=True)
class SequenceCoding:
    """What the data needs to know of a tokenizer and a model.

    Attributes:
        key: hash of the tokenizer and of how texts are cut.
        encode: texts, and second texts or None, to the token ids of each with its special tokens, cut to what is
            read, its token type ids or None, and its number of tokens before it was cut.
        pad_token_id: fills rows up; masked by length, never by id.
        padding_side: "right" or "left".
        positions: whether batches hold `position_ids`, counted from the first real token (decoders).
    """

    key: str
    encode: EncodeTexts
    pad_token_id: int
    padding_side: str = "right"
    positions: bool = False


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as tokens, in flat arrays.

    Attributes:
        tokens: int32 (tokens,), of one text after the other.
        token_types: uint8 (tokens,), or None.
        offsets: int64 (texts + 1,), where each text begins.
        uncut: int64 (texts,), tokens of each before it was cut.
    """

    tokens: np.ndarray
    token_types: np.ndarray | None
    offsets: np.ndarray
    uncut: np.ndarray


class LabeledRows(Dataset):
    """Examples: token ids with their special tokens, labels, and what each counts in the loss.

    Row i is a dictionary of arrays: `input_ids` and, where the model has them, `token_type_ids`: int64 (tokens,);
    `labels`: int64 (), or float32 (classes,) where a row has any number of them; `weights`: float32 of that shape.
    """

    def __init__(self, texts: EncodedTexts, chosen: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
        """Lay out the rows.

        Args:
            texts: the texts, which several sets of rows may share.
            chosen: int64 (rows,), the text of each row.
            labels: int64 (rows,), or bool (rows, classes).
            weights: float32, of the shape of `labels`.
        """
        self.texts, self.chosen = texts, chosen
        self.labels, self.weights = labels, weights
        self.lengths = np.diff(texts.offsets)[chosen]
        self.uncut = texts.uncut[chosen]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return one row; index -1 is a row of one token and weight 0, for processes that have none left."""
        nothing = index == -1
        start, end = self.texts.offsets[self.chosen[0 if nothing else index] + np.arange(2)]
        span = slice(start, start + 1 if nothing else end)
        row = {"input_ids": self.texts.tokens[span].astype(np.int64)}
        if self.texts.token_types is not None:
            row["token_type_ids"] = self.texts.token_types[span].astype(np.int64)
        labels, weights = self.labels[0 if nothing else index], self.weights[0 if nothing else index]
        row["labels"] = np.asarray(labels, dtype=np.int64 if labels.ndim == 0 else np.float32)
        row["weights"] = np.zeros_like(weights) if nothing else np.asarray(weights)
        return row

    @cached_property
    def key(self) -> str:
        """Hash of tokens, labels and weights."""
        texts = [self.texts.tokens, self.texts.offsets, self.chosen, self.labels, self.weights]
        types = None if self.texts.token_types is None else hash_array(self.texts.token_types)
        return hash_values([hash_array(array) for array in texts], types, self.labels.shape)

    def batches(
        self,
        batch_size: int,
        accumulation: int,
        seed: int,
        num_processes: int,
        process_index: int,
        by_length: bool,
        max_tokens: int | None,
    ) -> EpochBatches:
        """Return the micro-batches of a process.

        Args:
            batch_size: rows of a micro-batch on one process, at most.
            accumulation: micro-batches of an optimizer step.
            seed: of the shuffle.
            num_processes: processes that share the rows.
            process_index: which of them this is.
            by_length: whether rows of similar length make a batch.
            max_tokens: with `by_length`, positions of a micro-batch at most, padding included.
        """
        if by_length:
            return LengthBatches(self.lengths, batch_size, seed, num_processes, process_index, max_tokens)
        return EpochBatches(len(self), batch_size, seed, num_processes, process_index, self.lengths, accumulation)


@dataclass(frozen=True)
class CollateLabeled:
    """Makes a batch of rows, padded to the longest of them.

    Attributes:
        pad_token_id: fills rows up.
        padding_side: "right" or "left".
        positions: whether the batch holds `position_ids`.
    """

    pad_token_id: int
    padding_side: str = "right"
    positions: bool = False

    def __call__(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and, where there are, `token_type_ids` and `position_ids`.

        These are int64 (rows, positions); `labels` and `weights`, where rows have them, (rows,) or (rows, classes).
        """
        lengths = np.array([len(row["input_ids"]) for row in rows])
        places = np.arange(lengths.max())
        before = lengths.max() - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        real = (places >= before[:, None]) & (places < (before + lengths)[:, None])
        batch = {}
        for name, filler in (("input_ids", self.pad_token_id), ("token_type_ids", 0)):
            if name in rows[0]:
                batch[name] = np.full(real.shape, filler, dtype=np.int64)
                batch[name][real] = np.concatenate([row[name] for row in rows])
        batch["attention_mask"] = real.astype(np.int64)
        if self.positions:
            batch["position_ids"] = np.maximum(real.cumsum(axis=1) - 1, 0)
        batch |= {name: np.stack([row[name] for row in rows]) for name in ("labels", "weights") if name in rows[0]}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def count_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of tokens of a batch's examples, without padding and what weighs nothing: int64 scalar."""
    weighs = batch["weights"].reshape(len(batch["weights"]), -1).any(-1)
    return (batch["attention_mask"].sum(-1) * weighs).sum()


def encode_texts(
    texts: Sequence[str], pairs: Sequence[str] | None, where: Sequence[str], coding: SequenceCoding
) -> EncodedTexts:
    """Encode texts, with their second texts where they have some.

    Raises:
        UserError: a text has no token.
    """
    tokens, types, lengths, uncut = [], [], np.empty(len(texts), np.int64), np.empty(len(texts), np.int64)
    for start in progress(range(0, len(texts), _TEXTS_AT_ONCE), "tokenising", -(-len(texts) // _TEXTS_AT_ONCE)):
        end = start + _TEXTS_AT_ONCE
        encoded = coding.encode(list(texts[start:end]), None if pairs is None else list(pairs[start:end]))
        for index, (ids, types_of_ids, before) in enumerate(encoded, start=start):
            if not ids:
                raise UserError(f"{where[index]}: the tokenizer makes no token of this text")
            tokens.append(np.array(ids, dtype=np.int32))
            if types_of_ids is not None:
                types.append(np.array(types_of_ids, dtype=np.uint8))
            lengths[index], uncut[index] = len(ids), before
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return EncodedTexts(np.concatenate(tokens), np.concatenate(types) if types else None, offsets, uncut)


def join_texts(one: EncodedTexts, other: EncodedTexts) -> EncodedTexts:
    """Return the texts of two arrays in one."""
    types = None if one.token_types is None else np.concatenate([one.token_types, other.token_types])
    offsets = np.concatenate([one.offsets, one.offsets[-1] + other.offsets[1:]])
    return EncodedTexts(
        np.concatenate([one.tokens, other.tokens]), types, offsets, np.concatenate([one.uncut, other.uncut])
    )
