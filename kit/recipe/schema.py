"""The JSON Schema of a recipe, for editors: completion, descriptions and a first check while typing."""

import json
import typing
from typing import Any

from kit.recipe.models import Recipe
from kit.recipe.tasks import RECIPES
from kit.recipe.training_arguments import ALIASES, Argument, allowed_names, installed_arguments
from kit.recipe.words import members

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a recipe file; `training` is that of the installed transformers."""
    schemas = {task: _without_required(model.model_json_schema()) for task, model in RECIPES.items()}
    schema, *others = schemas.values()
    definitions = {name: section for each in schemas.values() for name, section in each["$defs"].items()}
    properties = dict(schema["properties"])
    of_tasks = [name for name in properties if any(each["properties"][name] != properties[name] for each in others)]
    for name in of_tasks:
        properties[name] = {"anyOf": [each["properties"][name] for each in schemas.values()]}
        properties[name]["description"] = Recipe.model_fields[name].description or "Each task has its own."
    properties["training"] |= {"additionalProperties": False, "properties": _training_properties()}
    extends = {
        "type": "string",
        "description": "A recipe, relative to this file, to inherit from: mappings are merged, lists are replaced.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of the domain adaptation kit",
        "description": "What to adapt, to which domain, and how.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **properties},
        # Where a file names no task, the one that it extends does.
        "allOf": [
            {
                "if": {"properties": {"task": {"const": task}}, "required": ["task"]},
                "then": {"properties": {name: each["properties"][name] for name in of_tasks}},
            }
            for task, each in schemas.items()
        ],
        "$defs": definitions,
    }


def schema_text() -> str:
    """Return the schema as the text that is committed as `recipes/recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _without_required(schema: Any) -> Any:
    """Return the schema without `required`: with `extends`, any key may stand in another file."""
    if isinstance(schema, dict):
        is_keyword = isinstance(schema.get("required"), list)  # not a property of that name
        return {k: _without_required(v) for k, v in schema.items() if not (k == "required" and is_keyword)}
    return [_without_required(item) for item in schema] if isinstance(schema, list) else schema


def _training_properties() -> dict[str, Any]:
    installed = installed_arguments()
    other = {**ALIASES, **{older: newer for newer, older in ALIASES.items()}}
    return {name: _property(installed.get(name) or installed[other[name]]) for name in allowed_names()}


def _property(argument: Argument) -> dict[str, Any]:
    names = [_JSON_TYPES.get(typing.get_origin(t) or t) for t in members(argument.annotation)]
    # null takes back what `extends` inherits, whatever the type
    schema: dict[str, Any] = {"type": [*dict.fromkeys(filter(None, names)), "null"]}
    if argument.choices and "array" not in schema["type"]:
        others = [name for name in schema["type"] if name not in ("string", "null")]
        choices: dict[str, Any] = {"enum": [*argument.choices, None]}
        schema = {"anyOf": [choices, *({"type": name} for name in others)]} if others else choices
    if argument.help:
        schema["description"] = " ".join(argument.help.split())
    if argument.default is None or isinstance(argument.default, (str, int, float, bool)):
        schema["default"] = getattr(argument.default, "value", argument.default)
    return schema
