"""Epochs of a classifier whose first blocks are frozen: with their output cached, and without."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.speed.causal_lm import request
from benchmarks.speed.children import Failed, run_method
from benchmarks.speed.material import Material, model_folder

EPOCHS, CHARACTERS_PER_TOKEN, TARGET = 3, 6, 5.0


def measure(options: Any, material: Material) -> dict[str, Any]:
    """Measure both by turns, and return the section of the result."""
    rows = _write_rows(options, material)
    model = model_folder(options.work, material, options.shape, options.positions, True)
    asked = request(options, material, model) | {"rows": str(rows), "epochs": EPOCHS}
    runs: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    setting = {"rows": options.frozen_rows, "epochs": EPOCHS, "shape": options.shape, "threads": options.threads}
    setting |= {name: getattr(options, name) for name in ("batch", "block", "rounds")}
    setting["precision"] = "bf16" if options.bf16 else "fp32"
    section: dict[str, Any] = {"status": "measured", "setting": setting, "target": TARGET}
    try:
        for number in range(options.rounds):
            for cache in sorted(runs, reverse=number % 2 == 0):  # on, off; off, on; …
                child = run_method("kit_frozen", asked | {"cache": cache}, options.work, options.threads)
                section["versions"] = {"kit": child.figures["versions"]}
                marks = child.figures["marks"]
                peak = child.figures["peak_gpu_mb"] or child.peak_mb(marks[0], marks[-1])
                runs[cache].append(_per_epoch(marks, peak))
                print(f"  cache {cache}: " + ", ".join(f"{k} {v:,.4g}" for k, v in runs[cache][-1].items()), flush=True)
    except Failed as error:
        return section | {"status": f"failed: {error}"}
    for cache, found in runs.items():
        section[cache] = {key: statistics.median(each[key] for each in found) for key in found[0]}
    ratios = [off["later_step_s"] / on["later_step_s"] for on, off in zip(runs["on"], runs["off"], strict=True)]
    return section | {"ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}}


def _per_epoch(marks: list[float], peak: float) -> dict[str, float]:
    """Return the median seconds of a step in the first epoch and in the later ones."""
    steps = [after - before for before, after in pairwise(marks)]
    first = len(marks) // EPOCHS - 1  # the first step has no beginning
    return {
        "first_step_s": statistics.median(steps[:first]),
        "later_step_s": statistics.median(steps[first + 1 :]),
        "peak_mb": peak,
    }


def _write_rows(options: Any, material: Material) -> Path:
    """Cut the corpus into texts that fill a block, with classes by turns: what is learned does not matter here."""
    text = material.text.read_text(encoding="utf-8")
    length = CHARACTERS_PER_TOKEN * options.block
    starts = [number * length % max(len(text) - length, 1) for number in range(options.frozen_rows)]
    rows = [{"text": f"{n} {text[start : start + length]}", "label": "ab"[n % 2]} for n, start in enumerate(starts)]
    path = options.work / "frozen_rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
