"""Checkpoints that are known to be whole: a marker written last, and the choice of the one to resume from."""

import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kit.console import warn
from kit.errors import UserError
from kit.files import is_sealed, read_seal, seal

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def complete_checkpoint(folder: Path, step: int, world_size: int, fingerprints: dict[str, str]) -> None:
    """Write the marker of a checkpoint, after every process has written its part."""
    seal(folder, step=step, world_size=world_size, **fingerprints)


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not."""
    found = [(int(m.group(1)), path) for path in folder.glob("*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def choose_checkpoint(resume: str, folder: Path, world_size: int, fingerprints: dict[str, str]) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    Args:
        resume: `auto`, `must`, `never` or the path of a checkpoint.
        folder: the run's checkpoints.
        world_size: number of processes now.
        fingerprints: of recipe and data now.

    Raises:
        UserError: a checkpoint is demanded and none is whole, or the newest one belongs to something else.
    """
    if resume == "never":
        return None
    if resume in ("auto", "must"):
        for path in checkpoints_newest_first(folder):
            if marker := read_seal(path):
                _check_belongs(path, marker, world_size, fingerprints)
                return path
            if is_sealed(path):
                warn(f"{path} is damaged (a file differs from its marker); trying the one before")
        if resume == "must":
            raise UserError(f"run.resume: `must` needs a complete checkpoint; {folder.absolute()} holds none")
        return None
    path = Path(resume)
    marker = read_seal(path)
    if marker is None or "world_size" not in marker:
        what = "is no complete checkpoint" if path.is_dir() else "no such folder"
        raise UserError(f"run.resume: `{resume}`: {what} (resolved to {path.absolute()})")
    _check_belongs(path, marker, world_size, fingerprints)
    return path


def _check_belongs(path: Path, marker: dict[str, Any], world_size: int, fingerprints: dict[str, str]) -> None:
    if marker["world_size"] != world_size:
        raise UserError(
            f"{path} was written by {marker['world_size']} processes, this run has {world_size}: it would not go on "
            f"exactly. Launch with {marker['world_size']}, or start afresh with `run.resume=never`"
        )
    for name, value in fingerprints.items():
        if marker.get(name) != value:
            raise UserError(
                f"{path} was written with {'other' if name == 'data' else 'another'} {name}: it would not go on "
                f"exactly. Restore the {name}, start afresh with `run.resume=never`, or choose another folder with "
                f"`run.output_dir=…`"
            )


def discard_after(checkpoint: Path | None, folder: Path) -> None:
    """Remove what lies beyond the checkpoint to resume from: broken checkpoints, and steps about to be repeated.

    They would otherwise count as the newest ones when older checkpoints are let go.
    """
    kept = _step(checkpoint) if checkpoint else -1
    for path in checkpoints_newest_first(folder):
        if _step(path) > kept:
            warn(f"discarding {path}: {'beyond the checkpoint resumed from' if is_sealed(path) else 'incomplete'}")
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1
