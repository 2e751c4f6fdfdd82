"""The tokenizer beside a checkpoint, from the files of its layout to Hugging Face's and back."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kit.checkpoints.formats import llama2c_tokenizer, tensorflow_bundle
from kit.checkpoints.layouts import llama2c, openai_tf
from kit.errors import UserError

# Hugging Face's: these hold the vocabulary, and those belong to it.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_OTHERS = ("tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def written_beside(layout: str, place: Path) -> list[Path]:
    """Return the files that a layout's tokenizer gets beside a file, rather than in it."""
    return [place.with_name(f"{place.stem}.tokenizer.bin")] if layout == llama2c.NAME and place.suffix else []


def save_tokenizer(source: Path, folder: Path, layout: str, positions: int) -> bool:
    """Write the tokenizer that lies beside a checkpoint as Hugging Face's files; return whether there is one.

    Args:
        source: a checkpoint, a folder with a tokenizer, or a tokenizer of llama2.c.
        folder: exists.
        layout: of the checkpoint; only llama2.c's has a tokenizer of llama2.c by chance.
        positions: of the model.

    Raises:
        UserError: its files are damaged.
    """
    if llama2c_tokenizer.recognises(source):
        llama2c_tokenizer.save_tokenizer(source, folder, positions)
        return True
    beside = source if source.is_dir() else source.parent
    if (beside / "model").is_dir() and not any((beside / name).is_file() for name in _VOCABULARIES):
        beside = beside / "model"  # a run directory
    if any((beside / name).is_file() for name in _VOCABULARIES):
        for name in (*_VOCABULARIES, *_OTHERS):
            if (beside / name).is_file():
                shutil.copyfile(beside / name, folder / name)
        return True
    if tensorflow_bundle.save_tokenizer(beside, folder):
        return True
    files = sorted(beside.glob("*.bin")) if layout == llama2c.NAME else []
    found = [path for path in files if llama2c_tokenizer.recognises(path)]
    if len(found) == 1:
        llama2c_tokenizer.save_tokenizer(found[0], folder, positions)
    return len(found) == 1


def write_tokenizer(folder: Path, layout: str, made: Path) -> str:
    """Write Hugging Face's tokenizer as a layout has it, beside or into what was made; return what became of it."""
    write = _WRITERS.get(layout)
    if not write:
        return "not written: the layout has no file for it"
    try:
        return write(folder, made)
    except UserError as error:
        return f"not written: {str(error).replace(f'{folder}{os.sep}', '')}"


def _write_openai(folder: Path, made: Path) -> str:
    if not made.is_dir():
        return "not written: the dictionary has no place for it"
    if not tensorflow_bundle.write_tokenizer(folder, made):
        return "not written: it is none like GPT-2's, a byte-level BPE"
    return "encoder.json, vocab.bpe"


def _write_llama2c(folder: Path, made: Path) -> str:
    [path] = written_beside(llama2c.NAME, made)
    llama2c_tokenizer.write_tok_bin(folder, path)
    return path.name


_WRITERS: dict[str, Callable[[Path, Path], str]] = {openai_tf.NAME: _write_openai, llama2c.NAME: _write_llama2c}
