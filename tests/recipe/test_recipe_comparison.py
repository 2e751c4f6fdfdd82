"""Recipes written back, and compared by their settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit.recipe.loading import differing_keys, dump_recipe, load_recipe, recipe_settings

ROOT = Path(__file__).parents[2]
RECIPES = {
    "minimal": "",
    "floats": "training: {learning_rate: 1e-05, weight_decay: 5e-324, num_train_epochs: 3}\n",
    "lists": "evaluation: {prompts: ['no', '1e-5', '010', ' x', 'a: b', '#', \"\\u2028\"]}\n",
    "sets": "evaluation: {sets: {a: {split: train, max_documents: 5}, b: {path: b.jsonl, text_column: body}}}\n",
    "corpora": "evaluation: {sets: {a: {builtin: docstrings, packages: [numpy]}, b: {path: x, separator: '---'}}}\n",
    "trackers": "tracking: {wandb: {}}\n",
    "stopping": "run: {early_stopping: {}, output_dir: runs/x, resume: must}\n",
    "training": "training: {gradient_checkpointing: true, lr_scheduler_kwargs: {num_cycles: 0.5}, fsdp: true}\n",
    "nulls": "training: {save_total_limit: null}\n",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_dump_loads_as_an_equal_recipe(write, text):
    recipe = load_recipe(write(text))
    again = load_recipe(write(dump_recipe(recipe), "dump.yaml", whole=True))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert recipe_settings(again) == recipe_settings(recipe)


def test_a_dump_of_a_fresh_model_and_validation_sources_loads(write):
    text = """\
        task: causal-lm
        model: {from_config: {model_type: gpt2, n_layer: 2, scale: null}, tokenizer: {vocab_size: 300}}
        data: {train: [{builtin: python-reference, weight: 0.5}, {path: "*.txt"}], validation: [{path: v.txt}]}
    """
    recipe = load_recipe(write(text, whole=True))
    assert load_recipe(write(dump_recipe(recipe), "dump.yaml", whole=True)) == recipe
    assert recipe.model.from_config["scale"] is None


def test_a_dump_holds_the_defaults_and_what_was_inherited(write):
    write("training: {learning_rate: 1e-5}\n", "base.yaml")
    text = dump_recipe(load_recipe(write("extends: base.yaml\n", whole=True), ["data.packing=false"]))
    for part in ("block_size: 512", "learning_rate: 1.0e-05", "packing: false", "sample_by: document", "resume: auto"):
        assert part in text
    assert "extends" not in text
    assert "null" not in text


@pytest.mark.parametrize(
    "override",
    [
        "run.resume=never",
        "run.output_dir=x",
        "tracking.wandb={}",
        "data.store_dir=/tmp",
        "training.num_train_epochs=3.0",
        "training.weight_decay=",
        "evaluation.prompts=[]",
        "data.block_size=512",
        "data.train.0.sample_by=document",
    ],
)
def test_what_leaves_the_numbers_alone(write, override):
    path = write("training: {num_train_epochs: 3}\n")
    a, b = load_recipe(path), load_recipe(path, [override])
    assert recipe_settings(a) == recipe_settings(b)


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("training.learning_rate=2e-5", ["training.learning_rate: 1e-4 -> 2e-5"]),
        ("training.learning_rate=0.01", ["training.learning_rate: 1e-4 -> 0.01"]),
        ("training.learning_rate=1.5e-7", ["training.learning_rate: 1e-4 -> 1.5e-7"]),
        ("training.bf16=true", ["training.bf16: unset -> true"]),
        ("training.learning_rate=", ["training.learning_rate: 1e-4 -> unset"]),
        ("data.train.0.path=b.txt", ['data.train.0.path: "a.txt" -> "b.txt"']),
        ("evaluation.prompts=[x]", ['evaluation.prompts: unset -> ["x"]']),
        ("data.packing=false", ["data.packing: true -> false"]),
        (
            "run.early_stopping.patience=1",
            ["run.early_stopping.patience: unset -> 1", "run.early_stopping.threshold: unset -> 0"],
        ),
        ("model.config={a: null}", ["model.config.a: unset -> null"]),
        ("model.config={a: []}", ["model.config.a: unset -> []"]),
        ("model.name_or_path=distilgpt2", ['model.name_or_path: "gpt2" -> "distilgpt2"']),
    ],
)
def test_what_changes_the_numbers(write, override, lines):
    path = write("training: {learning_rate: 1e-4}\n")
    a, b = load_recipe(path), load_recipe(path, [override])
    assert list(differing_keys(recipe_settings(a), recipe_settings(b)).values()) == lines


@pytest.mark.parametrize(
    ("text", "processes"),
    [
        ("training: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2}\n", 2),
        ("training: {per_device_train_batch_size: 2}\n", 8),
        ("training: {gradient_accumulation_steps: 2}\n", 1),
        ("run: {global_batch_size: 16}\n", 2),
        ("run: {global_batch_size: 16}\ntraining: {per_device_train_batch_size: 2}\n", 1),
    ],
)
def test_of_the_batch_size_the_product_counts(write, text, processes):
    found = recipe_settings(load_recipe(write(text)), processes)
    assert found["run.global_batch_size"] == 16
    assert found["world_size"] == processes
    assert not any("batch_size" in name or "accumulation" in name for name in found.keys() - {"run.global_batch_size"})


def test_where_batches_are_cut_by_length_their_size_counts_too(write):
    """With another, the steps are of other rows, whatever the product."""
    text = """\
        task: sequence-classification
        model: {name_or_path: gpt2}
        data: {train: [{path: a.csv, label_column: y}], group_by_length: true}
        run: {global_batch_size: 8}
    """
    path = write(text, whole=True)
    of_two, of_four = (
        recipe_settings(load_recipe(path, [f"training.per_device_train_batch_size={size}"])) for size in (2, 4)
    )
    assert list(differing_keys(of_two, of_four)) == ["training.per_device_train_batch_size"]


def test_settings_are_the_same_in_another_process_and_order(write):
    path = write("training: {learning_rate: 1e-4, bf16: true}\n")
    other = write("training: {bf16: true, learning_rate: 0.0001}\n", "other.yaml")
    show = f"json.dumps(recipe_settings(load_recipe({other!r})), sort_keys=True)"
    code = f"from kit.recipe.loading import *; print({show})"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == json.dumps(recipe_settings(load_recipe(path)), sort_keys=True)


def test_importing_the_room_imports_nothing_heavy():
    code = (
        "import sys, kit.recipe.loading, kit.recipe.schema, kit.recipe.training_arguments\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
