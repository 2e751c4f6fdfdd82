"""Any checkpoint that the kit reads, recognised by what its files hold."""

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.formats import distributed, llama2c_bin, pickled, safetensors_files, tensorflow_bundle
from kit.errors import UserError, suggest
from kit.names import fold_names

CONFIG = "config.json"
_INDEX = ".index.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HEAD = 64
_MOST_LISTED = 12
_EXPECTED = "safetensors, torch.save's files, llama2.c's, or a folder of one of them"
_FOREIGN = (
    (rb"version https://git-lfs", "a pointer of git-lfs; fetch the file itself with `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, not the file that it was to be"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\(\xb5\x2f\xfd", "compressed; unpack it first"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes them"),
    (rb"\x93NUMPY", "a numpy array"),
)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the tensors of a checkpoint, read when they are needed, and what its files say of the architecture.

    Args:
        path: a file of safetensors, torch.save or llama2.c; a folder of Hugging Face, DCP or OpenAI's TensorFlow, one
            with a single such file, or a run directory.

    Raises:
        UserError: it is none of these, is damaged or cut off, lacks a shard, or holds more than tensors and plain
            values.
    """
    path = Path(path)
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{path}: a link to {path.readlink()}, which does not exist")
        near = suggest(path.name, [each.name for each in path.parent.iterdir()]) if path.parent.is_dir() else ""
        hub = "; names on the Hub are not taken, download the files first" if _HUB_NAME.fullmatch(str(path)) else ""
        raise UserError(f"{path}: no such file or folder{near or hub}")
    try:
        checkpoint = _read_folder(path) if path.is_dir() else _read_file(path)
        checkpoint = _with_config(checkpoint)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    return _without_prefixes(checkpoint)


def _read_folder(folder: Path) -> Checkpoint:
    names = sorted(each.name for each in folder.iterdir())
    found = [name for whole in _WHOLE for name in (whole, whole + _INDEX) if name in names]
    if found:
        checkpoint = _read_shards(folder, found[0]) if found[0].endswith(_INDEX) else _read_file(folder / found[0])
        if len(found) > 1:
            note = f"read from {found[0]}; {', '.join(found[1:])} beside it was not"
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
        return replace(checkpoint, path=folder)
    if distributed.METADATA in names:
        return distributed.read(folder)
    if "hparams.json" in names and ("checkpoint" in names or "model.ckpt.index" in names):
        return tensorflow_bundle.read(folder)
    if "adapter_config.json" in names:
        raise UserError(f"{folder}: an adapter without its base model; `kit merge` makes a whole model of both")
    inner = [name for name in names if name == "model" or name.startswith("pytorch_model_fsdp")]
    inner = [name for name in inner if (folder / name).is_dir()]
    if len(inner) == 1:
        checkpoint = _read_folder(folder / inner[0])
        return checkpoint if inner == ["model"] else replace(checkpoint, path=folder)
    if any(name.endswith(".distcp") for name in names):
        raise UserError(f"{folder}: files of DCP without {distributed.METADATA}, which tells what they hold")
    files = [name for name in names if name.endswith(_SUFFIXES) and _format_of(folder / name)]
    if len(files) == 1:
        return _read_file(folder / files[0])
    listed = ", ".join(f"{name}/" if (folder / name).is_dir() else name for name in names[:_MOST_LISTED])
    more = f", and {len(names) - _MOST_LISTED:,} more" if len(names) > _MOST_LISTED else ""
    what = f"{len(files):,} checkpoints, name one of them: {', '.join(files)}" if files else "no checkpoint"
    raise UserError(f"{folder}: holds {what}; expected {_EXPECTED}. In it: {listed or 'nothing'}{more}")


def _format_of(path: Path) -> Any:
    """Return the module that reads a file, or None."""
    if not path.is_file():
        return None
    # First: its header may begin with the byte that pickles begin with, theirs are never sizes that fit.
    if llama2c_bin.recognises(path):
        return llama2c_bin
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return next((module for module in (safetensors_files, pickled) if module.recognises(head)), None)


def _read_file(path: Path) -> Checkpoint:
    if module := _format_of(path):
        return module.read(path)
    raise UserError(f"{path}: {_what_it_is(path)}; expected {_EXPECTED}")


def _what_it_is(path: Path) -> str:
    if not path.is_file():
        return "neither a file nor a folder"
    if path.name.endswith(_INDEX):
        return "the index of shards; name its folder"
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty"
    if what := next((what for begins, what in _FOREIGN if re.match(begins, head, re.IGNORECASE)), None):
        return what
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end within a character
        is_text = "".join(text.split()).isprintable()
    except UnicodeDecodeError:
        is_text = False
    return f"{'text' if is_text else 'no checkpoint'}; it begins with {head[:16]!r}"


def _read_shards(folder: Path, name: str) -> Checkpoint:
    index = _read_json(folder / name)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()) or not placed:
        raise UserError(f"{folder / name}: no `weight_map` in it; expected the name of a file for each tensor")
    files = sorted(set(placed.values()))
    if astray := [file for file in files if Path(file).name != file]:
        raise UserError(f"{folder / name}: names `{astray[0]}`, which is no file of this folder")
    if absent := [file for file in files if not (folder / file).exists()]:
        raise UserError(f"{folder}: {len(absent):,} of {len(files):,} shards are missing: {', '.join(absent)}")
    shards = {file: _read_file(folder / file) for file in files}
    tensors: dict[str, LazyTensor] = {}
    where: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in tensors:
                raise UserError(f"{folder}: `{tensor}` is in both {where[tensor]} and {file}")
            tensors[tensor], where[tensor] = shard.tensors[tensor], file
    if lacking := [tensor for tensor, file in placed.items() if where.get(tensor) != file]:
        raise UserError(f"{folder / name}: names a file that does not hold it for {fold_names(lacking)}")
    notes = list(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    if surplus := tensors.keys() - placed.keys():
        notes.append(f"{name} does not name what its files hold as well: {fold_names(surplus)}")
    first = shards[files[0]]
    form = f"{first.format}, {len(files):,} shard{'s' if len(files) > 1 else ''}"
    return Checkpoint(folder, form, tensors, first.settings, tuple(notes))


def _with_config(checkpoint: Checkpoint) -> Checkpoint:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not (folder / CONFIG).is_file():
        return checkpoint
    config = _read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: holds {type(config).__name__}; expected names and values")
    return replace(checkpoint, settings={**checkpoint.settings, CONFIG: config})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _without_prefixes(checkpoint: Checkpoint) -> Checkpoint:
    """Take from all names what DDP, torch.compile and FSDP put into them."""
    changed = {name: _WRAPPED.sub("", name) for name in checkpoint.tensors}
    parts = {part: count for part, count in _counted(checkpoint.tensors) if count}
    if not parts:
        return checkpoint
    if len(set(changed.values())) < len(changed):
        twice = [name for name in changed if list(changed.values()).count(changed[name]) > 1]
        raise UserError(f"{checkpoint.path}: without {', '.join(parts)} these have one name: {fold_names(twice)}")
    told = ", ".join(f"`{part}` from {count:,} name{'s' if count > 1 else ''}" for part, count in parts.items())
    tensors = {changed[name]: tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, f"removed {told}"))


def _counted(names: Iterable[str]) -> list[tuple[str, int]]:
    found = [set(_WRAPPED.findall(name)) for name in names]
    return [(part, sum(part in each for each in found)) for part in sorted(set().union(*found))]
