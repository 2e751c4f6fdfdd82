"""Every shipped recipe and launch file is used: on the smallest stand-in that leaves all other keys as they are."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from kit import run
from kit.recipe.loading import load_recipe
from kit.training.arguments import make_training_arguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_the_sweep_sees_every_file():
    assert [path.stem for path in RECIPES] == ["lm_gpt2_adapt", "lm_gpt2_control", "lm_gpt2_pretrain"]
    assert [path.stem for path in LAUNCH_FILES] == ["cpu_2proc"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_trains_and_every_key_reaches_trainer(path, tmp_path, tiny_models):
    overrides = [
        "training.max_steps=2",
        "training.per_device_train_batch_size=2",
        f"run.output_dir={tmp_path / 'run'}",
        f"data.store_dir={tmp_path / 'store'}",
        "evaluation.generation.max_new_tokens=4",
        # Reading torch-sized documentation takes longer than a test should; this package's is small.
        "data.train=[{builtin: docstrings, packages: [accelerate]}]",
    ]
    recipe = load_recipe(path)
    if recipe.model.name_or_path:
        overrides.append(f"model.name_or_path={tiny_models(n_positions=256)}")
    for name, wanted in recipe.evaluation.sets.items():
        if wanted.builtin:
            overrides.append(f"evaluation.sets.{name}={{builtin: docstrings, packages: [filelock], max_documents: 4}}")
    run.train(str(path), overrides)
    args, _ = make_training_arguments(recipe, run.TASKS[recipe.task], tmp_path)
    for key, value in recipe.training.items():
        assert getattr(args, key) == value, key


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_points_at_the_schema_and_says_what_it_is(path):
    first, *rest = path.read_text().splitlines()
    target = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / target).resolve() == ROOT / "recipes/recipe.schema.json"
    header = [line for line in rest if line.startswith("#")]
    assert any("Needs:" in line for line in header)
    assert any("Launch:" in line for line in header)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda p: p.stem)
def test_launch_file_is_topology_only(path):
    values = yaml.safe_load(path.read_text())
    assert load_config_from_file(str(path)).num_processes == values["num_processes"]
    # The recipe decides on precision; a launch file that did would do so unseen.
    assert not {"mixed_precision", "downcast_bf16"} & set(values)
    assert len([line for line in path.read_text().splitlines() if line and not line.startswith("#")]) <= 12
