"""The run directory: one run at a time, a manifest of what happened, nothing lost without a word."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kit.console import is_main_process, say, warn
from kit.errors import UserError
from kit.files import read_json, write_json, write_text
from kit.recipe.secrets import mask_secrets
from kit.training.topology import launcher

PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "wandb", "tokenizers", "safetensors",
    "numpy",
)  # fmt: skip


_LOCK_PATIENCE_S = 3  # `kit status` holds the lock for a moment


class RunDirectory:
    """The folder of one run. Only the main process writes to it.

    Attributes:
        path: the folder.
        checkpoints: where checkpoints are.
        model: the final model.
        scorecard: before, after and their difference.
    """

    def __init__(self, path: str | Path) -> None:
        """Name the folder; nothing is created yet."""
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.recipe = self.path / "recipe.yaml"
        self.ledger = self.path / "ledger.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.freezing = self.path / "freezing.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.json"
        self.scorecard = self.path / "scorecard.json"
        self.manifest = self.path / "manifest.json"
        real = self.path.resolve()  # `.` has no name of its own
        self._lock = FileLock(real.with_name(f".{real.name}.lock"))
        self._facts: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._stages: list[str] = []
        self._since = 0.0

    def lock(self) -> None:
        """Reserve the folder for this run; the operating system releases it however the process ends.

        Raises:
            UserError: another run has it, or it cannot be written.
        """
        if not is_main_process():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign_folder()
            self._lock.acquire(timeout=_LOCK_PATIENCE_S)
        except Timeout:
            raise RunDirectoryInUse(
                f"{self.path}: another run is using this folder; wait for it, or choose another with `run.output_dir=…`"
            ) from None
        except OSError as error:
            raise RunDirectoryInUse(
                f"run.output_dir: {self.path.absolute()} cannot be written: {error.strerror}"
            ) from None

    def check(self) -> None:
        """Find out whether the folder could be used, without touching it.

        Raises:
            UserError: it could not be written, or holds something else than a run.
        """
        real = self.path.resolve()
        # The lock lies beside the folder.
        for wanted in (real, real.parent):
            existing = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
            why = None
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                why = f"{existing} is {'read-only' if existing.is_dir() else 'a file'}"
            elif existing != wanted:
                try:  # permissions alone do not tell: some file systems take no folders
                    os.rmdir(tempfile.mkdtemp(prefix=".kit-", dir=existing))
                except OSError as error:
                    why = f"{existing}: {error.strerror}"
            if why:
                raise RunDirectoryInUse(f"run.output_dir: {self.path.absolute()} cannot be written: {why}")
        if self.path.exists():
            self._refuse_foreign_folder()

    def _refuse_foreign_folder(self) -> None:
        """Refuse a folder with anything in it that is not a run's: what it holds would be replaced or moved."""
        foreign = {p.name for p in self.path.iterdir() if not p.name.startswith(".")}
        foreign -= {self.ledger.name, self.vocabulary.name, self.freezing.name}  # of `kit prepare`
        if foreign and not self.manifest.is_file():
            listed = ", ".join(sorted(foreign)[:5])
            raise RunDirectoryInUse(
                f"run.output_dir: {self.path.absolute()} is no run directory (it holds {listed}); name a new or empty "
                f"folder, or one of an earlier run"
            )

    def unlock(self) -> None:
        """Release the folder."""
        if self._lock.is_locked:
            self._lock.release()

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest, empty where there is none."""
        return read_json(self.manifest) if self.manifest.is_file() else {}

    def is_finished(self) -> bool:
        """Tell whether a run ended here: the scorecard is the last thing that it writes."""
        return self.scorecard.is_file()

    def move_aside(self) -> None:
        """Keep an earlier run under another name, so that a fresh one can take its place."""
        if not is_main_process() or not any(self.path.iterdir()):
            return
        real = self.path.resolve()
        number = next(n for n in range(1, 10_000) if not real.with_name(f"{real.name}.{n}").exists())
        target = real.with_name(f"{real.name}.{number}")
        real.rename(target)
        real.mkdir()
        say(f"earlier run moved to {target}")

    def start(self, recipe_text: str, **facts: Any) -> None:
        """Write the resolved recipe and the manifest of a run that begins or goes on."""
        if not is_main_process():
            return
        # What marks a finished run must not vouch for the one that begins; nor is what a kill left half-written kept.
        self.scorecard.unlink(missing_ok=True)
        for leftover in self.path.glob(".*.????????"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        earlier = self.read_manifest()
        self._seconds = {**earlier.get("seconds", {}), **self._seconds}
        self._facts = {
            "status": "running",
            "seconds": self._take_time(),
            "command": _command(),
            "started": earlier.get("started", _now()),
            "attempts": earlier.get("attempts", 0) + 1,
            "step": earlier.get("step", 0),
            "resumes": earlier.get("resumes", []),
            "versions": {name: _version(name) for name in ("domain-adaptation-kit", *PACKAGES)},
            "python": platform.python_version(),
            "git": git_state(),
            **facts,
        }
        # The manifest first: without it a folder is not recognised as a run's.
        write_json(self.manifest, self._facts)
        write_text(self.recipe, recipe_text)

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        if is_main_process() and self._facts:
            self._facts.update(facts, updated=_now(), seconds=self._take_time())
            write_json(self.manifest, self._facts)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time within as that of a stage, over all attempts, and not as that of the one around it."""
        self._take_time()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._take_time()
            self._stages.pop()

    def _take_time(self) -> dict[str, float]:
        """Return the seconds of each stage so far."""
        now = time.monotonic()
        if self._stages:
            self._seconds[self._stages[-1]] = self._seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
        return {stage: round(seconds, 1) for stage, seconds in self._seconds.items()}

    def note_resume(self, checkpoint: str, differences: list[str]) -> None:
        """Add to the manifest what this attempt goes on from, and in what it differs from the run that wrote it."""
        resume = {"attempt": self._facts.get("attempts"), "checkpoint": checkpoint, "differences": differences}
        self.note(resumes=[*self._facts.get("resumes", []), resume])

    def end(self, status: str, **facts: Any) -> None:
        """Record how the run ended: `done`, `user-error`, `failed` or `preempted`; `prepared` if none began."""
        if not is_main_process():
            return
        if not self._facts:
            earlier = self.read_manifest()
            if earlier.get("attempts"):
                # Nothing was started: the manifest tells of the run that is here, and beside it of this attempt.
                if status in ("user-error", "failed") and earlier.get("status") != "done":
                    write_json(self.manifest, earlier | {"refused": {"status": status, **facts}})
                return
            self._facts = {"command": _command()}
        try:
            self.note(status=status, ended=_now(), **facts)
        except OSError as error:  # a full disk, most often what ended the run: its message is the one to be read
            if not _write_in_place(self.manifest, self._facts):
                warn(f"{self.manifest} cannot be written: {error.strerror}")


class RunDirectoryInUse(UserError):
    """The folder cannot be had; what is in it belongs to somebody else and stays as it is."""


def read_status(path: str | Path) -> str:
    """Return the status of a run directory, `missing` where there is none.

    A run that was killed cannot write its end: `running` without a living owner is reported as `killed`. Of a run that
    is not done and was refused when it was last started the status is that of the refusal.
    """
    directory = RunDirectory(path)
    try:
        manifest = read_json(directory.manifest)
        status = manifest["status"]
    except (OSError, json.JSONDecodeError, KeyError):
        return "missing"
    if status != "done" and (refused := manifest.get("refused")):
        return refused["status"]
    if status != "running":
        return status
    try:
        directory._lock.acquire(timeout=0)
    except Timeout:
        return "running"
    directory._lock.release()
    return "killed"


def _write_in_place(path: Path, value: Any) -> bool:
    """Write a JSON file into the blocks that it has, where a full disk leaves none for a second file to be renamed."""
    text = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        if len(text) > path.stat().st_blocks * 512:
            return False
        with open(path, "r+b") as file:
            file.write(text)
            file.truncate()
    except OSError:
        return False
    return True


def _command() -> str:
    """Return the command that repeats the run, as it was launched, without secrets."""
    words = ["kit", *sys.argv[1:]]
    if parent := launcher():
        words = parent.cmdline()
        if len(words) > 1 and Path(words[1]).name in ("accelerate", "torchrun"):  # installed scripts, run by Python
            words = [Path(words[1]).name, *words[2:]]
    return shlex.join(mask_secrets(words, os.environ))


def git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the repository that the run is started in, or None outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes.strip())}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def exit_code(status: str) -> int:
    """Return the exit code that goes with a status: what `kit train` itself would have ended with."""
    return {"done": 0, "user-error": 2, "preempted": 143, "interrupted": 130}.get(status, 1)


def model_of(target: str) -> str:
    """Return the model that a run directory holds; anything else, a model folder or a name on the Hub, as it is.

    Raises:
        UserError: the run has not written its model yet.
    """
    directory = RunDirectory(target)
    if directory.path.is_dir() and directory.model.is_dir():
        return str(directory.model)
    if directory.recipe.is_file():
        raise UserError(f"{target}: the run has no model/ yet; it is written when training ends")
    return target
