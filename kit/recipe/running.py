"""The recipe's `run` section: what a run does around training."""

from pydantic import Field

from kit.recipe.section import Section, Text


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
    early_stopping: EarlyStopping | None = None
    """When to end training before its last step."""
