"""Load, write and compare recipes. Importing this module imports neither torch nor transformers."""

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kit.errors import UserError
from kit.recipe.adapter import AdapterSection, check_adapter
from kit.recipe.layers import apply_override, read_layers
from kit.recipe.models import Recipe
from kit.recipe.resuming import NOT_FOR_THE_NUMBERS, explain_refusal
from kit.recipe.section import Section
from kit.recipe.validation import show_problems, validate_document
from kit.recipe.words import Problem
from kit.recipe.yaml import write_yaml

# How a step is computed, not what: a run that is out of memory goes on with others of these, equal but for rounding.
_MANNER = {
    "per_device_eval_batch_size",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "torch_empty_cache_steps",
}
_MICRO_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # with Trainer's defaults
_UNSET = object()
_LONG = 5  # entries of a list
_EMPTY = (None, (), [], {})


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file, with what it extends and with `section.key=value` overrides, fully checked.

    `training` holds the names of the installed `TrainingArguments`, without those that were set to null.

    Raises:
        UserError: one message with every mistake, each with its file and line (or override), key, what was found
            and what is expected.
    """
    # Only here: it imports transformers for its TrainingArguments, which takes seconds that `kit --help` must not.
    from kit.recipe.training_arguments import allowed_names, find_training_problems

    document = read_layers(str(path))
    for override in overrides:
        apply_override(document, override)
    recipe, problems = validate_document(document, allowed_names())
    training = document.data.get("training")
    checked: dict[str, Any] = {}
    if isinstance(training, dict):
        places = {name: document.place(("training", name)) for name in training}
        checked, found = find_training_problems(training, places)
        problems += [Problem(("training", name), text) for name, text in found]
    if recipe is not None:
        named = ((name, explain_refusal(name, type(recipe), allowed_names())) for name in recipe.run.resume_with)
        problems += [Problem(("run", "resume_with"), f"`{name}`: {why}") for name, why in named if why]
    if recipe is not None and recipe.adapter:
        problems += _find_adapter_problems(recipe.adapter, recipe.task)
    if problems:
        raise UserError(show_problems(document, problems))
    return recipe.model_copy(update={"training": checked}) if "training" in recipe.model_fields_set else recipe


def _find_adapter_problems(section: AdapterSection, task: str) -> list[Problem]:
    try:
        check_adapter(section, task)
    except UserError as error:
        key, _, text = str(error).partition(": ")
        return [Problem(tuple(key.split(".")), text)]
    return []


def overrides_for_model(path: str) -> list[str]:
    """Return the overrides that put another model, with its own tokenizer, in the place of a recipe's."""
    quoted = "'" + path.replace("'", "''") + "'"
    others = (
        "from_config=null",
        "tokenizer=null",
        "eos_token=null",
        "config={}",
        "revision=null",
        "trust_remote_code=false",
        "load_in_4bit=false",
    )
    return [f"model.name_or_path={quoted}", *(f"model.{other}" for other in others)]


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with its defaults written out, so that later defaults do not change the run.

    Loading the text gives an equal recipe. Left out are null, empty lists and empty mappings where they are defaults,
    and defaults that a section does not take beside what the recipe gives (such as `sample_by` beside `separator`).
    """
    return write_yaml(_plain(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return {name: _plain(child) for name, child in _writable(value).items()}
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def _writable(section: Section) -> dict[str, Any]:
    """Return the fields that can be written together, in the order of the model."""
    values = {name: getattr(section, name) for name in type(section).model_fields} | (section.model_extra or {})
    defaults = {name: field.get_default() for name, field in type(section).model_fields.items()}
    values = {name: v for name, v in values.items() if v not in _EMPTY or v not in (None, defaults.get(name, v))}
    kept = {name: value for name, value in values.items() if name in section.model_fields_set}
    for name, value in values.items():
        if name not in kept:
            try:  # a validator may read a default, once it is written, as a contradiction
                type(section)(**kept, **{name: value})
            except ValidationError:
                continue
            kept[name] = value
    return {name: value for name, value in values.items() if name in kept}


def recipe_settings(recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """Return `{dotted key: value}` of everything that affects the numbers of a run on so many processes.

    That is all of the recipe but `tracking`, what `NOT_FOR_THE_NUMBERS` lists and what only says how a step is
    computed; of batch size and accumulation it is the product, over all processes, as `run.global_batch_size`.
    """
    return _normal(_flat(_affecting(recipe, processes))) | {"world_size": processes}


def differing_keys(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return the keys in which settings differ, each with a line such as `training.learning_rate: 1e-4 -> 2e-5`."""
    names = list(dict.fromkeys([*before, *after]))
    pairs = {name: (before.get(name, _UNSET), after.get(name, _UNSET)) for name in names}
    return {name: _difference(name, old, new) for name, (old, new) in pairs.items() if _show(old) != _show(new)}


def differing_manner(a: Recipe, b: Recipe) -> list[str]:
    """Return such lines over the keys of `training` that say how a step is computed, not what."""
    keys = sorted(_MANNER | set(_MICRO_BATCH))
    manners = ({f"training.{key}": r.training[key] for key in keys if key in r.training} for r in (a, b))
    return list(differing_keys(*manners).values())


def _difference(name: str, before: Any, after: Any) -> str:
    """Return one line on a value that differs; of long lists only the entries that do."""
    if not all(isinstance(value, list) and len(value) > _LONG for value in (before, after)):
        return f"{name}: {_show(before)} -> {_show(after)}"
    gone, new = ([e for e in one if e not in other] for one, other in ((before, after), (after, before)))
    changes = [f"{word} {_first(entries)}" for word, entries in (("without", gone), ("with", new)) if entries]
    return f"{name}: {len(before):,} entries -> {len(after):,}: {'; '.join(changes) or 'in another order'}"


def _first(entries: list[Any]) -> str:
    more = f" and {len(entries) - _LONG:,} more" if len(entries) > _LONG else ""
    return ", ".join(map(_show, entries[:_LONG])) + more


def _affecting(recipe: Recipe, processes: int) -> dict[str, Any]:
    sections = {name: value for name, value in _plain(recipe).items() if name != "tracking"}
    for section in ("data", "run", "freezing"):
        values = sections.get(section) or {}
        kept = {key: value for key, value in values.items() if f"{section}.{key}" not in NOT_FOR_THE_NUMBERS}
        sections[section] = kept
    given = sections.get("training", {})
    # Batches of rows of similar length are cut by the batch size: with another, steps are of other rows.
    cuts_rows = {"per_device_train_batch_size"} if sections["data"].get("group_by_length") else set()
    free = _MANNER | set(_MICRO_BATCH) - cuts_rows
    sections["training"] = {key: value for key, value in given.items() if key not in free}
    rows = math.prod(given.get(name, default) for name, default in _MICRO_BATCH.items()) * processes
    sections["run"] = {**sections["run"], "global_batch_size": recipe.run.global_batch_size or rows}
    return {name: value for name, value in sections.items() if value not in _EMPTY}


def _normal(value: Any) -> Any:
    """Return the value with whole numbers as integers: `3` and `3.0` are one setting."""
    if isinstance(value, dict):
        return {key: _normal(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_normal(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{dotted key: value}`; a list of scalars is one value, and so is what is empty."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        entries = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, child in entries for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}


def _show(value: Any) -> str:
    if value is _UNSET:
        return "unset"
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return format(Decimal(repr(value)).normalize(), "e")  # 1e-4, not 0.0001 or 1e-04
    return json.dumps(_normal(value), ensure_ascii=False)
