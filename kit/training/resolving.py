"""What is known of a run before it starts: its recipe, with the run's folder, and how an earlier attempt stands."""

from pathlib import Path

from kit.model.declared_tokens import with_tokens_read
from kit.recipe.loading import load_recipe
from kit.recipe.models import Recipe
from kit.training.run_directory import read_status


def status(recipe_path: str, overrides: list[str]) -> tuple[str, str]:
    """Return the run directory of a recipe and how its run stands."""
    folder = resolve_recipe(recipe_path, overrides, reads_words=False).run.output_dir
    return folder, read_status(folder)


def resolve_recipe(recipe_path: str, overrides: list[str], reads_words: bool = True) -> Recipe:
    """Load a recipe and settle the folder of its run, by default named after the file, and the words that it adds.

    A run's own `recipe.yaml` so holds the words themselves, whatever becomes of the file that they were read from.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = recipe.run.output_dir or f"runs/{Path(recipe_path).stem}"
    settled = {"run": recipe.run.model_copy(update={"output_dir": folder})}
    if reads_words:
        settled["vocabulary"] = with_tokens_read(recipe.vocabulary)
    return recipe.model_copy(update=settled)
