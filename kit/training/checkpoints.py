"""Checkpoints that are known to be whole: a marker written last, and the choice of the one to resume from."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kit.console import say, warn
from kit.errors import UserError
from kit.files import COMPLETE, is_sealed, read_json, read_seal, seal
from kit.recipe.loading import differing_keys
from kit.recipe.resuming import covers, split_differences

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def complete_checkpoint(folder: Path, step: int, world_size: int, fingerprints: dict[str, Any]) -> None:
    """Write the marker of a checkpoint, after every process has written its part."""
    seal(folder, step=step, world_size=world_size, **fingerprints)


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not."""
    found = [(int(m.group(1)), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def choose_checkpoint(
    resume: str, folder: Path, fingerprints: dict[str, Any], resume_with: Sequence[str] = ()
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, or None for a fresh start, and in what the run differs from its run.

    Args:
        resume: `auto`, `must`, `never` or the path of a checkpoint.
        folder: the run's checkpoints.
        fingerprints: of data and model now; under `recipe` its settings, as `recipe_settings` returns them.
        resume_with: names of the differences that are allowed.

    Raises:
        UserError: a checkpoint is demanded and none is whole, or the newest one belongs to something else.
    """
    if resume == "never":
        return None, []
    if resume in ("auto", "must"):
        for path in checkpoints_newest_first(folder):
            if marker := read_seal(path):
                return path, _check_belongs(path, marker, fingerprints, resume_with)
            if is_sealed(path):
                warn(f"{path} is damaged (a file differs from its marker); trying the one before")
        if resume == "must":
            raise UserError(f"run.resume: `must` needs a complete checkpoint; {folder.absolute()} holds none")
        return None, []
    path = Path(resume)
    marker = read_seal(path)
    if marker is None or "world_size" not in marker:
        what = "is no complete checkpoint" if path.is_dir() else "no such folder"
        raise UserError(f"run.resume: `{resume}`: {what} (resolved to {path.absolute()})")
    return path, _check_belongs(path, marker, fingerprints, resume_with)


def _check_belongs(
    path: Path, marker: dict[str, Any], fingerprints: dict[str, Any], resume_with: Sequence[str]
) -> list[str]:
    """Return the differences of the recipe that are named; tell them, and the names of what does not differ."""
    for name, value in fingerprints.items():
        if name != "recipe" and marker.get(name) != value:
            raise UserError(
                f"{path} was written with {'other' if name == 'data' else 'another'} {name}: it would not go on "
                f"exactly. Restore the {name}, start afresh with `run.resume=never`, or choose another folder with "
                f"`run.output_dir=…`"
            )
    if not isinstance(marker.get("recipe"), dict):
        raise UserError(
            f"{path} was written by an earlier version of the kit, which this one cannot go on with: start afresh with "
            f"`run.resume=never`, or go on with that version"
        )
    settings = marker["recipe"], fingerprints["recipe"]
    differences = differing_keys(*settings)
    named, refused = split_differences(differences, resume_with, settings)
    if refused:
        raise UserError(
            f"{path} was written by a run of another recipe, which this one cannot go on with:\n{indented(refused)}\n"
            f"undo that, start afresh with `run.resume=never`, or choose another folder with `run.output_dir=…`"
        )
    if named:
        say(f"from {path} on the run differs as `run.resume_with` allows:\n{indented(named)}")
    same = [name for name in resume_with if not any(covers([name], key) for key in differences)]
    if same:
        say(f"run.resume_with: no difference to {path} in {', '.join(same)}")
    return named


def saved_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of the run that wrote a checkpoint, whole or damaged, or None where it does not tell."""
    try:
        return read_json(path / COMPLETE)["recipe"]
    except (OSError, ValueError, KeyError):
        return None


def saved_world_size(path: Path) -> int:
    """Return how many processes wrote a checkpoint that is whole."""
    return read_json(path / COMPLETE)["world_size"]


def indented(lines: Sequence[str]) -> str:
    """Return lines of a list, each with an indent."""
    return "\n".join(f"  {line}" for line in lines)


def discard_after(checkpoint: Path | None, folder: Path) -> None:
    """Remove what lies beyond the checkpoint to resume from: broken checkpoints, and steps about to be repeated.

    They would otherwise count as the newest ones when older checkpoints are let go.
    """
    kept = step_of(checkpoint) if checkpoint else -1
    for path in checkpoints_newest_first(folder):
        if step_of(path) > kept:
            warn(f"discarding {path}: {'beyond the checkpoint resumed from' if is_sealed(path) else 'incomplete'}")
            shutil.rmtree(path)


def discard_timed(folder: Path, newest: Path) -> None:
    """Remove what was saved because time had passed, once a newer checkpoint is whole."""
    for path in checkpoints_newest_first(folder):
        if path != newest and is_sealed(path) and is_timed(path):
            shutil.rmtree(path)


def is_timed(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved because time had passed."""
    return bool(_read_marker(checkpoint).get("timed"))


def _read_marker(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_json(checkpoint / COMPLETE)
    except ValueError:  # cut off
        return {}


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says, -1 where it has another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1
