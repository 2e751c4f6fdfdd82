"""Environments of the peers: made once, each of its own, with the torch that the kit is tested with."""

import subprocess
import sys
from pathlib import Path

from benchmarks.speed.children import ROOT, Failed

# TRL with the versions of the kit's own constraints. litgpt has bounds of its own that they would break: pip would go
# back to a release of two years ago to keep them.
PEERS = {"trl": (["torch", "trl"], None), "litgpt": (["torch", "litgpt"], "torch")}


_FAILED: dict[str, Failed] = {}


def python_of(name: str, folder: Path) -> str:
    """Return the interpreter of an environment, made and filled if need be.

    Raises:
        Failed: pip could not install it.
    """
    if name == "kit":
        return sys.executable
    if name in _FAILED:
        raise _FAILED[name]
    packages, only = PEERS[name]
    place = folder / name
    python = place / "bin/python"
    marker = place / ".installed"
    if not marker.is_file():
        print(f"installing {name} into {place} …", flush=True)
        constraints = ROOT / "constraints.txt"
        if only:
            pins = [line for line in constraints.read_text().splitlines() if line.startswith(f"{only}==")]
            folder.mkdir(parents=True, exist_ok=True)
            constraints = folder / f"{name}-constraints.txt"
            constraints.write_text("\n".join(pins) + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        try:
            _call([sys.executable, "-m", "venv", "--clear", str(place)])
            _call([*pip, "--constraint", str(constraints), *packages])
        except Failed as error:
            _FAILED[name] = error  # once is enough
            raise
        marker.touch()
    return str(python)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise Failed(f"install: {lines[-1][:300] if lines else done.returncode}")
