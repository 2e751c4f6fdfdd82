"""What was taken of precision, optimizer, loss and compilation, and the times behind it, for `kit check --probe`.

A run's choices follow from hardware and recipe alone, never from these times: one that goes on has to choose the same.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from kit.model.chunked_loss import compute_whole_logits, count_logits_at_once, give_losses, gives_losses

_SIZES = (2048, 1024, 512)  # of square matrices, the first whose product does not take too long
_LONGEST_PRODUCT_S = 0.5
_MOST_VALUES = 2**24  # that the optimizers are tried on
_WHOLE_LOGITS_BYTES = 12  # each: in bf16, their logarithms in float32, and the gradient of these


class Choice(NamedTuple):
    """A line of the table: what was chosen of what, and what was measured of it."""

    what: str
    taken: str
    measured: str


def measure_choices(
    model: PreTrainedModel,
    args: TrainingArguments,
    task: ModuleType,
    batch: Mapping[str, torch.Tensor],
    precision: str,
    steps: int,
    compiles: bool,
) -> list[Choice]:
    """Return what was taken and what it costs; weights and random state stay, gradients are let go.

    Args:
        model: as it trains, whole on this process and not wrapped.
        args: of the run.
        task: a module of `kit.tasks`.
        batch: a micro-batch as large as they get.
        precision: what `make_training_arguments` says of it.
        steps: optimizer steps of the run.
        compiles: whether to compile the model too, which takes from seconds to minutes.
    """
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    usual = _micro_batch_seconds(model, model, args, task, batch)
    return [
        Choice("precision", precision, _rates(args.device)),
        Choice("optimizer", args.optim.value, _optimizers(model, args)),
        Choice("attention", model.config._attn_implementation, f"a micro-batch, forward and backward: {usual:.3g} s"),
        *_loss(model, args, task, batch, usual),
        _compilation(model, args, task, batch, usual, steps, compiles),
    ]


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 2) -> float:
    """Return the shortest time that `work` takes, after a first time that does not count."""
    taken = []
    for _ in range(1 + times):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- Precision


def _rates(device: torch.device) -> str:
    """Return in words how fast matrices are multiplied; TF32 is a GPU's way to multiply float32, rounded before."""
    found, matmul = [], torch.backends.cuda.matmul
    before = matmul.fp32_precision
    kinds = {"fp32": (torch.float32, "ieee"), "bf16": (torch.bfloat16, "ieee")}
    if device.type == "cuda":
        kinds["TF32"] = (torch.float32, "tf32")
    try:
        for name, (dtype, setting) in kinds.items():
            matmul.fp32_precision = setting
            size, seconds = _product_seconds(dtype, device)
            found.append(f"{name}: {2 * size**3 / seconds / 1e9:,.0f} GFLOP/s in a product of {size:,}³")
    finally:
        matmul.fp32_precision = before
    return "\n".join(found)


def _product_seconds(dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """Return the largest size whose product is quick enough to be timed, and its seconds."""

    def seconds(size: int, times: int) -> float:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        return seconds_of(lambda: a @ b, device, times)

    smallest = _SIZES[-1]
    at_smallest = seconds(smallest, times=1)
    size = next((n for n in _SIZES if at_smallest * (n / smallest) ** 3 < _LONGEST_PRODUCT_S), smallest)
    return size, seconds(size, times=3)


# ---- Optimizer


def _optimizers(model: nn.Module, args: TrainingArguments) -> str:
    """Return in words what a step takes, over clones of what trains; of AdamW fused and as torch has it otherwise."""
    pair = [OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAMW_TORCH]
    values, clones = 0, []
    for parameter in model.parameters():
        if parameter.requires_grad and values < _MOST_VALUES:
            clones.append(parameter.detach().flatten()[: _MOST_VALUES - values].clone())
            values += clones[-1].numel()
    names = pair if args.optim in pair else [args.optim]
    return "\n".join(f"{n.value}: {_step_time(n, clones, args)} for a step over {values:,} values" for n in names)


def _step_time(name: OptimizerNames, clones: list[torch.Tensor], args: TrainingArguments) -> str:
    args = copy.copy(args)
    args.optim = name
    parameters = [nn.Parameter(clone) for clone in clones]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_cls(parameters, **kwargs)
        return f"{seconds_of(optimizer.step, args.device):.2g} s"
    except Exception as error:  # one that wants the model itself, or a closure
        return f"not measured ({type(error).__name__})"


# ---- Loss and compilation


def _micro_batch_seconds(
    forward: Callable, model: nn.Module, args: TrainingArguments, task: ModuleType, batch: Mapping, times: int = 1
) -> float:
    """Return what the forward and backward pass of a micro-batch takes, in the precision of training.

    Args:
        forward: the model, or its compiled form.
        model: whose gradients it gives.
        args: of the run.
        task: a module of `kit.tasks`.
        batch: the micro-batch, on the model's device.
        times: that it is done, after the first one.
    """
    device, dtype = args.device, torch.float16 if args.fp16 else torch.bfloat16

    def work() -> None:
        with torch.autocast(device.type, dtype) if args.bf16 or args.fp16 else nullcontext():
            loss = task.loss_sum(forward, batch, args)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return seconds_of(work, device, times)
    finally:
        model.train(was_training)


def _loss(
    model: PreTrainedModel, args: TrainingArguments, task: ModuleType, batch: Mapping[str, torch.Tensor], usual: float
) -> list[Choice]:
    """Return what a causal LM's loss in chunks is compared with: a micro-batch of whole logits, if they have room."""
    if not gives_losses(model):
        return []
    positions, vocab_size = batch["input_ids"].numel(), model.config.get_text_config().vocab_size
    at_once = count_logits_at_once(model, positions) // vocab_size
    if at_once == positions:
        return [Choice("loss", "logits of all positions at once", "")]
    taken = f"logits of {at_once:,} positions at a time"
    needed = positions * vocab_size * _WHOLE_LOGITS_BYTES
    if needed > _free_memory(args.device) / 2:
        return [Choice("loss", taken, f"all {positions:,} at once: not measured, {needed / 2**30:.1f} GiB")]
    whole = copy.copy(model)
    give_losses(whole, like=model)
    compute_whole_logits(whole)
    seconds = _micro_batch_seconds(whole, model, args, task, batch)
    return [Choice("loss", taken, f"a micro-batch: {usual:.3g} s\nall {positions:,} at once: {seconds:.3g} s")]


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _compilation(
    model: PreTrainedModel,
    args: TrainingArguments,
    task: ModuleType,
    batch: Mapping[str, torch.Tensor],
    usual: float,
    steps: int,
    compiles: bool,
) -> Choice:
    """Return what `training.torch_compile` would bring, by compiling the model as accelerate does."""
    taken = "on" if args.torch_compile else "off"
    if not compiles:
        return Choice("torch_compile", taken, "not measured: `--compile` does, in seconds to minutes")
    options = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    began = time.perf_counter()
    try:
        seconds = _micro_batch_seconds(torch.compile(model, **options), model, args, task, batch)
    except Exception as error:  # no C++ compiler, no Triton, an operation that it cannot trace
        return Choice("torch_compile", taken, f"cannot compile here ({' '.join(str(error).split())[:120]})")
    finally:
        torch._dynamo.reset()
    compiling = time.perf_counter() - began - 2 * seconds
    pays = when_it_pays(compiling, (usual - seconds) * args.gradient_accumulation_steps, steps)
    told = f"a micro-batch: {usual:.3g} s\ncompiled: {seconds:.3g} s, after {compiling:.0f} s for compiling\n{pays}"
    return Choice("torch_compile", taken, told)


def when_it_pays(cost: float, gain: float, steps: int) -> str:
    """Return in words from which optimizer step on a cost is made good.

    Args:
        cost: seconds, once.
        gain: seconds, in each step.
        steps: of the run.
    """
    if gain <= 0:
        return "does not pay, it is no faster"
    first = math.ceil(cost / gain)
    if first > steps:
        return f"does not pay in {steps:,} steps, but from step {first:,} on"
    return f"pays from step {first:,} of {steps:,}"
