"""Checkpoints written whole or not at all: safetensors tensor by tensor, `.pt` on request."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from kit.checkpoints.checkpoint import LazyTensor
from kit.checkpoints.formats.safetensors_files import DTYPES, LENGTH
from kit.errors import UserError

_ALIGNMENT = 8  # of the header's end, in bytes
_FILES = (".safetensors", ".pt", ".bin")  # any other target is a folder
REPORT = "conversion.json"  # marks a folder as one that a conversion has written
_CODES = {dtype: (rank, code) for rank, (code, dtype) in enumerate(DTYPES.items())}


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside `path` that takes its place, flushed to disk, if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically and one tensor at a time, with the bytes that `save_file` gives it.

    Args:
        path: where; replaced if it exists.
        tensors: by name.
        metadata: of the header. A library that reads it wants `{"format": "pt"}`; `describe` adds settings to that.

    Raises:
        UserError: safetensors has no such type.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise UserError(f"{path}: safetensors has no type {tensor.dtype}, as `{name}` is")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # The widest types first, then names: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
    ordered = sorted(tensors.items(), key=lambda item: (_CODES[item[1].dtype][0], item[0].encode()))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.bytes
        header[name] = {
            "dtype": _CODES[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    with replaced_file(Path(path)) as file:
        file.write(len(head).to_bytes(LENGTH, "little") + head)
        for _, tensor in ordered:
            file.write(_bytes(tensor))


def _bytes(tensor: LazyTensor) -> memoryview:
    values = tensor.read()
    # The header is written already.
    assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype)
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())


def describe(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a safetensors header's metadata that `read_checkpoint` makes settings of again."""
    return {"format": "pt", **({"settings": json.dumps(settings)} if settings else {})}


def write_pickled(path: Path, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> None:
    """Write `{"model": tensors, **settings}` with torch.save, atomically; holds all tensors in memory.

    Names with the same lazy tensor share its memory, in the file too.

    Args:
        path: where; replaced if it exists.
        tensors: by name.
        settings: plain values, so that `torch.load(weights_only=True)` reads them.
    """
    once = {id(tensor): tensor.read() for tensor in {id(each): each for each in tensors.values()}.values()}
    save_pickled(path, {"model": {name: once[id(tensor)] for name, tensor in tensors.items()}, **settings})


def save_pickled(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `torch.save` writes, atomically."""
    with replaced_file(Path(path)) as file:
        torch.save(dict(content), file)


def is_folder(target: Path) -> bool:
    """Tell whether a target is written as a folder; its name says so."""
    return target.suffix not in _FILES


def check_target(source: Path, target: Path, beside: Iterable[Path], overwrite: bool) -> None:
    """Refuse a target that is or holds the source, exists already, or has no folder to lie in.

    Args:
        source: what is read.
        target: what is to be written.
        beside: files that are written with it.
        overwrite: whether what a conversion has written may be replaced.

    Raises:
        UserError: with what stands in the way.
    """
    source, target = Path(source), Path(target)
    real, goal = source.resolve(), target.resolve()
    if goal == real or _same_file(source, target):
        raise UserError(f"{target}: is the source itself; name another target")
    if real.is_dir() and goal.is_relative_to(real):
        raise UserError(f"{target}: lies in the source {source}; name another target")
    if real.is_relative_to(goal):
        raise UserError(f"{target}: holds the source {source}; name another target")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")
    if target.is_symlink():
        raise UserError(f"{target}: is a link; name what it points to, or remove it")
    if target.exists() and target.is_dir() != is_folder(target):
        raise UserError(f"{target}: is a {'folder' if target.is_dir() else 'file'} already; name another target")
    for path in (target, *beside):
        if (path.exists() or path.is_symlink()) and not overwrite:
            raise UserError(f"{path}: exists already; --overwrite replaces it")
    if target.is_dir() and any(target.iterdir()) and not (target / REPORT).is_file():
        raise UserError(f"{target}: not a folder that a conversion has written (no {REPORT} in it); not replaced")


def _same_file(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    return any(
        each.is_file() and each.samefile(target) for each in (source.rglob("*") if source.is_dir() else [source])
    )
