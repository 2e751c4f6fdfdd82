"""llama2.c (https://github.com/karpathy/llama2.c): Meta's names, heads whose rotated pairs lie side by side."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint
from kit.checkpoints.formats import llama2c_bin
from kit.checkpoints.layout import SAME, Line, Read, Settings, Turn, count_blocks
from kit.checkpoints.layouts import gpt2
from kit.errors import UserError, did_you_mean

NAME = "llama2.c"
ABOUT = (
    "llama2.c: Meta's names; one `.bin` of version 0 or 1 (`version` in the settings), or `ckpt.pt` of its training."
)
MODEL_TYPE = "llama"
BUFFERS = ("freqs_cos", "freqs_sin", "freqs_cis", r"rope\.freqs", r"layers\.\d+\.attention\.mask")
KEEPS_TIED_HEAD = True  # by `ckpt.pt`; the binary file leaves it out
SUFFIXES = (".bin", ".pt")
OPTIONS = ("version",)  # of the binary file: 0 or 1


def _to_halves(rows: Tensor, heads: int) -> Tensor:
    """Turn the rows of each head from pairs (0, 1), (2, 3), … to all first of them and then all second."""
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _to_pairs(rows: Tensor, heads: int) -> Tensor:
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _halves(heads: str) -> Turn:
    return Turn(
        f"rows of each head from pairs to halves ({heads})",
        lambda own, config: _to_halves(own[0], getattr(config, heads)),
        lambda hf, config: [_to_pairs(hf, getattr(config, heads))],
    )


_EMBEDDINGS, _HEAD = "tok_embeddings.weight", "output.weight"
TABLE = (
    Line("model.embed_tokens.weight", (_EMBEDDINGS,)),
    *(
        Line(f"model.layers.{{n}}.{hf}.weight", (f"layers.{{n}}.{own}.weight",), turn)
        for hf, own, turn in (
            ("input_layernorm", "attention_norm", SAME),
            ("self_attn.q_proj", "attention.wq", _halves("num_attention_heads")),
            ("self_attn.k_proj", "attention.wk", _halves("num_key_value_heads")),
            ("self_attn.v_proj", "attention.wv", SAME),
            ("self_attn.o_proj", "attention.wo", SAME),
            ("post_attention_layernorm", "ffn_norm", SAME),
            ("mlp.gate_proj", "feed_forward.w1", SAME),
            ("mlp.up_proj", "feed_forward.w3", SAME),
            ("mlp.down_proj", "feed_forward.w2", SAME),
        )
    ),
    Line("model.norm.weight", ("norm.weight",)),
    Line("lm_head.weight", (_HEAD,), head=True),
)
# Of the header and of `model_args`.
_ARGUMENTS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": llama2c_bin.THETA,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_KNOWN = {*_ARGUMENTS.values(), *_DEFAULTS, "tie_word_embeddings"}


def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """See `Layout`. No tensor tells the number of heads, nor how many positions there are."""
    if unknown := sorted(set(given) - _KNOWN):
        raise UserError(f"--set {unknown[0]}: {NAME} has no such setting{did_you_mean(unknown[0], _KNOWN)}")
    arguments = checkpoint.settings.get("header") or checkpoint.settings.get("model_args") or {}
    # llama2.c leaves out, or sets to None, what it works out itself.
    stated = {theirs: arguments[own] for own, theirs in _ARGUMENTS.items() if arguments.get(own) is not None}
    for source, values in (("the file says", stated), ("--set says", given)):
        for name, value in values.items():
            if not isinstance(value, int | float) or value < 0:
                raise UserError(f"{checkpoint.path}: {source} {name} {value}; expected a number")
    for name in sorted(set(stated) & set(given)):
        if stated[name] != given[name]:
            raise UserError(f"{checkpoint.path}: --set says {name} {given[name]}, the file says {stated[name]}")
    known = {**_DEFAULTS, **stated, **given}
    heads = known.get("num_attention_heads")
    if heads is None:
        raise UserError(f"{checkpoint.path}: no tensor tells the number of heads; --set num_attention_heads=…")
    found: Settings = {"num_hidden_layers": count_blocks(checkpoint.tensors, TABLE)}
    found["vocab_size"], width = _matrix(checkpoint, _EMBEDDINGS)
    found["hidden_size"] = width
    found["intermediate_size"], _ = _matrix(checkpoint, "layers.0.feed_forward.w1.weight")
    keys, _ = _matrix(checkpoint, "layers.0.attention.wk.weight")
    if not isinstance(heads, int) or heads < 1 or width % (2 * heads):
        raise UserError(
            f"{checkpoint.path}: num_attention_heads {heads}: expected a divisor of half the width, {width // 2:,}"
        )
    found["num_key_value_heads"] = keys // (width // heads)
    if keys % (width // heads) or heads % max(found["num_key_value_heads"], 1):
        raise UserError(
            f"{checkpoint.path}: num_attention_heads {heads}: the {keys:,} rows of the keys are no whole heads of "
            f"{width // heads:,} whose number divides {heads}"
        )
    found["tie_word_embeddings"] = gpt2.is_tied(checkpoint, _EMBEDDINGS, _HEAD)
    for source, values in (("the file says", stated), ("--set says", given)):
        for name in sorted(set(values) & set(found)):
            if values[name] != found[name]:
                raise UserError(f"{checkpoint.path}: {source} {name} {values[name]}, its tensors {found[name]}")
    notes = []
    if "max_position_embeddings" not in stated and "max_position_embeddings" not in given:
        notes.append("max_position_embeddings: 2,048, as in llama2.c's `ModelArgs`; the file does not tell")
    _check_rotations(checkpoint, width // heads, known["rope_theta"])
    return {**known, **found, "n_layer": found["num_hidden_layers"]}, notes


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    tensor = checkpoint.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        what = "there is none" if tensor is None else f"it has the shape {tensor.shape}"
        raise UserError(f"{checkpoint.path}: expected a matrix `{name}`; {what}")
    return tensor.shape


def _check_rotations(checkpoint: Checkpoint, head_dim: int, theta: float) -> None:
    """Refuse rotations other than those of `theta`, which Hugging Face's model will compute itself."""
    stored = {n: checkpoint.tensors[n].read() for n in llama2c_bin.ROTATIONS if n in checkpoint.tensors}
    for name, table in stored.items():
        right = llama2c_bin.rotations(head_dim, len(table), theta)[llama2c_bin.ROTATIONS.index(name)]
        # Angles are rounded to 24 bits: they grow to the number of positions, and other processors round otherwise.
        if table.shape != right.shape or not (table - right).abs().max() <= 1e-5 + 1e-6 * len(table):
            said = f"`{name}` are not the rotations of rope_theta {theta:,.0f}{_implied(stored, head_dim)}"
            raise UserError(f"{checkpoint.path}: {said}")


def _implied(stored: Mapping[str, Tensor], head_dim: int) -> str:
    """Return the theta that the slowest rotation of position 1 means, in words, or nothing."""
    sines = stored.get("freqs_sin")
    if sines is None or min(sines.shape) < 2 or not 0 < (sine := float(sines[1, -1])) < 1:
        return ""
    theta = math.asin(sine) ** (-head_dim / (head_dim - 2))
    return f"; they look like those of {theta:,.0f}: --set rope_theta=…"


def make_config(settings: Settings) -> PreTrainedConfig:
    """See `Layout`."""
    known = {key: settings[key] for key in _KNOWN if key != "rope_theta"}
    return LlamaConfig(
        **known,
        head_dim=settings["hidden_size"] // settings["num_attention_heads"],
        rope_parameters={"rope_type": "default", "rope_theta": float(settings["rope_theta"])},
    )


def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
    """See `Layout`; llama2.c's code fixes what its files do not say."""
    rope = dict(config.rope_parameters)
    expected = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    faults = [f"{key} {getattr(config, key)}" for key, value in expected.items() if getattr(config, key) != value]
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        faults.append(f"head_dim {config.head_dim}")
    if not math.isclose(config.rms_norm_eps, 1e-5, rel_tol=1e-6):
        faults.append(f"rms_norm_eps {config.rms_norm_eps:g}")
    if rope.pop("rope_theta", llama2c_bin.THETA) != llama2c_bin.THETA:
        faults.append(f"rope_theta {config.rope_parameters['rope_theta']:,.0f}")
    if rope.pop("rope_type", "default") != "default" or rope:
        faults.append(f"rope_parameters {config.rope_parameters}")
    if faults:
        raise UserError(f"the layout {NAME} has no place for {', '.join(faults)}")
    arguments = {own: getattr(config, theirs) for own, theirs in _ARGUMENTS.items()}
    multiple = _multiple_of(config.hidden_size, config.intermediate_size)
    return {"model_args": {**arguments, "multiple_of": multiple, "dropout": 0.0}}


def _multiple_of(dim: int, hidden_dim: int) -> int:
    """Return of what the width inside is made a multiple, as `train.py` works it out: 256 where nothing leads there."""
    least = int(2 * (4 * dim) / 3)
    return next((m for m in (256, *range(hidden_dim, 0, -1)) if m * math.ceil(least / m) == hidden_dim), 256)


def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
    """See `Layout`; rotations are products of complex numbers, as in Meta's code, from which llama2.c's comes."""
    (batch, time), heads = input_ids.shape, settings["num_attention_heads"]
    width, kv_heads = settings["hidden_size"] // heads, settings["num_key_value_heads"]
    speeds = 1.0 / settings["rope_theta"] ** (torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(time), speeds)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (time, 1, width / 2)
    later = torch.ones(time, time, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + settings["rms_norm_eps"]) * read(f"{name}.weight")

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ read(f"{name}.weight").T

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = read(_EMBEDDINGS)[input_ids]
    for number in range(settings["n_layer"]):
        block = f"layers.{number}"
        normed = norm(x, f"{block}.attention_norm")
        query = rotate(linear(normed, f"{block}.attention.wq").view(batch, time, heads, width))
        key = rotate(linear(normed, f"{block}.attention.wk").view(batch, time, kv_heads, width))
        value = linear(normed, f"{block}.attention.wv").view(batch, time, kv_heads, width)
        key, value = (each.repeat_interleave(heads // kv_heads, dim=2) for each in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        x = x + linear(mixed, f"{block}.attention.wo")
        normed = norm(x, f"{block}.ffn_norm")
        gate = linear(normed, f"{block}.feed_forward.w1")
        inner = gate * torch.sigmoid(gate) * linear(normed, f"{block}.feed_forward.w3")
        x = x + linear(inner, f"{block}.feed_forward.w2")
    return norm(x, "norm") @ read(_EMBEDDINGS if settings["tie_word_embeddings"] else _HEAD).T
