"""A loss or gradient that is NaN or infinite: told with the documents of the step, on all processes alike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import TrainingArguments

_MOST_NAMED = 20
NameRows = Callable[[Sequence[int], int], tuple[list[str], int]]


@dataclass(frozen=True)
class Suspects:
    """Documents among which the cause is.

    Attributes:
        where: process, micro-batch and rows that they lie in.
        lines: the first of them in words.
        number: how many there are.
    """

    where: str
    lines: list[str]
    number: int


def suspects_by_loss(
    losses: torch.Tensor,
    micro_batches: Sequence[Sequence[int]],
    loss_of_row: Callable[[int], torch.Tensor] | None,
    name_rows: NameRows,
    args: TrainingArguments,
) -> list[Suspects]:
    """Return the documents of this process's micro-batches whose loss is no number.

    Args:
        losses: of the step's micro-batches so far: (micro-batches,).
        micro_batches: the rows of each.
        loss_of_row: the loss of a row alone, to find the guilty among several; None where that cannot be had.
        name_rows: the documents of some rows in words, at most so many, and how many there are.
        args: of the run.
    """
    found = []
    for number, (loss, rows) in enumerate(zip(losses.tolist(), micro_batches, strict=False), start=1):
        if math.isfinite(loss):
            continue
        rows = [row for row in rows if row >= 0]
        which = "in its rows"
        if loss_of_row and len(rows) > 1:
            alone = [row for row in rows if not loss_of_row(row).isfinite()]
            which = f"in {len(alone) or 'none'} of its {len(rows)} rows alone"
            rows = alone or rows
        where = f"process {args.process_index}, micro-batch {number} of {len(micro_batches)}: the loss is {loss}"
        found.append(Suspects(f"{where}, {which}:", *name_rows(rows, _MOST_NAMED)))
    return found


def suspects_by_gradient(
    micro_batches: Sequence[Sequence[int]], name_rows: NameRows, args: TrainingArguments
) -> list[Suspects]:
    """Return all documents that this process has in the step: its gradient no longer tells where it comes from."""
    rows = [row for batch in micro_batches for row in batch if row >= 0]
    where = f"process {args.process_index}, {len(micro_batches)} micro-batches, each with a finite loss; rows:"
    return [Suspects(where, *name_rows(rows, _MOST_NAMED))] if rows else []


def tell_suspects(step: int, what: str, own: list[Suspects]) -> str:
    """Return what all processes found in a step, on each of them.

    Args:
        step: the optimizer step, counted from 1.
        what: `loss` or `gradient`.
        own: what this process found.
    """
    of_all = [own]
    if dist.is_initialized():
        of_all = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, own)
    found = [suspects for each in of_all for suspects in each]
    lines, left = [], _MOST_NAMED
    for suspects in found[:_MOST_NAMED]:
        lines += [f"  {suspects.where}", *(f"    {line}" for line in suspects.lines[:left])]
        if more := suspects.number - len(suspects.lines[:left]):
            lines.append(f"    and {more:,} more documents")
        left = max(0, left - len(suspects.lines))
    if more := len(found) - _MOST_NAMED:
        lines += [f"  and {more:,} more micro-batches"] * (more > 0)
    return "\n".join([f"step {step:,}: the {what} is no number (NaN or infinite)", *lines])


def advice(args: TrainingArguments, skipped: int) -> str:
    """Return what helps against a loss or gradient that is no number."""
    clipping = "a lower" if args.max_grad_norm else "a"
    skip = "`run.skip_nonfinite_steps` leaves so many such steps out and goes on"
    if skipped:
        skip = f"{skipped:,} steps have been left out, as many as `run.skip_nonfinite_steps` allows"
    return (
        f"look at these documents; if nothing is wrong with them, training has diverged: lower "
        f"`training.learning_rate`, lengthen `training.warmup_steps`, set {clipping} `training.max_grad_norm`; {skip}"
    )
