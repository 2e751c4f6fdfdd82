"""Sebastian Raschka's book, Build a Large Language Model (From Scratch): https://github.com/rasbt/LLMs-from-scratch.

Query, key and value are three Linear layers, with biases or not; the output head is a parameter of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor, computed
from kit.checkpoints.layout import SAME, TRANSPOSED, Line, Read, Settings, joined
from kit.checkpoints.layouts import gpt2

NAME = "llms-from-scratch"
ABOUT = "The GPTModel of LLMs-from-scratch: trf_blocks, separate W_query, W_key, W_value, norms of scale and shift."
MODEL_TYPE = "gpt2"
# Its mask, and the cache of its variant that keeps keys and values.
BUFFERS = (r"trf_blocks\.\d+\.att\.(mask|cache_k|cache_v)",)
KEEPS_TIED_HEAD = True
SUFFIXES = (".safetensors", ".pt")
_HF, _OWN = "transformer.h.{n}.", "trf_blocks.{n}."


def _parts(kind: str) -> tuple[str, ...]:
    return tuple(f"{_OWN}att.W_{part}.{kind}" for part in ("query", "key", "value"))


def _norm(hf: str, own: str) -> tuple[Line, Line]:
    return Line(f"{hf}.weight", (f"{own}.scale",)), Line(f"{hf}.bias", (f"{own}.shift",))


def _linear(hf: str, own: str) -> tuple[Line, Line]:
    return Line(f"{hf}.weight", (f"{own}.weight",), TRANSPOSED), Line(f"{hf}.bias", (f"{own}.bias",), SAME)


TABLE = (
    Line("transformer.wte.weight", ("tok_emb.weight",)),
    Line("transformer.wpe.weight", ("pos_emb.weight",)),
    Line(f"{_HF}attn.c_attn.weight", _parts("weight"), joined(3, transposed=True)),
    Line(f"{_HF}attn.c_attn.bias", _parts("bias"), joined(3), switch="qkv_bias"),
    *_linear(f"{_HF}attn.c_proj", f"{_OWN}att.out_proj"),
    *_linear(f"{_HF}mlp.c_fc", f"{_OWN}ff.layers.0"),
    *_linear(f"{_HF}mlp.c_proj", f"{_OWN}ff.layers.2"),
    *_norm(f"{_HF}ln_1", f"{_OWN}norm1"),
    *_norm(f"{_HF}ln_2", f"{_OWN}norm2"),
    *_norm("transformer.ln_f", "final_norm"),
    Line("lm_head.weight", ("out_head.weight",), head=True),
)
_CONFIG = {
    "vocab_size": "vocab_size",
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "qkv_bias": "qkv_bias",
}
_FAST_NAMES = (
    (re.compile(r"((?:trf_blocks\.\d+\.norm[12]|final_norm))\.weight"), r"\1.scale"),
    (re.compile(r"((?:trf_blocks\.\d+\.norm[12]|final_norm))\.bias"), r"\1.shift"),
    (re.compile(r"(trf_blocks\.\d+\.att)\.proj\.(weight|bias)"), r"\1.out_proj.\2"),
)
_FAST_QKV = re.compile(r"(trf_blocks\.\d+\.att)\.qkv\.(weight|bias)")


def normalized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint under the book's names where it is of `GPTModelFast`, else as it is.

    That variant has PyTorch's own LayerNorm, and one Linear layer for query, key and value.
    https://github.com/rasbt/LLMs-from-scratch/blob/main/pkg/llms_from_scratch/ch04.py
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if (match := _FAST_QKV.fullmatch(name)) and tensor.shape:
            for at, part in enumerate(("query", "key", "value")):
                own = f"{match[1]}.W_{part}.{match[2]}"
                tensors[own] = computed(lambda whole, at=at: whole.tensor_split(3)[at], [tensor])
            continue
        for pattern, own in _FAST_NAMES:
            if match := pattern.fullmatch(name):
                name = match.expand(own)
                break
        tensors[name] = tensor
    if tensors.keys() == checkpoint.tensors.keys():
        return checkpoint
    note = "names of GPTModelFast (`norm1.weight`, `att.qkv`, `att.proj`) are read as the book's"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """See `Layout`; a `config` in the file has the book's names, as `GPT_CONFIG_124M`."""
    return gpt2.deduce(checkpoint, TABLE, gpt2.stated(checkpoint, "config", _CONFIG), given, _CONFIG)


make_config = gpt2.make_config


def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
    """See `Layout`: the dictionary that the book makes its model from."""
    gpt2.check_plain(NAME, config)
    sizes = {own: getattr(config, hf) for hf, own in _CONFIG.items() if hf != "qkv_bias"}
    return {"config": {**sizes, "drop_rate": 0.0, "qkv_bias": switches["qkv_bias"]}}


def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
    """See `Layout`."""

    def linear(x: Tensor, name: str, bias: bool = True) -> Tensor:
        y = x @ read(f"{name}.weight").T
        return y + read(f"{name}.bias") if bias else y

    def norm(x: Tensor, name: str) -> Tensor:
        return gpt2.layer_norm(x, read(f"{name}.scale"), read(f"{name}.shift"), settings["layer_norm_epsilon"])

    x = read("tok_emb.weight")[input_ids] + read("pos_emb.weight")[: input_ids.shape[1]]
    for number in range(settings["n_layer"]):
        block = f"trf_blocks.{number}"
        normed = norm(x, f"{block}.norm1")
        query, key, value = (
            linear(normed, f"{block}.att.{name}", settings["qkv_bias"]) for name in ("W_query", "W_key", "W_value")
        )
        x = x + linear(gpt2.causal_attention(query, key, value, settings["n_head"]), f"{block}.att.out_proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0")
        x = x + linear(gpt2.activation(inner, settings["activation_function"]), f"{block}.ff.layers.2")
    return norm(x, "final_norm") @ read("out_head.weight").T
