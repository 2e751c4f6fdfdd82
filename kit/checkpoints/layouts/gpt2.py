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
from kit.checkpoints.layout import Line, Settings, count_blocks, expand
from kit.errors import UserError, did_you_mean
from kit.names import fold_names

# Width to heads: GPT-2's four sizes, DistilGPT-2 among the first.
HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
TOKENS = 50257  # of GPT-2's vocabulary; the last is <|endoftext|>
# The approximation of GELU that GPT-2 computes has two names; `gelu` is the exact one.
APPROXIMATE_GELU = ("gelu_new", "gelu_pytorch_tanh")
_ACTIVATIONS = (*APPROXIMATE_GELU, "gelu")
_DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
_DEDUCED = ("n_layer", "n_embd", "n_positions", "vocab_size", "n_inner", "tie_word_embeddings")
KNOWN = (*_DEDUCED, "n_head", *_DEFAULTS, "bos_token_id", "eos_token_id", "pad_token_id")
_SAME_WHATEVER = 1e-6  # epsilon as a float of 32 bits


def stated(checkpoint: Checkpoint, key: str, names: Mapping[str, str]) -> Settings:
    """Return what a file says under a key, in Hugging Face's names.

    Args:
        checkpoint: of a layout.
        key: of its settings, such as `model_args`.
        names: Hugging Face's name to the file's.

    Raises:
        UserError: what is there is no dictionary.
    """
    said = checkpoint.settings.get(key)
    if said is None:  # a config.json beside the file may be another model's, so it never counts before the file's own
        beside = checkpoint.settings.get("config.json", {})
        told = beside if beside.get("model_type") == "gpt2" else {}
        return {name: told[name] for name in names if name in told}
    if not isinstance(said, Mapping):
        raise UserError(f"{checkpoint.path}: `{key}` is {type(said).__name__}; expected a dictionary of settings")
    return {hf: said[own] for hf, own in names.items() if own in said}


def deduce(
    checkpoint: Checkpoint,
    table: tuple[Line, ...],
    stated: Mapping[str, Any],
    given: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> tuple[Settings, list[str]]:
    """Return Hugging Face's settings from the shapes of a checkpoint, and notes on what was chosen.

    Each switch of the table is among the settings: true where the checkpoint has any tensor that hangs on it.

    Args:
        checkpoint: of a layout.
        table: of the layout; its names of the embeddings and of the inner layer tell the sizes.
        stated: what the file says, under Hugging Face's names; what no tensor tells counts, the rest is compared.
        given: what the user says; counts before `stated`, and is compared too.
        names: Hugging Face's name to the file's, for messages.

    Raises:
        UserError: a name of `given` that GPT-2 does not have; sizes that disagree; heads that nobody tells.
    """
    found, notes = _from_tensors(checkpoint, table)
    switches = {line.switch for line in table if line.switch}
    if unknown := sorted(set(given) - set(KNOWN) - switches):
        raise UserError(f"--set {unknown[0]}: GPT-2 has no such setting{did_you_mean(unknown[0], {*KNOWN, *switches})}")
    faults = [
        f"{source} {called.get(name, name)} {values[name]}, its tensors {found[name]}"
        for source, values, called in (("the file says", stated, names or {}), ("--set says", given, {}))
        for name in found
        if name in values and values[name] != found[name] and (name, values[name]) != ("n_inner", 4 * found["n_embd"])
    ]
    if faults:
        raise UserError(f"{checkpoint.path}: {'; '.join(faults)}")
    known = {**_DEFAULTS, **stated, **given}
    if known["activation_function"] not in _ACTIVATIONS:
        raise UserError(
            f"{checkpoint.path}: activation_function `{known['activation_function']}`; expected one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if "n_head" not in known:
        if found["n_embd"] not in HEADS:
            raise UserError(
                f"{checkpoint.path}: no tensor tells the number of heads, and {found['n_embd']:,} is the width of no "
                f"GPT-2 ({', '.join(f'{w:,}' for w in HEADS)}); give it with --set n_head=…"
            )
        known["n_head"] = HEADS[found["n_embd"]]
        notes.append(f"n_head: {known['n_head']}, as GPT-2 of width {found['n_embd']:,} has")
    heads = known["n_head"]
    if not isinstance(heads, int) or heads < 1 or found["n_embd"] % heads:
        raise UserError(f"{checkpoint.path}: n_head {heads}; expected a number that divides {found['n_embd']:,}")
    return {**{key: known[key] for key in KNOWN if key in known}, **found}, notes


def _from_tensors(checkpoint: Checkpoint, table: tuple[Line, ...]) -> tuple[Settings, list[str]]:
    tensors, own = checkpoint.tensors, {line.hf: line.own[0] for line in table}
    embeddings, positions = own["transformer.wte.weight"], own["transformer.wpe.weight"]
    head = own.get("lm_head.weight")
    blocks = count_blocks(tensors, table)
    if absent := [name for name in (embeddings, positions) if name not in tensors]:
        others = [
            name
            for line, _, names in expand(table, blocks)
            for name in names
            if name not in tensors and not line.switch and not line.head and name not in absent
        ]
        rest = f"; missing too: {fold_names(others)}" if others else ""
        raise UserError(f"{checkpoint.path}: without {fold_names(absent)} nothing tells the sizes{rest}")
    found: Settings = {"n_layer": blocks}
    found["vocab_size"], found["n_embd"] = _matrix(checkpoint, embeddings)
    found["n_positions"], width = _matrix(checkpoint, positions)
    if width != found["n_embd"]:
        raise UserError(
            f"{checkpoint.path}: its embeddings are {found['n_embd']:,} wide, its position embeddings {width:,}"
        )
    if not blocks:
        raise UserError(f"{checkpoint.path}: it has no block; expected names such as {fold_names(own.values())}")
    inside = [own["transformer.h.{n}.mlp.c_fc.weight"].replace("{n}", str(n)) for n in range(blocks)]
    sizes = next((list(tensors[name].shape[-2:]) for name in inside if name in tensors), [])
    if width in sizes:  # one is the width; which of both is the layout's business
        sizes.remove(width)
    found["n_inner"] = None if not sizes or sizes[0] == 4 * width else sizes[0]
    found["tie_word_embeddings"] = head is None or is_tied(checkpoint, embeddings, head)
    for line, _, names in expand(table, blocks):
        if line.switch:
            found[line.switch] = found.get(line.switch, False) or any(name in tensors for name in names)
    return found, [] if head is None or head in tensors else [f"`{head}`: there is none, so it is the embeddings"]


def is_tied(checkpoint: Checkpoint, embeddings: str, head: str) -> bool:
    """Tell whether the head is absent, or the embeddings bit for bit."""
    if head not in checkpoint.tensors:
        return True
    one, other = checkpoint.tensors[embeddings], checkpoint.tensors[head]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one.read(), other.read())


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2:
        raise UserError(f"{checkpoint.path}: `{name}` has the shape {tuple(shape)}; expected a matrix")
    return shape


def make_config(settings: Settings) -> GPT2Config:
    """Return the configuration of `deduce`'s settings."""
    known = {key: value for key, value in settings.items() if key in KNOWN}
    special = TOKENS - 1 if settings["vocab_size"] >= TOKENS else None
    return GPT2Config(**{"bos_token_id": special, "eos_token_id": special, **known})


def check_plain(
    layout: str,
    config: PreTrainedConfig,
    tied: bool = False,
    inner: bool = False,
    activations: tuple[str, ...] = APPROXIMATE_GELU,
) -> None:
    """Refuse what a layout has no place for.

    Args:
        layout: its name.
        config: a GPT-2's.
        tied: whether the layout has only a head that is the embeddings.
        inner: whether its blocks may have any width inside, not only four times the model's.
        activations: what its code computes, or its file can name.

    Raises:
        UserError: another inner width, activation, scaling or epsilon, cross-attention, or a head of its own.
    """
    expected = {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    faults = [f"{key} {getattr(config, key)}" for key, value in expected.items() if getattr(config, key) != value]
    if not inner and config.n_inner not in (None, 4 * config.n_embd):
        faults.append(f"n_inner {config.n_inner:,} (only 4 × {config.n_embd:,})")
    if config.activation_function not in activations:
        faults.append(f"activation_function {config.activation_function} (only {', '.join(activations)})")
    if abs(config.layer_norm_epsilon - 1e-5) > _SAME_WHATEVER * 1e-5:
        faults.append(f"layer_norm_epsilon {config.layer_norm_epsilon:g} (only 1e-05)")
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


def activation(x: Tensor, name: str) -> Tensor:
    """Return GELU: GPT-2's approximation (`gelu_new`), or exactly (`gelu`)."""
    if name in APPROXIMATE_GELU:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
