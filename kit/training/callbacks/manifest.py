"""The manifest during training: how far the run has come."""

from typing import Any

from transformers import TrainerCallback, TrainerState

from kit.training.run_directory import RunDirectory


class NoteProgress(TrainerCallback):
    """Enters the step of each checkpoint into the manifest, with the time that the run has taken so far."""

    def __init__(self, directory: RunDirectory) -> None:
        """Write to the manifest of `directory`."""
        self.directory = directory

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.directory.note(step=state.global_step)
