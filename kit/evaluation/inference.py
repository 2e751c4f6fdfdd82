"""A model over many rows in batches, shared out over the processes, the same figures whatever their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from kit.console import progress


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and into the precision of its weights, and back.

    float32 stays float32: a GPU that trains in TF32 does not evaluate in it, so that figures of any two machines can be
    compared. Weights that FSDP2 keeps in shards are in shards again after it.
    """
    was_training = model.training
    model.eval()
    matmul = torch.backends.cuda.matmul
    of_training, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    # accelerate patches autocast into the `forward` of the model that it prepares, where it would also round this.
    patched = model.__dict__.get("forward") if "_original_forward" in model.__dict__ else None
    if patched is not None:
        model.forward = model.__dict__["_original_forward"]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    policies: list[MixedPrecisionPolicy] = []
    try:
        for module in sharded:
            policies.append(_set_precision(module, MixedPrecisionPolicy()))
        yield
    finally:
        for module, policy in zip(sharded, policies, strict=False):
            _set_precision(module, policy)
        if patched is not None:
            model.forward = patched
        matmul.fp32_precision = of_training
        model.train(was_training)


def _set_precision(module: FSDPModule, policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Let FSDP2 gather a module's weights, and compute, in another precision; return the one before.

    It has no function for this. What it has gathered is let go: after a forward pass alone it keeps some.
    """
    module.reshard()
    state = module._get_fsdp_state()
    before, state._mp_policy = state._mp_policy, policy
    for group in state._fsdp_param_groups:
        group.mp_policy = policy
        for parameter in group.fsdp_params:
            parameter.mp_policy = policy
            parameter.init_dtype_attrs(policy)
            parameter.all_gather_outputs = []
            parameter.__dict__.pop("_unsharded_param", None)
    return before


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
            # A process that has run out of batches computes one of the others': where each has a part of the weights,
            # all have to go through the model equally often.
            batch = batch_of_each_rank[min(rank, len(batch_of_each_rank) - 1)]
            scored = score(batch).double().cpu()
            if rank < len(batch_of_each_rank):
                scores[batch] = scored
    if processes > 1:
        # NCCL reduces what is on the GPU, gloo what is on the CPU; the model's device is right for both.
        on_device = scores.to(next(model.parameters()).device)
        dist.all_reduce(on_device)  # zeros of all processes but one: a copy, nothing is rounded
        scores = on_device.cpu()
    return scores.numpy()
