"""What a classifier says of labelled rows: logits, and the probabilities that follow from them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy.special import expit, softmax

from kit.errors import UserError
from kit.evaluation.inference import score_in_batches

# What a collator may put beside the inputs, and no model is to see here.
_NO_INPUTS = ("labels", "weights")


class Rows(Protocol):
    """Encoded rows to classify."""

    lengths: np.ndarray  # int64 (rows,), tokens of each

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return a row as the collator takes it."""


def predict_logits(
    model: torch.nn.Module,
    rows: Rows,
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, torch.Tensor]],
    max_positions: int,
    poll: Callable[[], None] = lambda: None,
    name: str = "",
) -> np.ndarray:
    """Return the logits of every row, whole on every process: float64 (rows, classes).

    The model computes in evaluation mode and in the precision of its weights. Which rows are together in a batch
    depends on their lengths alone, so the result does not depend on the number of processes.

    Args:
        model: returns `logits` (rows, classes).
        rows: what to classify.
        collate: makes a batch of rows; of what it returns, `labels` and `weights` are not given to the model.
        max_positions: a batch holds at most so many, padding included, but always one row.
        poll: called between batches, on all processes equally often; may raise to interrupt.
        name: of the rows, for progress and messages.

    Raises:
        UserError: a logit is not finite.
    """
    device = next(model.parameters()).device
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_cache = "use_cache" in inspect.signature(type(base).forward).parameters
    options = {"use_cache": False} if takes_cache else {}

    def score(indices: Sequence[int]) -> torch.Tensor:
        batch = collate([rows[index] for index in indices])
        inputs = {key: tensor.to(device) for key, tensor in batch.items() if key not in _NO_INPUTS}
        return model(**inputs, **options).logits

    logits = score_in_batches(
        model, rows.lengths, base.config.num_labels, score, max_positions, f"measuring {name}".rstrip(), poll
    )
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise UserError(
            f"{name or 'rows'}: the model gives {broken:,} of {len(logits):,} rows logits that are not finite: its "
            f"weights have gone to pieces (a lower `training.learning_rate`, or `training.bf16` in place of `fp16`)"
        )
    return logits


def probabilities(logits: np.ndarray, multi: bool) -> np.ndarray:
    """Return the probability of each class, or with `multi` of each label by itself: float64 (rows, classes)."""
    logits = np.asarray(logits, dtype=np.float64)
    return expit(logits) if multi else softmax(logits, axis=1)
