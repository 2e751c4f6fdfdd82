"""The memory that training takes: an estimate before it, and what to do when there is not enough."""

import copy
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel, TrainingArguments, masking_utils

from kit.console import is_main_process
from kit.errors import UserError, is_out_of_memory
from kit.model.adapter import insert_alike
from kit.model.new_rows import is_new_rows, new_row_ids, train_new_rows
from kit.recipe.models import Recipe
from kit.training.preemption import Preempted
from kit.training.run_directory import RunDirectory

_KEY = "kit/out_of_memory"
_POLL_S = 0.5
_PATIENCE_S = 10.0
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
    optimizer = str(getattr(args.optim, "value", args.optim))
    per_parameter = next((b for name, b in _OPTIMIZER_BYTES.items() if optimizer.startswith(name)), 8)
    if "8bit" in optimizer:
        per_parameter /= 4
    try:
        with torch.random.fork_rng(devices=[]):
            activations = _saved_for_backward(model, args, task, batch)
    except Exception:  # an estimate is not worth a run, and each architecture fails in its own way without data
        activations = None
    return {
        # Rows that train alone are part of a matrix.
        "weights": sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not is_new_rows(name)),
        "gradients": trainable,
        f"optimizer ({optimizer})": trainable * per_parameter / 4,
        "activations": activations,
        # The gradient of the logits, in float32 and in the precision that they were computed in.
        "gradient of logits": task.count_logits(model, batch) * (6 if args.bf16 or args.fp16 else 4),
    }


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
def out_of_memory_explained(
    recipe: Recipe, args: TrainingArguments, directory: RunDirectory | None = None
) -> Iterator[None]:
    """Turn running out of memory, on whichever process, into one UserError on all of them.

    Args:
        recipe: the recipe.
        args: of the run.
        directory: of the run, whose manifest is told should this process have to be ended from outside.

    Raises:
        UserError: a process ran out of memory; the message names the keys to turn.
    """
    others = _Others(directory) if dist.is_initialized() else None
    try:
        yield
    except (RuntimeError, MemoryError, Preempted) as error:
        message = None
        if is_out_of_memory(error):
            message = _advice(recipe, args, str(error))
        if others:
            message = others.tell(message) if message else others.heard()
        if message is None:
            raise
        raise UserError(message) from None
    finally:
        if others:
            others.leave()


class _Others:
    """Passes word of a failure on to the other processes of a run.

    They stand in a collective operation that will never end, or fail in it once the process is gone, and with it
    perhaps the store of the process group. So a thread of each looks for a message there, and ends its process if
    that does not end of itself (NCCL waits on).
    """

    def __init__(self, directory: RunDirectory | None) -> None:
        self._directory = directory
        self._store = distributed_c10d._get_default_store()
        self._message: str | None = None
        self._left = threading.Event()
        # A connection of its own: the main thread may be waiting on the other one.
        self._thread = threading.Thread(target=self._listen, args=(self._store.clone(),), daemon=True)
        self._thread.start()

    def tell(self, message: str) -> str:
        """Leave word for the others and wait until they have it; return what all of them are to say."""
        self.leave()
        try:
            # The first one's word counts: where memory is short, it mostly is on all of them.
            message = self._store.compare_set(_KEY, "", message).decode()
            told = self._store.add(_KEY + "/told", 1)
            until = time.monotonic() + _PATIENCE_S
            while told < dist.get_world_size() and time.monotonic() < until:
                time.sleep(_POLL_S)
                told = self._store.add(_KEY + "/told", 0)
        except RuntimeError:  # the store went with its process
            pass
        return message

    def heard(self) -> str | None:
        """Return the word of another process, if there is one."""
        self._left.wait(2 * _POLL_S)  # a failure of both at once
        return self._message

    def leave(self) -> None:
        """Stop listening."""
        self._left.set()
        self._thread.join(_PATIENCE_S)

    def _listen(self, store: dist.Store) -> None:
        try:
            while not store.check([_KEY]):
                if self._left.wait(_POLL_S):
                    return
            self._message = store.get(_KEY).decode()
            store.add(_KEY + "/told", 1)
        except RuntimeError:
            return
        if not self._left.wait(_PATIENCE_S):
            if self._directory:
                self._directory.end(status="user-error", message=self._message)
            if is_main_process():
                print(f"error: {self._message}", file=sys.stderr, flush=True)
            os._exit(2)


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
