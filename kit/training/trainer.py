"""The Trainer subclass: a loss that is normalised right, exact evaluation, and checkpoints that resume exactly."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from kit.data.sampling import EpochBatches
from kit.errors import UserError
from kit.model.adapter_files import Adapter
from kit.model.new_rows import is_new_rows
from kit.training.checkpointing import CheckpointingTrainer
from kit.training.freezing import FreezingPlan
from kit.training.parameter_groups import check_takes_groups, with_rewarmup
from kit.training.preemption import Preempted, Preemption
from kit.training.topology import any_process, sum_over_processes

_SESSION_RATES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


class EvaluationInterrupted(Exception):
    """Raised on all processes alike when an evaluation gives way to a preemption."""


class KitTrainer(CheckpointingTrainer):
    """Trainer with the faults mended that matter here; each override names its own.

    Args:
        task: a module of `kit.tasks`, whose `loss_sum` and `loss_weight` define the objective.
        batches: returns the micro-batches of this process, as indices of rows; each epoch has as many.
        measure: evaluates the model on every set of the recipe; takes a function to call between batches.
        preemption: where a SIGTERM is noticed.
        fingerprints: of recipe and data, stored with each checkpoint.
        plan: of `freezing`, if the recipe has one.
        adapter: in the model, if it has one.
    """

    def __init__(
        self,
        *args: Any,
        task: ModuleType,
        batches: Callable[[TrainingArguments], EpochBatches],
        measure: Callable[[Callable[[], None]], dict[str, dict[str, float]]],
        preemption: Preemption,
        fingerprints: dict[str, str],
        plan: FreezingPlan | None = None,
        adapter: Adapter | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up; the remaining arguments are Trainer's."""
        # So Trainer knows of the adapter: it would refuse a model in 4 bits, as one that nothing can train in. It is
        # taken back, since transformers would save and load the adapter alone, without new tokens.
        model = kwargs["model"]
        model._hf_peft_config_loaded = adapter is not None
        super().__init__(*args, **kwargs)
        del model._hf_peft_config_loaded
        self.task = task
        self.batches = batches
        self.measure = measure
        self.preemption = preemption
        self.fingerprints = fingerprints
        self.plan = plan
        self.adapter = adapter
        # `compute_loss` normalises over the whole global batch, so nothing is left to divide: this says so to
        # transformers 5.23, and the next line to versions before it.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        # Since this process began; a tensor, so that no step waits for the GPU.
        self.weight_seen = torch.tensor(0)
        self.last_evaluation: tuple[int, dict[str, dict[str, float]] | None] = (-1, None)
        self.remove_callback(PrinterCallback)  # prints raw dictionaries
        self.add_callback(_Hooks(self))

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches; accelerate's sharding would repeat rows to even out the last batch."""
        workers = self.args.dataloader_num_workers
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=self.batches(self.args),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )

    # ---- Optimizer ----

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return what weight decay applies to: not the rows of new tokens, where these train alone.

        Trainer takes them for weights like others, and decay would shrink rows that seldom occur to zero.
        """
        return [name for name in super().get_decay_parameter_names(model) if not is_new_rows(name)]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with all that trains in any phase of the plan, each at its rate.

        Trainer leaves out what does not require grad at this moment, which then never trains, whatever is unfrozen.
        """
        if self.optimizer is None and self.plan:
            model = self.model if model is None else model
            groups = self.plan.groups(model, set(self.get_decay_parameter_names(model)), self.args)
            given = self.optimizer_cls_and_kwargs
            optimizer_cls, kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, model)
            check_takes_groups(optimizer_cls, kwargs)
            # The way that Trainer has for optimizers which choose their parameters.
            self.optimizer_cls_and_kwargs = optimizer_cls, {**kwargs, "params": groups}
            super().create_optimizer(model)
            self.optimizer_cls_and_kwargs = given
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler, with the warmup of each phase of the plan."""
        if self.lr_scheduler is None and self.plan:
            self.lr_scheduler = with_rewarmup(super().create_scheduler(num_training_steps, optimizer), self.plan.phases)
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Loss ----

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        """Return the loss weight of the global batch: all micro-batches, all processes.

        Trainer counts labels, and only where a key `labels` exists; it knows neither shifted labels nor class weights.
        """
        weight = torch.stack([self.task.loss_weight(batch) for batch in batch_samples]).sum()
        weight = sum_over_processes(weight.to(device))
        self.weight_seen = self.weight_seen + weight
        return weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's part of the mean loss over the global batch.

        Many heads ignore `num_items_in_batch` and return a plain mean, which Trainer takes for normalised: their
        gradient grows with accumulation and processes (transformers#47688). DDP averages gradients over processes,
        hence the factor.
        """
        return self.task.loss_sum(model, inputs, self.args) / num_items_in_batch * self.args.world_size

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the recipe's sets; Trainer's own loop averages means of batches, and so depends on their size."""
        sets = self.measure(self._poll)
        metrics = {f"{metric_key_prefix}_{s}_{name}": sets[s][name] for s in sets for name in self.task.LOGGED_FIGURES}
        self.last_evaluation = (self.state.global_step, sets)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def final_figures(self) -> dict[str, dict[str, float]] | None:
        """Return the last evaluation's figures, if they are those of the model that training ended with."""
        step, sets = self.last_evaluation
        restored_best = self.args.load_best_model_at_end and self.state.best_global_step
        return sets if step == (self.state.best_global_step if restored_best else self.state.global_step) else None

    def _poll(self) -> None:
        if any_process(self.preemption.requested, self.args.device):
            raise EvaluationInterrupted

    # ---- Step boundaries: log, evaluate, save; preemption ----

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Do what is due at a step boundary, and end here if a process was asked to.

        What is due but was not done is written into the checkpoint and done first on resume; Trainer forgets it.
        """
        preempted = any_process(self.preemption.requested, self.args.device)
        due = {"evaluate": self.control.should_evaluate, "save": self.control.should_save}
        if preempted:
            self.control.should_evaluate, self.control.should_save = False, False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationInterrupted:
            preempted = True
        if preempted:
            self._save_checkpoint(model, trial, due)
            raise Preempted

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without the summary's rates, which would set the samples of a whole run against one session's time.

        Raises:
            UserError: the loss or the gradient is no number.
        """
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise UserError(
                    f"step {self.state.global_step}: {name} is {logs[name]}: training has diverged; lower "
                    f"`training.learning_rate`, lengthen `training.warmup_steps`, or keep `training.max_grad_norm` on"
                )
        super().log({name: value for name, value in logs.items() if name not in _SESSION_RATES}, start_time)

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:
        """Train, resuming from a complete checkpoint where one is given.

        Raises:
            Preempted: a process was asked to end; a checkpoint is saved.
        """
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.preemption.deferred = True
        try:
            result = super().train(
                resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None, **kwargs
            )
        finally:
            self.preemption.deferred = False
        if self.preemption.requested:  # since the last step boundary
            raise Preempted
        return result


class _EpochLoader(DataLoader):
    """A DataLoader that passes the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _Hooks(TrainerCallback):
    """Where Trainer's loop calls back into its subclass."""

    def __init__(self, trainer: KitTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._restore_progress()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._in_epoch_end = False

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._in_epoch_end = True
