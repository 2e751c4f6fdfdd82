"""Classifiers: several ways to train them and seeds, beside majority, TF-IDF and zero-shot on the same rows.

    python benchmarks/classification.py [--base FOLDER] [--spam FILE] [--trec FOLDER] [--sections FILE] [--citations F]

Each seed splits the data anew (where it has no test of its own) and draws a head of its own; all ways and baselines
of a seed see the same rows. Without a file it tells the packages of docstrings apart, with the model of `make demo`,
which has to have run. Of `RATES` that for all weights was chosen for spam and TREC on validation with a seed that is
not reported, the others are first guesses; `--sweep` chooses them all in that way. Writes
benchmarks/results/classification.json, and prints the tables that docs/classification.md shows.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from comparison import ROOT, describe_setting, kit, spread, write_result

from kit.data.labeled_rows import LabeledRow, read_labeled_rows
from kit.tasks import sequence_classification
from kit.training.resolving import resolve_recipe

SEEDS = (11, 22, 33, 44, 55)
SEED_OF_SWEEP = 99
BASELINES = ("majority", "tfidf_logreg", "zero_shot")
# What trains, as overrides of the recipe; the learning rate of each is its own.
WAYS: dict[str, list[str]] = {
    "last block": ["freezing={trainable: {last_blocks: 1, final_norm: true, head: true}}"],
    "last two blocks": ["freezing={trainable: {last_blocks: 2, final_norm: true, head: true}}"],
    "last block, norm frozen": ["freezing={trainable: {last_blocks: 1, head: true}}"],
    "full": [],
    "lora": ["adapter={type: lora, r: 16, lora_alpha: 32}"],
    "adapted, full": [],
}
RATES = {
    "last block": 1e-3,
    "last two blocks": 1e-3,
    "last block, norm frozen": 1e-3,
    "full": 3e-4,
    "lora": 3e-3,
    "adapted, full": 3e-4,
}
RATES_TRIED = (3e-4, 1e-3, 3e-3)
# PubMedQA's authors name the same part of an abstract in many ways.
ROLES = {
    "BACKGROUND": ["INTRODUCTION", "BACKGROUND AND PURPOSE", "CONTEXT"],
    "OBJECTIVE": ["OBJECTIVES", "PURPOSE", "AIMS", "STUDY OBJECTIVE"],
    "METHODS": [
        "METHOD", "MATERIALS AND METHODS", "MATERIAL AND METHODS", "PATIENTS AND METHODS", "DESIGN", "STUDY DESIGN",
        "SETTING", "PATIENTS", "PARTICIPANTS", "INTERVENTIONS", "INTERVENTION", "MAIN OUTCOME MEASURES",
    ],
}  # fmt: skip


def data_of(options: argparse.Namespace) -> dict[str, tuple[dict[str, Any], list[str], int]]:
    """Return of each data set its `data` section, the ways to train on it, and the epochs."""
    found: dict[str, tuple[dict[str, Any], list[str], int]] = {}
    if options.spam:
        data = {"train": [{"path": options.spam}], "balance": {"method": "undersample", "rows": "all"}}
        found["spam"] = data, list(WAYS), 5
    if options.trec:
        train, test = (
            [{"path": f"{options.trec}/TREC.{part}.all", "encoding": "latin-1"}] for part in ("train", "test")
        )
        found["trec"] = {"train": train, "test": test}, ["full", "adapted, full"], 4
    if options.sections:
        names = {name: role for role, names in ROLES.items() for name in names}
        data = {"train": [{"path": options.sections, "group_column": "pmid"}], "min_rows_per_label": 200}
        found["sections"] = {**data, "label_names": names, "truncation": "head+tail", "max_length": 256}, ["full"], 3
    if options.citations:
        parts = {"train": "train", "validation": "dev", "test": "test"}
        found["citations"] = (
            {part: [{"path": f"{options.citations}/{name}.txt", "format": "jsonl"}] for part, name in parts.items()},
            ["full"],
            4,
        )
    packages = ("datasets", "numpy", "peft", "pydantic", "sklearn", "wandb")
    sources = [{"builtin": "docstrings", "packages": [name], "max_documents": 300} for name in packages]
    return found or {"packages": ({"train": sources, "max_length": 128}, ["last block", "full"], 4)}


def write_recipe(options: argparse.Namespace, name: str, data: dict[str, Any], epochs: int) -> Path:
    """Write the recipe that all ways share; a step has 16 rows."""
    recipe = {
        "task": "sequence-classification",
        "model": {"name_or_path": options.base},
        "data": {**data, "store_dir": f"{options.work}/store"},
        "training": {
            "num_train_epochs": epochs,
            # 16 rows a step, in parts of similar length.
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.1,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "logging_steps": 50,
        },
        "evaluation": {"train_sample": 200},
    }
    path = Path(options.work) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(options: argparse.Namespace, recipe: Path, way: str, seed: int, rate: float) -> dict[str, Any]:
    """Train one way with one seed, unless it was, and return the scorecard's sets."""
    folder = Path(options.work) / f"{recipe.stem}_{way.replace(' ', '-').replace(',', '')}_{seed}_{rate:g}"
    document = yaml.safe_load(recipe.read_text())
    seeds = [f"training.seed={seed}"]
    if "test" not in document["data"]:
        seeds += [f"data.split.seed={seed}"]
    if "balance" in document["data"]:
        seeds += [f"data.balance.seed={seed}"]
    base = [f"model.name_or_path={adapt(options, recipe, seeds, seed)}"] if way.startswith("adapted") else []
    kit("train", recipe, *seeds, *WAYS[way], *base, f"training.learning_rate={rate}", f"run.output_dir={folder}")
    return json.loads((folder / "scorecard.json").read_text())["sets"]


def adapt(options: argparse.Namespace, recipe: Path, seeds: list[str], seed: int) -> Path:
    """Adapt the base model to the texts that are neither validated nor tested on with this seed; return the model."""
    run_folder = Path(options.work) / f"{recipe.stem}_adapted_{seed}"
    resolved = resolve_recipe(str(recipe), seeds)
    corpus = sequence_classification.prepare_examples(
        resolved, sequence_classification.prepare_tokenizer(resolved), seed=0
    )
    held_out = {text for name in ("validation", "test") for text in corpus.sets[name].texts}
    rows = (row for source in resolved.data.train for row in read_labeled_rows(source))
    texts = dict.fromkeys(row.text for row in rows if isinstance(row, LabeledRow) and row.text not in held_out)
    path = run_folder.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    language_model = {
        "task": "causal-lm",
        "model": {"name_or_path": options.base},
        "data": {"train": [{"path": str(path)}], "block_size": 256, "store_dir": f"{options.work}/store"},
        "training": {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "weight_decay": 0.1,
            "seed": seed,
            "save_strategy": "no",
        },
    }
    run_folder.with_suffix(".yaml").write_text(yaml.safe_dump(language_model, sort_keys=False))
    kit("train", run_folder.with_suffix(".yaml"), f"run.output_dir={run_folder}")
    return run_folder / "model"


def sweep(options: argparse.Namespace, recipe: Path, ways: list[str]) -> dict[str, dict[str, float]]:
    """Return macro-F1 on validation of each way at each rate, with a seed that is not reported."""
    found = {}
    for way in ways:
        sets = {rate: run(options, recipe, way, SEED_OF_SWEEP, rate) for rate in RATES_TRIED}
        found[way] = {f"{rate:g}": of["validation"]["after"]["f1_macro"] for rate, of in sets.items()}
        print(f"{recipe.stem}, {way}: {found[way]}")
    return found


def summarise(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one way over all seeds, each on the test of its own split."""
    tests = [card["test"] for card in cards]
    differences = [test["against_tfidf"] for test in tests]
    return {
        "test": {key: spread([test["after"][key] for test in tests]) for key in ("accuracy", "f1_macro", "ece")},
        "test_intervals": [test["intervals"] for test in tests],
        "train_sample": {"accuracy": spread([card["train_sample"]["after"]["accuracy"] for card in cards])},
        "against_tfidf": {
            key: {
                "mean": statistics.mean(each[key]["difference"] for each in differences),
                "significantly_below": sum(each[key]["high"] < 0 for each in differences),
                "significantly_above": sum(each[key]["low"] > 0 for each in differences),
                "seeds": [each[key] for each in differences],
            }
            for key in ("accuracy", "f1_macro")
        },
    }


def summarise_baselines(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of each baseline over all seeds, on the same tests."""
    found = [card["test"]["baselines"] for card in cards]
    return {
        name: {key: spread([of[name][key] for of in found]) for key in ("accuracy", "f1_macro")}
        for name in BASELINES
        if all(name in of for of in found)
    }


def print_table(name: str, result: dict[str, Any]) -> None:
    """Print a table of one data set, in Markdown."""
    print(f"\n### {name}: {result['rows']}\n")
    print("| | rate | accuracy | macro-F1 | against TF-IDF | train |\n|---|--:|--:|--:|--:|--:|")
    for baseline, of in result["baselines"].items():
        print(f"| {baseline} | | {_percent(of['accuracy'])} | {_share(of['f1_macro'])} | | |")
    for way, of in result["ways"].items():
        against = of["against_tfidf"]["f1_macro"]
        told = f"{against['mean']:+.3f}; below {against['significantly_below']}, above {against['significantly_above']}"
        cells = [way, f"{of['rate']:g}", _percent(of["test"]["accuracy"]), _share(of["test"]["f1_macro"])]
        print("| " + " | ".join([*cells, told, f"{of['train_sample']['accuracy']['mean']:.1%}"]) + " |")


def _percent(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.1%} ± {figure['stdev']:.1%}"


def _share(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} ± {figure['stdev']:.3f}"


def main() -> None:
    """Train all ways with all seeds, and write and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="runs/lm_gpt2_words/model", help="the model to start from")
    parser.add_argument("--spam", help="SMSSpamCollection of the UCI SMS Spam Collection")
    parser.add_argument("--trec", help="a folder with TREC.train.all and TREC.test.all")
    parser.add_argument("--sections", help="sections of PubMedQA's abstracts as JSON lines: text, label, pmid")
    parser.add_argument("--citations", help="SciCite: a folder with train.txt, dev.txt, test.txt")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the committed seeds")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="only these")
    parser.add_argument("--rates", type=json.loads, default={}, help='such as {"full": 1e-3}')
    parser.add_argument("--sweep", action="store_true", help="choose the rates anew, on validation")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/classification.json"))
    parser.add_argument(
        "--work", default="runs/benchmark_classification", help="where the runs go; finished ones are kept"
    )
    options = parser.parse_args()
    options.corpus = None
    output = Path(options.output)
    known = json.loads(output.read_text())["data"] if output.is_file() else {}
    for name, (data, ways, epochs) in data_of(options).items():
        recipe = write_recipe(options, name, data, epochs)
        ways = [way for way in ways if options.ways is None or way in options.ways]
        swept = sweep(options, recipe, ways) if options.sweep else None
        rates = {**RATES, **options.rates}
        if swept:
            rates |= {way: float(max(of, key=lambda rate: of[rate])) for way, of in swept.items()}
        cards = {way: [run(options, recipe, way, seed, rates[way]) for seed in SEEDS[: options.seeds]] for way in ways}
        first = next(iter(cards.values()))
        rows = [card["test"]["after"]["rows"] for card in first]
        known[name] = {
            "rows": f"{int(np.mean(rows)):,} test rows, {len(rows)} seeds, {epochs} epochs of 16 rows a step",
            "epochs": epochs,
            "seeds": SEEDS[: options.seeds],
            "baselines": summarise_baselines(first),
            "ways": {way: {"rate": rates[way], **summarise(of)} for way, of in cards.items()},
            **({"sweep": swept} if swept else {}),
        }
        setting = {key: value for key, value in describe_setting(options).items() if key != "corpus"}
        write_result(options, {**setting, "data": known})
        print_table(name, known[name])


if __name__ == "__main__":
    main()
