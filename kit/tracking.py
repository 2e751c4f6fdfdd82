"""Weights & Biases: one run whatever the number of processes and restarts, every step once, no secret."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth
from transformers import TrainerCallback, TrainerState

from kit.console import is_main_process, say, warn
from kit.files import read_json, write_json
from kit.recipe.models import Recipe
from kit.recipe.tracking import WandbSection

DEFAULT_PROJECT = "domain-adaptation-kit"


@contextmanager
def tracked(recipe: Recipe, folder: Path) -> Iterator["WandbTracker | None"]:
    """Begin the W&B run of a run directory, if the recipe has one, and close it however the training ends."""
    section = recipe.tracking.wandb
    if section is None:
        yield None
        return
    tracker = WandbTracker(section, folder, folder.name)
    tracker.start(recipe.model_dump(mode="json"))
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.finish(exit_code)


class WandbTracker:
    """The W&B side of a run, on the main process; a failure of it is a warning, never the end of a training.

    W&B's history is append-only, and a resumed run repeats the steps since its checkpoint. So `wandb.json` beside the
    checkpoints holds the run's id and how many entries of the history it is certain to have; what it has is not sent
    again, what a kill may have cost it is sent anew.
    """

    def __init__(self, section: WandbSection, folder: Path, name: str) -> None:
        """Prepare to track run `name`, keeping identity and offline files in `folder`."""
        self.section = section
        self.identity_file = folder / "wandb.json"
        self.folder = folder
        self.name = name
        self.run: Any = None
        self.sent = 0

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the run, with the resolved recipe as its configuration."""
        if not is_main_process():
            return
        try:
            import wandb

            if self._mode() == "disabled":
                return

            identity = read_json(self.identity_file) if self.identity_file.is_file() else {}
            run_id = identity.get("id") or uuid.uuid4().hex[:8]
            offline = self._mode() != "online"
            self._supersede(identity)
            self.run = wandb.init(
                # `WANDB_*` variables win over the recipe: what is None here, wandb takes from them.
                project=_unless_set("WANDB_PROJECT", self.section.project or DEFAULT_PROJECT),
                entity=_unless_set("WANDB_ENTITY", self.section.entity),
                group=_unless_set("WANDB_RUN_GROUP", self.section.group),
                tags=_unless_set("WANDB_TAGS", list(self.section.tags) or None),
                name=_unless_set("WANDB_NAME", self.name),
                id=run_id,
                # Offline there is no server to ask; the id alone joins the parts when they are synchronised.
                resume=None if offline else "allow",
                mode=self._mode(),
                dir=str(self.folder),
                config=dict(config),
                # Console output, command line and the repository's address may hold data or keys.
                settings=wandb.Settings(
                    console="off", disable_git=True, disable_code=True, silent=True, x_disable_meta=True
                ),
            )
            # Online the server knows how many entries it has; offline, what was closed properly is on disk.
            self.sent = identity.get("closed", 0) if offline else self.run.step
            part = Path(self.run.dir).parent
            write_json(
                self.identity_file, {"id": run_id, "closed": self.sent, "open_part": part.name if offline else None}
            )
            self.run.define_metric("train/global_step")
            self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
            say(f"W&B run {run_id}: {f'offline; `wandb sync {part}` uploads it' if offline else self.run.url}")
        except Exception as error:  # whatever the network, the server or the client do, training goes on
            self._give_up(error)

    def callback(self) -> TrainerCallback:
        """Return the callback that sends Trainer's log entries."""
        return _SendLogs(self)

    def send(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send what of Trainer's log history was not sent before."""
        if self.run is None:
            return
        try:
            while self.sent < len(history):
                self.run.log(_named(history[self.sent]), step=self.sent)
                self.sent += 1
        except Exception as error:
            self._give_up(error)

    def summarise(self, scorecard: Mapping[str, Any]) -> None:
        """Set the run's summary from the scorecard."""
        if self.run is None:
            return
        try:
            self.run.summary.update(dict(_figures("scorecard", scorecard["sets"])))
        except Exception as error:
            self._give_up(error)

    def finish(self, exit_code: int) -> None:
        """Close the run's file; only then is certain what it holds."""
        if self.run is None:
            return
        try:
            run_id = self.run.id
            self.run.finish(exit_code=exit_code)
            write_json(self.identity_file, {"id": run_id, "closed": self.sent, "open_part": None})
        except Exception as error:
            self._give_up(error)

    def _supersede(self, identity: Mapping[str, Any]) -> None:
        """Remove the offline part of an attempt that was killed: it is cut off somewhere, and is written anew."""
        part = identity.get("open_part")
        if part and (self.folder / "wandb" / part).is_dir():
            say(f"W&B: replacing {part}, which was cut off when the run was killed")
            shutil.rmtree(self.folder / "wandb" / part)

    def _mode(self) -> str:
        mode = os.environ.get("WANDB_MODE") or self.section.mode
        if mode is None:
            host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
            mode = "online" if os.environ.get("WANDB_API_KEY") or get_netrc_auth(host) else "offline"
        return mode

    def _give_up(self, error: Exception) -> None:
        warn(f"W&B: {type(error).__name__}: {' '.join(str(error).split())[:300]}; training goes on without it")
        self.run = None


class _SendLogs(TrainerCallback):
    def __init__(self, tracker: WandbTracker) -> None:
        self.tracker = tracker

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._send(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._send(state)

    def _send(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.tracker.send(state.log_history)


def _figures(path: str, scores: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every number in nested mappings, under the way to it."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _figures(f"{path}/{name}", value)
        elif isinstance(value, int | float):
            yield f"{path}/{name}", value


def _named(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log entry under the names that transformers' own W&B callback gives: `train/…`, `eval/…`."""
    names = {
        key: f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        for key in entry
        if key != "step"
    }
    return {**{name: entry[key] for key, name in names.items()}, "train/global_step": entry["step"]}


def _unless_set(variable: str, value: Any) -> Any:
    return None if os.environ.get(variable) else value
