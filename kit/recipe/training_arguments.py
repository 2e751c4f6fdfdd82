"""The `training` section: names, types and ranges checked against the installed `TrainingArguments`.

Nothing is instantiated here: that would touch devices and environment variables. Importing this module is cheap,
calling it imports transformers.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kit.errors import UserError, did_you_mean
from kit.recipe.training_names import ALIASES, REFUSED, REMOVED
from kit.recipe.words import describe_types, describe_value, explain_unknown_key, members, mending_hint
from kit.recipe.yaml import Place


class Argument(NamedTuple):
    """One field of the installed `TrainingArguments`."""

    annotation: Any
    default: Any
    help: str
    choices: tuple[str, ...]


@cache
def installed_arguments() -> dict[str, Argument]:
    """Return the fields of the installed `TrainingArguments`, by name; imports transformers."""
    # Only here: the import takes seconds, and this module is imported by commands that do not train.
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    fields = [f for f in dataclasses.fields(TrainingArguments) if f.init and not f.name.startswith("_")]
    arguments = {}
    for f in fields:
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        # transformers 5.23 documents `fsdp: true` and deprecates its text, but still annotates text alone.
        annotation = hints[f.name] | bool if f.name == "fsdp" else hints[f.name]
        choices = (*f.metadata.get("choices", ()), *_enum_values(annotation), *_CHOICES.get(f.name, ()))
        arguments[f.name] = Argument(annotation, default, f.metadata.get("help", ""), choices)
    return arguments


_CHOICES = {"include_num_input_tokens_seen": ("all", "non_padding", "no")}  # named by its help text only


def _enum_values(annotation: Any) -> list[str]:
    types = [m for t in members(annotation) for m in (members(typing.get_args(t)[0]) if typing.get_args(t) else (t,))]
    return [member.value for t in types if isinstance(t, type) and issubclass(t, Enum) for member in t]


def allowed_names() -> list[str]:
    """Return the names that `training` takes: the installed ones, less those refused, plus aliases."""
    names = [name for name in installed_arguments() if not _refusal(name)]
    aliases = [other for pair in ALIASES.items() if set(pair) & set(names) for other in pair]
    return list(dict.fromkeys([*names, *aliases]))


def _refusal(name: str) -> str | None:
    """Return why the kit does not take a name; those of later versions of transformers go by their prefix."""
    alike = {"hub_": "hub_model_id", "trackio_": "trackio_space_id"}
    prefix = next((prefix for prefix in alike if name.startswith(prefix)), None)
    return REFUSED.get(name) or (REFUSED[alike[prefix]] if prefix else None)


def check_training_arguments(values: dict[str, Any], location: Callable[[str], str]) -> dict[str, Any]:
    """Return the values of `training` under the names that the installed transformers has, without those set to null.

    Args:
        values: the mapping that the recipe gives.
        location: returns, for a name, where it was written, for the message.

    Raises:
        UserError: one message with a line for every mistake.
    """
    checked, problems = find_training_problems(values)
    if problems:
        raise UserError("\n".join(f"{location(name)}: training.{name}: {text}" for name, text in problems))
    return checked


def find_training_problems(
    values: dict[str, Any], places: Mapping[str, Place] | None = None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the checked values under their installed names, and every mistake as (name, text)."""
    places = places or {}
    installed = installed_arguments()
    checked: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for name, value in values.items():
        target = _installed_name(name)
        if text := _name_problem(name, value):
            problems.append((name, text))
        elif target != name and target in values:
            problems.append((name, f"`{name}` and `{target}` are two names of one setting; keep `{target}`"))
        elif value is None:
            continue  # null takes back what `extends` inherits
        elif text := _value_problem(target, value, installed[target], places.get(name)):
            problems.append((name, text))
        else:
            checked[target] = value
    if not problems:  # on values that are wrong in themselves a contradiction would be noise
        problems = _contradictions(checked, places)
    return checked, problems


def _installed_name(name: str) -> str:
    """Return the installed one of two names of one setting; another name as it is."""
    installed = installed_arguments()
    for newer, older in ALIASES.items():
        if name in (newer, older):
            return newer if newer in installed else older
    return name


def _name_problem(name: str, value: Any) -> str | None:
    installed = installed_arguments()
    if reason := _refusal(name):
        return f"the kit does not take this key: {reason}"
    if _installed_name(name) in installed:
        return None
    if name in REMOVED:
        share = isinstance(value, float) and 0 < value < 1
        exact = f": `warmup_steps: {value}`" if name == "warmup_ratio" and share else ""
        return f"transformers no longer has this name: {REMOVED[name]}{exact}"
    return explain_unknown_key(name, ("training",), allowed_names(), allowed_names())


def _value_problem(name: str, value: Any, argument: Argument, place: Place | None) -> str | None:
    types = (*members(argument.annotation), *((str,) if argument.choices else ()))
    if not _fits(value, argument):
        hint = mending_hint(value, place, types)
        return f"found {describe_value(value, place)}; expected {_expected(argument)}{hint}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {describe_value(value, place)}; expected a finite number"
    if argument.choices and isinstance(value, (str, list)):
        words = value.split() if isinstance(value, str) and name == "debug" else value
        for word in words if isinstance(words, list) else [words]:
            if word not in argument.choices:
                near = _near(word, argument.choices)
                expected = "" if near and len(argument.choices) > 15 else f"; expected {_expected(argument)}"
                return f"found {describe_value(word, place)}{expected}{near}"
    if name == "report_to":
        return _tracker_problem(value)
    bound = _RANGES.get(name)
    if bound and isinstance(value, (int, float)) and not bound.holds(value):
        return f"found {describe_value(value, place)}; expected {bound.words}"
    return None


def _fits(value: Any, argument: Argument) -> bool:
    """Return whether the value has the type of the annotation; members of enumerations are looked at elsewhere."""
    annotation = argument.annotation
    if argument.choices and isinstance(value, str):
        return True
    if argument.choices and isinstance(value, list):
        annotation = list[str] if any(typing.get_origin(t) is list for t in members(annotation)) else str
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        return False
    return True


def _expected(argument: Argument) -> str:
    if argument.choices:
        kinds = [t for t in members(argument.annotation) if t in (bool, int, float)]
        listed = "one of " + ", ".join(f"`{choice}`" for choice in argument.choices)
        return " or ".join(filter(None, [listed, describe_types(kinds)]))
    return describe_types(members(argument.annotation))


def _near(word: Any, choices: tuple[str, ...]) -> str:
    suggestion = did_you_mean(str(word), choices)
    return suggestion if suggestion.startswith("; did") else ""  # the choices are listed already


def _tracker_problem(value: str | list[str]) -> str | None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers = sorted(set(INTEGRATION_TO_CALLBACK) - {"wandb"})
    for name in [value] if isinstance(value, str) else value:
        if name == "wandb":
            return "Weights & Biases has its own section; write `tracking: {wandb: {…}}` and remove it here"
        if name == "all":
            return "`all` takes in whatever is installed, Weights & Biases too; name the trackers"
        if name != "none" and name not in trackers:
            return f"unknown tracker `{name}`{did_you_mean(name, [*trackers, 'none'])}"
    return None


class _Range(NamedTuple):
    words: str
    holds: Callable[[float], bool]


_AT_LEAST_0 = _Range("a number of at least 0", lambda x: x >= 0)
_ABOVE_0 = _Range("a number greater than 0", lambda x: x > 0)
_AT_LEAST_1 = _Range("at least 1", lambda x: x >= 1)
_COUNT = _Range("at least 0", lambda x: x >= 0)
_SEED = _Range("from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
_BETA = _Range("a number of at least 0 and less than 1", lambda x: 0 <= x < 1)
_SHARE_OR_STEPS = "a whole number of steps, or a share of all steps below 1"
_STEPS = _Range(f"{_SHARE_OR_STEPS}, greater than 0", lambda x: x > 0 and (x < 1 or x == int(x)))

_RANGES = {
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "num_train_epochs": _AT_LEAST_0,
    "max_steps": _Range("at least 1 (or -1: `num_train_epochs` decides)", lambda x: x >= 1 or x == -1),
    "learning_rate": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "warmup_steps": _Range(f"{_SHARE_OR_STEPS}, at least 0", lambda x: x >= 0 and (x < 1 or x == int(x))),
    "max_grad_norm": _AT_LEAST_0,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _ABOVE_0,
    "label_smoothing_factor": _BETA,
    "neftune_noise_alpha": _ABOVE_0,
    "logging_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "dataloader_num_workers": _COUNT,
    "dataloader_prefetch_factor": _AT_LEAST_1,
    "ddp_bucket_cap_mb": _AT_LEAST_1,
    "ddp_timeout": _AT_LEAST_1,
    "seed": _SEED,
    "data_seed": _SEED,
}


def _contradictions(checked: dict[str, Any], places: Mapping[str, Place]) -> list[tuple[str, str]]:
    """Return what `TrainingArguments` would refuse only once it is built, and what it would silently resolve."""

    def get(name: str) -> Any:
        value = checked.get(name, installed_arguments()[name].default)
        return value.value if isinstance(value, Enum) else value

    def at(name: str) -> str:
        return f" ({places[name]})" if name in places else ""

    evaluates, saves, scheduler = get("eval_strategy"), get("save_strategy"), get("lr_scheduler_type")
    every = {"save": get("save_steps"), "eval": get("eval_steps") or get("logging_steps")}
    found: dict[str, str] = {}
    if get("max_steps") > 0 and "num_train_epochs" in checked:
        epochs = f"`num_train_epochs`{at('num_train_epochs')}"
        found["max_steps"] = f"contradicts {epochs}: keep one; write `null` for the one that is inherited"
    if get("bf16") and get("fp16"):
        found["fp16"] = f"contradicts `bf16`{at('bf16')}: keep one, rather `bf16`"
    if saves == "best" and (evaluates == "no" or not (get("metric_for_best_model") or get("load_best_model_at_end"))):
        found["save_strategy"] = "`best` saves nothing without both `eval_strategy` and `metric_for_best_model`"
    elif get("load_best_model_at_end") and evaluates == "no":
        found["load_best_model_at_end"] = "the best model is found by evaluating; set `eval_strategy`"
    elif get("load_best_model_at_end") and saves not in (evaluates, "best"):
        found["load_best_model_at_end"] = (
            f"needs a checkpoint at each evaluation, but `save_strategy` is `{saves}` and `eval_strategy` is "
            f"`{evaluates}`; make them equal, or write `save_strategy: best`"
        )
    elif get("load_best_model_at_end") and saves == "steps" and not _is_multiple(every["save"], every["eval"]):
        found["load_best_model_at_end"] = (
            f"needs an evaluation wherever it saves, but `save_steps` is {every['save']} and `eval_steps` is "
            f"{every['eval']}; make `save_steps` a multiple of `eval_steps`"
        )
    if scheduler in ("reduce_lr_on_plateau", "greedy") and evaluates == "no":
        found["lr_scheduler_type"] = f"`{scheduler}` follows the evaluations; set `eval_strategy`"
    if get("dataloader_prefetch_factor") is not None and get("dataloader_num_workers") == 0:
        found["dataloader_prefetch_factor"] = "needs `dataloader_num_workers` of at least 1"
    return list(found.items())


def _is_multiple(steps: float, of: float) -> bool:
    if (steps < 1) != (of < 1):
        return False  # a share of the run and a number of steps have no ratio yet
    return math.isclose(steps / of, round(steps / of), abs_tol=1e-9)
