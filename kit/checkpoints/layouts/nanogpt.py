"""nanoGPT (https://github.com/karpathy/nanoGPT): Linear layers, `model_args` in the file, biases that may be absent."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint
from kit.checkpoints.layout import SAME, TRANSPOSED, Line, Read, Settings
from kit.checkpoints.layouts import gpt2

NAME = "nanogpt"
ABOUT = "nanoGPT: Hugging Face's names, Linear layers, `bias=False` variants, a vocabulary padded to 50,304 rows."
MODEL_TYPE = "gpt2"
BUFFERS = (r"transformer\.h\.\d+\.attn\.bias",)
KEEPS_TIED_HEAD = True
SUFFIXES = (".pt", ".safetensors")
_BLOCK = "transformer.h.{n}."
TABLE = (
    Line("transformer.wte.weight", ("transformer.wte.weight",)),
    Line("transformer.wpe.weight", ("transformer.wpe.weight",)),
    *(
        Line(f"{_BLOCK}{name}.{kind}", (f"{_BLOCK}{name}.{kind}",), turn, switch="bias" if kind == "bias" else None)
        for name, weight in (
            ("ln_1", SAME),
            ("attn.c_attn", TRANSPOSED),
            ("attn.c_proj", TRANSPOSED),
            ("ln_2", SAME),
            ("mlp.c_fc", TRANSPOSED),
            ("mlp.c_proj", TRANSPOSED),
        )
        for kind, turn in (("weight", weight), ("bias", SAME))
    ),
    Line("transformer.ln_f.weight", ("transformer.ln_f.weight",)),
    Line("transformer.ln_f.bias", ("transformer.ln_f.bias",), switch="bias"),
    Line("lm_head.weight", ("lm_head.weight",), head=True),
)
_ARGUMENTS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "bias": "bias",
}
_PADDED = 50304  # GPT-2's vocabulary up to a multiple of 64


def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """See `Layout`. The activation is no tensor: nanoGPT's own code computes the exact GELU, GPT-2 an approximation."""
    stated = gpt2.stated(checkpoint, "model_args", _ARGUMENTS)
    default = "gelu" if stated else "gelu_new"
    why = "as in nanoGPT's own code" if stated else "as in GPT-2, since there are no `model_args`"
    stated |= gpt2.stated(checkpoint, "kit", {"activation_function": "activation_function"})
    told = "activation_function" in stated or "activation_function" in given
    settings, notes = gpt2.deduce(checkpoint, TABLE, {"activation_function": default, **stated}, given, _ARGUMENTS)
    if not told:
        other = "gelu_new" if default == "gelu" else "gelu"
        notes.append(f"activation_function: {default}, {why}; --set activation_function={other} is the other one")
    rows = settings["vocab_size"]
    if gpt2.TOKENS < rows <= _PADDED:
        notes.append(
            f"vocabulary: {rows:,} rows, kept; GPT-2 has {gpt2.TOKENS:,} tokens, the rest is padding, which "
            f"--vocab-size {gpt2.TOKENS} cuts off"
        )
    return settings, notes


make_config = gpt2.make_config


def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
    """See `Layout`; nanoGPT has a tied head, blocks four times as wide inside, and an epsilon of 1e-5."""
    gpt2.check_plain(NAME, config, tied=True, activations=(*gpt2.APPROXIMATE_GELU, "gelu"))
    arguments = {own: getattr(config, hf) for hf, own in _ARGUMENTS.items() if hf != "bias"}
    # Beside `model_args`, which nanoGPT hands to its own configuration whole.
    return {
        "model_args": {**arguments, "bias": switches["bias"], "dropout": 0.0},
        "kit": {"activation_function": config.activation_function},
    }


def target_notes(config: PreTrainedConfig) -> list[str]:
    """Return what nanoGPT's own code will do otherwise with a model that is written for it."""
    if config.activation_function == "gelu":
        return []
    return [
        f"activation_function {config.activation_function}: nanoGPT's own code computes the exact GELU "
        "(`nn.GELU()`), so its logits differ a little unless its MLP has `nn.GELU(approximate='tanh')`"
    ]


def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
    """See `Layout`."""

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ read(f"{name}.weight").T
        return y + read(f"{name}.bias") if settings["bias"] else y

    def norm(x: Tensor, name: str) -> Tensor:
        bias = read(f"{name}.bias") if settings["bias"] else None
        return gpt2.layer_norm(x, read(f"{name}.weight"), bias, settings["layer_norm_epsilon"])

    x = read("transformer.wte.weight")[input_ids] + read("transformer.wpe.weight")[: input_ids.shape[1]]
    for number in range(settings["n_layer"]):
        block = f"transformer.h.{number}"
        query, key, value = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        mixed = gpt2.causal_attention(query, key, value, settings["n_head"])
        x = x + linear(mixed, f"{block}.attn.c_proj")
        inner = gpt2.activation(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), settings["activation_function"])
        x = x + linear(inner, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ read("lm_head.weight").T
