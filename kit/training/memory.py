"""The memory that training takes: an estimate before it, and what to do when there is not enough."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, TrainingArguments, masking_utils

from kit.errors import UserError, is_out_of_memory
from kit.model.activations import fuse_activations
from kit.model.adapter import insert_alike
from kit.model.chunked_loss import give_losses, gives_losses
from kit.model.new_rows import is_new_rows, new_row_ids, train_new_rows
from kit.recipe.models import Recipe

# Bytes that an optimizer keeps for a parameter of four bytes; those that are not listed keep two values like AdamW.
_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "lion": 4, "lomo": 0, "adalomo": 0.1}


def estimate_memory(
    model: PreTrainedModel, args: TrainingArguments, task: ModuleType, batch: Mapping[str, torch.Tensor]
) -> dict[str, float | None]:
    """Estimate what training takes on one device, in bytes.

    What the backward pass needs is counted in a forward pass over tensors without data, so it is the architecture's
    own. Left out: fragmentation, the libraries' workspaces (about half a GB on a GPU), the layer that activation
    checkpointing computes again at a time, sharding by FSDP or DeepSpeed.

    Args:
        model: the model; neither it nor the state of the random numbers is touched.
        args: of the run.
        task: a module of `kit.tasks`, whose `loss_sum` is the forward pass.
        batch: a micro-batch as large as they get; its shapes count, not its values.

    Returns:
        Bytes by use; None for activations that cannot be counted, since the architecture's steps depend on the data.
    """
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    try:
        with torch.random.fork_rng(devices=[]):
            activations = _saved_for_backward(model, args, task, batch)
    except Exception:  # an estimate is not worth a run, and each architecture fails in its own way without data
        activations = None
    return {
        # Rows that train alone are part of a matrix.
        "weights": sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not is_new_rows(name)),
        "gradients": trainable,
        f"optimizer ({args.optim.value})": optimizer_bytes(model, args),
        "activations": activations,
        # In the precision that they are computed in, their logarithms in float32 and, in its place, their gradient.
        "logits": task.count_logits(model, batch) * 8,
    }


def optimizer_bytes(model: PreTrainedModel, args: TrainingArguments) -> float:
    """Return the bytes that the optimizer keeps beside what trains."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    optimizer = args.optim.value
    per_parameter = next((size for name, size in _OPTIMIZER_BYTES.items() if optimizer.startswith(name)), 8)
    return trainable * per_parameter / (16 if "8bit" in optimizer else 4)


def _saved_for_backward(
    model: PreTrainedModel, args: TrainingArguments, task: ModuleType, batch: Mapping[str, torch.Tensor]
) -> int:
    """Count the bytes that autograd keeps between forward and backward of a micro-batch."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        return tensor

    precision = torch.bfloat16 if args.bf16 else torch.float16
    autocast = torch.autocast(args.device.type, precision) if args.bf16 or args.fp16 else nullcontext()
    with torch.device("meta"):  # where peft copies nothing: it cannot copy a FakeTensor
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
        if adapters := getattr(model, "peft_config", None):
            insert_alike(twin, next(iter(adapters.values())))
    with FakeTensorMode(), args.device:
        _make_fake(twin)
        if (ids := new_row_ids(model)) is not None:
            train_new_rows(twin, ids)
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        if gives_losses(model):
            give_losses(twin, like=model)
        fuse_activations(twin)
        twin.train()
        if args.gradient_checkpointing:
            _enable_checkpointing(twin, dict(args.gradient_checkpointing_kwargs or {}))
        batch = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
        own = {t.untyped_storage()._cdata for t in (*twin.parameters(), *twin.buffers(), *batch.values())}
        # Without data transformers takes all rows for packed ones, and builds a mask that single rows do not need.
        unpacked = patch.object(masking_utils, "find_packed_sequence_indices", lambda *_: None)
        mask = nullcontext() if "position_ids" in batch else unpacked
        with mask, autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Kept until everything is counted: what is freed makes room for others at the same address.
            loss = task.loss_sum(twin, batch, args)
        total = sum(size for storage, size in seen.items() if storage not in own)
        del loss
    return total


def _make_fake(model: torch.nn.Module) -> None:
    """Put tensors of the present mode and device in the place of a model's own, tied ones once."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, whose id is not to be used anew
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = old, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
                tensors[name] = None if old is None else made[id(old)][1]


def _enable_checkpointing(model: PreTrainedModel, options: dict[str, Any]) -> None:
    if not hasattr(model, "activation_checkpointing_enable"):  # before transformers 5.18
        model.gradient_checkpointing_enable(options or None)
        return
    of_transformers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    model.activation_checkpointing_enable(options or None, **of_transformers)


@contextmanager
def out_of_memory_explained(recipe: Recipe, args: TrainingArguments) -> Iterator[None]:
    """Turn running out of memory into a UserError that names the keys to turn.

    Raises:
        UserError: this process ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(_advice(recipe, args, str(error))) from None
        raise


def _advice(recipe: Recipe, args: TrainingArguments, reason: str) -> str:
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    where = f"process {args.process_index} of {args.world_size} is " if args.world_size > 1 else ""
    reason = " ".join(reason.split())[:200]
    key = recipe.data.length_key
    length = getattr(recipe.data, key)
    of_length = f" of {length:,} tokens" if length else ""
    lines = [f"{where}out of memory, with {batch} rows{of_length} at a time ({reason})"]
    if batch > 1:
        smaller = next(n for n in range(batch // 2, 0, -1) if batch % n == 0)
        lines.append(
            f"  the same global batch of {batch * accumulation * args.world_size:,} rows in less memory:  "
            f"training.per_device_train_batch_size={smaller} "
            f"training.gradient_accumulation_steps={accumulation * (batch // smaller)}"
        )
    if not args.gradient_checkpointing:
        lines.append("  computes activations twice instead of keeping them:  training.gradient_checkpointing=true")
    if length is None or length >= 16:
        lines.append(f"  shorter rows:  data.{key}={length // 2 if length else 256}")
    if args.per_device_eval_batch_size > 1:
        lines.append(
            f"  if it was in an evaluation:  training.per_device_eval_batch_size={args.per_device_eval_batch_size // 2}"
        )
    lines.append("  `kit check` estimates what a setting takes")
    return "\n".join(lines)
