"""How fast a run goes and what of the device it uses: tokens per second, share of peak, memory, time left."""

import re
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from kit.model.parts import transformer_blocks
from kit.training.freezing import FreezingPlan, part_labels
from kit.training.parameter_groups import FIRST_PHASE, MEMBERS, phase_at

# What differs between two runs that compute the same numbers.
MEASURED = frozenset(("tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_gib", "seconds_left"))
# bf16 with dense matrices, in TFLOP/s, by words of the device's name; the first that stands there counts. From the data
# sheets of NVIDIA (half of what is given "with sparsity") and, of the A10G, Amazon's page of G5 instances.
_PEAKS = {
    "MIG": None, "Laptop": None,  # a part of a device, and a slower one of the same name
    "GB200": 2500, "B200": 2250, "B100": 1750, "GH200": 989, "H200 NVL": 836, "H200": 989, "H100 NVL": 836,
    "H100 PCIe": 756, "H100": 989, "H800 PCIe": 756, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A30": 165, "A40": 150, "A10G": 70, "A10": 125, "RTX 6000 Ada": 364, "RTX A6000": 155,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
_GIB = 2**30


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device in FLOP/s by its name, or None where it is not known."""
    found = next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)
    return found and found * 1e12


def flops_per_token(model: PreTrainedModel, length: int, skipped_blocks: int = 0) -> float | None:
    """Return the operations that a token of a training step needs, as PaLM counts them (Chowdhery et al., appendix B).

    A matrix of n weights takes 2 n for the output, 2 n for the gradient of its input and 2 n for its own; attention
    over `length` positions, 4 × layers × length × width for the output and twice that for gradients. Nothing trains
    below the first part that does, so no gradient is computed there, and a frozen matrix has none of its own. What is
    computed twice to save memory counts once.

    Args:
        model: as it trains now.
        length: positions of a row.
        skipped_blocks: so many of the first blocks compute nothing.

    Returns:
        None for a model with experts or convolutions, of which not everything takes part in every token.
    """
    blocks = transformer_blocks(model)[:skipped_blocks] if skipped_blocks else ()
    skipped = {module for block in blocks for module in block.modules()}
    matrices = total = below = 0
    reached = False  # by gradients, coming from the head
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.dim() > 2 for parameter in own):
            return None
        if isinstance(module, nn.Linear | Conv1D):
            weights = module.nx * module.nf if isinstance(module, Conv1D) else module.in_features * module.out_features
            matrices += weights
            below += weights * reached
            total += weights * (2 + 2 * reached + 2 * module.weight.requires_grad) * (module not in skipped)
        reached = reached or any(parameter.requires_grad for parameter in own)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = min(length, getattr(config, "sliding_window", None) or length)
    positions = [{"full_attention": length, "sliding_attention": window}.get(kind, 0) for kind in kinds]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    passes = sum(positions[skipped_blocks:]) + sum(positions) * 2 * below / max(matrices, 1)
    return total + 4 * passes * config.num_attention_heads * head_dim


class Throughput(TrainerCallback):
    """Knows what a log entry says beside the loss: rates of the groups, phase, tokens seen, speed, memory, time left.

    Attributes:
        tokens_seen: of the whole run, all processes together; a tensor, so that no step waits for the GPU.
        length: positions of the rows of the last step.
    """

    def __init__(
        self, plan: FreezingPlan | None = None, peak: float | None = None, served: Callable[[], int] = lambda: 0
    ) -> None:
        """Measure a run.

        Args:
            plan: of `freezing`, if the recipe has one.
            peak: of a device in FLOP/s, where the recipe gives one; else by the device's name.
            served: micro-batches that have skipped a part of the model so far.
        """
        self.plan, self.peak, self._served = plan, peak, served
        self.tokens_seen = torch.tensor(0)
        self.length = 0
        self.rates: dict[str, float] = {}
        self._names: list[str] = []
        self._model: PreTrainedModel | None = None
        self._clock = (0.0, 0.0)
        self._served_then = 0
        self._began = (0, 0.0)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, optimizer: Any, **kwargs: Any
    ) -> None:
        """Begin at the step that training begins at."""
        self._model, self._names = model, _group_names(model, optimizer, self.plan)
        self._began = (state.global_step, time.monotonic())
        self._start_clock()

    def go_on_from(self, tokens_seen: torch.Tensor) -> None:
        """Take up the count of the run that is resumed."""
        self.tokens_seen = tokens_seen
        self._start_clock()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, optimizer: Any, **kwargs: Any) -> None:
        """Keep the rates of this step; the scheduler goes on to the next one's before they are logged."""
        groups = zip(self._names, optimizer.param_groups, strict=True)
        self.rates = {f"learning_rate/{name}": float(group["lr"]) for name, group in groups if name}

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Keep the time of evaluations out of the speed of training."""
        self._start_clock()

    # A save takes time of its own just as an evaluation does.
    on_save = on_evaluate

    def figures(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Return what is known at a log entry; the speed is that since the last one, evaluation or save."""
        figures = {**self.rates, "tokens_seen": int(self.tokens_seen)}
        if self.plan and len(self.plan.phases) > 1:
            figures["phase"] = phase_at(self.plan.phases, max(state.global_step - 1, 0)) + 1
        (seen, then), now = self._clock, time.monotonic()
        if figures["tokens_seen"] > seen:
            speed = (figures["tokens_seen"] - seen) / max(now - then, 1e-9)
            each = speed / args.world_size
            figures |= {"tokens_per_second": speed, "tokens_per_second_per_device": each} | self._share(each, args)
        step, began = self._began
        if state.global_step > step:
            left = state.max_steps - state.global_step
            figures["seconds_left"] = left * (now - began) / (state.global_step - step)
        self._start_clock()
        on_gpu = args.device.type == "cuda"
        used = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        return figures | {"memory_gib": used / _GIB}

    def _share(self, speed: float, args: TrainingArguments) -> dict[str, float]:
        peak = self.peak
        # The table's peaks are those of 16 bits.
        if peak is None and args.device.type == "cuda" and (args.bf16 or args.fp16):
            peak = peak_flops(torch.cuda.get_device_name())
        # Of tokens of which some skipped a part of the model, nobody else's share could be compared with this one.
        flops = flops_per_token(self._model, self.length) if peak and self._served() == self._served_then else None
        return {"mfu": speed * flops / peak} if flops else {}

    def _start_clock(self) -> None:
        self._clock, self._served_then = (int(self.tokens_seen), time.monotonic()), self._served()


def _group_names(model: PreTrainedModel, optimizer: Any, plan: FreezingPlan | None) -> list[str]:
    """Return a name for each group of an optimizer, of what trains in it; none where all have one rate throughout."""
    phases = plan.phases if plan else ()

    def course(group: dict[str, Any]) -> tuple[float, ...]:
        warmup = phases[group[FIRST_PHASE]] if FIRST_PHASE in group and phases else None
        begins = (warmup.start, warmup.warmup_steps) if warmup and warmup.warmup_steps else ()
        return (group.get("initial_lr", group["lr"]), *begins)

    courses = [course(group) for group in optimizer.param_groups]
    if len(set(courses)) == 1:
        return [""] * len(courses)
    labels = part_labels(model)
    parts: dict[tuple[float, ...], list[str]] = {each: [] for each in courses}
    for each, group in zip(courses, optimizer.param_groups, strict=True):
        parts[each] += [labels[name] for name in group.get(MEMBERS, ())]
    names = {each: _joined(found) or f"group {number}" for number, (each, found) in enumerate(parts.items())}
    # Two rates within one part, such as of patterns or biases.
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    names = {e: f"{n} {number}" if n in twice else n for number, (e, n) in enumerate(names.items())}
    return [names[each].replace(" ", "_") for each in courses]


def _joined(parts: list[str]) -> str:
    """Return parts in one name, `blocks 0-3` for blocks that follow each other."""
    blocks = sorted({int(part.removeprefix("block ")) for part in parts if part.startswith("block ")})
    runs = [list(run) for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0])]
    ranges = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    others = dict.fromkeys(part for part in parts if not part.startswith("block "))
    return "+".join([*others, *([f"blocks {','.join(ranges)}"] if blocks else [])])
