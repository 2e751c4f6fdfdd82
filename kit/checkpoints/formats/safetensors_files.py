"""safetensors files: https://github.com/huggingface/safetensors#format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.errors import UserError

LENGTH = 8  # bytes that tell the header's length, little endian
_LONGEST_HEADER = 100_000_000  # as safetensors has it
# In the order in which safetensors sorts the tensors of a file, its widest types first.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def recognises(head: bytes) -> bool:
    """Tell whether a file begins as safetensors files do: the header's length, then JSON."""
    return head[LENGTH : LENGTH + 1] == b"{" and int.from_bytes(head[:LENGTH], "little") <= _LONGEST_HEADER


def read(path: Path) -> Checkpoint:
    """Read the header of a file; each tensor is read when it is needed.

    What the header says beside the tensors is in settings["metadata"]; what `write_safetensors` was given as
    settings is in the settings themselves.

    Raises:
        UserError: the file is damaged or cut off, or has a type that torch has not.
    """
    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.offset_keys():
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: `{name}` is of the type {header.get_dtype()}, which is not read")
                tensors[name] = LazyTensor(
                    tuple(header.get_shape()), DTYPES[header.get_dtype()], lambda name=name: _read(path, name)
                )
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise UserError(f"{path}: a safetensors file of {size:,} bytes that is damaged or cut off: {error}") from None
    if not tensors:
        raise UserError(f"{path}: a safetensors file without tensors")
    return Checkpoint(path, "safetensors", tensors, _settings(metadata))


def _read(path: Path, name: str) -> torch.Tensor:
    # Opened for each tensor: what was mapped of the file leaves the memory with it.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _settings(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        ours = json.loads(metadata["settings"])
    except (KeyError, ValueError):
        ours = None
    if not isinstance(ours, dict):
        return {"metadata": metadata} if metadata else {}
    return {"metadata": {key: value for key, value in metadata.items() if key != "settings"}, **ours}
