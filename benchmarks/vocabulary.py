"""What new words are worth by what their embeddings begin as: bits per byte before training and after equal steps.

    python benchmarks/vocabulary.py [--base FOLDER] [--corpus FILE] [--general FILE]

Mines the words of the domain that save the most tokens, then trains the base model as it is and extended by them, each
initialisation with several seeds, each run for as many steps of as many tokens. By default base and text are those of
`make demo`, which has to have run. Writes benchmarks/results/vocabulary.json, and prints the table that
docs/vocabulary.md shows.
"""

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
import yaml

ROOT = Path(__file__).parents[1]
METHODS = ("subword-mean", "mean", "mean-covariance", "random", "zeros")
DEMO_CORPUS = {"builtin": "docstrings", "packages": ["accelerate", "datasets", "huggingface_hub", "numpy", "peft"]}
_PLACES = ("base", "corpus", "general", "work", "output")  # of this machine
DEMO_GENERAL = {"builtin": "python-reference", "fraction": 0.03}


def main() -> None:
    """Run every variant that has not run yet, and compare."""
    options = read_options()
    work = Path(options.work)
    recipe, words = work / "recipe.yaml", work / "words.txt"
    work.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(make_recipe(options), sort_keys=False))
    if not words.is_file():
        kit("vocabulary", "mine", recipe, "--output", words, "--count", options.words)
    runs = {}
    for seed in range(options.seeds):
        runs["none", seed] = run(recipe, work, "none", seed)
        for method in METHODS:
            runs[method, seed] = run(recipe, work, method, seed, words)
    result = summarise(options, runs)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="runs/lm_gpt2_pretrain/model", help="the model to extend")
    parser.add_argument("--corpus", help="a text file of the domain (default: the demo's docstrings)")
    parser.add_argument("--separator", default="\\n\\n\\n", help="what separates its documents")
    parser.add_argument("--general", help="a text file of general text, one document")
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--documents", type=int, default=12, help="of an evaluation set")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/vocabulary.json"))
    parser.add_argument("--work", default="runs/benchmark_vocabulary", help="where the runs go; finished ones are kept")
    return parser.parse_args()


def make_recipe(options: argparse.Namespace) -> dict[str, Any]:
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
            "learning_rate": options.learning_rate,
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


def run(recipe: Path, work: Path, method: str, seed: int, words: Path | None = None) -> dict[str, Any]:
    """Train one variant, unless it has run already, and return its figures."""
    folder = work / f"{method}-{seed}"
    overrides = [f"training.seed={seed}", f"run.output_dir={folder}"]
    if words:
        overrides += [f"vocabulary.tokens.from_file={words}", f"vocabulary.initialize={method}"]
    kit("train", recipe, *overrides)
    sets = json.loads((folder / "scorecard.json").read_text())["sets"]
    audit = json.loads((folder / "vocabulary.json").read_text()) if words else None
    return {
        "base": {name: figures["before"]["bits_per_byte"] for name, figures in sets.items()},
        "step_0": {
            name: (audit["untrained"][name] if audit else figures["before"])["bits_per_byte"]
            for name, figures in sets.items()
        },
        "after": {name: figures["after"]["bits_per_byte"] for name, figures in sets.items()},
        "audit": audit,
    }


def summarise(options: argparse.Namespace, runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Return means and deviations over the seeds, and the audit of one run."""
    variants = {}
    for method in ("none", *METHODS):
        of_method = [runs[method, seed] for seed in range(options.seeds)]
        variants[method] = {
            when: {name: spread([figures[when][name] for figures in of_method]) for name in of_method[0][when]}
            for when in ("step_0", "after")
        }
    audit = runs["subword-mean", 0]["audit"]
    return {
        "variants": variants,
        "audit": {name: audit[name] for name in ("texts", "embedding_rows", "never_in_training")},
        "options": {name: value for name, value in vars(options).items() if name not in _PLACES},
        "base": Path(options.base).absolute().parts[-2 if Path(options.base).name == "model" else -1],
        "corpus": Path(options.corpus).parent.name if options.corpus else "docstrings",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation of some seeds' figures."""
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/vocabulary.md."""
    lines = [
        "| initialisation | domain, step 0 | domain, after | general, step 0 | general, after |",
        "|---|--:|--:|--:|--:|",
    ]
    for method, figures in result["variants"].items():
        cells = [
            f"{figures[when][name]['mean']:.4f} ± {figures[when][name]['stdev']:.4f}"
            for name in ("domain", "general")
            for when in ("step_0", "after")
        ]
        lines.append(f"| {'(not extended)' if method == 'none' else method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
