"""What training takes in memory and on disk, by size of model and strategy: the formulas of docs/scaling.md.

Everything is in bytes. `benchmarks/scaling.py` compares the formulas with what is counted and measured.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

GB = 1e9
RESULT = Path(__file__).parent / "results/scaling.json"
RANK = 16  # of LoRA, in every linear layer of the blocks
BLOCKS = 2  # that train where the others are frozen
# NF4 in groups of 64 values, whose scales are 8 bits with a scale of their own for 256 of them (arXiv:2305.14314, 3).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_GPT2 = {"model_type": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# What the published config.json of each has.
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": _GPT2,
    "GPT-2 medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "GPT-2 XL": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "Llama-3.2-3B": _LLAMA3 | _sizes(3072, 8192, 28, 24) | {"tie_word_embeddings": True},
    "Llama-3-8B": _LLAMA3 | _sizes(4096, 14336, 32, 32) | {"tie_word_embeddings": False},
    "Qwen3-14B": _QWEN3 | _sizes(5120, 17408, 40, 40) | {"tie_word_embeddings": False},
    "Qwen3-32B": _QWEN3 | _sizes(5120, 25600, 64, 64) | {"tie_word_embeddings": False},
    "Llama-3-70B": _LLAMA3 | _sizes(8192, 28672, 80, 64) | {"tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Shape:
    """A model in the letters of docs/scaling.md."""

    family: str
    layers: int
    h: int
    f: int
    heads: int
    kv_heads: int
    d: int
    vocabulary: int
    positions: int
    tied: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """Return the shape of a model of one of the families gpt2, llama and qwen3."""
        h, heads = config.hidden_size, config.num_attention_heads
        gpt2 = config.model_type == "gpt2"
        return cls(
            config.model_type, config.num_hidden_layers, h, 4 * h if gpt2 else config.intermediate_size, heads,
            heads if gpt2 else config.num_key_value_heads, getattr(config, "head_dim", None) or h // heads,
            config.vocab_size, config.max_position_embeddings, bool(config.tie_word_embeddings),
        )  # fmt: skip

    @property
    def a(self) -> int:
        """Width of the queries."""
        return self.heads * self.d

    @property
    def k(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.d

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Linear layers of a block: (in, out)."""
        h, f, a, k = self.h, self.f, self.a, self.k
        if self.family == "gpt2":
            return [(h, 3 * h), (h, h), (h, f), (f, h)]
        return [(h, a), (h, k), (h, k), (a, h), (h, f), (h, f), (f, h)]

    @property
    def linear(self) -> int:
        """Values in the linear layers of a block."""
        return sum(i * o for i, o in self.matrices)

    @property
    def block(self) -> int:
        """Parameters of a block."""
        small = {"gpt2": 9 * self.h + self.f, "llama": 2 * self.h, "qwen3": 2 * self.h + 2 * self.d}
        return self.linear + small[self.family]

    @property
    def head(self) -> int:
        """Values in the head's matrix, and in that of the embeddings."""
        return self.vocabulary * self.h

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        rest = self.positions * self.h + 2 * self.h if self.family == "gpt2" else self.h
        return self.head * (1 if self.tied else 2) + self.layers * self.block + rest

    @property
    def lora(self) -> int:
        """Parameters of a LoRA adapter in every linear layer."""
        return self.layers * sum(RANK * (i + o) for i, o in self.matrices)


def shape_of(model: str | dict[str, Any]) -> Shape:
    """Return the shape of one of `MODELS`, or of a configuration."""
    return Shape.of(AutoConfig.for_model(**(MODELS[model] if isinstance(model, str) else model)))


@dataclass(frozen=True)
class Strategy:
    """How a model is trained: what of it, in which precision, and over how many GPUs it is spread."""

    name: str
    launch: str
    keys: str = ""
    trains: str = "all"  # or last blocks, lora
    weights: float = 4  # bytes of one
    checkpointing: bool = True
    sharding: str = ""  # or ddp, fsdp2, fsdp2_offload, zero2, zero3
    gpus: int = 1

    @property
    def computes_in_bf16(self) -> bool:
        """Whether the weights that are multiplied are bfloat16 without autocast's doing."""
        return self.weights != 4 or self.sharding not in ("", "ddp")


_CHECKPOINTING = "training.gradient_checkpointing=true"
_BF16 = f"model.dtype=bfloat16 {_CHECKPOINTING}"
_FROZEN = "freezing: {trainable: {last_blocks: 2, final_norm: true}}"
_LORA = f"adapter: {{type: lora, r: {RANK}}}"
STRATEGIES = [
    Strategy("one GPU, fp32 weights", "single_gpu", "", checkpointing=False),
    Strategy("the same, checkpointing", "single_gpu", _CHECKPOINTING),
    Strategy("bfloat16 weights, checkpointing", "single_gpu", _BF16, weights=2),
    Strategy("last 2 blocks", "single_gpu", _FROZEN, trains="last blocks", checkpointing=False),
    Strategy("LoRA, bfloat16 base, checkpointing", "single_gpu", f"{_LORA} {_BF16}", trains="lora", weights=2),
    Strategy("QLoRA, checkpointing", "single_gpu", f"{_LORA} model.load_in_4bit=true {_BF16}", "lora", NF4),
    Strategy("DDP, checkpointing", "ddp", _CHECKPOINTING, sharding="ddp", gpus=8),
    *(
        Strategy(f"FSDP2 on {n} GPUs, checkpointing", "fsdp2", _CHECKPOINTING, sharding="fsdp2", gpus=n)
        for n in (8, 16, 64)
    ),
    Strategy("FSDP2 with offload on 8", "fsdp2_offload", _CHECKPOINTING, sharding="fsdp2_offload", gpus=8),
    Strategy("ZeRO-2 on 8", "zero2", _CHECKPOINTING, sharding="zero2", gpus=8),
    Strategy("ZeRO-3 on 8", "zero3", _CHECKPOINTING, sharding="zero3", gpus=8),
]


# ---- the formulas


def norm_per_token(shape: Shape, bf16: bool, frozen: bool = False) -> int:
    """Return the bytes that one normalisation keeps for the backward pass."""
    if shape.family == "gpt2":
        return 2 * shape.h + 4 if bf16 else 4 * shape.h + 8
    return 4 * shape.h + 4 + (0 if frozen else 2 * shape.h if bf16 else 4 * shape.h)


def block_per_token(shape: Shape, length: int, bf16: bool, lora: bool = False) -> int:
    """Return the bytes that a block keeps for the backward pass, for a token of rows in which documents are packed.

    Args:
        shape: of the model.
        length: of a row.
        bf16: the weights are bfloat16, rather than fp32 that autocast casts.
        lora: they are frozen, with an adapter beside them.
    """
    h, f, a, k = shape.h, shape.f, shape.a, shape.k
    mask, softmax = 2 * length, 4 * shape.heads
    total = 2 * norm_per_token(shape, bf16, lora) + mask + softmax + (2 * RANK * len(shape.matrices) if lora else 0)
    if shape.family == "gpt2":
        return total + 4 * h + 8 * h + 4 * f + (2 * h if lora else 0)
    inputs = 4 * h if bf16 and not lora else 10 * h
    of_heads = (4 if lora else 6) * (a + k) + 4 * (shape.heads + shape.kv_heads) if shape.family == "qwen3" else 0
    return total + inputs + 8 * a + (2 * a if lora else 0) + of_heads + 8 * f


def positions_of_chunk(shape: Shape, tokens: int) -> int:
    """Return how many positions' logits the kit holds at a time."""
    return min(tokens, 2**24 // shape.vocabulary)


def training_memory(shape: Shape, strategy: Strategy, rows: int = 1, length: int = 2048) -> dict[str, float]:
    """Return the bytes that a GPU holds at most while training, by use: see docs/scaling.md for each.

    Args:
        shape: of the model.
        strategy: how it is trained; accumulation is left out for what is sharded.
        rows: of a micro-batch.
        length: of a row.
    """
    everything, n, sharding = shape.parameters, strategy.gpus, strategy.sharding
    tokens, bf16, lora = rows * length, strategy.computes_in_bf16, strategy.trains == "lora"
    frozen_but_last = strategy.trains == "last blocks"
    blocks = BLOCKS if frozen_but_last else shape.layers
    last = BLOCKS * shape.block + (2 if shape.family == "gpt2" else 1) * shape.h
    in_shards = sharding not in ("", "ddp")
    trained = shape.lora if lora else last if frozen_but_last else everything
    of_trained = 4 if lora else strategy.weights
    per_block = block_per_token(shape, length, bf16, lora) * tokens
    kept = (2 if bf16 else 4) * shape.h * tokens if strategy.checkpointing else per_block
    parts = {
        "weights": strategy.weights * everything + (4 * shape.lora if lora else 0),
        "gradients": of_trained * trained,
        "optimizer": 2 * of_trained * trained,
        "casts": 0 if bf16 else 2 * (blocks * shape.linear + shape.head),
        "buckets": 4 * trained if sharding == "ddp" else 0,
        "gathered": 0,
        "activations": blocks * kept + (norm_per_token(shape, bf16, lora) + 2 * shape.h) * tokens,
        "one block again": per_block if strategy.checkpointing else 0,
        "logits": 8 * shape.vocabulary * (tokens if in_shards else positions_of_chunk(shape, tokens)),
    }
    if strategy.weights == NF4:
        quantised = shape.layers * shape.linear
        parts["weights"] = NF4 * quantised + 2 * (everything - quantised) + 4 * shape.lora
        parts["gathered"] = 2 * max(i * o for i, o in shape.matrices)
    if sharding.startswith("fsdp2"):
        shard = 0 if sharding == "fsdp2_offload" else 1 / n
        parts |= {"weights": 4 * everything * shard, "gradients": 4 * everything * shard}
        parts |= {"optimizer": 8 * everything * shard, "gathered": 8 * shape.block + 6 * shape.head}
    elif sharding == "zero2":
        parts |= {"weights": 4 * everything, "gradients": 4 * everything / n, "optimizer": 12 * everything / n}
    elif sharding == "zero3":
        parts |= {"weights": 4 * everything / n, "gradients": 4 * everything / n, "optimizer": 12 * everything / n}
        parts["gathered"] = 4 * shape.head + 4 * min(everything, 1e9)
    return parts


def whole_model(shape: Shape, strategy: Strategy) -> float:
    """Return the bytes of the whole model as it is loaded, and measured before it is spread over GPUs."""
    return training_memory(shape, strategy)["weights"] if not strategy.sharding else strategy.weights * shape.parameters


def device_peak(shape: Shape, strategy: Strategy, length: int) -> float:
    """Return the bytes that a GPU needs from start to end."""
    whole = whole_model(shape, strategy)
    sharded = strategy.sharding not in ("", "ddp")
    # Shards are cut while the whole is there; without them the saved model is loaded beside the trained one at the end.
    around = whole * (1 + 1 / strategy.gpus) if sharded else 2 * whole
    return max(sum(training_memory(shape, strategy, length=length).values()), around)


def main_memory(shape: Shape, strategy: Strategy, per_machine: int = 8) -> float:
    """Return the bytes of main memory that the processes of a machine take for the model at most."""
    here = min(per_machine, strategy.gpus)
    loading = here * max(strategy.weights, 2) * shape.parameters
    offloaded = 16 * shape.parameters * here / strategy.gpus if strategy.sharding == "fsdp2_offload" else 0
    # One process puts the shards together to save them, and loads what it has saved.
    gathered = 8 * shape.parameters if strategy.sharding not in ("", "ddp") else 0
    return max(loading, offloaded + gathered)


def checkpoint_size(shape: Shape, strategy: Strategy) -> float:
    """Return the bytes of a checkpoint on disk: weights, and AdamW's two values for each that trains."""
    if strategy.trains == "lora":
        return 12 * shape.lora
    if strategy.sharding.startswith("zero"):  # DeepSpeed's own files hold the weights again; those of stage 3 in shards
        return (20 if strategy.sharding == "zero2" else 16) * shape.parameters
    trained = training_memory(shape, strategy)["gradients"] if not strategy.sharding else 4 * shape.parameters
    return strategy.weights * shape.parameters + 2 * trained


# ---- the tables of docs/scaling.md


def length_of(shape: Shape) -> int:
    """Return the length of a row in the tables."""
    return min(2048, shape.positions)


def _gb(size: float) -> str:
    return f"{size / GB:,.0f}" if size >= 10 * GB else f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def choose(shape: Shape, gpus: int, memory: float) -> str:
    """Return the first way to train that fits: launch file, and what it takes of the recipe.

    Args:
        shape: of the model.
        gpus: how many there are.
        memory: of one, in bytes; a tenth of it is left free.
    """
    many = {"launch": "ddp" if gpus <= 8 else "multi_node", "sharding": "ddp", "gpus": gpus} if gpus > 1 else {}
    one, checkpointing, _, _, lora, qlora = (replace(strategy, **many) for strategy in STRATEGIES[:6])
    fsdp2 = [replace(strategy, gpus=gpus) for strategy in STRATEGIES if strategy.launch == "fsdp2"][:1]
    ways = {
        "": one,
        ", checkpointing": checkpointing,
        " (shards), checkpointing": fsdp2[0] if gpus > 1 else None,
        ", LoRA": lora,
        ", QLoRA": qlora,
    }
    for words, way in ways.items():
        if way and device_peak(shape, way, length_of(shape)) <= 0.9 * memory:
            return f"`{way.launch}`{words}"
    return "–"


def tables() -> str:
    """Return the tables of docs/scaling.md."""
    shapes = {name: shape_of(name) for name in MODELS}
    sizes = [f"{name} ({shape.parameters / 1e9:.3g}B)" for name, shape in shapes.items()]

    def by_kind(figure: Callable[[Shape, Strategy], float], kinds: dict[str, Strategy]) -> str:
        rows = [[words, *(_gb(figure(shape, each)) for shape in shapes.values())] for words, each in kinds.items()]
        return _table(["GB", *sizes], rows)

    def by_strategy(figure: Callable[[Shape, Strategy], float]) -> str:
        return by_kind(figure, {each.name: each for each in STRATEGIES})

    def training(shape: Shape, strategy: Strategy) -> float:
        return sum(training_memory(shape, strategy, length=length_of(shape)).values())

    plain, frozen, lora, zero = STRATEGIES[0], STRATEGIES[3], STRATEGIES[4], STRATEGIES[-1]
    parts = {name: training_memory(shape, STRATEGIES[1], length=length_of(shape)) for name, shape in shapes.items()}
    sections = [
        ("A GPU while it trains, one row per micro-batch", by_strategy(training)),
        ("The same, from start to end", by_strategy(lambda shape, each: device_peak(shape, each, length_of(shape)))),
        (
            "Of what the second line is made",
            _table(
                ["GB", *sizes],
                [[use, *(_gb(part[use]) for part in parts.values())] for use in parts["GPT-2"] if parts["GPT-2"][use]],
            ),
        ),
        (
            "Main memory of a machine with eight GPUs",
            by_kind(
                main_memory,
                {
                    "one process, fp32 weights": plain, "one process, bfloat16 weights; LoRA; QLoRA": lora,
                    "eight processes, fp32 weights: DDP; FSDP2; ZeRO": zero,
                },
            ),
        ),
        (
            "A checkpoint on disk",
            by_kind(
                checkpoint_size,
                {
                    "fp32 weights; DDP; FSDP2": plain, "last 2 blocks": frozen, "LoRA; QLoRA": lora, "ZeRO": zero,
                },
            ),
        ),
    ]  # fmt: skip
    for memory in (24, 80, 141):
        rows = [[name, *(choose(shape, n, memory * GB) for n in (1, 8, 16, 64))] for name, shape in shapes.items()]
        head = ["model", "1 GPU", "8 GPUs", "16 GPUs", "64 GPUs"]
        sections.append((f"What to take with GPUs of {memory} GB", _table(head, rows)))
    trained = json.loads(RESULT.read_text(encoding="utf-8"))["trained"]
    rows = [
        [name, _gb(figures["formula"]), _gb(figures["measured"]), f"{figures['formula'] / figures['measured']:.0%}"]
        for name, figures in trained.items()
    ]
    sections.append(("A small GPT-2 trained on a CPU", _table(["", "formula, GB", "measured, GB", ""], rows)))
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in sections)
