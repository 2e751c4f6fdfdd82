"""Loading by name or folder, with the libraries' failures turned into one line for the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from kit.errors import UserError, did_you_mean

# Absent, not reachable, cut off, or made for something else.
_UNUSABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)


@contextmanager
def from_hub(key: str, name: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises for an absent or unusable `name` into a UserError that names `key`.

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
        yield
    except _UNUSABLE as error:
        reason = " ".join(str(error).split())
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") and not path.exists() else ""
        raise UserError(f"{key}: `{name}` cannot be loaded{offline}: {reason[:600]}") from error
