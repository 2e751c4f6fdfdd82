"""llama2.c's weights in one binary file, versions 0 and 1: a header of sizes, then float32 tensors without names.

As `export.py` of https://github.com/karpathy/llama2.c writes them: each kind of tensor for all layers, then the next.
Version 0 ("legacy") has no magic, and holds the rotations of the positions as well; version 2 is 8-bit integers.
"""

import math
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.writing import replaced_file
from kit.errors import UserError
from kit.names import fold_names

MAGIC = 0x616B3432  # "ak42"
THETA = 10000.0
ROTATIONS = ("freqs_cos", "freqs_sin")
# The most that a header may say. Bytes that are no header hardly ever pass, nor do sizes that no memory holds.
_MOST = {
    "dim": 1 << 17,
    "hidden_dim": 1 << 20,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_seq_len": 1 << 24,
}
_HEADER = struct.Struct("<7i")
_BEGINNING = struct.Struct("<Ii")  # of version 1: magic, version; a byte for the head follows the sizes
_PADDED = 256
_NORMS = ("attention_norm", "ffn_norm")
_MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_INNER = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_ORDERS = {
    0: (
        "tok_embeddings.weight",
        *(f"layers.{{n}}.{name}.weight" for name in ("attention_norm", *_MATRICES, "ffn_norm", *_INNER)),
        "norm.weight",
        *ROTATIONS,
        "output.weight",
    ),
    1: (
        *(f"layers.{{n}}.{name}.weight" for name in _NORMS),
        "norm.weight",
        "tok_embeddings.weight",
        *(f"layers.{{n}}.{name}.weight" for name in (*_MATRICES, *_INNER)),
        "output.weight",
    ),
}
Header = dict[str, int]


def rotations(head_dim: int, positions: int, theta: float = THETA) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary embeddings, (positions, head_dim / 2), as `precompute_freqs_cis` does."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    angles = torch.outer(torch.arange(positions), frequencies).float()
    return torch.cos(angles), torch.sin(angles)


def recognises(path: Path) -> bool:
    """Tell whether a file begins as llama2.c's do, whole or not: with the magic, or with seven sizes that fit."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
    if start[:4] == struct.pack("<I", MAGIC):
        return True
    return len(start) == _HEADER.size and not _fault(_named(start, version=0)[0])


def read(path: Path) -> Checkpoint:
    """Return the tensors of a file under the names of llama2.c's `model.py`, and its header.

    `settings` are `header` (`vocab_size` without the sign that marks a head of its own) and `version`.

    Raises:
        UserError: it is no such file, of another version, or of another length than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_PADDED)
    version, begin = 0, _HEADER.size
    if start[:4] == struct.pack("<I", MAGIC):
        version, begin = _version(path, start), _PADDED
    if size < begin:
        raise UserError(f"{path}: {size:,} bytes; the header of llama2.c's version {version} alone has {begin:,}")
    header, shared = _named(start, version)
    if fault := _fault(header):
        raise UserError(f"{path}: not llama2.c's version {version}: its header says {fault}")
    shapes = _shapes(header, version, shared)
    expected = begin + 4 * sum(map(math.prod, shapes.values()))
    if size != expected:
        told = f"{expected - size:,} are missing" if size < expected else f"{size - expected:,} are too many"
        raise UserError(f"{path}: {size:,} bytes, of which {told}: its header ({_told(header)}) means {expected:,}")
    tensors, at = {}, begin
    for name, shape in shapes.items():
        tensors[name] = LazyTensor(shape, torch.float32, partial(_slice, path, at, shape))
        at += 4 * math.prod(shape)
    return Checkpoint(path, f"llama2.c, version {version}", tensors, {"header": header, "version": version})


def write(path: Path, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[str]:
    """Write a file, a tensor at a time; it is whole or absent. Return notes on what was changed.

    A head that equals the embeddings is not written, and a type of fewer bits becomes float32, as by `export.py`.

    Args:
        path: what is there is replaced.
        tensors: under the names of `model.py`; the rotations of version 0 are computed where they are not among them.
        settings: `header` or `model_args`, which has more than the sizes; `version`, 0 where it is absent.

    Raises:
        UserError: another version, sizes that cannot be, or tensors that are missing, too many or of another shape.
    """
    version = settings.get("version", 0)
    if version not in _ORDERS:
        raise UserError(f"{path}: llama2.c's version {version} cannot be written; expected 0 or 1")
    stated = settings.get("header") or settings["model_args"]
    header = {name: stated[name] for name in _MOST}
    if fault := _fault(header):
        raise UserError(f"{path}: llama2.c cannot hold {fault}")
    shared = "output.weight" not in tensors or torch.equal(
        tensors["output.weight"].read(), tensors["tok_embeddings.weight"].read()
    )
    shapes = _shapes(header, version, shared)
    if version == 0:
        tables = zip(ROTATIONS, rotations(header["dim"] // header["n_heads"], header["max_seq_len"]), strict=True)
        made = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tables}
        tensors = {**made, **tensors}
    _check(path, tensors, shapes)
    with replaced_file(path) as file:
        file.write(_beginning(header, version, shared))
        for name in shapes:
            file.write(tensors[name].read().to(torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
    widened = [name for name in shapes if tensors[name].dtype != torch.float32]
    return [f"written as float32, which is all that the file holds: {fold_names(widened)}"] if widened else []


def _version(path: Path, start: bytes) -> int:
    version = _BEGINNING.unpack_from(start)[1] if len(start) >= _BEGINNING.size else None
    if version == 1:
        return version
    kind = {None: "cut off before its version", 2: "version 2: 8-bit integers"}.get(version, f"version {version}")
    raise UserError(f"{path}: llama2.c's file, {kind}; expected version 0 or 1, which hold float32")


def _named(start: bytes, version: int) -> tuple[Header, bool]:
    """Return the header, and whether the head is the embeddings."""
    header = dict(zip(_MOST, _HEADER.unpack_from(start, _BEGINNING.size if version else 0), strict=True))
    if version:
        return header, start[_BEGINNING.size + _HEADER.size] != 0
    shared = header["vocab_size"] > 0
    return {**header, "vocab_size": abs(header["vocab_size"])}, shared


def _fault(header: Header) -> str | None:
    """Return what cannot be in a header, or None."""
    for name, most in _MOST.items():
        if not 1 <= header[name] <= most:
            return f"{name} {header[name]:,}, expected 1 to {most:,}"
    if header["dim"] % (2 * header["n_heads"]):
        return f"dim {header['dim']:,} and n_heads {header['n_heads']:,}, expected heads of an even width"
    if header["n_heads"] % header["n_kv_heads"]:
        return f"n_heads {header['n_heads']:,} and n_kv_heads {header['n_kv_heads']:,}, expected a divisor"
    return None


def _told(header: Header) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in header.items())


def _shapes(header: Header, version: int, shared: bool) -> dict[str, tuple[int, ...]]:
    """Return what a file holds, in its order."""
    dim, hidden, head = header["dim"], header["hidden_dim"], header["dim"] // header["n_heads"]
    wide = {"wk": head * header["n_kv_heads"], "wv": head * header["n_kv_heads"], "w1": hidden, "w3": hidden}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _ORDERS[version]:
        kind = name.removesuffix(".weight").split(".")[-1]
        if "norm" in kind:
            shape = (dim,)
        elif kind in ("tok_embeddings", "output"):
            shape = (header["vocab_size"], dim)
        elif kind in ROTATIONS:
            shape = (header["max_seq_len"], head // 2)
        else:
            shape = (wide.get(kind, dim), hidden if kind == "w2" else dim)
        if "{n}" in name:
            shapes |= {name.replace("{n}", str(n)): shape for n in range(header["n_layers"])}
        elif name != "output.weight" or not shared:
            shapes[name] = shape
    return shapes


def _slice(path: Path, at: int, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.fromfile(path, dtype="<f4", count=math.prod(shape), offset=at)
    return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(shape)


def _check(path: Path, tensors: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    known = {*shapes, "output.weight", *ROTATIONS}
    faults = {
        "missing": [name for name in shapes if name not in tensors],
        "unknown": [name for name in tensors if name not in known],
        "of another shape than the sizes mean": [n for n in shapes if n in tensors and tensors[n].shape != shapes[n]],
        "of 64 bits, where the file has 32": [n for n in shapes if n in tensors and tensors[n].dtype.itemsize > 4],
    }
    if told := "; ".join(f"{what}: {fold_names(names)}" for what, names in faults.items() if names):
        raise UserError(f"{path}: llama2.c's file cannot be written. Tensors {told}")


def _beginning(header: Header, version: int, shared: bool) -> bytes:
    sizes = list(header.values())
    if version:
        return (_BEGINNING.pack(MAGIC, version) + _HEADER.pack(*sizes) + bytes([shared])).ljust(_PADDED, b"\0")
    sizes[list(header).index("vocab_size")] *= 1 if shared else -1
    return _HEADER.pack(*sizes)
