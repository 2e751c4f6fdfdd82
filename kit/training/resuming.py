"""What a run that goes on takes from its checkpoint, and what from its recipe, which may differ (`run.resume_with`).

Trainer loads the optimizer's groups and the schedule's rates with their state, the steps between log lines with the
history, and patience with the count of evaluations: what a recipe has changed would be ignored, silently.
"""

from pathlib import Path

import numpy as np
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, set_seed

from kit.console import say
from kit.errors import UserError
from kit.training.checkpoints import saved_world_size
from kit.training.parameter_groups import MEMBERS

# Of an optimizer's group, what `TrainingArguments` set; the rate itself is the schedule's.
_OF_THE_RECIPE = ("initial_lr", "weight_decay", "betas", "eps", MEMBERS)
_REGROUPED = (
    "run.resume_with: with these rates or weight decays the parameters fall into other groups than the checkpoint's, "
    "whose state belongs to its own; keep `training.learning_rate`, or whether `training.weight_decay` is 0"
)


class ResumingTrainer(Trainer):
    """Trainer in which the recipe holds for a resumed run too; where it has not changed, this changes no bit."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their state, but not the values that the recipe gives.

        Of a schedule that follows the loss the rates are state; `run.resume_with` refuses others.

        Raises:
            UserError: the optimizer's groups are not the checkpoint's.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        ours = [{key: group[key] for key in _OF_THE_RECIPE if key in group} for group in self.optimizer.param_groups]
        base_lrs = getattr(self.lr_scheduler, "base_lrs", None)
        try:
            self._load_steps_state(checkpoint)
        except ValueError as error:  # torch's, where groups differ in number or size
            raise UserError(_REGROUPED) from error
        for group, values in zip(self.optimizer.param_groups, ours, strict=True):
            if group.get(MEMBERS) != values.get(MEMBERS):
                raise UserError(_REGROUPED)
            group.update(values)
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = base_lrs
            rates = [lr * of(scheduler.last_epoch) for lr, of in zip(base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def _load_steps_state(self, checkpoint: str) -> None:
        """Load the state of optimizer and scheduler with all values that were saved."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load this process's random state; Trainer goes on with any where another number of processes saved theirs."""
        if checkpoint is None or saved_world_size(Path(checkpoint)) == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        say("the checkpoint has random states (dropout) of another number of processes: seeded by step and process")
        entropy = [self.args.seed, self.state.global_step, self.args.process_index]
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _load_callback_state(self) -> None:
        """Load the evaluations without improvement, but not the patience; Trainer loads both."""
        ours = self._early_stopping()
        super()._load_callback_state()
        for callback, before in zip(self._early_stopping(), ours, strict=True):
            vars(callback).update(before.state()["args"])

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _has_run_out_of_patience(self) -> bool:
        """Return whether early stopping has ended the run, as it would now; `max_steps` may be another by now."""
        return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._early_stopping())

    def _hold_recipe(self) -> None:
        """Let the recipe's steps between log lines, evaluations and checkpoints hold; Trainer loads them."""
        self.state.compute_steps(self.args, self.state.max_steps)
        self.state.train_batch_size = self._train_batch_size
