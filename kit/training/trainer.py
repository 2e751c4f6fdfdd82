"""The Trainer subclass: a loss that is normalised right, exact evaluation, and checkpoints that resume exactly."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from kit.console import warn
from kit.data.sampling import EpochBatches
from kit.errors import UserError
from kit.model.adapter_files import Adapter
from kit.model.new_rows import is_new_rows, put_back
from kit.training.checkpointing import CheckpointingTrainer
from kit.training.freezing import FreezingPlan
from kit.training.nonfinite import NameRows, advice, suspects_by_gradient, suspects_by_loss, tell_suspects
from kit.training.parameter_groups import check_takes_groups, with_rewarmup
from kit.training.preemption import Preempted, Preemption
from kit.training.prefix_cache import PrefixCache
from kit.training.prefix_rows import CollateNamed
from kit.training.sharding import prepare_sharding
from kit.training.throughput import Throughput
from kit.training.topology import any_process, on_any_process, sum_over_processes

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
        prefix: keeps what leaves the frozen bottom of the model, if there is such a cache.
        throughput: what counts tokens and measures speed.
        name_rows: tells in words of some rows which documents lie in them, and how many these are.
        save_minutes: of the recipe's `run`.
        skip_nonfinite_steps: of the recipe's `run`.
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
        prefix: PrefixCache | None = None,
        throughput: Throughput | None = None,
        name_rows: NameRows,
        save_minutes: float | None = None,
        skip_nonfinite_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        """Set up; the remaining arguments are Trainer's.

        Raises:
            UserError: steps are to be skipped with what makes them before their loss can be looked at.
        """
        # So Trainer knows of the adapter: it would refuse a model in 4 bits, as one that nothing can train in. It is
        # taken back, since transformers would save and load the adapter alone, without new tokens.
        model = kwargs["model"]
        model._hf_peft_config_loaded = adapter is not None
        forward = vars(model).get("forward")
        super().__init__(*args, **kwargs)
        del model._hf_peft_config_loaded
        if forward is not None:  # Liger Kernel has put its own in the place of the one that gives the kit's losses
            model.forward = forward
        prepare_sharding(self.accelerator, self.model)
        self.task = task
        self.batches = batches
        self.measure = measure
        self.preemption = preemption
        self.fingerprints = fingerprints
        self.plan = plan
        self.adapter = adapter
        self.prefix = prefix
        # `compute_loss` normalises over the whole global batch, so nothing is left to divide: this says so to
        # transformers 5.23, and the next line to versions before it.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.throughput = throughput or Throughput(plan)
        self.name_rows = name_rows
        self.save_minutes, self.skip_nonfinite_steps = save_minutes, skip_nonfinite_steps
        self._losses: list[torch.Tensor] = []  # of the step's micro-batches so far
        self._agreed: list[bool] | None = None  # by all processes in this step: whether to end, and to save
        self._moves_in_backward = self.is_deepspeed_enabled or "lomo" in self.args.optim.value
        if skip_nonfinite_steps and self._moves_in_backward:
            raise UserError(
                "run.skip_nonfinite_steps: not with DeepSpeed or LOMO, whose optimizers move within the backward pass"
            )
        self.last_evaluation: tuple[int, dict[str, dict[str, float]] | None] = (-1, None)
        self.remove_callback(PrinterCallback)  # prints raw dictionaries
        self.add_callback(self.throughput)
        self.add_callback(_Hooks(self))

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's batches; accelerate's sharding would repeat rows to even out the last batch."""
        workers = self.args.dataloader_num_workers
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=self.batches(self.args),
            collate_fn=CollateNamed(self.data_collator) if self.prefix else self.data_collator,
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
        """Return the loss weight of the global batch: all micro-batches, all processes; count its tokens too.

        Trainer counts labels, and only where a key `labels` exists; it knows neither shifted labels nor class weights.
        """
        weight = torch.stack([self.task.loss_weight(batch) for batch in batch_samples]).sum()
        tokens = torch.stack([self.task.count_tokens(batch) for batch in batch_samples]).sum()
        weight, tokens = sum_over_processes(torch.stack([weight, tokens.to(weight.dtype)]).to(device))
        self.throughput.tokens_seen = self.throughput.tokens_seen.to(device) + tokens.long()
        self.throughput.length = max(batch["input_ids"].shape[-1] for batch in batch_samples)
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
        with self.prefix.training(inputs) if self.prefix else nullcontext():
            loss = self.task.loss_sum(model, inputs, self.args) / num_items_in_batch * self.args.world_size
        self._losses.append(loss.detach())
        if self._moves_in_backward and any_process(~loss.isfinite(), self.args.device):
            self._meet_nonfinite("loss")
        return loss

    # ---- A loss or gradient that is no number ----

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient, after a look at it and at the losses: the optimizer moves next.

        Trainer lets it move whatever they are. What all processes have to agree on at a step boundary is asked here
        too, so that a step has one exchange of flags and waits for the device once. With fp16 a gradient that is no
        number is the scaler's to meet, which leaves such steps out.

        Raises:
            UserError: loss or gradient is NaN or infinite on some process.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        no_loss = ~torch.stack(self._losses).isfinite().all()
        no_gradient = ~torch.as_tensor(0.0 if norm is None else norm).isfinite()
        # DeepSpeed has stepped by now, unless it found this; the norm that it tells is then that of the step before.
        no_gradient |= self.is_deepspeed_enabled and not self.deepspeed.was_step_applied()
        flags = on_any_process([no_loss, no_gradient, *self._wishes()], self.args.device)
        no_loss, no_gradient, *self._agreed = flags
        if no_loss or (no_gradient and not self.args.fp16):
            self._meet_nonfinite("loss" if no_loss else "gradient")
        return None if no_loss or no_gradient else norm

    def _meet_nonfinite(self, what: str) -> None:
        """End the run, or leave this step out where the recipe allows it; the same on all processes.

        Raises:
            UserError: the recipe does not allow it, or not once more.
        """
        batches = self.batches(self.args).of_step(self.state.global_step, self.args.gradient_accumulation_steps)
        if what == "loss":
            alone = None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._loss_alone
            own = suspects_by_loss(torch.stack(self._losses), batches, alone, self.name_rows, self.args)
        else:
            own = suspects_by_gradient(batches, self.name_rows, self.args)
        report = tell_suspects(self.state.global_step + 1, what, own)
        if self.skipped_steps >= self.skip_nonfinite_steps:
            moved = what == "gradient" and self._moves_in_backward and not self.is_deepspeed_enabled
            state = "which the optimizer has taken before it could be seen" if moved else "the optimizer has not moved"
            raise UserError(f"{report}\n  {state}; {advice(self.args, self.skipped_steps)}")
        self.skipped_steps += 1
        warn(f"{report}\n  the step is skipped, {self.skipped_steps} of {self.skip_nonfinite_steps}")
        # What accelerate's optimizer takes for a micro-batch in between: it does nothing, in the state that it has.
        self.accelerator.gradient_state._set_sync_gradients(False)
        if self.accelerator.scaler:  # has divided this step's gradient already, which it does once between updates
            self.accelerator.scaler.update()
        # To the mean loss since the last log line the step is as if it had not been.
        self._tr_loss = self._loss_before
        self._globalstep_last_logged += 1

    @torch.no_grad()
    def _loss_alone(self, row: int) -> torch.Tensor:
        """Return the loss of one row, in the model that is not wrapped: other processes know nothing of it."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[row]]))
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            return self.task.loss_sum(self.model, batch, self.args)

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the recipe's sets; Trainer's own loop averages means of batches, and so depends on their size."""
        put_back(self.model)
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

    def _wishes(self) -> tuple[bool, bool]:
        """Return whether this process was asked to end, and, on the first one, whether it is time to save."""
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self.save_minutes is not None and minutes >= self.save_minutes
        return self.preemption.requested, late and self.args.process_index == 0

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Do what is due at a step boundary, and end here if a process was asked to.

        What is due but was not done is written into the checkpoint and done first on resume; Trainer forgets it.
        """
        # At the end of an epoch, and on resume, no step came before.
        preempted, late = self._agreed or (any_process(self.preemption.requested, self.args.device), False)
        self._agreed = None
        late = late and not self._is_evaluated_or_saved()
        due = {"evaluate": self.control.should_evaluate, "save": self.control.should_save}
        if preempted:
            self.control.should_evaluate, self.control.should_save = False, False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationInterrupted:
            preempted = True
        if preempted or late:
            self._save_checkpoint(model, trial, due, timed=not preempted)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if preempted:
            raise Preempted

    def _is_evaluated_or_saved(self) -> bool:
        """Tell whether this step has an evaluation or a checkpoint, now or when its epoch ends in a moment."""
        by_epoch = "epoch" in (self.args.eval_strategy.value, self.args.save_strategy.value)
        ends = self.state.epoch == int(self.state.epoch) or self.state.global_step >= self.state.max_steps
        return self.control.should_evaluate or self.control.should_save or (by_epoch and ends)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of skipped steps, and without what Trainer's summary divides by other numbers.

        Its rates would set the samples of a whole run against one session's time.
        """
        if self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
            if "train_loss" in logs:
                logs["train_loss"] *= self.state.global_step / max(1, self.state.global_step - self.skipped_steps)
        figures = self.throughput.figures(self.args, self.state) if "loss" in logs else {}
        kept = {name: value for name, value in logs.items() if name not in _SESSION_RATES}
        super().log(kept | figures, start_time)

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:
        """Train, resuming from a complete checkpoint where one is given.

        Raises:
            Preempted: a process was asked to end; a checkpoint is saved.
        """
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.preemption.deferred = True
        self._saved_at = time.monotonic()
        try:
            result = super().train(
                resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None, **kwargs
            )
        finally:
            self.preemption.deferred = False
        if self.preemption.requested:  # since the last step boundary
            raise self.preemption.raises
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
        self.trainer._losses, self.trainer._loss_before = [], self.trainer._tr_loss.clone()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._in_epoch_end = True
