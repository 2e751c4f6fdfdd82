"""Rows of a batch by their content, which is what the frozen-prefix cache knows them by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

# Of each row of a batch: digest, first position, and length without padding.
Rows = Sequence[tuple[bytes, int, int]]
Collate = Callable[[list[Mapping[str, np.ndarray]]], dict[str, torch.Tensor]]

_ROWS = "prefix_rows"  # in a batch
_NOT_READ = {"labels", "weights", "shift_labels"}  # of a row, by the model below its head
_READ = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_OTHER_INPUTS = ("inputs_embeds", "past_key_values", "use_cache")
_PROBED_POSITIONS = 64


@dataclass(frozen=True)
class CollateNamed:
    """Collates rows, and names them in the batch by a digest of what the model reads of each."""

    collate: Collate

    def __call__(self, rows: list[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Return the batch of `collate`, with the names."""
        batch = self.collate(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        padded = batch["input_ids"].shape[1]
        # Padding on the left shows in the mask.
        left = [mask is not None and not bool(mask[0]) for mask in batch.get("attention_mask", [None] * len(rows))]
        starts = [padded - length if is_left else 0 for length, is_left in zip(lengths, left, strict=True)]
        digests = [_digest("training", {k: v for k, v in row.items() if k not in _NOT_READ}) for row in rows]
        return {**batch, _ROWS: list(zip(digests, starts, lengths, strict=True))}


def _digest(purpose: str, row: Mapping[str, np.ndarray]) -> bytes:
    digest = xxhash.xxh3_128(purpose.encode())
    for name in sorted(row):
        values = np.ascontiguousarray(row[name])
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.digest()


def take_rows(batch: dict[str, Any]) -> Rows | None:
    """Return the names that `CollateNamed` gave the rows of a batch, which has them no longer."""
    return batch.pop(_ROWS, None)


def rows_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rows | None:
    """Return names of the rows that a model is called with in an evaluation; None where it is not to be served.

    These are whole rows with their padding: an evaluation has the same batches each time.
    """
    if args or kwargs.get("input_ids") is None or any(kwargs.get(name) for name in _OTHER_INPUTS):
        return None
    given = {name: kwargs[name].cpu().numpy() for name in _READ if kwargs.get(name) is not None}
    rows, length = given["input_ids"].shape
    return [(_digest("evaluation", {k: v[row] for k, v in given.items()}), 0, length) for row in range(rows)]


def probe_batch(rows: Sequence[Mapping[str, np.ndarray]], collate: Collate) -> dict[str, torch.Tensor]:
    """Return a batch of the first positions of some rows, as the model reads it."""
    short = []
    for row in rows:
        length = len(row["input_ids"])
        of_positions = {name for name, values in row.items() if np.shape(values)[:1] == (length,)}
        short.append({k: v[:_PROBED_POSITIONS] if k in of_positions else v for k, v in row.items()})
    return {name: tensor for name, tensor in collate(short).items() if name not in _NOT_READ}
