"""The reference of recipes, `docs/recipes.md`: every key of every section, written from the models.

Types, defaults and descriptions are those of the pydantic fields; examples are cut out of shipped recipes. Only what is
no field stands here as text: how files are layered, and what the kit decides about `TrainingArguments`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from kit.recipe.adapter import REFUSED_KEYS, REFUSED_TYPES
from kit.recipe.models import CausalLmRecipe, Recipe
from kit.recipe.section import Section
from kit.recipe.shipped import find_recipe
from kit.recipe.tasks import RECIPES
from kit.recipe.training_names import ALIASES, REFUSED, REMOVED
from kit.recipe.words import members

_HEAD = """\
<!-- Written by `make docs` from kit/recipe/: change the fields' docstrings there, not this page. -->
# Recipes: every key

A recipe is one YAML file. `kit recipes` lists those that come with the kit, `kit recipes NAME --copy my_recipe.yaml`
copies one to start from, and `kit train my_recipe.yaml` runs it. An unknown key, a wrong type or a contradiction ends
the command before anything is read or loaded, with file, line and the nearest valid name. With the comment
`# yaml-language-server: $schema=…` on its first line, editors complete and check a recipe.
"""

_LAYERS = """\
## How files and the command line go together

`extends: other.yaml` inherits another recipe, named relative to the file that says so; that one may extend a third.

- Mappings are merged key by key. Anything else replaces what was inherited, lists as a whole.
- `null` takes back what was inherited: the key is then as if it had not been written.

{example}
`section.key=value` after the recipe on the command line replaces one value of the merged recipe. The value is YAML;
nothing after the `=` is null; an entry of a list is named by its number, from 0:

```console
kit train my_recipe.yaml training.learning_rate=5e-5 data.train.0.path=other.txt run.output_dir=runs/lr5e-5
```

Numbers are YAML 1.2's, so that `2e-5` is a number. Recipes hold no secrets: keys and tokens belong in the environment.
"""

_TRAINING = """\
The names, types and defaults are those of the installed transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments);
`kit schema` lists them with their descriptions. A value is checked before anything is loaded. One optimizer step of
each process takes `per_device_train_batch_size` × `gradient_accumulation_steps` × `data.block_size` tokens.
"""

DECIDED = {
    ("bf16", "fp16"): "Without either, `bf16` where the hardware multiplies it well, else fp32. `fp16` never on a CPU.",
    ("use_cpu",): "True where there is no accelerator.",
    ("dataloader_pin_memory",): "With an accelerator only.",
    ("report_to",): "`none` unless given. Weights & Biases has its own section, `tracking.wandb`.",
    ("ddp_find_unused_parameters",): "True where a probed step or a phase leaves a parameter without a gradient.",
    ("load_best_model_at_end",): "True with `run.early_stopping` where every checkpoint is of an evaluated step.",
    ("metric_for_best_model",): "Unless given, bits per byte of the first evaluation set, such as "
    "`domain_bits_per_byte`, and of a classifier `validation_f1_macro`; a figure of another set is named in the same "
    "way.",
    ("greater_is_better",): "Follows from the metric; a value that contradicts it is refused.",
}
"""What the kit decides about `TrainingArguments` that a recipe may give; what it may not give is in `REFUSED`."""

# Where the example of a section is cut out of; a section that no shipped recipe has is written out here.
_EXAMPLES = {
    "model": "text/lm_gpt2_full",
    "data": "text/lm_gpt2_full",
    "vocabulary": "chat/lm_gpt2_chat",
    "freezing": "chat/lm_gpt2_new-tokens",
    "adapter": "text/lm_gpt2_lora",
    "training": "text/lm_gpt2_full",
    "evaluation": "offline/lm_gpt2_adapt",
    "run": "text/lm_gpt2_full",
    "data of sequence-classification": "spam/cls_gpt2_last-block",
    "evaluation of sequence-classification": "spam/cls_gpt2_last-block",
}
_WRITTEN_EXAMPLES = {
    "task": "task: causal-lm\n",
    "tracking": "tracking:\n  wandb: {project: medical, tags: [gpt2]}\n",
}
_INHERITING_EXAMPLE = "text/lm_gpt2-large_checkpointing"


def reference_text() -> str:
    """Return the page as the text that is committed as `docs/recipes.md`."""
    sections = ([f"[`{name}`](#{name})", _described(name, field)] for name, field in _fields_of_recipe())
    overview = _table(("section", "holds"), sections)
    inheriting = find_recipe(_INHERITING_EXAMPLE).path.read_text(encoding="utf-8")
    body = [line for line in inheriting.splitlines() if not line.startswith("#")]
    parts = [_HEAD, overview, _LAYERS.format(example=_yaml("\n".join(body) + "\n"))]
    shown: set[type[Section]] = set()
    for name, field in _fields_of_recipe():
        parts.append(f"## {name}\n\n{_described(name, field)}\n")
        if name == "training":
            parts += [_TRAINING, _example(name), *_training_tables()]
            continue
        sections = _sections_in(field.annotation)
        parts += [_example(name)] if sections else [f"{_type(field)}; {_default_in_words(field)}.\n", _example(name)]
        for section in sections:
            shown.add(section)
            parts += [_fields_table(section), *_below(section, shown)]
        parts += _adapter_tables() if name == "adapter" else []
        for task, model in _other_tasks(name):
            [section] = _sections_in(model.model_fields[name].annotation)
            shown.add(section)
            parts += [f"### {name} of {task}\n\n{_first_paragraph(section)}\n", _example(f"{name} of {task}")]
            parts += [_fields_table(section), *_below(section, shown)]
    return "\n".join(part for part in parts if part)


def _fields_of_recipe() -> Iterator[tuple[str, FieldInfo]]:
    """Yield the sections of a recipe; one that each task has its own of as `causal-lm` has it."""
    for name, field in Recipe.model_fields.items():
        yield name, field if name == "task" else CausalLmRecipe.model_fields[name]


def _other_tasks(name: str) -> list[tuple[str, type[Recipe]]]:
    """Return the tasks that have another section of this name than `causal-lm`, with their models."""
    own = _sections_in(CausalLmRecipe.model_fields[name].annotation)
    return [(task, m) for task, m in RECIPES.items() if own and _sections_in(m.model_fields[name].annotation) != own]


def _described(name: str, field: FieldInfo) -> str:
    """Return the description of a recipe's section, with where those of other tasks are."""
    links = [f"of `{task}`: [below](#{name}-of-{task})" for task, _ in _other_tasks(name)]
    return " ".join([_describe(field), *(f"Here those of `causal-lm`; {link}." for link in links)])


def _below(section: type[Section], shown: set[type[Section]]) -> Iterator[str]:
    """Yield a part for each section inside a section, and inside those, that was not shown yet."""
    for field in section.model_fields.values():
        for inner in _sections_in(field.annotation):
            for model in (*reversed(_bases(inner)), inner):  # what others build on comes before them
                if model in shown:
                    continue
                shown.add(model)
                yield f"### {_title(model)}\n\n{_first_paragraph(model)}\n"
                yield _fields_table(model)
                yield from _below(model, shown)


def _fields_table(section: type[Section]) -> str:
    base = next(iter(_bases(section)), None)
    inherited = base.model_fields if base else {}
    own = {
        name: field
        for name, field in section.model_fields.items()
        if name not in inherited or inherited[name].description != field.description
    }
    rows = ([f"`{name}`", _type(field), _default(field), _describe(field)] for name, field in own.items())
    note = f"All keys of a {_link(base)}, and:\n\n" if base else ""
    return note + _table(("key", "type", "default", "meaning"), rows)


def _training_tables() -> Iterator[str]:
    yield "### What the kit decides\n"
    rows = ([", ".join(f"`{name}`" for name in names), text] for names, text in DECIDED.items())
    yield _table(("key", "value"), rows)
    yield "### Two names of one setting\n\nEither is taken, whichever the installed transformers has.\n"
    yield _table(("newer", "older"), ([f"`{newer}`", f"`{older}`"] for newer, older in ALIASES.items()))
    yield "### What the kit does not take\n"
    yield _table(("key", "reason"), _by_reason(REFUSED))
    yield "### Names that transformers no longer has\n"
    yield _table(("key", "instead"), _by_reason(REMOVED))


def _adapter_tables() -> Iterator[str]:
    yield "### Keys of peft that the kit does not take\n"
    yield _table(("key", "reason"), _by_reason(REFUSED_KEYS))
    yield "### Types of peft that the kit does not take\n"
    yield _table(("type", "reason"), _by_reason({name.lower(): reason for name, reason in REFUSED_TYPES.items()}))


def _by_reason(names: dict[str, str]) -> Iterator[list[str]]:
    """Yield a row for each reason, with all the names that it is given for."""
    for reason in dict.fromkeys(names.values()):
        yield [", ".join(f"`{name}`" for name, text in names.items() if text == reason), reason]


def _table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _yaml(text: str) -> str:
    return f"```yaml\n{text}```\n"


def _example(section: str) -> str:
    """Return a section as a shipped recipe has it, with its comments; empty where there is none."""
    if section in _WRITTEN_EXAMPLES:
        return _yaml(_WRITTEN_EXAMPLES[section])
    if section not in _EXAMPLES:
        return ""
    lines = find_recipe(_EXAMPLES[section]).path.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{section.split()[0]}:"))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return _yaml("\n".join(lines[start:end]) + "\n")


# ---- one field in words


def _describe(field: FieldInfo) -> str:
    """Return a field's description; that of its section where it has none of its own."""
    sections = _sections_in(field.annotation)
    text = field.description or (_first_paragraph(sections[0]) if sections else "")
    return " ".join(text.split())


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _type(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [f"{sign} {getattr(b, name)}" for b in field.metadata for name, sign in signs.items() if hasattr(b, name)]
    return " ".join([_type_in_words(field.annotation), ", ".join(bounds)]).strip()


def _type_in_words(annotation: Any) -> str:
    kinds = [kind for kind in members(annotation) if kind is not type(None)]
    return " or ".join(dict.fromkeys(_kind_in_words(kind) for kind in kinds))


def _kind_in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (tuple, list):
        return f"list of {_type_in_words(inner[0])}"
    if origin is dict:
        return "mapping" if inner[1] is Any else f"mapping from names to {_type_in_words(inner[1])}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return _link(kind)
    return {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping"}.get(kind, "any")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if isinstance(value, Section):
        value = {}  # all of its defaults
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _default_in_words(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"by default {_default(field)}"


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the models that an annotation names, at any depth, in order."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _sections_in(get_args(annotation)[0])
    if get_origin(annotation) in (tuple, list, dict, Union, UnionType):
        found = [model for part in get_args(annotation) if part is not ... for model in _sections_in(part)]
        return list(dict.fromkeys(found))
    return []


def _bases(section: type[Section]) -> list[type[Section]]:
    """Return the models that a section extends, the nearest first, as far as they have keys themselves."""
    return [parent for parent in section.__mro__[1:] if parent is not Section and issubclass(parent, Section)]


def _title(section: type[Section]) -> str:
    """Return the name of a section in words: `TrainSource` is a train source."""
    words = re.findall(r"[A-Z][a-z0-9]*", section.__name__.removesuffix("Section"))
    return " ".join(words).capitalize()


def _link(section: type[Section]) -> str:
    title = _title(section)
    return f"[{title.lower()}](#{title.lower().replace(' ', '-')})"
