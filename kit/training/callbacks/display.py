"""What training shows: a bar on a terminal, a plain line for each log entry everywhere."""

from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

from transformers import TrainerCallback, TrainerState

from kit.console import new_progress, say, shows_bars


class Display(TrainerCallback):
    """Shows progress, loss, speed and evaluations on rank 0."""

    def __init__(self, task: ModuleType, tells_end: bool = True) -> None:
        """Show the task's `SHOWN_FIGURE` of evaluations, and why training ends."""
        self.figure, self.figure_in_words = task.SHOWN_FIGURE
        self.tells_end = tells_end
        self.bar = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin at the step that training begins at."""
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
            say(f"{step}  {'  '.join(_in_words(logs))}")
        end = f"_{self.figure}"
        found = {k.removeprefix("eval_").removesuffix(end): v for k, v in logs.items() if k.endswith(end)}
        if found:
            say(f"{step}  " + "  ".join(f"{name} {value:.4f} {self.figure_in_words}" for name, value in found.items()))

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


def _in_words(logs: dict[str, float]) -> Iterator[str]:
    """Yield what a line says of a log entry; of several learning rates the highest."""
    rates = [rate for name, rate in logs.items() if name.startswith("learning_rate")]
    yield f"loss {logs['loss']:.4f}"
    if "grad_norm" in logs:
        yield f"grad norm {logs['grad_norm']:.3f}"
    yield f"lr {max(rates):.2e}"
    yield f"epoch {logs['epoch']:.2f}"
    if "phase" in logs:
        yield f"phase {logs['phase']}"
    if "tokens_per_second" in logs:
        yield f"{logs['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in logs:
        yield f"{logs['mfu']:.0%} of peak"
    if "memory_gib" in logs:
        yield f"{logs['memory_gib']:.1f} GiB"
    if logs.get("seconds_left"):
        yield f"{timedelta(seconds=round(logs['seconds_left']))} left"
