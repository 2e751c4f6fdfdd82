"""A checkpoint: named tensors that are read one at a time, and what its files say beside them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed, and anew each time.

    Attributes:
        shape: its sizes.
        dtype: its type.
        read: returns it, on the CPU; nobody keeps it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def parameters(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, in the order of their file.

    Attributes:
        path: the file or folder that it was read from.
        format: of its files, in words, such as `safetensors, 3 shards`.
        tensors: what it holds.
        settings: what its files say of the architecture, under their own names: `model_args`, `config.json`, a header.
        notes: what was done to read it, such as a prefix that was taken from all names.
    """

    path: Path
    format: str
    tensors: dict[str, LazyTensor]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def computed(compute: Callable[..., torch.Tensor], of: Iterable[LazyTensor]) -> LazyTensor:
    """Return the tensor that a function makes of others; its shape and type come from a run without data."""
    of = list(of)
    empty = compute(*(torch.empty(each.shape, dtype=each.dtype, device="meta") for each in of))
    return LazyTensor(tuple(empty.shape), empty.dtype, lambda: compute(*(each.read() for each in of)).contiguous())
