"""What a freezing plan is to the optimizer: its parameter groups, their rates, and the warmup of each phase.

Every parameter that trains in any phase is in the optimizer from the start. Trainer's own `create_optimizer` leaves out
what does not require grad at that moment, and what is left out never moves, whatever is unfrozen later.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from kit.errors import UserError

FIRST_PHASE = "first_phase"  # of a group's parameters; saved and loaded with the optimizer's groups
MEMBERS = "members"  # names of its parameters; DeepSpeed puts one flat tensor in their place

# With these in their arguments, optimizers choose their parameters by themselves (GaLore, LOMO, layer-wise ones).
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


@dataclass(frozen=True)
class Phase:
    """From a step on exactly these parameters train, until the next phase begins.

    Attributes:
        start: the optimizer steps made before it; 0 for the first phase.
        trainable: names, as `named_parameters` gives them: a tied matrix has one.
        warmup_steps: in which the rate of what trains for the first time climbs to the run's; 0 for none.
    """

    start: int
    trainable: frozenset[str]
    warmup_steps: int = 0


@dataclass(frozen=True)
class GroupRule:
    """The learning rate and the weight decay of some parameters; None leaves a value as it is."""

    names: frozenset[str]
    learning_rate: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Settings:
    """How a parameter trains: its peak learning rate, its weight decay, and the index of its first phase."""

    learning_rate: float
    weight_decay: float
    first_phase: int


def check_phases(phases: Sequence[Phase]) -> None:
    """Check what whoever makes the phases has to keep.

    Raises:
        RuntimeError: there is none, the first does not start at 0, they are out of order, or one trains nothing.
    """
    starts = [phase.start for phase in phases]
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise RuntimeError(f"phases start at {starts}: expected 0, then each later than the one before")
    if not all(phase.trainable for phase in phases):
        raise RuntimeError("a phase trains no parameter")


def phase_at(phases: Sequence[Phase], step: int) -> int:
    """Return the index of the phase that the step after `step` finished ones belongs to."""
    return max(index for index, phase in enumerate(phases) if phase.start <= step)


def ever_trained(phases: Sequence[Phase]) -> frozenset[str]:
    """Return the names of what trains in any phase."""
    return frozenset().union(*(phase.trainable for phase in phases))


def sets_change(phases: Sequence[Phase]) -> bool:
    """Tell whether what is registered with DDP does not all train in each phase, so that it has to look for it."""
    return len({phase.trainable for phase in phases}) > 1


def require_all_phases(model: torch.nn.Module, phases: Sequence[Phase]) -> None:
    """Let everything that trains in any phase require grad, and nothing else.

    DDP registers what requires grad when it wraps the model; what is unfrozen later without being registered drifts
    apart between the processes, silently. So this comes before; `Unfreezing` takes over when training begins.
    """
    names = ever_trained(phases)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def parameter_settings(
    model: torch.nn.Module,
    decay_names: set[str],
    args: TrainingArguments,
    phases: Sequence[Phase],
    rules: Sequence[GroupRule] = (),
    layer_decay: float | None = None,
    depth_of: Mapping[str, int] | None = None,
) -> dict[str, Settings]:
    """Return how each parameter trains that trains in any phase, in the model's order.

    The rate is `learning_rate * layer_decay ** depth`, as in BEiT and ELECTRA; that of a rule is taken as written. A
    rule's weight decay leaves out what never decays (norms, biases, new rows), unless it is a rule for such alone.

    Args:
        model: the model.
        decay_names: what weight decay applies to, as Trainer's `get_decay_parameter_names` gives it.
        args: for `learning_rate` and `weight_decay`.
        phases: the plan.
        rules: for some parameters; of two that set the same value the later one wins.
        layer_decay: factor per depth.
        depth_of: 0 for the head and the final norm, one more per block downward, embeddings deepest.

    Raises:
        RuntimeError: a name is none of the model's, or its depth is missing.
    """
    check_phases(phases)
    names = [name for name, _ in model.named_parameters()]
    trained = ever_trained(phases)
    unknown = sorted(trained.union(*(rule.names for rule in rules)) - set(names))
    if unknown:
        raise RuntimeError(f"no parameters of {type(model).__name__}: {', '.join(unknown[:5])}")
    missing = trained - set(depth_of or {}) if layer_decay is not None else ()
    if missing:
        raise RuntimeError(f"no depth of {', '.join(sorted(missing)[:5])}")
    settings = {}
    for name in names:
        if name not in trained:
            continue
        rate = args.learning_rate if layer_decay is None else args.learning_rate * layer_decay ** depth_of[name]
        decay = args.weight_decay if name in decay_names else 0.0
        for rule in rules:
            if name not in rule.names:
                continue
            if rule.learning_rate is not None:
                rate = rule.learning_rate
            if rule.weight_decay is not None and (name in decay_names or not rule.names & decay_names):
                decay = rule.weight_decay
        first = next(index for index, phase in enumerate(phases) if name in phase.trainable)
        settings[name] = Settings(rate, decay, first)
    return settings


def make_groups(
    model: torch.nn.Module,
    decay_names: set[str],
    args: TrainingArguments,
    phases: Sequence[Phase],
    rules: Sequence[GroupRule] = (),
    layer_decay: float | None = None,
    depth_of: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Return the optimizer's groups: one for each rate, weight decay and set of phases that occurs.

    Groups come by first phase, then from the highest rate and decay down: the first one's rate is what Trainer logs.
    What a phase freezes is a whole group, or nothing of it.
    Parameters keep the model's order within them. Both are the same whenever they are made, as resuming demands: the
    optimizer's state knows parameters by their place alone.

    Args and Raises: those of `parameter_settings`.
    """
    parameters = dict(model.named_parameters())
    by_settings: dict[tuple[Settings, tuple[int, ...]], list[str]] = {}
    for name, settings in parameter_settings(model, decay_names, args, phases, rules, layer_decay, depth_of).items():
        when = tuple(index for index, phase in enumerate(phases) if name in phase.trainable)
        by_settings.setdefault((settings, when), []).append(name)
    ordered = sorted(by_settings, key=lambda k: (k[0].first_phase, -k[0].learning_rate, -k[0].weight_decay, k[1]))
    return [
        {
            "params": [parameters[name] for name in by_settings[settings, when]],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            FIRST_PHASE: settings.first_phase,
            MEMBERS: by_settings[settings, when],
        }
        for settings, when in ordered
    ]


def check_takes_groups(optimizer_cls: Any, optimizer_kwargs: dict[str, Any]) -> None:
    """Check what `Trainer.get_optimizer_cls_and_kwargs` returns.

    Raises:
        UserError: the optimizer chooses its parameters by itself, so that rates and phases would be lost.
    """
    if is_optimizer_factory(optimizer_cls) or _OWN_PARAMETERS & optimizer_kwargs.keys():
        name = getattr(optimizer_cls, "__name__", optimizer_cls)
        raise UserError(
            f"training.optim: {name} divides the parameters in a way of its own and knows no rates or phases of "
            f"`freezing`, and no `adapter`; expected one that takes groups, such as `adamw_torch`"
        )


def check_follows_steps(scheduler: LRScheduler) -> None:
    """Check that a schedule can begin anew with a phase.

    Raises:
        UserError: it is no function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            f"training.lr_scheduler_type: found {type(scheduler).__name__}, which follows the loss and cannot begin "
            f"anew with a phase; expected one that follows the steps, such as `linear`, or no warmup of phases"
        )


def group_lambdas(
    groups: Sequence[Mapping[str, Any]], bases: Sequence[Callable[[int], float]], phases: Sequence[Phase]
) -> list[Callable[[int], float]]:
    """Return each group's factor of its rate by step: the run's schedule, times the warmup of its first phase.

    Args:
        groups: of the optimizer, made by `make_groups`.
        bases: the run's schedule, one function for each group.
        phases: the plan.
    """
    return [_rewarmed(base, phases[group[FIRST_PHASE]]) for group, base in zip(groups, bases, strict=True)]


def _rewarmed(base: Callable[[int], float], phase: Phase) -> Callable[[int], float]:
    if not phase.warmup_steps:
        return base
    # A plain function: LambdaLR saves nothing of it, so that a checkpoint holds no part of the plan.
    return lambda step: base(step) * warmup_factor(phase, step)


def warmup_factor(phase: Phase, step: int) -> float:
    """Return the share of the run's rate at a step: `1 / warmup_steps` in the phase's first one, then up to 1."""
    if not phase.warmup_steps:
        return 1.0
    return min(1.0, max(0.0, (step - phase.start + 1) / phase.warmup_steps))


def with_rewarmup(scheduler: LRScheduler, phases: Sequence[Phase]) -> LRScheduler:
    """Return a fresh scheduler's like, with the warmup of the phases; the scheduler itself where there is none.

    Args:
        scheduler: of an optimizer whose groups `make_groups` made; no step of it has been made.
        phases: the plan.

    Raises:
        UserError: the schedule is no function of the step alone.
    """
    if not any(phase.warmup_steps for phase in phases):
        return scheduler
    check_follows_steps(scheduler)
    optimizer = scheduler.optimizer
    return LambdaLR(optimizer, group_lambdas(optimizer.param_groups, scheduler.lr_lambdas, phases))
