"""The rows of the causal-LM tables: which program, which settings, which environment, and what is to be reached.

Every row trains the same shape on the same text with the same number of positions per step, in the same precision.
"""

from dataclasses import dataclass, field
from typing import Any

NO_CHECKPOINTING = {"gradient_checkpointing": False}
# Documents cut into one stream, as run_clm does. TRL's other strategies put a batch into one long row, whose attention
# costs more without flash-attention.
TRL_BEST = {**NO_CHECKPOINTING, "packing_strategy": "wrapped"}


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        label: what the table calls it.
        module: of this package, run in a process of its own.
        dropout: GPT-2's own 0.1, as its users run it, or none.
        environment: `kit`, or a peer's.
        settings: what the module is asked for beside what all are.
        target: the kit is to be at least so many times as fast.
        memory_target: the kit is to take at most this share of its memory.
        isolated: a document sees nothing of the others in its row.
        note: what else the row does differently.
        most_steps: are timed in a round, where steps are long and the target is far away.
        once: measured after the last round alone, since starting takes long and nothing is to be reached.
    """

    label: str
    module: str
    dropout: bool = False
    environment: str = "kit"
    settings: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    memory_target: float | None = None
    isolated: bool = False
    note: str = ""
    most_steps: int | None = None
    once: bool = False


_LITGPT = "nearest shape: rotary instead of learned positions; weights that it draws; compiled by its own loop"

CPU = {
    "kit": Method("the kit, `kit train`", "kit_lm", isolated=True),
    "bare": Method("bare loop", "bare_loop", note="a bound"),
    "run_clm": Method("run_clm's method, dropout 0", "run_clm", target=1.0, memory_target=0.7),
    "run_clm_default": Method("run_clm's method, GPT-2's dropout", "run_clm", True, target=1.5, most_steps=1),
    "trl": Method(
        "TRL SFTTrainer, packed, its defaults", "trl_sft", True, "trl", target=2.2, isolated=True, most_steps=1,
        note="the checkpoint's dropout 0.1, where the kit has 0; checkpointing on; cuts off what a document has beyond "
        "a block",
    ),
    "trl_best": Method(
        "TRL SFTTrainer, packed, best settings", "trl_sft", False, "trl", {"arguments": TRL_BEST}, 1.6,
        note="checkpointing off, dropout 0, `wrapped`",
    ),
    "litgpt": Method(
        "litgpt pretrain", "litgpt_pretrain", False, "litgpt", note=f"{_LITGPT}; measured once, after the rounds",
        most_steps=1, once=True,
    ),
    "guide_lines": Method(
        "guide's lines padded to the block", "guide_lines", True, target=28.0, isolated=True,
        note="GPT-2's dropout; blank lines left out", most_steps=1,
    ),
}  # fmt: skip

_COMPILED = {"torch_compile": True}
GPU = {
    "kit": Method("the kit, `kit train`", "kit_lm", isolated=True),
    "kit_compiled": Method(
        "the kit, `training.torch_compile`", "kit_lm", settings={"training": _COMPILED}, isolated=True
    ),
    "bare": Method("bare loop", "bare_loop", note="a bound"),
    "run_clm": Method("run_clm's method, dropout 0", "run_clm", target=1.3),
    "run_clm_compiled": Method(
        "run_clm's method, dropout 0, compiled", "run_clm", settings={"arguments": _COMPILED}, target=1.3
    ),
    "run_clm_default": Method("run_clm's method, GPT-2's dropout", "run_clm", True),
    "trl": Method(
        "TRL SFTTrainer, packed, its defaults", "trl_sft", True, "trl", isolated=True, note=CPU["trl"].note
    ),
    "trl_best": Method(
        "TRL SFTTrainer, packed, best settings", "trl_sft", False, "trl", {"arguments": TRL_BEST}, 1.3,
        note=CPU["trl_best"].note,
    ),
    "trl_compiled": Method(
        "TRL SFTTrainer, packed, best settings, compiled", "trl_sft", False, "trl",
        {"arguments": TRL_BEST | _COMPILED}, 1.3, note=CPU["trl_best"].note,
    ),
    "litgpt": Method("litgpt pretrain", "litgpt_pretrain", False, "litgpt", note=_LITGPT),
}  # fmt: skip

_CHECKPOINTING = {"gradient_checkpointing": True}
XL = {
    "kit": Method("the kit, checkpointing", "kit_lm", settings={"training": _CHECKPOINTING}, isolated=True),
    "run_clm": Method("run_clm's method, checkpointing", "run_clm", settings={"arguments": _CHECKPOINTING}),
    "trl": Method(
        "TRL SFTTrainer, packed, checkpointing", "trl_sft", False, "trl",
        {"arguments": _CHECKPOINTING | {"packing_strategy": "wrapped"}},
    ),
}  # fmt: skip
