"""`metrics.jsonl`: the history of a run, a line for each log entry."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from kit.files import write_text


class MetricsLog(TrainerCallback):
    """Appends each log entry to a file, which after a resume holds the checkpoint's history and nothing beyond it."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the history so far: none, or the checkpoint's."""
        if state.is_world_process_zero:
            write_text(self.path, "".join(_line(entry) for entry in state.log_history))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Append the newest entry."""
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: dict[str, Any]) -> str:
    # Trainer sorts the keys of a history that it has saved and loaded; in one order the file does not show it.
    return json.dumps({"step": entry["step"], **dict(sorted(entry.items()))}) + "\n"
