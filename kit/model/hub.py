"""Loading by name or folder, with the libraries' failures turned into one line for the user."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import __version__
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from kit.errors import UserError, did_you_mean, is_out_of_memory
from kit.network import why_offline

# Absent, not reachable, cut off, or made for something else.
_UNUSABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = re.compile(r"(pytorch_)?model\b.*\.(bin|pt|pth|ckpt)")  # and not training_args.bin, optimizer.pt, …
_LFS_POINTER = b"version https://git-lfs"

ADAPTER_RECORD = "base.json"  # which model an adapter belongs to


def expand(name: str) -> str:
    """Return a model's name with `~` replaced by the home folder, as a shell would."""
    return os.path.expanduser(name)


@contextmanager
def from_hub(key: str, name: str, revision: str | None = None, file: str = "config.json") -> Iterator[dict[str, Any]]:
    """Turn what `from_pretrained` raises for an absent or unusable `name` into a UserError that names `key`.

    Args:
        key: the recipe's key that gives the name.
        name: a folder, or a name on the Hub.
        revision: of a name on the Hub.
        file: what is loaded without which nothing goes on, to be named where it is missing from the cache.

    Yields:
        Options for `from_pretrained` that keep it off a Hub that cannot be reached.

    Raises:
        UserError: the name is neither a folder here nor reachable on the Hub, or what it holds cannot be loaded.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise UserError(f"{key}: `{name}`: no such folder (resolved to {path.absolute()}){hint}")
    if path.is_file():
        raise UserError(f"{key}: `{name}` is a file; expected a folder, or a name on the Hub")
    try:
        yield {} if path.is_dir() else {"local_files_only": why_offline() is not None}
    except _UNUSABLE as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{key}: {_explain(name, revision, file, error)}") from error


def is_adapter(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter as the kit writes it, if perhaps not whole."""
    there = [(Path(folder) / name).is_file() for name in (ADAPTER_CONFIG_NAME, CONFIG_NAME, ADAPTER_RECORD)]
    return there[0] and any(there[1:])


def check_weights(key: str, name: str) -> None:
    """Check of a folder that its weights are there, safe to read and whole, by their headers alone.

    Raises:
        UserError: they are not; the message names the file.
    """
    folder = Path(name)
    if (folder / _WEIGHTS).is_file():
        shards = [_WEIGHTS]
    elif (folder / _INDEX).is_file():
        shards = _shards(key, name, folder / _INDEX)
    elif pickled := sorted(p.name for p in folder.iterdir() if _PICKLED.fullmatch(p.name)):
        raise UserError(
            f"{key}: `{name}` has its weights in {pickled[0]} and not in {_WEIGHTS}: unpickling can run any code, so "
            f"that file is not read; if you trust it, save the model again as safetensors with "
            f"`AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)`"
        )
    elif not any(folder.glob("*.safetensors")):
        raise UserError(f"{key}: `{name}` holds no weights: there is neither {_WEIGHTS} nor {_INDEX}")
    else:
        return  # under another name, which the configuration may give
    for shard in shards:
        _check_shard(key, name, folder / shard)


def _shards(key: str, name: str, index: Path) -> list[str]:
    """Return the files that an index names."""
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{key}: `{name}`: {index.name} cannot be read; expected JSON with a `weight_map` from tensors to files "
            f"({reason})"
        ) from error
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise UserError(
            f"{key}: `{name}`: {len(missing)} of {len(shards)} files that {index.name} names are missing: "
            f"{', '.join(missing[:8])}"
        )
    return shards


def _check_shard(key: str, name: str, path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        fault = (
            "is a Git LFS pointer, not the file itself: `git lfs pull` fetches it"
            if pointer
            else f"is cut off or damaged ({path.stat().st_size:,} bytes): {error}"
        )
        raise UserError(f"{key}: `{name}`: {path.name} {fault}") from error


def _explain(name: str, revision: str | None, file: str, error: Exception) -> str:
    """Return what is wrong with `name`, in one line."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"`{name}` can only be loaded by running code that comes with it; if you trust that code, set "
            f"`model.trust_remote_code: true` and pin `model.revision` to the full hash of the commit that you read"
        )
    if unknown := re.search(r"has model type `([^`]+)` but Transformers does not recognize", reason):
        return f"`{name}` is of type `{unknown[1]}`, which transformers {__version__} does not know; a newer one may"
    if Path(name).is_dir():
        return _lacking(name, file) or f"`{name}` cannot be loaded: {reason[:600]}"
    nowhere = f"`{name}` is no folder here ({Path(name).absolute()})"
    offline = why_offline()
    if offline is None:
        return f"{nowhere} and cannot be loaded from {constants.ENDPOINT}: {reason[:600]}"
    for needed in dict.fromkeys(("config.json", file)):
        if not isinstance(try_to_load_from_cache(name, needed, revision=revision), str):
            return f"{nowhere}, its {needed} is not in the cache ({constants.HF_HUB_CACHE}), and {offline}"
    return f"{nowhere} and cannot be loaded from the cache ({offline}): {reason[:600]}"


def _lacking(name: str, file: str) -> str | None:
    """Return what a folder lacks without which `file` cannot be loaded from it, or None."""
    names = {path.name for path in Path(name).iterdir()}
    if "config.json" not in names and "adapter_config.json" in names:
        return (
            f"`{name}` holds a PEFT adapter, not a model; merge it into its base model with "
            f"`AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)`"
        )
    if file == "config.json" and file not in names and {"recipe.yaml", "model"} <= names:
        return f"`{name}` is a run directory; its model is {Path(name) / 'model'}"
    if file == "config.json" and file not in names:
        return f"`{name}` holds no config.json, and so no model that could be loaded"
    if file == "tokenizer.json" and not any(
        n.startswith(("tokenizer", "vocab")) or n.endswith(".model") for n in names
    ):
        return f"`{name}` holds no tokenizer; name one with `model.tokenizer`"
    return None
