"""Figures that are measured once, however many runs ask for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.console import is_main_process
from kit.files import build_once, read_json, read_seal, write_json
from kit.training.topology import barrier, from_main_process

_FILE = "before.json"


def measured_once(folder: Path, measure: Callable[[], Any]) -> Any:
    """Return what `folder` holds, after measuring it where it holds nothing.

    Args:
        folder: named after all that the figures depend on.
        measure: called on all processes; what the first returns is kept.
    """
    if not from_main_process(lambda: read_seal(folder) is not None):
        measured = measure()
        if is_main_process():
            build_once(folder, lambda temporary: write_json(temporary / _FILE, measured))
        barrier()
    return read_json(folder / _FILE)
