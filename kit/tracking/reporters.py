"""The trackers of `training.report_to`: callbacks of transformers, of which a failure must not end a training."""

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from kit.console import warn


def settle_reporters(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """Let a tracker that fails fall silent with a warning, and TensorBoard write into the run directory.

    transformers would let the training fail, and write between the checkpoints.
    """
    for callback in callbacks:
        if type(callback) not in INTEGRATION_TO_CALLBACK.values():
            continue
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.absolute() / "tensorboard")
        for event in (name for name in dir(callback) if name.startswith("on_")):
            setattr(callback, event, _guarded(callback, event))


def _guarded(callback: TrainerCallback, event: str) -> Callable[..., Any]:
    call = getattr(callback, event)

    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if getattr(callback, "has_failed", False):
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            callback.has_failed = True
            name = type(callback).__name__.removesuffix("Callback")
            warn(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; training goes on without it")
            return None

    return guarded
