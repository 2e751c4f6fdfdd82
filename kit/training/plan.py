"""What a run is going to do: rows per step, steps, evaluations, before it does any of it."""

import math
from dataclasses import dataclass
from functools import cached_property

from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments

from kit.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """The arithmetic of a run.

    Attributes:
        rows: rows of an epoch.
        rows_per_step: rows of an optimizer step: batch size × accumulation × processes.
        steps_per_epoch: optimizer steps of an epoch; the last one may hold fewer rows.
        steps: optimizer steps of the run.
        args: of the run.
    """

    rows: int
    rows_per_step: int
    steps_per_epoch: int
    steps: int
    args: TrainingArguments

    @cached_property
    def stops(self) -> tuple[int, int]:
        """Evaluations and checkpoints on the way, those of the end included.

        Early stopping may leave some out; with `save_strategy: best` there are at most so many checkpoints.
        """
        return _count_stops(self.args, self.steps, self.steps_per_epoch)

    @property
    def epochs(self) -> float:
        """Epochs of the run."""
        return self.steps / self.steps_per_epoch


def describe_global_batch(args: TrainingArguments) -> str:
    """Return what makes the rows of an optimizer step, in words."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = args.world_size * batch * accumulation
    return f"{args.world_size} × {batch} × {accumulation} = {rows:,} rows per step (processes × batch × accumulation)"


def plan_steps(rows: int, args: TrainingArguments, micro_batches: int | None = None) -> StepPlan:
    """Work out the steps of a run as Trainer does.

    Args:
        rows: rows of an epoch.
        args: of the run.
        micro_batches: of an epoch, on each process; by default of `per_device_train_batch_size` rows each.

    Raises:
        UserError: the rows of an epoch do not fill a single global batch.
    """
    per_micro_batch = args.per_device_train_batch_size * args.world_size
    rows_per_step = per_micro_batch * args.gradient_accumulation_steps
    if rows < rows_per_step:
        processes = f" × {args.world_size} processes" if args.world_size > 1 else ""
        raise UserError(
            f"the {rows:,} rows of an epoch do not fill one global batch of {rows_per_step:,} "
            f"({args.per_device_train_batch_size} × {args.gradient_accumulation_steps}{processes}); lower "
            f"`run.global_batch_size`, or `training.gradient_accumulation_steps` or "
            f"`training.per_device_train_batch_size`, or give more data (of a causal LM, a shorter `data.block_size` "
            f"makes more rows of it)"
        )
    micro_batches = micro_batches or -(-rows // per_micro_batch)
    steps_per_epoch = -(-micro_batches // args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    return StepPlan(rows, rows_per_step, steps_per_epoch, steps, args)


def _count_stops(args: TrainingArguments, steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """Count evaluations and checkpoints by asking what Trainer itself asks after each step and epoch."""
    flow, state, control = DefaultFlowCallback(), TrainerState(max_steps=steps), TrainerControl()
    state.compute_steps(args, steps)
    evaluations, checkpoints = int(args.eval_on_start), 0
    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, step / steps_per_epoch
        control.should_evaluate = control.should_save = False
        flow.on_step_end(args, state, control)
        if step % steps_per_epoch == 0 or step == steps:
            flow.on_epoch_end(args, state, control)
        evaluations += control.should_evaluate
        checkpoints += control.should_save or (control.should_evaluate and args.save_strategy.value == "best")
    return evaluations, checkpoints
