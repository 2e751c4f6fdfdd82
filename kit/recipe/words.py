"""Words for error messages: what was found, what is expected, and where a misplaced key belongs."""

import difflib
import re
from collections.abc import Iterable
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from kit.errors import did_you_mean, nearest
from kit.recipe.models import Recipe
from kit.recipe.section import Section
from kit.recipe.tasks import RECIPES
from kit.recipe.yaml import Keys, Place

# What other tools call it, where no similarity of letters would lead there.
_ELSEWHERE = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "grad_clip": "training.max_grad_norm",
    "max_length": "data.block_size",
    "max_seq_length": "data.block_size",
    "context_length": "data.block_size",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "validation_split": "data.validation.fraction",
    "resume_from_checkpoint": "run.resume",
}

# The same within a section.
_BESIDE = {"token": "content", "word": "content", "file": "from_file", "path": "from_file"}
# What does the same in recipes of another task.
_SAME_ROLE = {"block_size": "max_length", "max_length": "block_size", "prompts": "examples", "examples": "prompts"}
# What no key does.
_IMPOSSIBLE = {
    "remove_tokens": "tokens cannot be removed from a tokenizer: the ids of all others, which are rows of the model's "
    "embeddings, would change; tokens that the text does not hold cost nothing but memory",
}


class Problem(NamedTuple):
    """One mistake: the way to it, and what is wrong there."""

    keys: Keys
    text: str


def dotted(keys: Keys) -> str:
    """Return the keys as overrides name them, such as `data.train.0.path`."""
    return ".".join(map(str, keys))


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, each without its annotations, in order."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in members(part))
    return (annotation,)


def types_at(keys: Keys, root: type[Recipe]) -> tuple[Any, ...]:
    """Return the types that a recipe of a task takes at `keys`; none where it has no such key."""
    types: tuple[Any, ...] = (root,) if keys[:1] != ("task",) else (Recipe,)  # which has all tasks
    for key in keys:
        types = tuple(t for around in types for t in _types_inside(around, key))
    return tuple(dict.fromkeys(types))


def _types_inside(around: Any, key: str | int) -> tuple[Any, ...]:
    if isinstance(around, type) and issubclass(around, BaseModel):
        return members(around.model_fields[key].annotation) if key in around.model_fields else ()
    wanted = {tuple: (int, 0), dict: (str, 1)}.get(get_origin(around))
    if wanted is None or not isinstance(key, wanted[0]):
        return ()
    return members(get_args(around)[wanted[1]])


def describe_types(types: Iterable[Any]) -> str:
    """Return what values the types take, in words."""
    return " or ".join(dict.fromkeys(words for t in types if (words := _describe_type(t))))


def _describe_type(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return f"one of {', '.join(f'`{value}`' for value in get_args(type_))}"
    if isinstance(type_, type) and issubclass(type_, Enum):
        return f"one of {', '.join(f'`{member.value}`' for member in type_)}"
    if isinstance(type_, type) and issubclass(type_, BaseModel):
        return f"a mapping with the keys {', '.join(f'`{name}`' for name in type_.model_fields)}"
    names = {
        str: "text", int: "an integer", float: "a number", bool: "true or false", tuple: "a list", list: "a list",
        dict: "a mapping",
    }  # fmt: skip
    return names.get(get_origin(type_) or type_, "")


def describe_value(value: Any, place: Place | None = None) -> str:
    """Return what was found, in words; with its place, also how YAML came to read it so."""
    raw = place.text if place and place.plain else None
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f'the text "{value if len(value) <= 60 else value[:60] + "…"}"'
    if value is None:
        return f"`{raw}`, which YAML reads as null" if raw else "nothing (null)"
    if isinstance(value, bool):
        reading, same = f"the boolean {str(value).lower()}", str(value).lower()
    else:
        reading, same = f"the number {value}", str(value)
    return f"`{raw}`, which YAML reads as {reading}" if raw not in (None, same) else reading


def mending_hint(value: Any, place: Place | None, types: tuple[Any, ...]) -> str:
    """Return how to write what was probably meant, as the end of a message; empty where nothing suggests itself."""
    raw = place.text if place and place.plain else None
    takes_text = any(t is str or get_origin(t) is Literal or _is_enum(t) for t in types)
    kinds = {get_origin(t) or t for t in types}
    fields = _fields(types)
    if takes_text and raw and not isinstance(value, str):
        return f'; write "{raw}" in quotes'
    if isinstance(value, str) and kinds & {int, float, bool}:
        if raw and re.fullmatch(r"[-+]?0\d+", raw):
            return "; write it without the leading 0"
        return "; remove the quotes" if place and not place.plain and _is_number(value) else ""
    if isinstance(value, float) and int in kinds and value.is_integer():
        return f"; write {int(value)}"
    if value is None:
        return "; give it a value or remove the key"
    if fields and not isinstance(value, (dict, list)):
        return _as_field(value, fields)
    if kinds & {tuple, list} and isinstance(value, dict):
        return f"; write it as an entry of a list: `- {next(iter(value), 'key')}: …`"
    if kinds & {tuple, list} and not isinstance(value, list):
        items = [name for t in types if get_origin(t) is tuple for name in _fields(members(get_args(t)[0]))]
        entry = _as_field(value, items).replace("`", "`- ", 1)
        return entry or f"; write `[{place.text if place and place.text else value}]`"
    if fields and isinstance(value, list) and len(value) == 1:
        return "; remove the `-`"
    return ""


def _fields(types: Iterable[Any]) -> list[str]:
    return [name for t in types if _is_section(t) for name in t.model_fields]


def _as_field(value: Any, fields: list[str]) -> str:
    """Return the hint to write a lone value under the key that it is most probably meant for."""
    wanted = ("path", "name_or_path") if isinstance(value, str) else ("fraction",)
    key = next((name for name in wanted if name in fields), None)
    return f"; write `{key}: {value}`" if key else ""


def _is_enum(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Enum)


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Section)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def explain_unknown_key(
    name: str,
    section: Keys,
    valid: Iterable[str],
    training_names: Iterable[str],
    roots: Iterable[type[Recipe]] = tuple(RECIPES.values()),
) -> str:
    """Return what to write instead of a key that its section does not have.

    Args:
        name: the unknown key.
        section: the way to the section that holds it.
        valid: the keys that the section has.
        training_names: the keys of `training`, which the models do not list.
        roots: the models of the tasks that it may belong to.
    """
    roots = list(roots)
    homes, valid = _homes(training_names, roots), list(valid)
    if name.lower() in _IMPOSSIBLE:
        return f"unknown key; {_IMPOSSIBLE[name.lower()]}"
    if _BESIDE.get(name.lower()) in valid:
        return f"unknown key; did you mean `{_BESIDE[name.lower()]}`?"
    others = [task for task, root in RECIPES.items() if root not in roots and _has(root, (*section, name))]
    if others:
        meant = _SAME_ROLE.get(name)
        hint = f"; did you mean `{meant}`?" if meant in valid else ""
        return f"unknown key here, one of `task: {others[0]}`{hint or _listed_if_few(valid)}"
    if here := homes.get(name):
        where = [f"under `{place}`" if place else "at the top level" for place in here[:3]]
        return f"unknown key; `{name}` belongs {' or '.join(where)}"
    if meant := _ELSEWHERE.get(name.lower()):
        own = f"data.{_SAME_ROLE.get(meant.removeprefix('data.'))}"
        if not any(_has(root, tuple(meant.split("."))) for root in roots) and not meant.startswith("training."):
            meant = own
        return f"unknown key; did you mean `{meant}`?"
    # In other sections only what is hardly a guess: any word resembles one of so many names.
    elsewhere = difflib.get_close_matches(name.lower(), homes, n=1, cutoff=0.8)
    if elsewhere and not nearest(name, valid):
        return f"unknown key; did you mean `{f'{homes[elsewhere[0]][0]}.{elsewhere[0]}'.lstrip('.')}`?"
    if len(valid) > 40:  # the names of TrainingArguments would bury the message
        return f"unknown key{did_you_mean(name, valid) if nearest(name, valid) else ''}"
    return f"unknown key{did_you_mean(name, valid)}"


def _has(root: type[Recipe], keys: Keys) -> bool:
    return bool(types_at(keys, root))


def _listed_if_few(valid: list[str]) -> str:
    return f"; valid: {', '.join(sorted(valid))}" if len(valid) <= 20 else ""


def _homes(training_names: Iterable[str], roots: Iterable[type[Recipe]]) -> dict[str, list[str]]:
    """Return for every key of a recipe the sections that have it."""
    homes: dict[str, list[str]] = {name: ["training"] for name in training_names}

    def visit(model: type[Section], path: str) -> None:
        for name, field in model.model_fields.items():
            if path not in homes.setdefault(name, []):
                homes[name].append(path)
            for type_ in members(field.annotation):
                inner, below = type_, f"{path}.{name}".lstrip(".")
                if get_origin(type_) is dict:
                    inner, below = members(get_args(type_)[1])[0], f"{below}.<name>"
                elif get_origin(type_) is tuple:
                    inner = members(get_args(type_)[0])[0]
                if _is_section(inner):
                    visit(inner, below)

    for root in roots:
        visit(root, "")
    return homes
