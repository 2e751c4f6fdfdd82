"""The recipe's `adapter` section: small weights of peft that train in place of the model's own.

Its keys are those of the peft configuration that `type` names. What the kit does not take is refused when the recipe
is loaded; what the installed peft does not take by `check_adapter`, since importing peft takes seconds.
"""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator

from kit.errors import UserError, suggest
from kit.recipe.section import Section, Text

if TYPE_CHECKING:
    from peft import PeftConfig

# What peft raises for settings that do not go together, or not with a model.
PEFT_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, KeyError, re.error)
_INITIALISATIONS = {"eva", "corda", "loftq", "lora_ga"}
# What users of other tools write for a type, and what it is in peft.
_WRITTEN_AS = {
    "dora": "`type: lora` and `use_dora: true`",
    "rslora": "`type: lora` and `use_rslora: true`",
    "qlora": "`type: lora`, and `load_in_4bit: true` in `model`",
}
_HIGHEST_RANK = 65_536
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_LEAVING, _CHANGING = ("gaussian", "orthogonal"), ("pissa", "olora")  # the base model's weights
_OWN_DATA = "this initialisation looks at training data or at quantised weights first, which the kit does not do"

_OWN_STEPS = "it has to be told of each optimizer step, which Trainer does not do, so its ranks would never adapt"
_OWN_LOSS = "it needs terms of its own in the loss, which is the task's alone"

# Keys of peft's configurations that the kit decides, or that do not go together with what it promises.
REFUSED_KEYS = {
    "peft_type": "write `type`",
    "task_type": "it follows from `task`",
    "base_model_name_or_path": "it follows from `model.name_or_path`",
    "revision": "it follows from `model.revision`",
    "inference_mode": "the adapter is there to be trained",
    "auto_mapping": "peft writes it itself",
    "peft_version": "peft writes it itself",
    "fan_in_fan_out": "it follows from the kind of the layers, which the kit looks at",
    "trainable_token_indices": "`vocabulary` and the rows of its new tokens do this without copying the whole matrix",
    "ensure_weight_tying": "tied matrices are no targets of an adapter",
    "layer_replication": "the base model keeps its blocks",
    "megatron_config": "the kit does not train with Megatron",
    "megatron_core": "the kit does not train with Megatron",
    "arrow_config": "it combines several adapters; a recipe trains one",
    "alora_invocation_tokens": "it takes a row for one text, and packed rows hold several documents",
    "monteclora_config": _OWN_LOSS,
    "kasa_config": _OWN_LOSS,
    "use_asa": _OWN_STEPS,
    "eva_config": _OWN_DATA,
    "corda_config": _OWN_DATA,
    "loftq_config": _OWN_DATA,
    "lora_ga_config": _OWN_DATA,
}

_VIRTUAL_TOKENS = (
    "it puts learned states before a row, which the documents packed into that row would all see, and which no plain "
    "model can hold after a merge"
)
_SEVERAL = "it chooses among several adapters or tasks; a recipe trains one"

# Types of peft that the kit does not take, by their name in `peft.PeftType`.
REFUSED_TYPES = {
    "ADALORA": _OWN_STEPS,
    "ADAPTION_PROMPT": _VIRTUAL_TOKENS,
    "CARTRIDGE": _VIRTUAL_TOKENS,
    "CPT": _VIRTUAL_TOKENS,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "POLY": _SEVERAL,
    "PREFIX_TUNING": _VIRTUAL_TOKENS,
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "SHADOW": "it puts a second network beside the model, not weights into its layers",
    "TRAINABLE_TOKENS": "`vocabulary` with `freezing: {trainable: {new_tokens: true}}` trains the rows of new tokens",
    "XLORA": _SEVERAL,
}


class AdapterSection(Section):
    """An adapter of peft: its type, and the keys of that type's configuration under peft's own names."""

    model_config = ConfigDict(extra="allow")

    type: Text
    """`lora`, `ia3`, `vera`, … or any other name of `peft.PeftType` that puts weights into a model's layers."""

    @model_validator(mode="after")
    def _keys_that_are_the_recipes(self) -> "AdapterSection":
        if reason := REFUSED_TYPES.get(self.type.upper()):
            raise ValueError(f"`type: {self.type}` is not taken: {reason}")
        for name in self.options():
            if name in REFUSED_KEYS:
                raise ValueError(f"the kit does not take `{name}`: {REFUSED_KEYS[name]}")
        return self

    def options(self) -> dict[str, Any]:
        """Return what goes to peft's configuration; `null` takes back what `extends` inherits."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


def check_adapter(section: AdapterSection, task: str = "causal-lm") -> "PeftConfig":
    """Return the installed peft's configuration for a recipe's section, as far as no model is needed; imports peft.

    Args:
        section: the recipe's.
        task: as the recipe has it.

    Raises:
        UserError: a type or key that peft does not know, a value of another type or out of range, or what peft refuses.
    """
    # Only here: the import takes seconds, and this module is imported by commands that do not train.
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    types = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value not in REFUSED_TYPES}
    if section.type.upper() not in types:
        valid = [name.lower() for name in types]
        written = _WRITTEN_AS.get(section.type.lower())
        near = suggest(section.type, valid) or f"; valid: {', '.join(sorted(valid))}"
        raise UserError(f"adapter.type: peft has no type `{section.type}`{f'; write {written}' if written else near}")
    cls = types[section.type.upper()]
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in REFUSED_KEYS]
    values = {}
    for name, value in section.options().items():
        if name not in names:
            near = suggest(name, names) or f"; valid: {', '.join(sorted(names))}"
            raise UserError(f"adapter.{name}: unknown key of peft's {cls.__name__}{near}")
        values[name] = _checked(name, value, hints[name])
    if task != "causal-lm" and "modules_to_save" not in hints:
        raise UserError(f"adapter.type: `{section.type}` cannot train the head of a classifier beside it; `lora` can")
    try:
        return cls(task_type=_TASK_TYPES[task], **values)
    except PEFT_ERRORS as error:
        raise UserError(f"adapter: peft refuses these settings: {peft_reason(error)}") from None


def _checked(name: str, value: Any, annotation: Any) -> Any:
    """Return a value of the YAML file as its field's type, such as a nested dataclass; refuse nonsense."""
    from kit.recipe.words import describe_types, describe_value, members  # which knows the whole recipe, and so this

    if name == "init_lora_weights" and str(value).lower() in _INITIALISATIONS:
        raise UserError(f"adapter.init_lora_weights: `{value}`: {REFUSED_KEYS['eva_config']}; leave the key out")
    if name == "init_lora_weights" and re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value  # in the annotation it is a text about its form
    if name == "init_lora_weights" and isinstance(value, str) and value not in (*_CHANGING, *_LEAVING):
        expected = f"true, false, {' or '.join(f'`{kind}`' for kind in _LEAVING)}"
        raise UserError(f"adapter.{name}: found {describe_value(value)}; expected {expected}")
    nested = next((kind for kind in members(annotation) if dataclasses.is_dataclass(kind)), None)
    if nested and isinstance(value, dict):
        return _nested(name, value, nested)
    if nested:
        raise UserError(f"adapter.{name}: found {describe_value(value)}; expected a mapping")
    try:
        # As JSON, which lets lists stand for tuples, but no text for a number.
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        checked = adapter.validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError):
        expected = describe_types(members(annotation)) or str(annotation)
        raise UserError(f"adapter.{name}: found {describe_value(value)}; expected {expected}") from None
    for key, number in _numbers(name, value):
        if problem := _out_of_range(name, number):
            raise UserError(f"adapter.{name}{key}: found {describe_value(number)}; expected {problem}")
    return checked


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the value; of ranks and scales by pattern each, after a look at its pattern."""
    if name not in _BY_PATTERN or not isinstance(value, dict):
        yield "", value
        return
    for pattern, number in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"adapter.{name}: `{pattern}` is no regular expression: {error}") from None
        yield f".{pattern}", number


def _nested(name: str, value: dict[str, Any], kind: type) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            near = suggest(str(key), names) or f"; valid: {', '.join(names)}"
            raise UserError(f"adapter.{name}.{key}: unknown key of peft's {kind.__name__}{near}")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (name, *first["loc"])))
        raise UserError(f"adapter.{where}: {first['msg'].removeprefix('Value error, ')}") from None
    except (TypeError, *PEFT_ERRORS) as error:
        raise UserError(f"adapter.{name}: {peft_reason(error)}") from None


def _out_of_range(name: str, value: Any) -> str | None:
    """Return what was expected instead of a number that peft would take, or refuse only inside a layer."""
    if name in _BY_PATTERN and (isinstance(value, bool) or not isinstance(value, (int, float))):
        return "a number for each pattern"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "a finite number"
    if name in ("r", "rank_pattern") and not 1 <= value <= _HIGHEST_RANK:
        return f"a rank from 1 to {_HIGHEST_RANK:,}"
    if name.endswith(("alpha", "alpha_pattern")) and value <= 0:
        return "a number greater than 0: what the adapter adds is multiplied by it"
    if name.endswith("dropout") and not 0 <= value < 1:
        return "a number of at least 0 and less than 1"
    return None


def peft_reason(error: BaseException) -> str:
    """Return what peft says, on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
