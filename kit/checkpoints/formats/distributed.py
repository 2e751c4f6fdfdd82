"""Folders of torch.distributed.checkpoint (DCP), as FSDP runs write them: `.metadata` and `*.distcp`."""

import math
import pathlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.formats.nesting import unwrap
from kit.errors import UserError, is_out_of_memory
from kit.names import fold_names

METADATA = ".metadata"
_CLASSES = {(each.__module__, each.__name__): each for each in (torch.Size, filesystem._StorageInfo)}
_CLASSES |= {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
}
_CLASSES |= {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # Where the checkpoint lay when it was written; Python 3.13 keeps the classes elsewhere.
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): pathlib.PureWindowsPath for module in ("pathlib", "pathlib._local")},
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes that DCP's metadata consists of, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _CLASSES:
            raise UserError(f"holds `{module}.{name}`, which is none of DCP's own classes; nothing of it was run")
        return _CLASSES[module, name]


class _Reader(dcp.FileSystemReader):
    """Reads tensors by metadata that were read with care; the base class would unpickle whatever they hold."""

    def __init__(self, folder: Path, known: metadata.Metadata) -> None:
        super().__init__(folder)
        self._known = known

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._known


def read(folder: Path) -> Checkpoint:
    """Read what a folder's metadata list; each tensor is put together from its shards when it is needed.

    Raises:
        UserError: the metadata are damaged or hold other classes; a file is absent or cut off; there are no tensors.
    """
    known = _read_metadata(folder / METADATA)
    try:
        tree, left_out = _tree(folder, known)
        files = _check_files(folder, known)
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{folder / METADATA}: damaged, or of another version of torch: {error!r}") from None
    content = unwrap(folder, tree)
    if left_out:
        content.notes.append(f"left out, since they are no tensors: {fold_names(left_out)}")
    form = f"DCP, {files:,} file{'s' if files > 1 else ''}"
    return Checkpoint(folder, form, content.leaves, content.settings, tuple(content.notes))


def _read_metadata(path: Path) -> metadata.Metadata:
    try:
        with open(path, "rb") as file:
            known = _Unpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: damaged or cut off: {error or type(error).__name__}") from None
    if not isinstance(known, metadata.Metadata):
        raise UserError(f"{path}: holds {type(known).__name__}; expected DCP's Metadata")
    return known


def _tree(folder: Path, known: metadata.Metadata) -> tuple[dict[Any, Any], list[str]]:
    """Return the tensors in the dictionaries that they were saved in, which DCP had flattened to dotted names."""
    tree: dict[Any, Any] = {}
    left_out = []
    places = known.planner_data if isinstance(known.planner_data, dict) else {}
    for name, stored in known.state_dict_metadata.items():
        *outer, last = places.get(name, (name,))
        if isinstance(stored, metadata.TensorStorageMetadata):
            inside = tree
            for key in outer:
                inside = inside.setdefault(key, {})
            size, dtype = tuple(stored.size), stored.properties.dtype
            held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if held != math.prod(size):
                told = f"`{name}` is said to have {math.prod(size):,} values, its shards have {held:,}"
                raise UserError(f"{folder / METADATA}: {told}")
            inside[last] = LazyTensor(size, dtype, lambda n=name, s=size, d=dtype: _read(folder, known, n, s, d))
        elif not any(str(key).startswith("optim") for key in (*outer, last)):
            left_out.append(name)
    return tree, left_out


def _check_files(folder: Path, known: metadata.Metadata) -> int:
    ends: dict[str, int] = {}
    for place in known.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise UserError(f"{folder / METADATA}: names `{place.relative_path}`, which is no file of this folder")
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    if absent := sorted(name for name in ends if not (folder / name).is_file()):
        raise UserError(f"{folder}: {len(absent):,} of {len(ends):,} files are missing: {', '.join(absent)}")
    for name, end in ends.items():
        if (size := (folder / name).stat().st_size) < end:
            raise UserError(f"{folder / name}: cut off: it has {size:,} bytes; expected {end:,}")
    return len(ends)


def _read(folder: Path, known: metadata.Metadata, name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    target = {name: torch.empty(size, dtype=dtype)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is one process
            dcp.load(target, storage_reader=_Reader(folder, known), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter holds those of the processes, and is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if is_out_of_memory(cause):
            raise cause from None
        code = re.search(r"GLOBAL (\S+)", str(cause))
        reason = f"it holds code: {code[1]}; nothing of it was run" if code else " ".join(str(cause).split())[:300]
        raise UserError(f"{folder}: `{name}` cannot be read: {reason}") from None
    return target[name]
