"""Causal-LM rows: rounds of all methods by turns, each in a process of its own; medians, and ratios within a round."""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.speed.children import Failed, run_method
from benchmarks.speed.environments import python_of
from benchmarks.speed.material import Material, model_folder, parameters_of
from benchmarks.speed.methods import Method

ONCE_S = 120  # a row that is measured once has to compile first
PEAK = "peak"  # stands among the names of methods: the matrix product


def measure(
    options: Any, material: Material, shape: str, methods: dict[str, Method], names: list[str]
) -> dict[str, Any]:
    """Measure methods in rounds, and return the section of the result.

    Args:
        options: the command line.
        material: what they read.
        shape: of `material.SHAPES`.
        methods: all rows of the table.
        names: of those that are measured, and `PEAK`.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    failed: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}

    def take_turns(turns: list[str], figures: dict[str, dict[str, Any]]) -> None:
        for name in turns:
            if name in failed:
                continue
            try:
                one = _measure_one(options, material, shape, methods.get(name))
            except Failed as error:
                failed[name] = str(error)
                print(f"  {name}: failed: {error}", flush=True)
                continue
            versions.setdefault(methods[name].environment if name in methods else "kit", one.pop("versions"))
            figures[name] = one
            said = ", ".join(f"{key} {value:,.4g}" for key, value in one.items() if isinstance(value, float))
            print(f"  round {len(rounds)}, {name}: {said}", flush=True)

    once = [name for name in names if name in methods and methods[name].once]
    turns, last = [name for name in names if name not in once], 0.0
    while len(rounds) < options.rounds and (not rounds or time.monotonic() + last < options.deadline):
        began = time.monotonic()
        rounds.append({})
        take_turns(turns, rounds[-1])
        turns.reverse()  # so that none is always the first after a pause, or behind the same one
        last = time.monotonic() - began
    if time.monotonic() + ONCE_S * len(once) < options.deadline:
        take_turns(once, rounds[-1])
    elif once:
        print(f"  no time is left for {', '.join(once)}: --minutes {options.minutes:g}", flush=True)
    folder = model_folder(options.work, material, shape, options.positions, False)
    section = _summarise(options, methods, rounds, failed) | {
        "setting": {
            "model": f"{shape} shape, {parameters_of(folder):,} parameters, random weights",
            "parameters": parameters_of(folder),
            "precision": "bf16" if options.bf16 else "fp32",
            **{name: getattr(options, name) for name in ("batch", "block", "threads", "warmup", "steps")},
            "rounds": len(rounds),
            "rounds_asked": options.rounds,
            **material.about,
        },
        "versions": versions,
    }
    _add_share_of_peak(section)
    return section


def _measure_one(options: Any, material: Material, shape: str, method: Method | None) -> dict[str, Any]:
    if method is None:
        asked = {"cpu": options.device == "cpu"}
        found = run_method("matrix_peak", asked, options.work, options.threads).figures
        return {"bf16_flops": found["bf16"], "fp32_flops": found["fp32"], "versions": found["versions"]}
    asked = request(options, material, model_folder(options.work, material, shape, options.positions, method.dropout))
    steps = min(options.steps, method.most_steps or options.steps)
    asked |= {"stop_after": options.warmup + steps, **method.settings}
    python = python_of(method.environment, options.peers_env)
    child = run_method(method.module, asked, options.work, options.threads, python)
    found, marks = child.figures, child.figures["marks"]
    seconds = statistics.median(after - before for before, after in pairwise(marks[options.warmup - 1 :]))
    peak = found["peak_gpu_mb"] or child.peak_mb(marks[0], marks[-1])
    return {
        "tokens_per_second": found["labels_per_step"] / seconds,
        "seconds_per_step": seconds,
        "labels_per_step": float(found["labels_per_step"]),
        "peak_mb": peak,
        "versions": found["versions"],
    }


def request(options: Any, material: Material, model: Path) -> dict[str, Any]:
    """Return what every method is asked for."""
    return {
        "model": str(model),
        "corpus": str(material.text),
        "documents": str(material.documents),
        "tokens": str(material.tokens),
        "separator": "\n\n\n",
        "store": str(options.work / "store"),
        "block": options.block,
        "batch": options.batch,
        "bf16": options.bf16,
        "cpu": options.device == "cpu",
    }


def _summarise(
    options: Any, methods: dict[str, Method], rounds: list[dict[str, dict[str, Any]]], failed: dict[str, str]
) -> dict[str, Any]:
    rows = {}
    for name, method in methods.items():
        row = {"label": method.label, "environment": method.environment, "note": method.note}
        row |= {"target": method.target, "memory_target": method.memory_target}
        found = [figures[name] for figures in rounds if name in figures]
        if name in failed and len(found) < len(rounds):
            row["status"] = f"failed: {failed[name]}"
        elif not found:
            row["status"] = "not measured"
        else:
            row["status"] = "measured"
            for key in ("tokens_per_second", "seconds_per_step", "labels_per_step", "peak_mb"):
                row[key] = statistics.median(figures[key] for figures in found)
            row["steps"] = min(options.steps, method.most_steps or options.steps)
            row["each"] = [figures["tokens_per_second"] for figures in found]
            if name != "kit":
                row["ratio"] = _ratio(rounds, name, "tokens_per_second")
                row["memory_ratio"] = _ratio(rounds, name, "peak_mb")
        rows[name] = row
    peaks = [figures[PEAK] for figures in rounds if PEAK in figures]
    peak = {key: statistics.median(each[key] for each in peaks) for key in ("bf16_flops", "fp32_flops") if peaks}
    return {"methods": rows, "matrix_peak": peak}


def _ratio(rounds: list[dict[str, dict[str, Any]]], name: str, key: str) -> dict[str, float] | None:
    """Return the median and the ends of the kit's figure by another's, each within a round."""
    values = [figures["kit"][key] / figures[name][key] for figures in rounds if "kit" in figures and name in figures]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def _add_share_of_peak(section: dict[str, Any]) -> None:
    """Enter, for every row, the share of the matrix peak that 6 operations per parameter and useful token are."""
    if not section["matrix_peak"]:
        return
    peak = section["matrix_peak"][f"{section['setting']['precision']}_flops"]
    for row in section["methods"].values():
        if row["status"] == "measured":
            row["share_of_peak"] = 6 * section["setting"]["parameters"] * row["tokens_per_second"] / peak
