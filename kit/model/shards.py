"""Parameters in shards over the processes (FSDP2, ZeRO-3): read whole where saved, and written where loaded.

What reads is to be called on every process in the same order: each tensor is put together from what all of them hold.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kit.console import is_main_process


def in_shards(model: nn.Module) -> bool:
    """Return whether a model's parameters are in shards."""
    return isinstance(model, FSDPModule) or any(_is_of_zero(parameter) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is without shards, on every process, and without its gradient."""
    if _is_of_zero(tensor):
        with _gathered(tensor):
            return tensor.detach().clone()
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape that a tensor has without shards; ZeRO-3 leaves an empty one."""
    return tensor.ds_shape if _is_of_zero(tensor) else tensor.shape


def _is_of_zero(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def _gathered(tensor: torch.Tensor, changes: bool = False) -> AbstractContextManager:
    """Return a context in which a parameter that ZeRO-3 has cut up is whole; others are left as they are."""
    if not _is_of_zero(tensor):
        return nullcontext()
    import deepspeed  # which only those have who asked for it

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if changes else None)


@torch.no_grad()
def gather(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors whole and in CPU memory on the first process, nothing elsewhere; tied ones are one there too."""
    gathered: dict[int, torch.Tensor] = {}
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        full = whole(tensor)
        if is_main_process():
            gathered[id(tensor)] = full.cpu()
    return {name: gathered[id(tensor)] for name, tensor in tensors.items() if id(tensor) in gathered}


@torch.no_grad()
def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value, which every process has, into a tensor, of which each may hold a part."""
    with _gathered(tensor, changes=True):
        local, start = _own_part(tensor)
        local.copy_(value[tuple(slice(first, first + size) for first, size in zip(start, local.shape, strict=True))])


@torch.no_grad()
def write_rows(matrix: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Write some whole rows, which every process has, into a matrix, of which each may hold a part."""
    with _gathered(matrix, changes=True):
        local, start = _own_part(matrix)
        own = (ids >= start[0]) & (ids < start[0] + len(local))
        local[(ids[own] - start[0]).to(local.device)] = rows[own.to(rows.device)].to(local.device, local.dtype)


def _own_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what this process holds of a tensor, in its own memory, and where in the whole that begins."""
    if not isinstance(tensor, DTensor):
        return tensor.data, (0,) * tensor.dim()
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), start


def load(model: nn.Module, folder: str | Path) -> None:
    """Load what `save_pretrained` wrote of a model under the names that it has in memory; each process reads the files.

    Raises:
        RuntimeError: the files do not hold every tensor, or others.
    """
    ours = model.state_dict(keep_vars=True)
    found = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                if name in ours:
                    write(ours[name], file.get_tensor(name))
                found.add(name)
    tied = {id(ours[name]) for name in found & ours.keys()}
    missing = {name for name, tensor in ours.items() if name not in found and id(tensor) not in tied}
    if missing or found - ours.keys():
        unexpected = sorted(found - ours.keys())
        raise RuntimeError(f"{folder} and the model differ: missing {sorted(missing)}, unexpected {unexpected}")
