"""A model over many rows in batches, shared out over the processes, the same figures whatever their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from kit.console import progress


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and into the precision of its weights, and back."""
    was_training = model.training
    model.eval()
    # accelerate patches autocast into the `forward` of the model that it prepares, where it would also round this.
    patched = model.__dict__.get("forward") if "_original_forward" in model.__dict__ else None
    if patched is not None:
        model.forward = model.__dict__["_original_forward"]
    try:
        yield
    finally:
        if patched is not None:
            model.forward = patched
        model.train(was_training)


def batches_of(lengths: np.ndarray, max_positions: int) -> list[np.ndarray]:
    """Group rows, sorted longest first, into batches of at most `max_positions` positions (or one row): indices."""
    batches, start = [], 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, max_positions // max(1, int(lengths[start]))))
        batches.append(np.arange(start, end))
        start = end
    return batches


@torch.no_grad()
def score_in_batches(
    model: torch.nn.Module,
    lengths: np.ndarray,
    columns: int,
    score: Callable[[Sequence[int]], torch.Tensor],
    max_positions: int,
    description: str,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Score every row once, longest first; which rows are together depends on their lengths alone.

    Args:
        model: put into evaluation mode and the precision of its weights meanwhile.
        lengths: positions that each row takes: int64 (rows,).
        columns: scores of a row.
        score: returns the scores of the rows with the given indices: (number of them, columns).
        max_positions: a batch holds at most so many, padding included, but always one row.
        description: what the progress display says.
        poll: called between batches, on all processes equally often; may raise to interrupt.

    Returns:
        The scores of all rows, whole on every process: float64 (rows, columns).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches = [order[batch].tolist() for batch in batches_of(np.asarray(lengths)[order], max_positions)]
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rounds = [batches[start : start + processes] for start in range(0, len(batches), processes)]
    scores = torch.zeros((len(lengths), columns), dtype=torch.float64)
    with inference(model):
        for batch_of_each_rank in progress(rounds, description, total=len(lengths), size=lambda r: sum(map(len, r))):
            poll()
            if rank < len(batch_of_each_rank):
                batch = batch_of_each_rank[rank]
                scores[batch] = score(batch).double().cpu()
    if processes > 1:
        # NCCL reduces what is on the GPU, gloo what is on the CPU; the model's device is right for both.
        on_device = scores.to(next(model.parameters()).device)
        dist.all_reduce(on_device)  # zeros of all processes but one: a copy, nothing is rounded
        scores = on_device.cpu()
    return scores.numpy()
