"""OpenAI's model folder: TensorFlow's checkpoint files, hparams.json, and a tokenizer in encoder.json and vocab.bpe.

TensorFlow itself reads and writes its files: the optional extra `tensorflow`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GPT2Tokenizer

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.errors import UserError
from kit.files import read_json, write_json, write_text

_PREFIX = "model.ckpt"
_VERSION = "#version: 0.2\n"  # first line of vocab.bpe, which OpenAI's reader skips
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}


def read(folder: Path) -> Checkpoint:
    """Return the tensors of a folder of TensorFlow's checkpoint files, and its hparams.json as `settings`.

    Raises:
        UserError: TensorFlow is not installed, or the files are damaged, incomplete or not those of one checkpoint.
    """
    tf = _tensorflow(f"reading {folder}")
    prefix = _find_prefix(tf, folder)
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    # Its own kinds of errors, a RuntimeError or a ValueError: according to where the index is damaged.
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UserError(f"{prefix}.index: not an index of TensorFlow's checkpoints: {_first_line(error)}") from None
    if unknown := [name for name in sorted(dtypes) if dtypes[name].name not in _DTYPES]:
        raise UserError(f"{prefix}: `{unknown[0]}` is {dtypes[unknown[0]].name}; expected {', '.join(_DTYPES)}")

    def tensor(name: str) -> LazyTensor:
        dtype = _DTYPES[dtypes[name].name]
        return LazyTensor(tuple(shapes[name]), dtype, lambda: _read_tensor(tf, reader, prefix, name, dtype))

    tensors = {name: tensor(name) for name in sorted(shapes)}
    expected = sum(each.bytes for each in tensors.values())
    found = sum(path.stat().st_size for path in prefix.parent.glob(f"{prefix.name}.data-*"))
    if found < expected:
        raise UserError(f"{prefix}.data-…: cut off: {expected - found:,} of its {expected:,} bytes are missing")
    return Checkpoint(folder, "TensorFlow checkpoint", tensors, _read_hparams(folder))


def write(folder: Path, tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> list[str]:
    """Write TensorFlow's checkpoint files and hparams.json, which OpenAI's code and `tf.train.latest_checkpoint` read.

    TensorFlow writes one checkpoint at once, so all of it is in memory. There is no `.meta`: it is the graph of the
    code that saved, which OpenAI's code makes anew.

    Args:
        folder: exists, and becomes whole only with its tokenizer: the caller puts it into its place.
        tensors: under the names of the variables.
        settings: its `settings` are the contents of hparams.json.

    Returns:
        Notes for the user.

    Raises:
        UserError: TensorFlow is not installed.
    """
    tf = _tensorflow(f"writing {folder}")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    tf.raw_ops.SaveV2(
        prefix=str(folder / _PREFIX),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[_to_tensorflow(tf, tensor.read()) for tensor in tensors.values()],
    )
    write_text(folder / "checkpoint", f'model_checkpoint_path: "{_PREFIX}"\nall_model_checkpoint_paths: "{_PREFIX}"\n')
    write_json(folder / "hparams.json", dict(settings["settings"]))
    if dtypes == ["float32"]:
        return []
    return [f"written as {', '.join(dtypes)}; OpenAI's own code restores float32 alone"]


def write_tokenizer(source: Path, folder: Path) -> bool:
    """Write encoder.json and vocab.bpe from the tokenizer.json of a folder; False where it is not one like GPT-2's.

    Args:
        source: Hugging Face's model folder.
        folder: gets the two files.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        return False
    stored = read_json(path)
    model, before = stored.get("model") or {}, stored.get("pre_tokenizer") or {}
    plain = before.get("use_regex", True) and not before.get("add_prefix_space") and not stored.get("normalizer")
    # Words that are in the vocabulary without merges that lead to them are taken whole by `ignore_merges` alone.
    if (model.get("type"), before.get("type")) != ("BPE", "ByteLevel") or model.get("ignore_merges") or not plain:
        return False
    merges = (each if isinstance(each, str) else " ".join(each) for each in model["merges"])
    write_text(folder / "encoder.json", json.dumps(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)))
    write_text(folder / "vocab.bpe", _VERSION + "".join(f"{merge}\n" for merge in merges))
    return True


def save_tokenizer(source: Path, folder: Path) -> bool:
    """Write the tokenizer of encoder.json and vocab.bpe as Hugging Face's files; False where they are not there.

    Raises:
        UserError: one of the two is damaged or missing.
    """
    paths = [source / "encoder.json", source / "vocab.bpe"]
    if not any(path.is_file() for path in paths):
        return False
    try:
        vocab, lines = read_json(paths[0]), paths[1].read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except Exception as error:  # tokenizers raises bare ones for what does not hold together
        raise UserError(f"{source}: encoder.json and vocab.bpe are no tokenizer: {_first_line(error)}") from None
    tokenizer.save_pretrained(folder)
    return True


def _tensorflow(what: str) -> ModuleType:
    # Else it tells of the machine and of oneDNN on each start; nothing is computed with it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow
    except ImportError:
        raise UserError(
            f"{what}: TensorFlow's checkpoint files need TensorFlow: pip install 'domain-adaptation-kit[tensorflow]'"
        ) from None
    return tensorflow


def _find_prefix(tf: ModuleType, folder: Path) -> Path:
    """Return the path of a checkpoint's files without what follows `.index`."""
    try:
        named = tf.train.latest_checkpoint(str(folder))  # of the file `checkpoint`
    except (tf.errors.OpError, ValueError):  # not even text
        named = None
    indexes = sorted(folder.glob("*.index"))
    if named is not None:
        if Path(named).parent.resolve() != folder.resolve():  # a copied folder names the one that it came from
            raise UserError(f"{folder / 'checkpoint'}: names {named}, which is in another folder")
        return Path(named)
    if len(indexes) != 1:
        found = ", ".join(path.name for path in indexes) or "no file .index"
        raise UserError(
            f"{folder}: expected a file `checkpoint` that names one of TensorFlow's checkpoints here; found {found}"
        )
    return indexes[0].with_suffix("")


def _read_hparams(folder: Path) -> dict[str, Any]:
    path = folder / "hparams.json"
    if not path.is_file():
        return {}
    try:
        return {"settings": read_json(path)}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _read_tensor(tf: ModuleType, reader: Any, prefix: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    try:
        array = reader.get_tensor(name)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UserError(f"{prefix}: `{name}` cannot be read: {_first_line(error)}") from None
    if dtype == torch.bfloat16:  # numpy has no such type: torch takes its bits
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(dtype)
    return torch.from_numpy(np.ascontiguousarray(array))


def _to_tensorflow(tf: ModuleType, tensor: torch.Tensor) -> Any:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tf.bitcast(tf.convert_to_tensor(tensor.view(torch.int16).numpy()), tf.bfloat16)
    return tf.convert_to_tensor(tensor.numpy())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
