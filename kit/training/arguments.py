"""From the recipe's `training` section to `TrainingArguments`: what the kit decides, and nothing else."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from kit.errors import UserError, did_you_mean
from kit.model.precision import has_accelerator, supports_bf16
from kit.recipe.models import Recipe
from kit.recipe.resuming import WORLD_SIZE
from kit.training.parameter_groups import check_follows_steps, check_takes_groups
from kit.training.sharding import check_not_ignored, check_sharding, load_whole, sharding_of
from kit.training.topology import announced_processes


def make_training_arguments(recipe: Recipe, task: ModuleType, checkpoints: Path) -> tuple[TrainingArguments, str]:
    """Return the arguments of a run, and a line that says which precision was chosen and why.

    Creating them also creates the process group.

    Raises:
        UserError: the values contradict each other.
    """
    values = dict(recipe.training)
    # What accelerate's `use_cpu` sets; it alone would not keep a run off the GPUs, since Trainer passes its own on.
    asked_for_cpu = values.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU") == "true"
    on_cpu = asked_for_cpu or not has_accelerator()
    if on_cpu:
        check_not_ignored(values)
    if recipe.run.resume_with and sharding_of(values) == "DeepSpeed":
        raise UserError("run.resume_with: not with DeepSpeed, which takes rates and schedule from the checkpoint")
    if WORLD_SIZE in recipe.run.resume_with and sharding_of(values):
        raise UserError(f"run.resume_with: `{WORLD_SIZE}`: not with FSDP: each process saves its part of the optimizer")
    precision = _choose_precision(values, on_cpu)
    kit_values = {
        "output_dir": str(checkpoints.absolute()),
        # Otherwise accelerate looks for a GPU backend and every process believes that it is alone.
        "use_cpu": bool(on_cpu),
        "dataloader_pin_memory": not on_cpu,
        # Trainer would replace a NaN loss by the average of earlier ones.
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": values.get("report_to", "none"),
        **_derive_accumulation(recipe.run.global_batch_size, values),
    }
    if recipe.run.early_stopping:
        # EarlyStoppingCallback counts its patience in memory; only this makes Trainer restore the count.
        kit_values["restore_callback_states_from_checkpoint"] = True
        # Stopping early and keeping the last model, the one that no longer improved, is hardly anybody's wish.
        kit_values["load_best_model_at_end"] = values.get("load_best_model_at_end", _saves_every_evaluation(values))
    kit_values |= _best_model_metric(recipe, task)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    try:
        args = TrainingArguments(**{**values, **{k: v for k, v in kit_values.items() if k in known}})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    load_whole()
    _check_buildable(args)
    _check_plan(recipe, args)
    if args.fp16 and args.device.type == "cpu":
        raise UserError("training.fp16: a CPU multiplies fp16 a hundred times slower than fp32; leave it out")
    _check_evaluation(recipe, task, args)
    check_sharding(recipe, args)
    return args, precision


def _derive_accumulation(global_batch: int | None, values: dict[str, Any]) -> dict[str, int]:
    """Return `gradient_accumulation_steps` where it follows from `run.global_batch_size`.

    Raises:
        UserError: there is no such number, or the recipe gives another.
    """
    if global_batch is None:
        return {}
    batch = values.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    processes, given = announced_processes()[0], values.get("gradient_accumulation_steps")
    at_once = batch * processes
    factors = f"{batch} rows (`training.per_device_train_batch_size`) × {_count(processes)}"
    if given is not None and given * at_once != global_batch:
        raise UserError(
            f"run.global_batch_size: found {global_batch:,}, but {factors} × {given} "
            f"(`training.gradient_accumulation_steps`) = {given * at_once:,}; leave the latter out: it follows"
        )
    if global_batch % at_once:
        below = global_batch // at_once * at_once
        others = [("`run.global_batch_size`", [n for n in (below, below + at_once) if n])]
        others.append(("`training.per_device_train_batch_size`", _nearest_divisors(global_batch, processes, batch)))
        others.append(("processes", _nearest_divisors(global_batch, batch, processes)))
        listed = "; ".join(f"{what}: {' or '.join(f'{n:,}' for n in found)}" for what, found in others if found)
        raise UserError(
            f"run.global_batch_size: found {global_batch:,}, which is no multiple of {factors} = {at_once:,}; "
            f"nearest of what would do, each alone: {listed}"
        )
    return {"gradient_accumulation_steps": global_batch // at_once}


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def _nearest_divisors(number: int, factor: int, to: int) -> list[int]:
    """Return the next smaller and the next larger number than `to` which, times `factor`, divides `number`."""
    found = [n for n in range(1, number // factor + 1) if number % (factor * n) == 0]
    return [*[n for n in found if n < to][-1:], *[n for n in found if n > to][:1]]


def _saves_every_evaluation(values: dict[str, Any]) -> bool:
    """Tell whether each checkpoint is of an evaluated step, which Trainer demands for restoring the best one."""
    evaluates, saves = values.get("eval_strategy", "no"), values.get("save_strategy", "steps")
    if evaluates != saves or saves == "no":
        return False
    eval_steps = values.get("eval_steps") or values.get("logging_steps", 500)
    return saves == "epoch" or values.get("save_steps", 500) % eval_steps == 0


def _choose_precision(values: dict[str, Any], on_cpu: bool) -> str:
    """Set `bf16` where the recipe leaves the precision open; return what was chosen and why."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ["ACCELERATE_MIXED_PRECISION"] != "no":
        raise UserError(
            f"the launch file sets mixed_precision to {os.environ['ACCELERATE_MIXED_PRECISION']}, which would decide "
            f"beside the recipe; remove it there and set `training.bf16` or `training.fp16`, or neither"
        )
    for name in ("bf16", "fp16"):
        if values.get(name):
            return f"{name} (recipe)"
    if "bf16" in values or "fp16" in values:
        return "fp32 (recipe)"
    good, reason = supports_bf16(bool(on_cpu))
    values["bf16"] = good
    return f"{'bf16' if good else 'fp32'} ({reason})"


def _best_model_metric(recipe: Recipe, task: ModuleType) -> dict[str, Any]:
    """Return the metric that the best model is chosen by, and its direction.

    Raises:
        UserError: the recipe names one that no evaluation gives.
    """
    sets = task.set_names(recipe)
    if not sets:
        return {}
    metrics = [f"{name}_{figure}" for name in sets for figure in task.LOGGED_FIGURES]
    metric = recipe.training.get("metric_for_best_model")
    if metric is None:
        metric = f"{sets[0]}_{task.DEFAULT_FIGURE}"
    elif metric not in metrics and metric.removeprefix("eval_") in metrics:
        metric = metric.removeprefix("eval_")
    elif metric not in metrics:
        raise UserError(f"training.metric_for_best_model: no such metric: `{metric}`{did_you_mean(metric, metrics)}")
    better = recipe.training.get("greater_is_better")
    higher = any(metric.endswith(figure) for figure in task.HIGHER_IS_BETTER)
    if better is not None and better != higher:
        raise UserError(
            f"training.greater_is_better: found {better}, but of `{metric}` {'more' if higher else 'less'} is better"
        )
    # With Trainer's prefix: it takes a metric that begins with `eval_` for one that has it.
    return {"metric_for_best_model": f"eval_{metric}", "greater_is_better": higher}


def _check_buildable(args: TrainingArguments) -> None:
    """Build what the arguments only name, on a single parameter, before anything long begins.

    Raises:
        UserError: an optimizer, scheduler or tracker cannot be built: a package or an argument of it is missing.
    """
    checks = {
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args),
        "lr_scheduler_type": lambda: _scheduler(args),
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
        "use_liger_kernel": lambda: args.use_liger_kernel and __import__("liger_kernel"),
    }
    for key, build in checks.items():
        if fault := _fault_of(build):
            raise UserError(f"training.{key}: {fault}")


def _fault_of(build: Callable[[], Any]) -> str | None:
    # A tracker that is half made complains when it goes, in a traceback of its own.
    with patch.object(sys, "unraisablehook", lambda _: None):
        try:
            build()
        except Exception as error:  # each fails in its own way
            return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return None


def _scheduler(args: TrainingArguments) -> LRScheduler:
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
        num_warmup_steps=args.get_warmup_steps(100),
        num_training_steps=100,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )


def _check_plan(recipe: Recipe, args: TrainingArguments) -> None:
    """Check that optimizer and schedule can follow what the recipe freezes; it is told again when they are made."""
    if recipe.freezing or recipe.adapter:
        check_takes_groups(*Trainer.get_optimizer_cls_and_kwargs(args))
    if recipe.freezing and any(phase.warmup_steps for phase in recipe.freezing.schedule):
        check_follows_steps(_scheduler(args))


def _check_evaluation(recipe: Recipe, task: ModuleType, args: TrainingArguments) -> None:
    wants_evaluation = recipe.run.early_stopping or args.load_best_model_at_end
    if args.eval_strategy.value == "no":
        if wants_evaluation:
            key = "run.early_stopping" if recipe.run.early_stopping else "training.load_best_model_at_end"
            raise UserError(f"{key} needs evaluations: set `training.eval_strategy` to `steps` or `epoch`")
        return
    if not task.set_names(recipe):
        raise UserError(
            "training.eval_strategy needs something to evaluate: give `data.validation` or `evaluation.sets`"
        )
