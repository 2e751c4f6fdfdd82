"""What all methods get: corpus, tokenizer and a seeded model with and without dropout, made once in a folder."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.preparation import SEPARATOR, prepare_tokenizer, write_builtin_text
from benchmarks.speed.children import ROOT

DATA = ROOT.parent / "shared/data"
VOCABULARY = 50_257
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64},
}
SMOKE_CHARACTERS = 300_000


@dataclass(frozen=True)
class Material:
    """Files that every method reads.

    Attributes:
        text: the corpus, as its documents between separators.
        documents: the same as JSON lines.
        tokens: its ids in one stream, EOS after each document; an array file.
        tokenizer: a folder that `AutoTokenizer` takes.
        about: what a table says of them.
    """

    text: Path
    documents: Path
    tokens: Path
    tokenizer: Path
    about: dict[str, Any]


def given_or_shared(given: Path | None, name: str) -> Path | None:
    """Return a path of the command line, which is to be there, else that of the data beside the repository or none."""
    if given and not given.exists():
        raise SystemExit(f"{given}: there is no such file")
    path = given or DATA / name
    return path.absolute() if path.exists() else None


def digest(*files: Path) -> str:
    """Return what names the content of files, whatever folder they are in."""
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(hashlib.sha256(file.read_bytes()).digest() + file.name.encode())
    return found.hexdigest()[:16]


def prepare(work: Path, corpus: Path | None, tokenizer: Path | None, smoke: bool) -> Material:
    """Write what is not there yet of this content; `smoke` takes the beginning of the corpus."""
    from transformers import AutoTokenizer

    folder = work / "material"
    source = corpus or write_builtin_text(work / "builtin.txt")
    about = {
        "corpus": corpus.parent.name + "/" + corpus.name if corpus else "docstrings of installed packages",
        "tokenizer": tokenizer.name if tokenizer else "byte-level BPE, trained on the corpus",
        "corpus_digest": digest(source),
        "tokenizer_digest": digest(*filter(Path.is_file, tokenizer.iterdir())) if tokenizer else None,
        "smoke": smoke,
    }
    made = folder / "about.json"
    known = json.loads(made.read_text()) if made.is_file() else {}
    material = Material(
        folder / "corpus.txt", folder / "corpus.jsonl", folder / "tokens.npy", folder / "tokenizer", known
    )
    if {name: known.get(name) for name in about} == about:
        return material
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = source.read_text(encoding="utf-8")
    documents = [each.strip("\n") for each in text[: SMOKE_CHARACTERS if smoke else None].split(SEPARATOR)]
    documents = [each for each in documents if each.strip()]
    material.text.write_text(SEPARATOR.join(documents), encoding="utf-8")
    material.documents.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents), encoding="utf-8")
    prepare_tokenizer(tokenizer, material.text, SEPARATOR, material.tokenizer, VOCABULARY)
    encoder = AutoTokenizer.from_pretrained(material.tokenizer)
    rows = encoder(documents, add_special_tokens=False)["input_ids"]
    stream = np.concatenate([np.array([*row, encoder.eos_token_id], dtype=np.int64) for row in rows])
    np.save(material.tokens, stream)
    about |= {"documents": len(documents), "tokens": len(stream), "vocabulary": len(encoder)}
    made.write_text(json.dumps(about))
    return Material(**(vars(material) | {"about": about}))


def model_folder(work: Path, material: Material, shape: str, positions: int, dropout: bool) -> Path:
    """Return a folder with a model of random weights, the same with and without dropout, and the tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(material.tokenizer)
    stem = f"{shape}-{positions}-{digest(*filter(Path.is_file, material.tokenizer.iterdir()))}"
    plain, folder = work / f"models/{stem}", work / f"models/{stem}{'-dropout' if dropout else ''}"
    if (folder / ".made").is_file():
        return folder
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {**SHAPES[shape], **ends, "vocab_size": len(tokenizer), "n_positions": positions}
    if dropout:
        model_folder(work, material, shape, positions, False)
        folder.mkdir(parents=True, exist_ok=True)
        GPT2Config(**sizes, architectures=["GPT2LMHeadModel"]).save_pretrained(folder)
        for file in plain.glob("*.safetensors*"):
            (folder / file.name).unlink(missing_ok=True)
            os.link(file, folder / file.name)
    else:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**sizes, **NO_DROPOUT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / ".made").touch()
    return folder


def parameters_of(folder: Path) -> int:
    """Return the parameters of a model, a tied head counted once."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total
