"""The model of a recipe for each task."""

from typing import Any

from kit.recipe.classification import ClassificationRecipe
from kit.recipe.models import CausalLmRecipe, Recipe

RECIPES: dict[str, type[Recipe]] = {
    "causal-lm": CausalLmRecipe,
    "sequence-classification": ClassificationRecipe,
}


def recipe_model(document: Any) -> type[Recipe]:
    """Return the model that a document is to be read as; that of `causal-lm` where it names no task that there is."""
    task = document.get("task") if isinstance(document, dict) else None
    return RECIPES.get(task, CausalLmRecipe) if isinstance(task, str) else CausalLmRecipe
