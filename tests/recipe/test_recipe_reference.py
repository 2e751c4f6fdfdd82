"""The reference of recipes: the committed page is the models' own, complete, and true about `TrainingArguments`."""

import re
from pathlib import Path

import yaml
from transformers import TrainingArguments

from kit import run
from kit.recipe.loading import load_recipe
from kit.recipe.models import Recipe
from kit.recipe.reference import DECIDED, reference_text
from kit.recipe.tasks import RECIPES
from kit.recipe.training_arguments import allowed_names
from kit.recipe.training_names import ALIASES, REFUSED, REMOVED
from kit.recipe.words import members
from kit.training.arguments import make_training_arguments

COMMITTED = Path(__file__).parents[2] / "docs" / "recipes.md"
ROW = re.compile(r"^\| (`.*?) \|", re.MULTILINE)


def test_the_committed_page_is_fresh():
    assert COMMITTED.read_text(encoding="utf-8") == reference_text(), "write it with `make docs`"


def keys(page):
    """Return the keys that the page's tables have a row for, under their headings."""
    found = {}
    for part in re.split(r"^##+ ", page, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        found[title] = {name for cell in ROW.findall(part) for name in re.findall(r"`(\w+)`", cell)}
    return found


def models_in(annotation):
    for kind in members(annotation):
        if hasattr(kind, "model_fields"):
            yield kind
        else:
            for part in getattr(kind, "__args__", ()):
                yield from models_in(part)


def all_models(model):
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            yield from all_models(inner)


def test_every_key_of_every_section_has_a_row():
    by_title = keys(reference_text())
    roots = RECIPES.values()
    models = [model for root in roots for model in all_models(root) if model not in roots]
    assert len(models) > 10
    for model in models:
        inherited = getattr(model.__mro__[1], "model_fields", {})
        own = {name for name in model.model_fields if name not in inherited}
        assert any(own <= names for names in by_title.values()), model
    assert set(Recipe.model_fields) <= set(by_title)
    assert set(by_title["What the kit does not take"]) == set(REFUSED)
    assert set(by_title["Names that transformers no longer has"]) == set(REMOVED)
    assert set(by_title["Two names of one setting"]) == set(ALIASES)


def test_a_row_says_type_range_default_and_meaning():
    page = reference_text()
    assert "\n| `block_size` | integer ≥ 8 | `512` | Label positions per row, in tokens;" in page
    assert "\n| `fraction` | number > 0, < 1 | required | Share of the documents to hold out;" in page
    assert "\n| `train` | list of [train source](#train-source) | required |" in page
    assert "\n| `dtype` | `float32`, `bfloat16`, `float64` | `float32` |" in page
    assert "\n| `sets` | mapping from names to [evaluation set](#evaluation-set) | `{}` |" in page


def test_no_cell_is_empty_and_no_type_unknown():
    for line in reference_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert all(cells), line
            assert cells[1] != "any", line


def test_headings_are_unique_and_links_lead_to_them():
    page = reference_text()
    headings = re.findall(r"^##+ (.*)$", page, re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#(.*?)\)", page)) <= set(anchors)


def test_examples_are_valid(tmp_path):
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", reference_text(), re.DOTALL)]
    inheriting, *sections = blocks
    assert "extends" in inheriting
    together = {}
    for block in sections:
        together = block | together  # where each task has its own, the first is that of `causal-lm`
    assert {"freezing", "adapter"} <= set(together)
    for other in ("freezing", "adapter"):  # of which a model has one: what an adapter leaves, it freezes
        left_out = {other} if other == "adapter" else {other, "vocabulary"}  # whose tokens `freezing` trains
        chosen = {name: section for name, section in together.items() if name not in left_out}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(chosen))
        assert set(chosen) <= load_recipe(path).model_fields_set


def test_what_the_kit_decides_about_training_arguments_is_told(write_recipe, tmp_path):
    """A value that the kit sets and the page does not tell of would come as a surprise."""
    evaluations = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "bf16": None, "max_steps": 2}
    recipe = load_recipe(write_recipe(training=evaluations, run={"early_stopping": {"patience": 1}}))
    args, _ = make_training_arguments(recipe, run.TASKS["causal-lm"], tmp_path)
    plain = TrainingArguments(output_dir=str(tmp_path), **recipe.training)
    decided = {name for name in allowed_names() if getattr(args, name, None) != getattr(plain, name, None)}
    told = {name for names in DECIDED for name in names}
    assert decided <= told
    # What depends on the machine may by chance be what Trainer does itself; DDP is settled once the model is there.
    by_chance = {"bf16", "fp16", "use_cpu", "dataloader_pin_memory", "report_to", "ddp_find_unused_parameters"}
    assert told - decided <= by_chance
    assert told <= set(allowed_names())
