"""From the recipe's `training` section to `TrainingArguments`: what the kit decides, and nothing else."""

import dataclasses
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from kit.errors import UserError, did_you_mean
from kit.model.freezing import check_sharding
from kit.model.precision import has_accelerator, supports_bf16
from kit.recipe.models import Recipe
from kit.training.parameter_groups import check_follows_steps, check_takes_groups

_NO_SHARDS = "FSDP and DeepSpeed are ignored on CPUs: the run would be plain DDP; leave them out"


def make_training_arguments(recipe: Recipe, task: ModuleType, checkpoints: Path) -> tuple[TrainingArguments, str]:
    """Return the arguments of a run, and a line that says which precision was chosen and why.

    Creating them also creates the process group, and registers ZeRO-3 where it is used: before any model exists.

    Raises:
        UserError: the values contradict each other.
    """
    values = dict(recipe.training)
    # What accelerate's `use_cpu` sets; it alone would not keep a run off the GPUs, since Trainer passes its own on.
    asked_for_cpu = values.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU") == "true"
    on_cpu = asked_for_cpu or not has_accelerator()
    if on_cpu and "true" in map(os.environ.get, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        raise UserError(_NO_SHARDS)
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
        # Every parameter gets a gradient, so DDP need not search for ones that do not; but for those of later phases.
        "ddp_find_unused_parameters": values.get(
            "ddp_find_unused_parameters", bool(recipe.freezing and recipe.freezing.schedule)
        ),
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
    _check_buildable(args)
    _check_plan(recipe, args)
    if args.device.type == "cpu" and (args.fsdp or args.deepspeed):
        raise UserError(_NO_SHARDS)
    if args.fp16 and args.device.type == "cpu":
        raise UserError("training.fp16: a CPU multiplies fp16 a hundred times slower than fp32; leave it out")
    _check_evaluation(recipe, task, args)
    check_sharding(recipe, args)
    return args, precision


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
        try:
            build()
        except Exception as error:  # each fails in its own way
            raise UserError(f"training.{key}: {' '.join(f'{type(error).__name__}: {error}'.split())[:400]}") from error


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
