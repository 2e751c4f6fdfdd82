"""Weights & Biases: one run whatever the number of processes and restarts, every step once, no secret."""

import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth
from transformers import TrainerCallback, TrainerState

from kit.console import is_main_process, say, warn
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.recipe.models import Recipe
from kit.recipe.tracking import WandbSection
from kit.tracking.wandb_contents import log_artifacts, make_tables, scorecard_figures

DEFAULT_PROJECT = "domain-adaptation-kit"
_INIT_S, _CALL_S = 90, 60  # seconds that W&B may take before training goes on without it
# For the rest of the upload: a run that is cut off has seconds, since others wait for its processes, and one with a
# model to upload hours.
_FINISH_S, _FINISH_EARLY_S, _FINISH_MODEL_S = 300, 20, 4 * 3600


@contextmanager
def tracked(recipe: Recipe, folder: Path) -> Iterator["WandbTracker | None"]:
    """Begin the W&B run of a run directory, if the recipe has one, and close it however the training ends."""
    section = recipe.tracking.wandb
    if section is None:
        yield None
        return
    tracker = WandbTracker(section, folder, section.name or folder.name)
    tracker.start(recipe.model_dump(mode="json"))
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    except UserError:
        exit_code = 2
        raise
    except KeyboardInterrupt:
        exit_code = 130
        raise
    except SystemExit as end:  # because of another process
        exit_code = end.code
        raise
    except BaseException as error:
        # By name, as the command line does: the room where it is defined lies above this one.
        exit_code = 143 if type(error).__name__ == "Preempted" else 1
        raise
    finally:
        with _undisturbed() if exit_code else nullcontext():
            tracker.finish(exit_code)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no SIGTERM cut this off: launcher and other processes send one more to a process that is ending."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        self._offline = False
        self._part = folder
        self._closed: list[str] = []  # names of its parts that are whole

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the run, with the resolved recipe as its configuration."""
        if not is_main_process():
            return
        try:
            mode = self._mode()
            if mode == "disabled":
                return
            self._begin(mode, config)
        except Exception as error:  # whatever the network, the server or the client do, training goes on
            self._give_up(error)

    def _begin(self, mode: str, config: Mapping[str, Any]) -> None:
        import wandb

        identity = read_json(self.identity_file) if self.identity_file.is_file() else {}
        wanted = os.environ.get("WANDB_RUN_ID")
        if wanted not in (None, "", identity.get("id")):
            identity = {"id": wanted}  # another run than the one that was kept so far
        run_id = identity.get("id") or uuid.uuid4().hex[:8]
        self._offline = mode != "online"
        self._closed = identity.get("parts", [])
        # Before the run begins: what a kill leaves of it then has an id that is known.
        self._note_identity(run_id, identity.get("closed", 0))
        self._supersede(run_id)
        section, patience = self.section, float(os.environ.get("WANDB_INIT_TIMEOUT") or _INIT_S)
        values = {
            # `WANDB_*` variables win over the recipe: what is left out here, wandb takes from them.
            "project": ("WANDB_PROJECT", section.project or DEFAULT_PROJECT),
            "entity": ("WANDB_ENTITY", section.entity),
            "group": ("WANDB_RUN_GROUP", section.group),
            "job_type": ("WANDB_JOB_TYPE", section.job_type),
            "tags": ("WANDB_TAGS", list(section.tags) or None),
            "notes": ("WANDB_NOTES", section.notes),
            "name": ("WANDB_NAME", self.name),
            "dir": ("WANDB_DIR", str(self.folder)),
            # Offline there is no server to ask; the id alone joins the parts when they are synchronised.
            "resume": ("WANDB_RESUME", None if self._offline else "allow"),
        }
        # Console output, command line and the repository's address may hold data or keys.
        settings = {"console": "off", "disable_git": True, "disable_code": True, "silent": True, "x_disable_meta": True}
        self.run = _within(
            patience + _CALL_S,
            lambda: wandb.init(
                **{name: value for name, (variable, value) in values.items() if not os.environ.get(variable)},
                id=run_id,
                mode=mode,
                config=dict(config),
                settings=wandb.Settings(**settings, init_timeout=patience),
            ),
        )
        # Online the server knows how many entries it has; offline, what was closed properly is on disk.
        self.sent = identity.get("closed", 0) if self._offline else self.run.step
        self._part = Path(self.run.dir).parent.resolve()
        _within(_CALL_S, lambda: self.run.define_metric("train/global_step"))
        _within(_CALL_S, lambda: self.run.define_metric("*", step_metric="train/global_step", step_sync=True))
        say(f"W&B run {run_id}: {'offline' if self._offline else self.run.url}")

    def callback(self) -> TrainerCallback:
        """Return the callback that sends Trainer's log entries."""
        return _SendLogs(self)

    def send(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send what of Trainer's log history was not sent before."""

        def log() -> None:
            while self.sent < len(history):
                self.run.log(_named(history[self.sent]), step=self.sent)
                self.sent += 1

        self._attempt(log)

    def summarise(self, scorecard: Mapping[str, Any]) -> None:
        """Set the run's summary from the scorecard, and send the tables and artifacts that go with it.

        To be called when the run directory holds all but the scorecard.
        """
        self._attempt(lambda: self.run.summary.update(scorecard_figures(scorecard)))
        self._attempt(
            lambda: self.run.summary.update(make_tables(self.folder, scorecard, self.section.log_text)), "the tables"
        )
        if self.section.log_model or self.section.log_data:
            self._attempt(
                lambda: log_artifacts(
                    self.run, self.name, self.folder, scorecard, self.section.log_model, self.section.log_data
                ),
                "the artifacts",
                _FINISH_MODEL_S,
            )

    def finish(self, exit_code: int) -> None:
        """Close the run's file; only then is certain what it holds."""
        if self.run is None:
            return
        run = self.run
        if exit_code == 143:
            self._attempt(run.mark_preempting, "that it is preempted")
        patience = _FINISH_EARLY_S if exit_code else _FINISH_MODEL_S if self.section.log_model else _FINISH_S
        self._attempt(lambda: run.finish(exit_code=exit_code), seconds=patience)
        complete = self.run is not None
        if complete:
            self._closed = [*self._closed, self._part.name]
            self._attempt(lambda: self._note_identity(run.id, self.sent))
        if self._offline:
            parts = sorted(map(str, self._part.parent.glob(f"offline-run-*-{run.id}")))
            say(f"W&B: offline; this uploads the run: wandb sync {' '.join(parts)}")
        elif not complete:
            say(f"W&B: what was not uploaded lies in {self._part}: wandb sync {self._part}")

    def _note_identity(self, run_id: str, sent: int) -> None:
        write_json(self.identity_file, {"id": run_id, "closed": sent, "parts": self._closed})

    def _supersede(self, run_id: str) -> None:
        """Remove the offline part of an attempt that was killed: it is cut off somewhere, and is written anew."""
        for part in Path(os.environ.get("WANDB_DIR") or self.folder, "wandb").glob(f"offline-run-*-{run_id}"):
            if part.name not in self._closed:
                say(f"W&B: replacing {part.name}, which was cut off when the run was killed")
                shutil.rmtree(part)

    def _mode(self) -> str:
        mode = os.environ.get("WANDB_MODE") or self.section.mode
        if mode is None:
            host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
            mode = "online" if os.environ.get("WANDB_API_KEY") or get_netrc_auth(host) else "offline"
        return mode

    def _attempt(self, action: Callable[[], None], what: str | None = None, seconds: float = _CALL_S) -> None:
        """Do something with the run; where it fails, `what` is missing in it, or all that was to follow."""
        if self.run is None:
            return
        try:
            _within(seconds, action)
        except Exception as error:
            if what:
                warn(f"W&B: {_in_words(error)}; {what} could not be sent")
            else:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        warn(f"W&B: {_in_words(error)}; training goes on without it")
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


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """Return what `action` returns, or stop waiting: W&B's own time limits do not cover all that may hang.

    Raises:
        TimeoutError: it takes longer.
    """
    done: Future = Future()

    def act() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # an end of the interpreter that W&B asks for is none here
            done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    threading.Thread(target=act, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # its own
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _named(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log entry under the names that transformers' own W&B callback gives: `train/…`, `eval/…`."""
    names = {
        key: f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
        for key in entry
        if key != "step"
    }
    return {**{name: entry[key] for key, name in names.items()}, "train/global_step": entry["step"]}
