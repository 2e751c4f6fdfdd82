"""What a folder that holds a run already means for the run that is to be started in it."""

from types import ModuleType

from kit.console import say
from kit.errors import UserError
from kit.files import hash_values
from kit.model.loading import model_key
from kit.recipe.loading import differing_keys, differing_manner, load_recipe
from kit.recipe.models import Recipe
from kit.recipe.running import RunSection
from kit.training.checkpoints import checkpoints_newest_first
from kit.training.run_directory import RunDirectory


def inputs_key(recipe: Recipe, task: ModuleType, seed: int) -> str:
    """Return a hash of the content of everything that a recipe reads: text and weights."""
    return hash_values(task.sources_key(recipe), model_key(recipe.model, seed))


def effective_resume(recipe: Recipe, directory: RunDirectory) -> RunSection:
    """Return the recipe's `run` section, with `auto` for a start with `never` or from a path that was cut off.

    The same command has to go on after a preemption, not to begin once more.
    """
    earlier = directory.read_manifest()
    unfinished = earlier.get("status") in ("preempted", "interrupted", "running")
    cut_off = unfinished and earlier.get("resume") == recipe.run.resume
    return recipe.run.model_copy(update={"resume": "auto"}) if cut_off else recipe.run


def is_finished(recipe: Recipe, task: ModuleType, directory: RunDirectory, seed: int) -> bool:
    """Tell whether this very recipe's run has ended here.

    Raises:
        UserError: the folder holds the run of another recipe, or this recipe's on other data or weights.
    """
    if recipe.run.resume == "never":
        return False
    check_same_recipe(recipe, directory)
    if not directory.is_finished() or recipe.run.resume not in ("auto", "must"):
        return False
    if directory.read_manifest().get("inputs") != inputs_key(recipe, task, seed):
        raise UserError(
            f"{directory.path}: is finished, but data or base model have changed since; run afresh with "
            f"`run.resume=never`, which keeps the old run aside, or choose another folder with `run.output_dir=…`"
        )
    return True


def check_same_recipe(recipe: Recipe, directory: RunDirectory) -> None:
    """Keep runs of different recipes apart."""
    has_run = directory.is_finished() or checkpoints_newest_first(directory.checkpoints)
    if not has_run or not directory.recipe.is_file():
        return
    earlier = load_recipe(directory.recipe)
    if manner := differing_manner(earlier, recipe):
        say(f"other settings of the same effect than before, so no longer equal bit by bit: {'; '.join(manner)}")
    if differences := differing_keys(earlier, recipe):
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise UserError(
            f"{directory.path}: holds a run of another recipe, which this one cannot go on with:\n{listed}\n"
            f"choose another folder with `run.output_dir=…`, or run afresh with `run.resume=never`, which keeps the "
            f"old one aside"
        )
