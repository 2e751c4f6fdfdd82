"""The recipe's `run` section: what a run does around training."""

from pydantic import Field

from kit.recipe.section import Section, Text, sequence


class EarlyStopping(Section):
    """End training when the best-model metric stops improving."""

    patience: int = Field(default=3, ge=1)
    """Number of evaluations without improvement after which training ends."""
    threshold: float = Field(default=0.0, ge=0)
    """Least change of the metric that counts as an improvement."""


class RunSection(Section):
    """What a run does around training."""

    output_dir: Text | None = None
    """The run directory; by default `runs/<stem of the recipe file>`."""
    resume: Text = "auto"
    """`auto`: the newest complete checkpoint of this run directory, else a fresh start; `must`: a checkpoint or an
    error; `never`: a fresh start, an earlier run being moved aside; or the path of a checkpoint. The same command after
    a preemption goes on with what `never` or a path began."""
    resume_with: sequence(Text) = ()
    """In what this run may differ from the one that it goes on with: `world_size` (the number of processes) and keys
    such as `training.learning_rate`, but for those that say what the model and its data are, or where in an epoch a
    step is. Any other difference is refused."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Rows of an optimizer step, over all processes; `training.gradient_accumulation_steps` follows from it, whatever
    the number of processes."""
    early_stopping: EarlyStopping | None = None
    """When to end training before its last step."""
    save_minutes: float | None = Field(default=None, gt=0)
    """A checkpoint also whenever so many minutes have passed since the last one, at the next step that is not
    evaluated; beside what `training.save_strategy` asks for, `no` included. It is kept until the next checkpoint is
    whole, and neither counts for `training.save_total_limit` nor as the best one."""
    skip_nonfinite_steps: int = Field(default=0, ge=0)
    """A step whose loss or gradient is NaN or infinite ends the run before the optimizer moves. So many such steps are
    instead left out with a warning: nothing moves, but the learning rate goes on."""
