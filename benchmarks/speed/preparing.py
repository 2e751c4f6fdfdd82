"""The preparing row: from a file to rows by the kit and by run_clm's method, the tokenizer alone as the bound.

The methods are those of `benchmarks/preparation.py`; here the memory of each is watched as well.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import preparation
from benchmarks.speed.material import Material

TARGET, MEMORY_TARGET = 1.7, 0.5


def measure(options: Any, material: Material, texts: list[Path]) -> dict[str, Any]:
    """Measure all three by turns, and return the section of the result."""
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    text = options.work / "preparing.txt"
    read = [path.read_text(encoding="utf-8")[: options.most_characters] for path in texts] or [
        material.text.read_text()
    ]
    text.write_text(preparation.SEPARATOR.join(read), encoding="utf-8")
    megabytes = text.stat().st_size / 1e6
    methods = {"kit": "the kit", "run_clm": "run_clm's tokenise-and-group", "tokenizer": "the tokenizer alone"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    status = "measured"
    try:
        for number in range(options.rounds):
            for name in list(methods)[:: -1 if number % 2 else 1]:  # so that none is always the first
                runs[name].append(_measure_one(name, options.work / "preparing", text, material, cores))
                print(f"  {name}: " + ", ".join(f"{k} {v:,.4g}" for k, v in runs[name][-1].items()), flush=True)
    except subprocess.CalledProcessError as error:
        status = f"failed: {error.output.strip().splitlines()[-1][:300] if error.output else error}"
    rows = {
        name: {"label": methods[name]} | _summary(found, runs["kit"], megabytes)
        for name, found in runs.items()
        if found
    }
    return {
        "status": status,
        "setting": {
            "texts": [f"{path.parent.name}/{path.name}" for path in texts] or [material.about["corpus"]],
            "megabytes": megabytes,
            "processes": len(cores),
            "block": preparation.BLOCK_SIZE,
            "rounds": options.rounds,
        },
        "target": TARGET,
        "memory_target": MEMORY_TARGET,
        "methods": rows,
    }


def _measure_one(name: str, folder: Path, text: Path, material: Material, cores: list[int]) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    asked = {
        "method": name,
        "text": str(text),
        "separator": preparation.SEPARATOR,
        "tokenizer": str(material.tokenizer),
    }
    asked |= {"folder": str(folder), "num_proc": len(cores)}
    command = [sys.executable, str(Path(preparation.__file__)), "--one", json.dumps(asked)]
    child = preparation.start(
        command, cores, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        peak = preparation.watch_memory(child)
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers too
            os.killpg(child.pid, signal.SIGKILL)
    said = child.stdout.read()
    if child.wait():
        raise subprocess.CalledProcessError(child.returncode, name, said)
    preparation.remove(folder)
    return {"seconds": json.loads(said.splitlines()[-1])["seconds"], "peak_mb": peak["peak_mb"]}


def _summary(found: list[dict[str, float]], kit: list[dict[str, float]], megabytes: float) -> dict[str, Any]:
    pairs = list(zip(kit, found, strict=False))
    seconds = statistics.median(each["seconds"] for each in found)
    ratios = [its["seconds"] / ours["seconds"] for ours, its in pairs]
    memory = [ours["peak_mb"] / its["peak_mb"] for ours, its in pairs]
    return {
        "seconds": seconds,
        "mb_per_second": megabytes / seconds,
        "peak_mb": statistics.median(each["peak_mb"] for each in found),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory_ratio": {"median": statistics.median(memory), "min": min(memory), "max": max(memory)},
    }
