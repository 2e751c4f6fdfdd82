"""What to train: bits per byte, seconds per step and memory of full training, of frozen parts and of LoRA.

    python benchmarks/freezing.py [--base FOLDER] [--corpus FILE] [--general FILE]

Adapts the base model to the domain in each way with several seeds, each run for as many steps of as many tokens, and
measures a held-out part of the domain and general text, before and after. By default base and text are those of
`make demo`, which has to have run. Writes benchmarks/results/freezing.json, and prints the table that docs/freezing.md
shows.

Each way has a learning rate of its own, since what is best for all parameters is not for a few: `RATES`, or what
`--learning-rates` says. `--sweep` chooses them anew: each way is trained once with each of `RATES_TRIED`, with a seed
that the reported runs do not have, and measured on other held-out documents; the fewest bits per byte of the domain
win, and where that is the highest rate, higher ones are tried. All ways train for equally many steps, and these are
few: the figures tell what a short run is worth.

Seconds and memory are measured apart: short runs, each in a process of its own, in rounds of all variants, so that a
machine that slows down slows down all of them. Only optimizer steps count: not loading, not evaluation.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from comparison import (
    add_run_options,
    add_text_options,
    describe_setting,
    in_words,
    kit,
    make_recipe,
    read_bits_per_byte,
    spread_of_sets,
    write_result,
)
from transformers import AutoConfig, TrainerCallback

from kit.console import quiet_libraries
from kit.stages import TASKS, Run, extend_model, prepare_run, run_training
from kit.training.arguments import make_training_arguments
from kit.training.preemption import Preemption
from kit.training.resolving import resolve_recipe
from kit.training.run_directory import RunDirectory

# What `--sweep` chose for a GPT-2 of 9 M parameters that went from novels to the Python documentation; see `sweep` in
# benchmarks/results/freezing.json.
RATES = {"full": 3e-3, "first-half-frozen": 3e-3, "gradual": 3e-3, "last-block-only": 1e-2, "lora": 1e-2}
RATES_TRIED = (1e-3, 3e-3, 1e-2)
WARMUP = 2  # steps that are not timed: the first ones of a phase allocate gradients and optimizer states
_MIB = 2**20


def main() -> None:
    """Run every variant that has not run yet, measure what a step costs, and compare."""
    options = read_options()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    blocks = AutoConfig.from_pretrained(options.base).num_hidden_layers
    variants = {name: section for name, section in make_variants(blocks).items() if name in options.variants}
    rates, tried = RATES | dict(options.learning_rates), None
    if options.sweep:
        tried = {name: sweep(options, name, section) for name, section in variants.items()}
        rates |= {name: min(figures, key=figures.get) for name, figures in tried.items()}
    recipes, runs = {}, {}
    for name, section in variants.items():
        recipes[name] = work / f"{name}.yaml"
        write_recipe(recipes[name], make_recipe(options, rates[name]) | section)
        for seed in range(options.seeds):
            runs[name, seed] = run(recipes[name], work / f"{name}-{rates[name]:g}-{seed}", seed)
    costs = measure_costs(options, recipes)
    result = summarise(options, blocks, rates, tried, runs, costs)
    write_result(options, result)
    print(markdown(result))


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_text_options(parser)
    add_run_options(parser, "freezing", steps=60, documents=6)
    parser.add_argument("--variants", nargs="+", choices=RATES, default=list(RATES), metavar="NAME")
    parser.add_argument(
        "--learning-rates", nargs="+", type=_read_rate, default=[], metavar="NAME=RATE", help="others than usual"
    )
    parser.add_argument("--sweep", action="store_true", help="choose the learning rates anew")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring seconds and memory")
    parser.add_argument("--timed-steps", type=int, default=20, help="of a run that measures seconds and memory")
    return parser.parse_args()


def _read_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    if name not in RATES:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(RATES)}, `=` and a rate")
    return name, float(rate)


def make_variants(blocks: int) -> dict[str, dict[str, Any]]:
    """Return the recipe sections of each variant, for a model of so many blocks.

    Half of an odd number of blocks is rounded down. The embeddings are frozen with the first half: they lie below it,
    and a backward pass that has to reach them has to go through every block. With tied embeddings, as GPT-2 has, the
    head is frozen with them. Gradual unfreezing has trained as much in its second phase, and all after half of the run.
    """
    half = blocks // 2
    last_block = {"last_blocks": 1, "final_norm": True}
    schedule = [
        {"trainable": last_block},
        {"fraction": 0.25, "trainable": {"last_blocks": blocks - half}},
        {"fraction": 0.5, "trainable": "all"},
    ]
    below = {"embeddings": True, "position_embeddings": True, "first_blocks": half}
    return {
        "full": {},
        "first-half-frozen": {"freezing": {"frozen": below}},
        "gradual": {"freezing": {"schedule": schedule}},
        "last-block-only": {"freezing": {"trainable": last_block}},
        "lora": {"adapter": {"type": "lora", "r": 16, "lora_alpha": 32}},
    }


def describe_variants(blocks: int) -> dict[str, str]:
    """Return the label of each variant."""
    half = blocks // 2
    return {
        "full": "full: all parameters",
        "first-half-frozen": f"first half frozen: embeddings and {half} of {blocks} blocks",
        "gradual": f"gradual: last block and final norm; after ¼ last {blocks - half} blocks; after ½ all",
        "last-block-only": "last block only, and final norm",
        "lora": "LoRA, r = 16, α = 32",
    }


# ---- what it is worth


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def run(recipe: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Train one variant, unless it has run already, and return its figures."""
    kit("train", recipe, f"training.seed={seed}", f"run.output_dir={folder}")
    manifest = json.loads((folder / "manifest.json").read_text())
    return read_bits_per_byte(folder) | {name: manifest[name] for name in ("parameters", "trainable")}


def sweep(options: argparse.Namespace, name: str, section: dict[str, Any]) -> dict[float, float]:
    """Return the bits per byte of the domain by learning rate, on documents and with a seed that are not reported."""
    figures: dict[float, float] = {}
    rates = list(RATES_TRIED)
    for rate in rates:
        recipe = make_recipe(options, rate) | section
        recipe["data"]["validation"]["seed"] = 1  # other documents are held out
        recipe["evaluation"]["sets"].pop("general")
        path = Path(options.work) / "sweep" / f"{name}-{rate:g}.yaml"
        write_recipe(path, recipe)
        figures[rate] = run(path, path.with_suffix(""), options.seeds)["after"]["domain"]
        if rate == rates[-1] == min(figures, key=figures.get):
            rates.append(round(3 * rate, 3) if len(rates) % 2 else round(10 * rates[-2], 3))  # 1, 3, 10, 30, …
    return figures


# ---- what it costs


def measure_costs(options: argparse.Namespace, recipes: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Return what a step of each variant takes, round by round, all variants in each of them."""
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for number in range(options.rounds):
        # There and back, so that none is always the first after a pause, or the last.
        for name in list(recipes) if number % 2 == 0 else reversed(recipes):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                command = [__file__, _MEASURE_COST, recipes[name], folder, options.timed_steps]
                subprocess.run([sys.executable, *map(str, command)], check=True)
                costs[name].append(json.loads((Path(folder) / "cost.json").read_text()))
    return costs


_MEASURE_COST = "measure-cost"  # as the first argument: this process is one of a round


def measure_cost(recipe_path: str, folder: str, steps: str) -> None:
    """Train so many steps of a recipe in this process, and write what one of them takes into the folder."""
    quiet_libraries()
    short = [f"training.max_steps={steps}", "training.warmup_steps=0", "run.resume=never", f"run.output_dir={folder}"]
    recipe = resolve_recipe(recipe_path, short)
    directory = RunDirectory(folder)
    args, _ = make_training_arguments(recipe, TASKS[recipe.task], directory.checkpoints)
    trained = extend_model(prepare_run(recipe, args, directory))
    cost = _CostOfSteps()
    run_training(trained, None, Preemption(), cost)
    figures = {"seconds": cost.seconds_per_step(_phase_starts(trained)), "began_bytes": cost.began_bytes}
    (directory.path / "cost.json").write_text(json.dumps(figures | {"peak_bytes": cost.peak_bytes}))


def _phase_starts(trained: Run) -> list[int]:
    return [phase.start for phase in trained.plan.phases] if trained.plan else [0]


class _CostOfSteps(TrainerCallback):
    """Takes the time of each optimizer step, and the most memory in use from when training begins to its last step.

    Attributes:
        began_bytes: in use when training began, on a CPU with Python and its libraries; None where it cannot be known.
        peak_bytes: the most that was in use from then on.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began_bytes: int | None = None
        self.peak_bytes: int | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began_bytes = _forget_peak_memory()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.peak_bytes = _peak_memory()

    def seconds_per_step(self, starts: list[int]) -> float:
        """Return the mean over the run of what a step takes: of each phase the median, weighted by its length."""
        total = 0.0
        for start, end in zip(starts, [*starts[1:], len(self.seconds)], strict=True):
            timed = self.seconds[start + WARMUP : end] or self.seconds[end - 1 : end]
            total += statistics.median(timed) * (end - start)
        return total / len(self.seconds)


def _forget_peak_memory() -> int | None:
    """Let the peak begin at what is in use now, and return that in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark: man 5 proc_pid_clear_refs
    return _peak_memory()


def _peak_memory() -> int | None:
    """Return the most bytes in use since the peak was forgotten: of the GPU's memory, else of this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


# ---- compared


def summarise(
    options: argparse.Namespace,
    blocks: int,
    rates: dict[str, float],
    tried: dict[str, dict[float, float]] | None,
    runs: dict[tuple[str, int], dict[str, Any]],
    costs: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Return means and deviations over the seeds, and medians over the rounds."""
    labels, variants = describe_variants(blocks), {}
    for name, rounds in costs.items():
        of_variant = [runs[name, seed] for seed in range(options.seeds)]
        variants[name] = {
            "label": labels[name],
            "learning_rate": rates[name],
            **{when: spread_of_sets([figures[when] for figures in of_variant]) for when in ("before", "after")},
            "parameters": of_variant[0]["parameters"],
            "trainable": of_variant[0]["trainable"],
            "seconds_per_step": _median(rounds, "seconds"),
            "relative_seconds": _relative(rounds, costs.get("full")),
            "peak_bytes": _median(rounds, "peak_bytes"),
            "began_bytes": _median(rounds, "began_bytes"),
            "rounds": rounds,
        }
    setting = describe_setting(options)
    if torch.cuda.is_available():
        setting["machine"] += f", {torch.cuda.get_device_name()}"
    setting["options"]["learning_rates"] = {name: rates[name] for name in variants}
    return {"variants": variants, **({"sweep": tried} if tried else {}), **setting}


def _median(rounds: list[dict[str, Any]], name: str) -> float | None:
    values = [figures[name] for figures in rounds if figures[name] is not None]
    return statistics.median(values) if values else None


def _relative(rounds: list[dict[str, Any]], full: list[dict[str, Any]] | None) -> float | None:
    """Return the median over the rounds of a variant's seconds by those of full training in the same round."""
    if not full or not rounds:
        return None
    return statistics.median(ours["seconds"] / its["seconds"] for ours, its in zip(rounds, full, strict=True))


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/freezing.md."""
    lines = [
        "| what trains | learning rate | share | domain | general | seconds per step | of full | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    before = next(iter(result["variants"].values()))["before"]
    cells = " | ".join(f"{before[name]['mean']:.4f}" for name in ("domain", "general"))
    lines.append(f"| (nothing: before) | – | – | {cells} | – | – | – |")
    for figures in result["variants"].values():
        cells = [
            figures["label"],
            f"{figures['learning_rate']:g}",
            f"{figures['trainable'] / figures['parameters']:.1%}".replace("%", " %"),
            *(in_words(figures["after"][name]) for name in ("domain", "general")),
            _or_dash(figures["seconds_per_step"], "{:.3g}"),
            _or_dash(figures["relative_seconds"], "{:.2f}"),
            _or_dash(figures["peak_bytes"] and figures["peak_bytes"] / _MIB, "{:,.0f} MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    if sys.argv[1:2] == [_MEASURE_COST]:
        measure_cost(*sys.argv[2:])
    else:
        main()
