"""What a folder that holds a run already means for the run that is to be started in it."""

from types import ModuleType

from kit.console import say
from kit.errors import UserError
from kit.files import hash_values
from kit.model.loading import model_key
from kit.recipe.loading import differing_keys, differing_manner, load_recipe, recipe_settings
from kit.recipe.models import Recipe
from kit.recipe.resuming import split_differences
from kit.recipe.running import RunSection
from kit.training.checkpoints import checkpoints_newest_first, indented, saved_settings
from kit.training.run_directory import RunDirectory


def inputs_key(recipe: Recipe, task: ModuleType, seed: int) -> str:
    """Return a hash of the content of everything that a recipe reads: text and weights."""
    return hash_values(task.sources_key(recipe), model_key(recipe.model, seed))


def effective_resume(recipe: Recipe, directory: RunDirectory) -> RunSection:
    """Return the recipe's `run` section, with `auto` for a start with `never` or from a path that was cut off.

    The same command has to go on after a preemption, not to begin once more.
    """
    earlier = directory.read_manifest()
    unfinished = earlier.get("status") in ("preempted", "interrupted", "killed", "running")
    cut_off = unfinished and earlier.get("resume") == recipe.run.resume
    return recipe.run.model_copy(update={"resume": "auto"}) if cut_off else recipe.run


def is_finished(recipe: Recipe, task: ModuleType, directory: RunDirectory, seed: int, processes: int) -> bool:
    """Tell whether this very recipe's run has ended here; one that differs as `run.resume_with` allows goes on.

    Raises:
        UserError: the folder holds the run of another recipe, or this recipe's on other data or weights.
    """
    if recipe.run.resume == "never":
        return False
    differs = check_same_recipe(recipe, directory, processes)
    if not directory.is_finished() or recipe.run.resume not in ("auto", "must"):
        return False
    if directory.read_manifest().get("inputs") != inputs_key(recipe, task, seed):
        raise UserError(
            f"{directory.path}: is finished, but data or base model have changed since; run afresh with "
            f"`run.resume=never`, which keeps the old run aside, or choose another folder with `run.output_dir=…`"
        )
    if differs and not checkpoints_newest_first(directory.checkpoints):
        raise UserError(
            f"{directory.path}: is finished, and has no checkpoint (`training.save_strategy: no`) from which it could "
            f"go on with `run.resume_with`; choose another folder with `run.output_dir=…`"
        )
    return not differs


def check_same_recipe(recipe: Recipe, directory: RunDirectory, processes: int | None = None) -> list[str]:
    """Keep runs of different recipes apart; return the differences that `run.resume_with` allows.

    Args:
        recipe: of the run that is to begin or go on.
        directory: its folder.
        processes: of the run, where it is going to train; None where it makes no difference, as to a finished run.

    Raises:
        UserError: there are others.
    """
    checkpoints = checkpoints_newest_first(directory.checkpoints)
    if not (directory.is_finished() or checkpoints) or not directory.recipe.is_file():
        return []
    earlier = load_recipe(directory.recipe)
    of_earlier = directory.read_manifest().get("topology", {}).get("processes", 1)
    # An attempt that ended before its first checkpoint has left its recipe, but nothing that could be gone on with.
    saved = [] if directory.is_finished() else filter(None, map(saved_settings, checkpoints))
    before = next(iter(saved), None) or recipe_settings(earlier, of_earlier)

    def compare(processes: int) -> tuple[list[str], list[str]]:
        after = recipe_settings(recipe, processes)
        return split_differences(differing_keys(before, after), recipe.run.resume_with, (before, after))

    named, refused = compare(of_earlier if processes is None or directory.is_finished() else processes)
    if processes is not None and (named or refused):  # a finished run, too, would go on with as many as there are now
        named, refused = compare(processes)
    if refused:
        raise UserError(
            f"{directory.path}: holds a run of another recipe, which this one cannot go on with:\n{indented(refused)}\n"
            f"choose another folder with `run.output_dir=…`, or run afresh with `run.resume=never`, which keeps the "
            f"old one aside"
        )
    if manner := differing_manner(earlier, recipe):
        say(f"other settings of the same effect than before, so no longer equal bit by bit: {'; '.join(manner)}")
    return named
