"""Guide 1's names for a GPT of one's own: `tok_emb`, `pos_emb`, `blocks`, `mlp.fc1`; plain Linear layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from kit.checkpoints.checkpoint import Checkpoint
from kit.checkpoints.layout import SAME, TRANSPOSED, Line, Read, Settings
from kit.checkpoints.layouts import gpt2

NAME = "guide"
ABOUT = "A GPT of one's own after guide 1: tok_emb, pos_emb, blocks, ln_f, lm_head; Linear layers with biases."
MODEL_TYPE = "gpt2"
BUFFERS = (r"blocks\.\d+\.attn\.(bias|masked_bias|mask)",)
KEEPS_TIED_HEAD = True
SUFFIXES = (".safetensors", ".pt")
TABLE = (
    Line("transformer.wte.weight", ("tok_emb.weight",)),
    Line("transformer.wpe.weight", ("pos_emb.weight",)),
    *(
        Line(f"transformer.h.{{n}}.{hf}.{kind}", (f"blocks.{{n}}.{own}.{kind}",), turn)
        for hf, own, weight in (
            ("ln_1", "ln_1", SAME),
            ("attn.c_attn", "attn.c_attn", TRANSPOSED),
            ("attn.c_proj", "attn.c_proj", TRANSPOSED),
            ("ln_2", "ln_2", SAME),
            ("mlp.c_fc", "mlp.fc1", TRANSPOSED),
            ("mlp.c_proj", "mlp.fc2", TRANSPOSED),
        )
        for kind, turn in (("weight", weight), ("bias", SAME))
    ),
    Line("transformer.ln_f.weight", ("ln_f.weight",)),
    Line("transformer.ln_f.bias", ("ln_f.bias",)),
    Line("lm_head.weight", ("lm_head.weight",), head=True),
)


def read_settings(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """See `Layout`; a `config` in the file, or a config.json beside it, has Hugging Face's names."""
    stated = gpt2.stated(checkpoint, "config", {name: name for name in gpt2.KNOWN})
    return gpt2.deduce(checkpoint, TABLE, stated, given)


make_config = gpt2.make_config


def own_settings(config: PreTrainedConfig, switches: Mapping[str, bool]) -> Settings:
    """See `Layout`."""
    gpt2.check_plain(NAME, config, inner=True, activations=(*gpt2.APPROXIMATE_GELU, "gelu"))
    return {"config": {name: getattr(config, name) for name in gpt2.KNOWN if not name.endswith("_token_id")}}


def reference_logits(read: Read, settings: Settings, input_ids: Tensor) -> Tensor:
    """See `Layout`."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ read(f"{name}.weight").T + read(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return gpt2.layer_norm(x, read(f"{name}.weight"), read(f"{name}.bias"), settings["layer_norm_epsilon"])

    x = read("tok_emb.weight")[input_ids] + read("pos_emb.weight")[: input_ids.shape[1]]
    for number in range(settings["n_layer"]):
        block = f"blocks.{number}"
        query, key, value = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        x = x + linear(gpt2.causal_attention(query, key, value, settings["n_head"]), f"{block}.attn.c_proj")
        inner = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.fc1")
        x = x + linear(gpt2.activation(inner, settings["activation_function"]), f"{block}.mlp.fc2")
    return norm(x, "ln_f") @ read("lm_head.weight").T
