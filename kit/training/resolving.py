"""What is known of a run before it starts: its recipe, with the run's folder, and how an earlier attempt stands."""

from pathlib import Path

from kit.files import is_sealed
from kit.model.declared_tokens import with_tokens_read
from kit.recipe.loading import load_recipe
from kit.recipe.models import Recipe
from kit.training.checkpoints import checkpoints_newest_first
from kit.training.run_directory import RunDirectory, read_status


def status(recipe_path: str, overrides: list[str]) -> tuple[str, str, str | None]:
    """Return the run directory of a recipe, how its run stands, and the newest checkpoint if it is not done."""
    folder = resolve_recipe(recipe_path, overrides, reads_words=False).run.output_dir
    found = read_status(folder)
    saved = filter(is_sealed, [] if found == "done" else checkpoints_newest_first(RunDirectory(folder).checkpoints))
    return folder, found, next((path.name for path in saved), None)


def resolve_recipe(recipe_path: str, overrides: list[str], reads_words: bool = True) -> Recipe:
    """Load a recipe and settle the folder and name of its run, by default those of the file, and the words it adds.

    A run's own `recipe.yaml` so holds the words themselves, whatever becomes of the file that they were read from.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = recipe.run.output_dir or f"runs/{Path(recipe_path).stem}"
    settled = {"run": recipe.run.model_copy(update={"output_dir": folder})}
    if (wandb := recipe.tracking.wandb) and wandb.name is None:
        named = wandb.model_copy(update={"name": Path(recipe_path).stem})
        settled["tracking"] = recipe.tracking.model_copy(update={"wandb": named})
    if reads_words:
        settled["vocabulary"] = with_tokens_read(recipe.vocabulary)
    return recipe.model_copy(update=settled)
