"""In a process that is measured: when each optimizer step ended, whichever library takes it.

PyTorch calls a global hook after every `step` of every optimizer, so the clock is the same for the kit, for Trainer and
for loops written by hand, and none of them knows of it. This module needs torch alone: it runs in the environments of
the peers as well.
"""

import atexit
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "trl",
    "litgpt",
    "lightning",
)


def read_request() -> dict[str, Any]:
    """Return what the benchmark asks this process for: the first argument, as JSON."""
    return json.loads(sys.argv[1])


def answer(asked: dict[str, Any], **figures: Any) -> None:
    """Write figures, and the versions in this environment, to where the benchmark reads them."""
    Path(asked["result"]).write_text(json.dumps({**figures, "versions": _versions()}))


class Clock:
    """Notes the end of each optimizer step.

    Attributes:
        marks: times of `time.monotonic`, which all processes of a machine share.
    """

    def __init__(self, asked: dict[str, Any], labels_per_step: float | Callable[[int], float]) -> None:
        """Begin to note.

        Args:
            asked: `stop_after` optimizer steps the process answers and ends at once, saving nothing; without it, it
                answers when it ends by itself.
            labels_per_step: label positions that carry loss in one optimizer step, or what tells them of that many
                steps.
        """
        self.asked, self.labels_per_step = asked, labels_per_step
        self.marks: list[float] = []
        self.peak_gpu_mb: float | None = None  # between the ends of the first step and of the last one so far
        register_optimizer_step_post_hook(self._mark)
        if not asked.get("stop_after"):
            atexit.register(self._answer)

    def _mark(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if not self.marks:
                torch.cuda.reset_peak_memory_stats()
            self.peak_gpu_mb = torch.cuda.max_memory_allocated() / 1e6
        self.marks.append(time.monotonic())
        if len(self.marks) == self.asked.get("stop_after"):
            self._answer()
            sys.stdout.flush()
            os._exit(0)

    def _answer(self) -> None:
        labels = self.labels_per_step
        answer(
            self.asked,
            marks=self.marks,
            labels_per_step=labels(len(self.marks)) if callable(labels) else labels,
            peak_gpu_mb=self.peak_gpu_mb,
        )


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
