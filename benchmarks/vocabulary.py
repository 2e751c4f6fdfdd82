"""What new words are worth by what their embeddings begin as: bits per byte before training and after equal steps.

    python benchmarks/vocabulary.py [--base FOLDER] [--corpus FILE] [--general FILE]

Mines the words of the domain that save the most tokens, then trains the base model as it is and extended by them, each
initialisation with several seeds, each run for as many steps of as many tokens. By default base and text are those of
`make demo`, which has to have run. Writes benchmarks/results/vocabulary.json, and prints the table that
docs/vocabulary.md shows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

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

METHODS = ("subword-mean", "mean", "mean-covariance", "random", "zeros")


def main() -> None:
    """Run every variant that has not run yet, and compare."""
    options = read_options()
    work = Path(options.work)
    recipe, words = work / "recipe.yaml", work / "words.txt"
    work.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(make_recipe(options, options.learning_rate), sort_keys=False))
    if not words.is_file():
        kit("vocabulary", "mine", recipe, "--output", words, "--count", options.words)
    runs = {}
    for seed in range(options.seeds):
        runs["none", seed] = run(recipe, work, "none", seed)
        for method in METHODS:
            runs[method, seed] = run(recipe, work, method, seed, words)
    result = summarise(options, runs)
    write_result(options, result)
    print(markdown(result))


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_text_options(parser)
    parser.add_argument("--words", type=int, default=200)
    add_run_options(parser, "vocabulary", steps=200, documents=12, learning_rate=1e-3)
    return parser.parse_args()


def run(recipe: Path, work: Path, method: str, seed: int, words: Path | None = None) -> dict[str, Any]:
    """Train one variant, unless it has run already, and return its figures."""
    folder = work / f"{method}-{seed}"
    overrides = [f"training.seed={seed}", f"run.output_dir={folder}"]
    if words:
        overrides += [f"vocabulary.tokens.from_file={words}", f"vocabulary.initialize={method}"]
    kit("train", recipe, *overrides)
    figures = read_bits_per_byte(folder)
    audit = json.loads((folder / "vocabulary.json").read_text()) if words else None
    untrained = {name: audit["untrained"][name]["bits_per_byte"] for name in figures["before"]} if audit else None
    return {"step_0": untrained or figures["before"], "after": figures["after"], "audit": audit}


def summarise(options: argparse.Namespace, runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Return means and deviations over the seeds, and the audit of one run."""
    variants = {}
    for method in ("none", *METHODS):
        of_method = [runs[method, seed] for seed in range(options.seeds)]
        variants[method] = {
            when: spread_of_sets([figures[when] for figures in of_method]) for when in ("step_0", "after")
        }
    audit = runs["subword-mean", 0]["audit"]
    return {
        "variants": variants,
        "audit": {name: audit[name] for name in ("texts", "embedding_rows", "never_in_training")},
        **describe_setting(options),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/vocabulary.md."""
    lines = [
        "| initialisation | domain, step 0 | domain, after | general, step 0 | general, after |",
        "|---|--:|--:|--:|--:|",
    ]
    for method, figures in result["variants"].items():
        cells = [in_words(figures[when][name]) for name in ("domain", "general") for when in ("step_0", "after")]
        lines.append(f"| {'(not extended)' if method == 'none' else method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
