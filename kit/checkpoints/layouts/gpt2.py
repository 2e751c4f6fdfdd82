"""What all layouts of GPT-2 share: its sizes, what the tensors tell of them, and the arithmetic of its blocks.

Radford et al., Language Models are Unsupervised Multitask Learners (2019). Not a layout of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint
from kit.checkpoints.layout import Line, Settings, count_blocks
from kit.errors import UserError, did_you_mean

# Width to heads: GPT-2's four sizes, DistilGPT-2 among the first.
HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
_EOS = 50256  # where a vocabulary has at least GPT-2's tokens
_DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_by_inverse_layer_idx": False}
_DEDUCED = ("n_layer", "n_embd", "n_positions", "vocab_size", "n_inner", "tie_word_embeddings")
_KNOWN = (*_DEDUCED, "n_head", *_DEFAULTS, "bos_token_id", "eos_token_id", "pad_token_id")
_SAME_WHATEVER = 1e-6  # epsilon as a float of 32 bits


def deduce(
    checkpoint: Checkpoint, table: tuple[Line, ...], stated: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Settings, list[str]]:
    """Return Hugging Face's settings from the shapes of a checkpoint, and notes on what was chosen.

    Args:
        checkpoint: of a layout.
        table: of the layout; its names of the embeddings and of the inner layer tell the sizes.
        stated: what the file says, under Hugging Face's names; what no tensor tells counts, the rest is compared.
        given: what the user says; counts before `stated`, and is compared too.

    Raises:
        UserError: a name of `given` that GPT-2 does not have; sizes that disagree; heads that nobody tells.
    """
    if unknown := sorted(set(given) - set(_KNOWN)):
        raise UserError(f"--set {unknown[0]}: GPT-2 has no such setting{did_you_mean(unknown[0], _KNOWN)}")
    own = {line.hf: line.own[0] for line in table}
    found: Settings = {"n_layer": count_blocks(checkpoint.tensors, table)}
    first = own["transformer.h.{n}.mlp.c_fc.weight"].replace("{n}", "0")
    wide, _ = _sizes(checkpoint, own["transformer.wte.weight"]), None
    found["vocab_size"], found["n_embd"] = wide
    found["n_positions"], width = _sizes(checkpoint, own["transformer.wpe.weight"])
    if width != found["n_embd"]:
        raise UserError(
            f"{checkpoint.path}: its embeddings are {found['n_embd']:,} wide, its position embeddings {width:,}"
        )
    inner = max(_sizes(checkpoint, first))
    found["n_inner"] = None if inner == 4 * found["n_embd"] else inner
    found["tie_word_embeddings"] = is_tied(checkpoint, own["transformer.wte.weight"], own["lm_head.weight"])
    for source, values in (("the file says", stated), ("--set says", given)):
        for name in set(values) & set(_DEDUCED):
            if values[name] != found[name] and (name, values[name]) != ("n_inner", 4 * found["n_embd"]):
                raise UserError(f"{checkpoint.path}: {source} {name} {values[name]}, its tensors {found[name]}")
    notes = []
    known = {**_DEFAULTS, **stated, **given}
    if "n_head" not in known:
        if found["n_embd"] not in HEADS:
            raise UserError(
                f"{checkpoint.path}: no tensor tells the number of heads, and {found['n_embd']:,} is the width of no "
                f"GPT-2 ({', '.join(f'{w:,}' for w in HEADS)}); give it with --set n_head=…"
            )
        known["n_head"] = HEADS[found["n_embd"]]
        notes.append(f"n_head: {known['n_head']}, as GPT-2 of width {found['n_embd']:,} has")
    if found["n_embd"] % known["n_head"]:
        raise UserError(f"{checkpoint.path}: {found['n_embd']:,} is no multiple of {known['n_head']} heads")
    return {**{key: known[key] for key in _KNOWN if key in known}, **found}, notes


def is_tied(checkpoint: Checkpoint, embeddings: str, head: str) -> bool:
    """Tell whether the head is absent, or the embeddings bit for bit."""
    if head not in checkpoint.tensors:
        return True
    one, other = checkpoint.tensors[embeddings], checkpoint.tensors[head]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one.read(), other.read())


def _sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    tensor = checkpoint.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        what = "there is none" if tensor is None else f"it has the shape {tuple(tensor.shape)}"
        raise UserError(f"{checkpoint.path}: expected a matrix `{name}`; {what}")
    return tensor.shape


def make_config(settings: Settings) -> GPT2Config:
    """Return the configuration of `deduce`'s settings."""
    known = {key: value for key, value in settings.items() if key in _KNOWN}
    special = _EOS if settings["vocab_size"] > _EOS else None
    return GPT2Config(**{"bos_token_id": special, "eos_token_id": special, **known})


def check_plain(layout: str, config: PreTrainedConfig, tied: bool = False) -> None:
    """Refuse what a layout has no place for.

    Args:
        layout: its name.
        config: a GPT-2's.
        tied: whether the layout has only a head that is the embeddings.

    Raises:
        UserError: another inner width, scaling or epsilon than GPT-2's, cross-attention, or a head of its own.
    """
    expected = {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    faults = [f"{key} {getattr(config, key)}" for key, value in expected.items() if getattr(config, key) != value]
    if config.n_inner not in (None, 4 * config.n_embd):
        faults.append(f"n_inner {config.n_inner:,}")
    if abs(config.layer_norm_epsilon - 1e-5) > _SAME_WHATEVER * 1e-5:
        faults.append(f"layer_norm_epsilon {config.layer_norm_epsilon:g}")
    if tied and not config.tie_word_embeddings:
        faults.append("a head of its own (tie_word_embeddings false)")
    if faults:
        raise UserError(f"the layout {layout} has no place for {', '.join(faults)}")


# ---- the arithmetic, in plain PyTorch


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Return LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon) * weight
    return y if bias is None else y + bias


def causal_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return what each position gathers of itself and those before it: (batch, time, width)."""
    batch, time, width = query.shape
    query, key, value = (x.view(batch, time, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(width // heads)
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).reshape(batch, time, width)


def activation(x: Tensor, settings: Settings) -> Tensor:
    """Return GELU: GPT-2's approximation (`gelu_new`), or exactly.

    Raises:
        UserError: another one, which no layout of GPT-2 has.
    """
    name = settings["activation_function"]
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    raise UserError(f"activation_function: `{name}`; expected gelu_new or gelu")
