"""`.pt`, `.pth` and `.bin` of torch.save: pickles, read by `torch.load(weights_only=True)` alone."""

import contextlib
import functools
import operator
import pickle
import pickletools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.formats.nesting import unwrap
from kit.errors import UserError, is_out_of_memory

_MAPPED = 1 << 26  # bytes of a mapped file that may stay in memory, or as many as the largest tensor has
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_PICKLES = 4  # a magic number, the protocol, the machine, the content; then the bytes of the tensors
_OF_TENSORS = re.compile(r"torch\.\w+|torch\._utils\.\w+")
# Classes of the standard library that hold settings: what they say can be saved in another way.
_HOLDERS = {"argparse", "collections", "pathlib", "types"}
_SAVE_ANEW = (
    '. Where you trust the file, save it anew: `c = torch.load("{name}", weights_only=False); torch.save({{"model": '
    'c["model"], "model_args": vars(c["config"])}}, "plain.pt")` with the names that it has; of a whole module, '
    '`torch.save(c.state_dict(), "plain.pt")`'
)


def recognises(head: bytes) -> bool:
    """Tell whether a file begins as torch.save's do: as a zip file since torch 1.6, as a pickle before."""
    return head.startswith((_ZIP, _PICKLE))


def read(path: Path) -> Checkpoint:
    """Read the names and shapes of a file; each tensor is read when it is needed, from the mapped file.

    The format before torch 1.6 and numpy arrays cannot be mapped: they are held in memory.

    Raises:
        UserError: the file is damaged, or holds what weights_only refuses, or no dense tensors.
    """
    with open(path, "rb") as opened:
        zipped = opened.read(len(_ZIP)) == _ZIP
    file = _File(path, zipped)
    try:
        content = unwrap(path, file.content())
    except RecursionError:
        raise UserError(f"{path}: its dictionaries hold each other; expected a state dict") from None
    tensors, arrays = {}, 0
    for name, leaf in content.leaves.items():
        is_array = isinstance(leaf, np.ndarray)
        arrays += is_array
        tensor = _tensor(leaf) if is_array else leaf.detach()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else tensor.layout
            raise UserError(f"{path}: the tensor `{name}` is {kind}; expected dense ones")
        held = tensor if is_array else None
        tensors[name] = LazyTensor(
            tuple(tensor.shape),
            tensor.dtype,
            lambda keys=content.keys[name], held=held: file.read(keys) if held is None else held.clone(),
        )
        file.most_mapped = max(file.most_mapped, tensors[name].bytes)
    if arrays:
        content.notes.append(f"{arrays:,} numpy arrays are held in memory")
    if not zipped:
        content.notes.append("the format before torch 1.6: all tensors are held in memory")
    kind = "PyTorch (zip)" if zipped else "PyTorch (before 1.6)"
    return Checkpoint(path, kind, tensors, content.settings, tuple(content.notes))


class _File:
    """What a file holds, mapped; mapped anew when much was read, for that leaves the memory with the mapping alone."""

    def __init__(self, path: Path, zipped: bool) -> None:
        self.path, self.zipped = path, zipped
        self.most_mapped = _MAPPED
        self._content: Any = None
        self._read = 0

    def content(self) -> Any:
        if self._content is None:
            self._content = _load(self.path, self.zipped)
        return self._content

    def read(self, keys: tuple[Any, ...]) -> torch.Tensor:
        tensor = functools.reduce(operator.getitem, keys, self.content())
        if self.zipped and self._read and self._read + tensor.nbytes > self.most_mapped:
            del tensor
            self._content, self._read = None, 0
            return self.read(keys)
        self._read += tensor.nbytes
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _load(path: Path, zipped: bool) -> Any:
    try:
        with safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats and types, to those who write them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: {_why_not(path, zipped, error)}") from None


def _why_not(path: Path, zipped: bool, error: Exception) -> str:
    if wanted := _unsafe_globals(path, zipped):
        told = (
            f"a pickle that holds code: {', '.join(wanted)}; nothing of it was run. Expected only tensors and plain "
            "values, which torch.load(weights_only=True) reads"
        )
        roots = {each.split(".")[0] for each in wanted} - _HOLDERS
        return told + ("" if roots & set(sys.stdlib_module_names) else _SAVE_ANEW.format(name=path.name))
    reason = " ".join(str(error).split()) or type(error).__name__
    if "TorchScript" in reason:
        return "a TorchScript archive, which holds code; nothing of it was run. Expected a state dict"
    if "Invalid magic number" in reason or "Unsupported operand" in reason:
        return "a pickle that torch.save did not write; save what it holds anew with torch.save"
    said = re.sub(r".*WeightsUnpickler error: ", "", reason).split(" Check the documentation")[0][:300]
    return f"damaged, cut off, or not written by torch.save: {said}"


def _unsafe_globals(path: Path, zipped: bool) -> list[str]:
    try:
        if zipped:
            with safe_globals(_STAND_INS):
                return sorted(get_unsafe_globals_in_checkpoint(path))
        known = {"collections.OrderedDict", "_codecs.encode", *(name for _, name in _STAND_INS)}
        return sorted(each for each in _globals_of_pickles(path) - known if not _OF_TENSORS.fullmatch(each))
    except Exception:  # damaged; the caller tells the first error
        return []


def _globals_of_pickles(path: Path) -> set[str]:
    found = set()
    # What follows the pickles of a file is none, and one of others than torch is the only one.
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        for _ in range(_LEGACY_PICKLES):
            strings = ["", ""]
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL":
                    found.add(argument.replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return found


# ---- numpy arrays in a pickle. Not numpy's own functions: those believe the flags of a type that a pickle states,
# and would take an array's bytes for addresses.


class _Type:
    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"a numpy array of the type {self.dtype}, which no tensor has")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "=")


class _Array(np.ndarray):
    def __new__(cls) -> "_Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, kind, by_columns, data = state
        super().__setstate__((1, shape, kind.dtype, by_columns, data))


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Type, data: bytes) -> Any:
    return np.frombuffer(data, kind.dtype)[0].item()


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


# numpy 2 calls the folder `_core`.
_STAND_INS = [
    (_Type, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
