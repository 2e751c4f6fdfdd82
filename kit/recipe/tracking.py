"""The recipe's `tracking` section: who is told how a run goes."""

from typing import Literal

from kit.recipe.section import Section, sequence


class WandbSection(Section):
    """Weights & Biases; `WANDB_*` environment variables win over these keys."""

    project: str | None = None
    """Project of the run; by default `domain-adaptation-kit`."""
    entity: str | None = None
    """User or team that owns the project."""
    group: str | None = None
    """Group of runs in the project."""
    tags: sequence(str) = ()
    """Tags of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """By default online where an API key is configured, else offline."""


class TrackingSection(Section):
    """Experiment trackers; `metrics.jsonl` is always written."""

    wandb: WandbSection | None = None
    """Follow the run in Weights & Biases."""
