"""Parameters that get no gradient in some step, which DDP has to look for: asked of the model, not guessed."""

import re
from collections.abc import Mapping
from types import ModuleType

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TrainingArguments

from kit.console import say
from kit.errors import UserError
from kit.training.parameter_groups import Phase, ever_trained
from kit.training.sharding import is_sharded

_MOST_NAMED = 3
_POSITIONS = 64
_OF_ROWS = {"labels", "weights"}  # may have as many classes as there are positions
_EXPERT = re.compile(r"\bexperts\.\d+\.")  # a module for each, of which a batch may leave some out


def settle_unused_search(
    model: PreTrainedModel,
    args: TrainingArguments,
    task: ModuleType,
    batch: Mapping[str, torch.Tensor],
    phases: tuple[Phase, ...] = (),
) -> None:
    """Set `ddp_find_unused_parameters` to what the model needs, before a Trainer reads it, unless the recipe has it.

    DDP waits for the gradient of every parameter that required one when it was wrapped, and ends with a RuntimeError
    where one never comes, unless it searches each step's graph for it, which takes time in every step.

    Args:
        model: not wrapped yet; what is ever to train requires a gradient.
        args: of the run; changed in place.
        task: for its `loss_sum`.
        batch: a micro-batch of this process.
        phases: of the freezing plan.

    Raises:
        UserError: the recipe says `false`, and it is needed; or activation checkpointing does not go with it.
    """
    if args.world_size == 1 or is_sharded(args):
        return
    found = {name: "in some phases" for phase in phases for name in ever_trained(phases) - phase.trainable}
    found = find_unused(model, args, task, batch) | found
    of_all: list[dict[str, str]] = [{}] * args.world_size
    dist.all_gather_object(of_all, found)
    found = {name: when for found in of_all for name, when in found.items()}
    if not found:
        args.ddp_find_unused_parameters = bool(args.ddp_find_unused_parameters)
        return
    named = ", ".join(f"{name} ({found[name]})" for name in sorted(found)[:_MOST_NAMED])
    more = f" and {len(found) - _MOST_NAMED:,} more" if len(found) > _MOST_NAMED else ""
    because = f"{len(found):,} trainable parameter(s) get no gradient: {named}{more}"
    if args.gradient_checkpointing and is_reentrant(args):
        raise UserError(
            f"training.activation_checkpointing_kwargs.use_reentrant: expected false with several processes: {because}"
        )
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True
        say(f"DDP looks for parameters without a gradient in each step: {because}")
    elif not args.ddp_find_unused_parameters:
        raise UserError(f"training.ddp_find_unused_parameters: found False; expected true, or nothing: {because}")


def find_unused(
    model: PreTrainedModel, args: TrainingArguments, task: ModuleType, batch: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Return the trainable parameters that a forward and backward pass leaves without a gradient, and when.

    One row of the batch, cut after a few positions, tells as much as all of it, but for experts that are a module
    each: those that tokens are not sent to get no gradient, and which these are differs from batch to batch. They
    count whatever this one says. Random state and gradients are afterwards what they were.

    Returns:
        Name → when it has no gradient, in words.
    """
    shape = batch["input_ids"].shape
    cut = {name for name, tensor in batch.items() if tensor.shape == shape} - _OF_ROWS
    short = {name: (tensor[:1, :_POSITIONS] if name in cut else tensor[:1]) for name, tensor in batch.items()}
    short = {name: tensor.to(args.device) for name, tensor in short.items()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    device, was_training = args.device, model.training
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    model.train()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, dtype, enabled=args.fp16 or args.bf16),
        ):
            loss = task.loss_sum(model, short, args)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    finally:
        model.train(was_training)
    found = {name: "in a probed step" for name, g in zip(parameters, gradients, strict=True) if g is None}
    return found | {name: "where no token is sent to it" for name in parameters if _EXPERT.search(name)}


def is_reentrant(args: TrainingArguments) -> bool:
    """Return whether activation checkpointing, if it is on, is or may be of the reentrant kind."""
    options = dict(args.gradient_checkpointing_kwargs or {})
    # As in `Trainer.train`: without options that torch is to get, transformers chooses the other kind.
    return bool(options.keys() - {"every_n_layers", "offload"}) and options.get("use_reentrant") is not False
