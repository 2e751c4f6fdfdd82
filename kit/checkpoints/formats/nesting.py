"""What a file's dictionaries hold: the tensors, under dotted names, and what lies beside them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from kit.checkpoints.checkpoint import LazyTensor
from kit.errors import UserError
from kit.names import fold_names

# Training loops wrap the tensors in these, the first before the others; `app` is of PyTorch's own examples of DCP.
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "params", "app")
_DEEPEST = 2
_TENSORS = (Tensor, np.ndarray, LazyTensor)
_PLAIN = (str, int, float, bool, type(None))


@dataclass
class Content:
    """What was found.

    Attributes:
        leaves: tensors by name, as they were: a torch tensor, a numpy array or a lazy tensor.
        keys: the keys and indices that lead to each.
        settings: the plain values that lie beside the tensors, under the file's own names.
        notes: what was unwrapped and left out, in words.
    """

    leaves: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def unwrap(where: object, content: Any) -> Content:
    """Take the tensors out of nested dictionaries and lists; a state dict in wrappers is found in them.

    Args:
        where: for messages.
        content: what a file holds.

    Raises:
        UserError: it holds no tensors, or two under one name.
    """
    found, inside = Content(), ()
    for _ in range(_DEEPEST):
        wrapper = next((key for key in WRAPPERS if _wraps(content, key)), None)
        if wrapper is None:
            break
        for key, value in content.items():
            if key != wrapper:
                _keep(found, key, value)
        content, inside = content[wrapper], (*inside, wrapper)
    if inside:
        found.notes.append(f"the tensors were taken from `{'.'.join(inside)}`")
    left_out = []
    for keys, leaf in _leaves(content):
        name = ".".join(map(str, keys))
        if len(keys) > 1 and not inside and _is_optimizer(keys[0]):
            left_out.append(str(keys[0]))
        elif not isinstance(leaf, _TENSORS):
            left_out.append(name or type(leaf).__name__)
        elif name in found.leaves:
            raise UserError(f"{where}: holds two tensors of the name `{name}`")
        else:
            found.leaves[name], found.keys[name] = leaf, (*inside, *keys)
    if not found.leaves or "" in found.leaves:
        held = "one tensor without a name" if found.leaves else fold_names(left_out) or "nothing"
        raise UserError(f"{where}: holds no named tensors, but {held}; expected a state dict")
    if left_out:
        found.notes.append(f"left out, since they are no tensors of the model: {fold_names(set(left_out))}")
    return found


def _wraps(content: Any, key: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(key), dict) and _count(content[key]) > 0


def _keep(found: Content, key: Any, value: Any) -> None:
    if _is_optimizer(key):
        found.notes.append(f"left out: `{key}`, an optimizer's state")
    elif isinstance(value, _TENSORS) and not value.shape:
        found.settings[str(key)] = (value.read() if isinstance(value, LazyTensor) else value).item()
    elif count := _count(value):
        found.notes.append(f"left out: `{key}`, which holds {count:,} other tensor{'s' if count > 1 else ''}")
    elif all(isinstance(leaf, _PLAIN) for _, leaf in _leaves(value)):
        found.settings[str(key)] = value
    else:
        found.notes.append(f"left out: `{key}`, which is no plain value")


def _is_optimizer(key: Any) -> bool:
    return str(key).startswith("optim")


def _count(value: Any) -> int:
    return sum(isinstance(leaf, _TENSORS) for _, leaf in _leaves(value))


def _leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*keys, key))
    else:
        yield keys, value
