"""What benchmarks that train one base model in several ways have in common: options, recipe, runs, figures."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
DEMO_CORPUS = {"builtin": "docstrings", "packages": ["accelerate", "datasets", "huggingface_hub", "numpy", "peft"]}
DEMO_GENERAL = {"builtin": "python-reference", "fraction": 0.03}
_PLACES = ("base", "corpus", "general", "spam", "trec", "sections", "citations", "work", "output")  # of this machine


# ---- options


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is trained on which text."""
    parser.add_argument("--base", default="runs/lm_gpt2_pretrain/model", help="the model to start from")
    parser.add_argument("--corpus", help="a text file of the domain (default: the demo's docstrings)")
    parser.add_argument("--separator", default="\\n\\n\\n", help="what separates its documents")
    parser.add_argument("--general", help="a text file of general text, one document")


def add_run_options(
    parser: argparse.ArgumentParser, name: str, steps: int, documents: int, learning_rate: float | None = None
) -> None:
    """Add the options that say how long is trained, on how much is measured, and where the results go.

    Args:
        parser: takes them.
        name: of the benchmark.
        steps: default number of optimizer steps.
        documents: default size of an evaluation set.
        learning_rate: default rate; None where the benchmark has its own option for it.
    """
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    if learning_rate is not None:
        parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--documents", type=int, default=documents, help="of an evaluation set")
    parser.add_argument("--output", default=str(ROOT / f"benchmarks/results/{name}.json"))
    parser.add_argument("--work", default=f"runs/benchmark_{name}", help="where the runs go; finished ones are kept")


# ---- runs


def make_recipe(options: argparse.Namespace, learning_rate: float) -> dict[str, Any]:
    """Return the recipe that all variants share."""
    separator = options.separator.encode().decode("unicode_escape")
    corpus = {"path": options.corpus, "separator": separator} if options.corpus else DEMO_CORPUS
    general = {"path": options.general, "sample_by": "paragraph"} if options.general else DEMO_GENERAL
    return {
        "task": "causal-lm",
        "model": {"name_or_path": options.base},
        "data": {"train": [corpus], "validation": {"fraction": 0.03}, "block_size": 256},
        "training": {
            "max_steps": options.steps,
            "per_device_train_batch_size": 8,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": options.steps // 10,
            "weight_decay": 0.1,
            "logging_steps": 50,
            "save_strategy": "no",
        },
        "evaluation": {
            "sets": {
                "domain": {"split": "validation", "max_documents": options.documents},
                "general": {**general, "max_documents": 20 * options.documents},
            }
        },
    }


def kit(*arguments: Any) -> None:
    """Run a command of the kit."""
    subprocess.run([sys.executable, "-m", "kit", *map(str, arguments)], check=True)


def read_bits_per_byte(folder: Path) -> dict[str, dict[str, float]]:
    """Return the bits per byte of a finished run: of each evaluation set, `before` and `after` training."""
    sets = json.loads((folder / "scorecard.json").read_text())["sets"]
    return {when: {name: sets[name][when]["bits_per_byte"] for name in sets} for when in ("before", "after")}


# ---- results


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation of some seeds' figures."""
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}


def spread_of_sets(figures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over some seeds, of each evaluation set."""
    return {name: spread([of_seed[name] for of_seed in figures]) for name in figures[0]}


def in_words(figure: dict[str, float]) -> str:
    """Return mean and standard deviation as a table's cell."""
    return f"{figure['mean']:.4f} ± {figure['stdev']:.4f}"


def describe_setting(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures were measured with: options, model, corpus, versions and machine, without any path."""
    return {
        "options": {name: value for name, value in vars(options).items() if name not in _PLACES},
        "base": Path(options.base).absolute().parts[-2 if Path(options.base).name == "model" else -1],
        "corpus": Path(options.corpus).parent.name if options.corpus else "docstrings",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def write_result(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write a benchmark's figures to the file that was asked for."""
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
