"""The tensors that safetensors files hold, from their headers: a folder's, or a Hub model's without downloading it."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.hf_api import SafetensorsFileMetadata, parse_local_safetensors_file_metadata
from safetensors import safe_open

from kit.console import warn
from kit.errors import UserError
from kit.files import read_json
from kit.model.hub import check_weights, from_hub, is_adapter
from kit.names import fold_names
from kit.network import why_offline

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
_DTYPES |= {"F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        name: its name in the file.
        shape: its sizes.
        dtype: torch's name of the type, or safetensors' where torch has none.
        bytes: its size in the file.
        file: the file that holds it.
        times: the number of alike tensors that it stands for in a table.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: str
    times: int = 1

    @property
    def parameters(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)


def read_headers(name: str, revision: str | None = None) -> list[StoredTensor]:
    """Return the tensors that a model's files hold; only the headers of the files are read.

    Raises:
        UserError: a file is absent or damaged, or the weights are not in safetensors format.
    """
    folder = Path(name)
    if folder.is_dir():
        return _local_headers(name, folder)
    if offline := why_offline():
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise UserError(f"`{name}` is no folder here, it is not in the cache, and {offline}")
        try:
            return _local_headers(name, Path(cached).parent)
        except UserError as error:
            raise UserError(f"{error} (in the cache, since {offline})") from error
    try:
        found = get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError as error:
        raise UserError(f"`{name}` has neither {_SINGLE} nor {_INDEX} on the Hub; nothing else is read") from error
    except Exception as error:  # the errors of httpx have no base in common with the Hub client's
        reason = " ".join(str(error).split())[:600]
        raise UserError(f"`{name}`: the headers of its weights cannot be read from the Hub: {reason}") from error
    return [tensor for file, header in found.files_metadata.items() for tensor in _stored(file, header)]


def _local_headers(name: str, folder: Path) -> list[StoredTensor]:
    check_weights("model", str(folder))
    placed: dict[str, str] = {}
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif (folder / _INDEX).is_file():
        placed = read_json(folder / _INDEX)["weight_map"]
        files = sorted(set(placed.values()))
    elif is_adapter(folder):
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    else:
        raise UserError(f"`{name}` has neither {_SINGLE} nor {_INDEX}; nothing else is read")
    tensors = []
    for file in files:
        try:
            tensors += _stored(file, parse_local_safetensors_file_metadata(folder / file))
        except SafetensorsParsingError as error:
            raise UserError(f"`{name}`: {error}") from error
    held = {tensor.name: tensor.file for tensor in tensors}
    if astray := [tensor for tensor, file in placed.items() if held.get(tensor) != file]:
        warn(f"{_INDEX} names a file that does not hold it for {fold_names(astray)}")
    if placed and (surplus := held.keys() - placed.keys()):
        warn(f"{_INDEX} does not name {fold_names(surplus)}, which its files hold")
    return tensors


def _stored(file: str, header: SafetensorsFileMetadata) -> list[StoredTensor]:
    return [
        StoredTensor(name, tuple(t.shape), _DTYPES.get(t.dtype, t.dtype), t.data_offsets[1] - t.data_offsets[0], file)
        for name, t in header.tensors.items()
    ]


def read_tensor(model: str, revision: str | None, tensor: StoredTensor) -> torch.Tensor:
    """Read one tensor from the file that holds it; of a Hub model, that file alone is downloaded.

    Raises:
        UserError: the file cannot be had, or torch has no such type.
    """
    folder = Path(model)
    with from_hub("model", model, revision, tensor.file) as options:
        path = folder / tensor.file
        if not folder.is_dir():
            path = hf_hub_download(model, tensor.file, revision=revision, **options)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(tensor.name)
