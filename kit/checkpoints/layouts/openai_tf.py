"""OpenAI's original GPT-2 (https://github.com/openai/gpt-2): TensorFlow files, or a dictionary of the same tensors.

The dictionary is `{"settings": hparams, "params": {"blocks": [...], "wte", "wpe", "g", "b"}}`, as made from the files
by https://github.com/rasbt/LLMs-from-scratch/blob/main/ch05/01_main-chapter-code/gpt_download.py; its matrices lack
the first axis, of size 1, that those of the files have.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.layout import SAME, Line, Read, Settings, Turn
from kit.checkpoints.layouts import gpt2

NAME = "openai-tf"
ABOUT = "OpenAI's original TensorFlow files, or the dictionary of `settings` and `params`; the head is the embeddings."
MODEL_TYPE = "gpt2"
BUFFERS = ()
KEEPS_TIED_HEAD = False
SUFFIXES = ("", ".pt")
# A convolution of width 1: (1, in, out), in the dictionary (in, out).
_CONVOLUTION = Turn(
    "first axis dropped",
    lambda own, config: own[0].reshape(own[0].shape[-2:]),
    lambda hf, config: [hf.unsqueeze(0)],
)
_BLOCK = ("ln_1", "attn/c_attn", "attn/c_proj", "ln_2", "mlp/c_fc", "mlp/c_proj")
TABLE = (
    Line("transformer.wte.weight", ("model/wte",)),
    Line("transformer.wpe.weight", ("model/wpe",)),
    *(
        Line(f"transformer.h.{{n}}.{part.replace('/', '.')}.{kind}", (f"model/h{{n}}/{part}/{own}",), turn)
        for part in _BLOCK
        for kind, own, turn in (
            ("weight", "g", SAME) if part.startswith("ln") else ("weight", "w", _CONVOLUTION),
            ("bias", "b", SAME),
        )
    ),
    Line("transformer.ln_f.weight", ("model/ln_f/g",)),
    Line("transformer.ln_f.bias", ("model/ln_f/b",)),
)
_HPARAMS = {
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_OUTSIDE = {"wte": "model/wte", "wpe": "model/wpe", "g": "model/ln_f/g", "b": "model/ln_f/b"}
_INSIDE = re.compile(rf"blocks\.(\d+)\.((?:{'|'.join(part.replace('/', '[.]') for part in _BLOCK)})\.[gbw])")


def normalized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint under the names of the files where it is the dictionary, flattened, else as it is."""
    tensors = {_name_in_files(name): tensor for name, tensor in checkpoint.tensors.items()}
    if tensors.keys() == checkpoint.tensors.keys() or len(tensors) < len(checkpoint.tensors):
        return checkpoint
    note = "names of `params` (`blocks.0.attn.c_attn.w`) are read as those of the files (`model/h0/attn/c_attn/w`)"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _name_in_files(name: str) -> str:
    if match := _INSIDE.fullmatch(name):
        return f"model/h{match[1]}/{match[2].replace('.', '/')}"
    return _OUTSIDE.get(name, name)


def nested(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary `{"settings": …, "params": …}` of a converted model; all of it is in memory.

    Args:
        tensors: under the names of the files.
        settings: what `own_settings` returned.
    """
    outside = {name: own for own, name in _OUTSIDE.items()}
    params: dict[str, Any] = {"blocks": [{} for _ in range(settings["settings"]["n_layer"])]}
    for name, tensor in tensors.items():
        value = tensor.read()
        if name in outside:
            params[outside[name]] = value
            continue
        _, block, *parts, last = name.split("/")
        place = params["blocks"][int(block.removeprefix("h"))]
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value.squeeze(0) if last == "w" else value
    return {"settings": dict(settings["settings"]), "params": params}


def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """See `Layout`; hparams.json, or `settings` of the dictionary, tells the heads."""
    return gpt2.deduce(checkpoint, TABLE, gpt2.stated(checkpoint, "settings", _HPARAMS), given, _HPARAMS)


make_config = gpt2.make_config


def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
    """See `Layout`: what hparams.json holds."""
    gpt2.check_plain(NAME, config, tied=True)
    return {"settings": {own: getattr(config, hf) for hf, own in _HPARAMS.items()}}


def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
    """See `Layout`."""

    def conv1d(x: Tensor, scope: str) -> Tensor:
        w = read(f"{scope}/w")
        return x @ w.reshape(-1, w.shape[-1]) + read(f"{scope}/b")

    def norm(x: Tensor, scope: str) -> Tensor:
        return gpt2.layer_norm(x, read(f"{scope}/g"), read(f"{scope}/b"), settings["layer_norm_epsilon"])

    h = read("model/wte")[input_ids] + read("model/wpe")[: input_ids.shape[1]]
    for layer in range(settings["n_layer"]):
        scope = f"model/h{layer}"
        q, k, v = conv1d(norm(h, f"{scope}/ln_1"), f"{scope}/attn/c_attn").chunk(3, dim=-1)
        h = h + conv1d(gpt2.causal_attention(q, k, v, settings["n_head"]), f"{scope}/attn/c_proj")
        inner = conv1d(norm(h, f"{scope}/ln_2"), f"{scope}/mlp/c_fc")
        h = h + conv1d(gpt2.activation(inner, settings["activation_function"]), f"{scope}/mlp/c_proj")
    return norm(h, "model/ln_f") @ read("model/wte").T
