"""A document checked against the models: every error of pydantic in words, with its place."""

import re
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from kit.errors import did_you_mean, nearest
from kit.recipe.models import Recipe
from kit.recipe.tasks import recipe_model
from kit.recipe.words import (
    Problem,
    describe_types,
    describe_value,
    dotted,
    explain_unknown_key,
    mending_hint,
    types_at,
)
from kit.recipe.yaml import Document, Keys

_BOUNDS = {
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "string_too_short": "text of at least {min_length} character(s)",
}


def validate_document(document: Document, training_names: list[str]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe that the document holds, or the problems that it has."""
    try:
        return recipe_model(document.data).model_validate(document.data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    return None, [_explain(detail, document, training_names) for detail in details]


def show_problems(document: Document, problems: list[Problem]) -> str:
    """Return all problems as one message, a line each, in the order of their places."""
    lines = {}  # a dictionary, as an ordered set: an alias repeats its mistakes
    for problem in sorted(problems, key=lambda p: _order(document, p)):
        prefix = f"{dotted(problem.keys)}: " if problem.keys else ""
        lines[f"{document.place(problem.keys)}: {prefix}{problem.text}"] = None
    if len(lines) == 1:
        return next(iter(lines))
    return "\n".join([f"{document.places[()].source}: {len(lines)} problems", *(f"  {line}" for line in lines)])


def _order(document: Document, problem: Problem) -> tuple[bool, str, int]:
    place = document.place(problem.keys)
    return place.line is None, place.source, place.line or 0


def _explain(detail: dict[str, Any], document: Document, training_names: list[str]) -> Problem:
    root = recipe_model(document.data)
    keys, value = _walk(detail["loc"], document.data, root)
    kind, context = detail["type"], detail.get("ctx", {})
    types = types_at(keys, root)
    if kind == "extra_forbidden":
        valid = {name for t in types_at(keys[:-1], root) for name in getattr(t, "model_fields", ())}
        return Problem(keys, explain_unknown_key(str(keys[-1]), keys[:-1], valid, training_names, [root]))
    if kind == "missing":
        return Problem(keys, f"required, but missing; expected {describe_types(types)}")
    if kind == "value_error":
        text = str(context["error"])
        named = re.match(r"(\w+(?:\.\w+)*) ", text)
        # Sections that do not go together: the place is the one that the message begins with.
        if not keys and named and named[1].split(".")[0] in Recipe.model_fields:
            return Problem(tuple(named[1].split(".")), text[named.end() :])
        return Problem(keys, f"{text}{_origins(document, keys, value)}")
    if kind == "string_pattern_mismatch" and detail["loc"][-1] == "[key]":
        return Problem(keys, f"the name `{keys[-1]}` does not fit the pattern {context['pattern']}")
    if kind in _BOUNDS:
        return Problem(keys, _found(document, keys, value, _BOUNDS[kind].format(**context)))
    if not types:
        return Problem(keys, detail["msg"])  # nothing that the models of today can cause
    expected = describe_types(types)
    near = nearest(value, _choices(types)) if isinstance(value, str) else None
    hint = did_you_mean(value, _choices(types)) if near else mending_hint(value, document.places.get(keys), types)
    return Problem(keys, _found(document, keys, value, expected) + hint)


def _found(document: Document, keys: Keys, value: Any, expected: str) -> str:
    return f"found {describe_value(value, document.places.get(keys))}; expected {expected}"


def _choices(types: tuple[Any, ...]) -> list[str]:
    return [str(choice) for t in types if get_origin(t) is Literal for choice in get_args(t)]


def _walk(location: tuple[str | int, ...], data: Any, root: type[Recipe]) -> tuple[Keys, Any]:
    """Return the keys and the value of pydantic's location, which also holds tags of unions and `[key]` marks."""
    keys: Keys = ()
    for i, part in enumerate(location):
        unknown_key = i == len(location) - 1 and isinstance(data, dict) and part in data
        if not types_at((*keys, part), root) and not unknown_key:
            continue
        keys = (*keys, part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None  # a key that is missing
    return keys, data


def _origins(document: Document, keys: Keys, value: Any) -> str:
    """Return where the keys of a section that contradicts itself come from, when that is not one file alone."""
    if not isinstance(value, dict):
        return ""
    places = {name: document.place((*keys, name)) for name, child in value.items() if child is not None}
    if len({place.source for place in places.values()}) < 2:
        return ""
    listed = ", ".join(f"`{name}` at {place}" for name, place in places.items())
    whole = document.places[()].source
    inherited = next((name for name, place in places.items() if place.source != whole), next(iter(places)))
    example = f"`{inherited}: null`"
    return f" (combined from {listed}; to drop a key that is inherited, give it no value, as in {example})"
