"""The recipe's `tracking` section: who is told how a run goes."""

from typing import Annotated, Literal

from pydantic import Field

from kit.recipe.section import Section, sequence


class WandbSection(Section):
    """Weights & Biases; `WANDB_*` environment variables win over these keys."""

    project: str | None = None
    """Project of the run; by default `domain-adaptation-kit`."""
    entity: str | None = None
    """User or team that owns the project."""
    name: str | None = None
    """Name of the run; by default the recipe's file name without its ending."""
    group: str | None = None
    """Group of runs in the project, such as one experiment with several seeds."""
    job_type: str | None = None
    """Kind of run within its group, such as `train`."""
    tags: sequence(str) = ()
    """Tags of the run."""
    notes: str | None = None
    """A longer description of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """By default online where an API key is configured, else offline."""
    log_text: bool = False
    """Also send text of the data: samples of the model, rows that a classifier mistakes."""
    log_model: bool = False
    """Upload `model/` as an artifact, with facts of the base model as what it was made from."""
    log_data: bool = False
    """Log the data's ledger (names, counts, hashes; no text) as an artifact that the run was made from."""


class TrackingSection(Section):
    """Experiment trackers; `metrics.jsonl` is always written."""

    wandb: WandbSection | None = None
    """Follow the run in Weights & Biases."""
    peak_tflops: Annotated[float, Field(gt=0, strict=False)] | None = None
    """Peak of a device in TFLOP/s, of which `mfu` is the share; by default that of 16 bits of GPUs that are known."""
