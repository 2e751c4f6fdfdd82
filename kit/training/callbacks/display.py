"""What training shows: a bar on a terminal, a plain line for each log entry everywhere."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from transformers import TrainerCallback, TrainerState

from kit.console import new_progress, say, shows_bars


class Display(TrainerCallback):
    """Shows progress, loss, speed and evaluations on rank 0."""

    def __init__(self, weight_seen: Callable[[], float], task: ModuleType, tells_end: bool = True) -> None:
        """Show the speed at which `weight_seen`, in the task's `UNIT`, grows, its `SHOWN_FIGURE`, and why it ends."""
        self.weight_seen = weight_seen
        self.unit, (self.figure, self.figure_in_words) = task.UNIT, task.SHOWN_FIGURE
        self.tells_end = tells_end
        self.bar = None
        self.clock = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin at the step that training begins at."""
        self.clock = (self.weight_seen(), time.monotonic())
        if shows_bars():
            self.bar = new_progress()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print a line for a log entry."""
        step = f"step {state.global_step:,}/{state.max_steps:,}"
        if "loss" in logs:
            before, then = self.clock
            self.clock = (self.weight_seen(), time.monotonic())
            speed = (self.clock[0] - before) / max(self.clock[1] - then, 1e-9)
            norm = f"  grad norm {logs['grad_norm']:.3f}" if "grad_norm" in logs else ""
            say(
                f"{step}  loss {logs['loss']:.4f}{norm}  lr {logs['learning_rate']:.2e}  epoch {logs['epoch']:.2f}"
                f"  {speed:,.0f} {self.unit}/s"
            )
        end = f"_{self.figure}"
        found = {k.removeprefix("eval_").removesuffix(end): v for k, v in logs.items() if k.endswith(end)}
        if found:
            say(f"{step}  " + "  ".join(f"{name} {value:.4f} {self.figure_in_words}" for name, value in found.items()))

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the time of evaluations out of the speed of training."""
        self.clock = (self.weight_seen(), time.monotonic())

    # A save takes time of its own just as an evaluation does.
    on_save = on_evaluate

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell of an early end, and of the model that is kept."""
        if not self.tells_end:
            return
        if state.global_step < state.max_steps:
            say(f"stopped early at step {state.global_step:,} of {state.max_steps:,}: no improvement any more")
        if args.load_best_model_at_end and state.best_global_step:
            say(f"keeping the model of step {state.best_global_step:,}, the best by {args.metric_for_best_model}")

    def close(self) -> None:
        """Remove the bar, however training ended."""
        if self.bar:
            self.bar.stop()
            self.bar = None
