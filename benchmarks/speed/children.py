"""Processes that are measured: started alone, watched from outside, and gone when the benchmark goes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SAMPLE_EVERY_S, LIST_EVERY_S = 0.05, 1.0
LIMIT_S = 600
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Failed(Exception):
    """A process that was to be measured did not come to its end; the message is the last thing that it said."""


@dataclass(frozen=True)
class Child:
    """What came of a process.

    Attributes:
        figures: what it answered.
        seconds: from its start to its end.
        memory: (time, bytes) of it and its descendants, resident sets added up; times of `time.monotonic`.
    """

    figures: dict[str, Any]
    seconds: float
    memory: list[tuple[float, int]]

    def peak_mb(self, begin: float = 0.0, end: float = float("inf")) -> float | None:
        """Return the most memory at a time between two."""
        return max((used / 1e6 for when, used in self.memory if begin <= when <= end), default=None)


def run_child(
    command: list[str],
    folder: Path,
    threads: int,
    result: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Child:
    """Run a command in a folder to its end.

    Args:
        command: what is run, in a process group of its own.
        folder: working directory, which also takes `log.txt`.
        threads: of everything that counts threads.
        result: the file of its answer, if it writes one.
        environment: further variables.

    Raises:
        Failed: it ended with an error, without its answer or not in time.
    """
    settings = {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "true", **(environment or {}),
    }  # fmt: skip
    log, memory, began = folder / "log.txt", [], time.monotonic()
    with open(log, "wb") as file:
        to_log = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        try:
            child = subprocess.Popen(command, cwd=folder, env=os.environ | settings, **to_log)
        except OSError as error:
            raise Failed(f"{error.strerror}: {Path(command[0]).name}") from error
        try:
            memory = _watch(child, began + LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = time.monotonic() - began
    if child.returncode or (result and not result.is_file()):
        raise Failed(_last_line(log) if seconds < LIMIT_S else f"took more than {LIMIT_S} s")
    return Child(json.loads(result.read_text()) if result else {}, seconds, memory)


def run_method(module: str, asked: dict[str, Any], work: Path, threads: int, python: str = sys.executable) -> Child:
    """Run a module of this package in a process and a folder of its own, with what it is asked for."""
    with tempfile.TemporaryDirectory(prefix=".measured-", dir=work) as name:
        folder = Path(name)
        result = folder / "result.json"
        request = json.dumps(asked | {"result": str(result), "started": time.monotonic()})
        caches = {"HF_DATASETS_CACHE": str(work / "datasets"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
        return run_child([python, "-m", f"benchmarks.speed.{module}", request], folder, threads, result, caches)


def _watch(child: subprocess.Popen, deadline: float) -> list[tuple[float, int]]:
    memory: list[tuple[float, int]] = []
    tree, listed = [child.pid], 0.0
    while child.poll() is None and (now := time.monotonic()) < deadline:
        if now - listed > LIST_EVERY_S:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [child.pid, *(each.pid for each in psutil.Process(child.pid).children(recursive=True))]
            listed = now
        memory.append((now, sum(map(_resident, tree))))
        time.sleep(SAMPLE_EVERY_S)
    return memory


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0  # it ended


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word"
