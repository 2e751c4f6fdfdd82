"""A freezing plan during training: what trains at a step, without dropout in what does not, and proof of gradients."""

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from kit.console import say, warn
from kit.errors import UserError
from kit.model.freezing import count_parameters
from kit.model.new_rows import is_new_rows
from kit.model.parts import adapters_by_module
from kit.training.parameter_groups import Phase, check_phases, ever_trained, phase_at, sets_change
from kit.training.sharding import is_sharded, sharding_of
from kit.training.unused import is_reentrant

_MOST_NAMED = 5


class Unfreezing(TrainerCallback):
    """Lets each phase's parameters train, and no others.

    What is set depends on the number of finished steps alone, so that resuming needs no state. Before the model is
    wrapped, `require_all_phases` has let DDP register what trains in any phase.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        """Follow `phases`."""
        check_phases(phases)
        self.phases = list(phases)
        self._model: PreTrainedModel | None = None
        self._phase: int | None = None  # the one that is set
        self._proven: int | None = None  # the one whose gradients this process has seen
        self._frozen: list[nn.Module] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Set the phase that training begins or goes on in.

        Raises:
            UserError: DDP cannot cope with parameters that have no gradient in some phases.
        """
        self.close()
        _check_distributed(args, self.phases)
        missing = ever_trained(self.phases) - {name for name, _ in model.named_parameters()}
        if missing:
            raise RuntimeError(f"no parameters of {type(model).__name__}: {', '.join(sorted(missing)[:_MOST_NAMED])}")
        if not is_reentrant(args):
            # With activation checkpointing transformers lets the embeddings' output require grad, which only the
            # reentrant kind needs: the backward pass would go through all blocks, however many are frozen.
            model.disable_input_require_grads()
        self._model, self._phase, self._proven = model, None, None
        model.train = self._train  # on the instance; a wrapper's `train` calls it
        if isinstance(model, FSDPModule):
            # Otherwise at the first forward pass, where FSDP2 takes note of the precision of what trains just then.
            model._get_fsdp_state()._lazy_init()
        self._follow(state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go over to the phase that this step belongs to."""
        self._follow(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Check once in each phase that what should train has a gradient, after all micro-batches.

        Not under DeepSpeed, which keeps gradients elsewhere.

        Raises:
            UserError: a tensor has none.
        """
        if self._proven == self._phase or sharding_of(vars(args)) == "DeepSpeed":
            return
        self._proven = self._phase
        wanted = self.phases[self._phase].trainable
        parameters = {name: p for name, p in model.named_parameters() if name in wanted}
        check_gradients(parameters, state.global_step + 1, adapters_by_module(model))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the whole model be put into training mode again."""
        self.close()

    def close(self) -> None:
        """Give the model its own `train` back, however training ended; what requires grad stays as it is."""
        if self._model is not None:
            self._model.__dict__.pop("train", None)
        self._model, self._frozen = None, []

    def _follow(self, step: int) -> None:
        """Set what trains in the step after `step` finished ones."""
        phase = phase_at(self.phases, step)
        if phase == self._phase:
            return
        set_trainable(self._model, self.phases[phase].trainable)
        self._phase, self._frozen = phase, frozen_modules(self._model)
        self._model.train(self._model.training)
        if len(self.phases) > 1:
            _, trains = count_parameters(self._model)
            say(f"step {step + 1:,}: phase {phase + 1} of {len(self.phases)}, {trains:,} parameters train")

    def _train(self, mode: bool = True) -> PreTrainedModel:
        """Do as `Module.train` does, and leave frozen modules in evaluation mode: Trainer calls it in each step."""
        type(self._model).train(self._model, mode)
        for module in self._frozen if mode else ():
            # A block in evaluation mode would not be checkpointed: with embeddings that train below frozen blocks, all
            # memory that is to be saved would be used after all. What is in the block has its own mode.
            if not getattr(module, "gradient_checkpointing", False):
                module.training = False
        return self._model


def set_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Let exactly the parameters of these names require grad.

    The others lose the gradient that they may have: an optimizer passes over a parameter without one, and applies
    neither its momentum of an earlier phase nor weight decay.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def frozen_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that run without dropout: those of which no parameter trains, with all that is in them.

    A dropout module has no parameters: it belongs to what it is in. One that stands beside the input embeddings, as
    in GPT-2, belongs to these and to the position embeddings beside them.
    """
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.update(dict.fromkeys(module.modules()))
    embeddings = model.get_input_embeddings()
    for module in model.modules():
        children = list(module.children())
        if any(child is embeddings for child in children):
            if all(child in found for child in children if isinstance(child, nn.Embedding) or child is embeddings):
                found.update(dict.fromkeys(child for child in children if isinstance(child, nn.Dropout)))
            break
    return list(found)


def check_gradients(
    parameters: Mapping[str, nn.Parameter], step: int, adapters: Mapping[str, Set[str]] = MappingProxyType({})
) -> None:
    """Check that each parameter has a gradient; warn of zeros, which rows of tokens that do not occur may well have.

    Args:
        parameters: name → what should train.
        step: the optimizer step about to be made, counted from 1, for the message.
        adapters: the names of those that belong to one adapter. One with a gradient is enough: of a product of which
            a factor begins as zero the other has none yet.

    Raises:
        UserError: one has none.
    """
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if without:
        raise UserError(
            f"freezing: in step {step}, {len(without)} of {len(parameters)} tensors that should train got no gradient: "
            f"{_named(without)}; expected one for each. If `training` turns on activation checkpointing with "
            f"`use_reentrant: true`, leave that out; what the loss does not depend on is to be frozen"
        )
    nonzero = _any_nonzero([parameter.grad for parameter in parameters.values()])
    zero = {name for name, found in zip(parameters, nonzero, strict=True) if not found and not is_new_rows(name)}
    of_adapters = {name for names in adapters.values() for name in names}
    dead = [name for names in adapters.values() if (ours := names & parameters.keys()) <= zero for name in sorted(ours)]
    zeros = [name for name in parameters if name in zero and name not in of_adapters] + dead
    if zeros:
        warn(f"in step {step}, the gradient of {len(zeros)} tensors that should train is zero: {_named(zeros)}")


def _any_nonzero(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Return of each tensor whether it has a value other than zero, in any of its shards."""
    flags = [(t.to_local() if isinstance(t, DTensor) else t).any() for t in tensors]
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).int() if flags else torch.zeros(0)
    if any(isinstance(t, DTensor) for t in tensors):
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.bool().tolist()


def _check_distributed(args: TrainingArguments, phases: Sequence[Phase]) -> None:
    if args.world_size == 1 or is_sharded(args) or not sets_change(phases):
        return
    because = "where `freezing` has a schedule, some parameters have no gradient in some phases"
    if not args.ddp_find_unused_parameters:
        found = args.ddp_find_unused_parameters
        raise UserError(f"training.ddp_find_unused_parameters: found {found}; expected true: {because}")
    if args.gradient_checkpointing and is_reentrant(args):
        raise UserError(
            f"training.activation_checkpointing_kwargs.use_reentrant: expected false with several processes: {because}"
        )


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
