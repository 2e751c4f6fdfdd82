"""The model card of a run: what a stranger has to know of its model, and nothing of the text or the machine."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kit.model.hub import expand
from kit.recipe.models import ModelSection, Recipe

TAG = "domain-adaptation-kit"

_FIGURES = {
    "causal-lm": {
        "bits_per_byte": ("bits per byte", "{:.4f}", "{:+.4f}"),
        "perplexity": ("perplexity", "{:,.2f}", "{:+,.2f}"),
        "token_accuracy": ("token accuracy", "{:.1%}", "{:+.1%}"),
    },
    "sequence-classification": {
        "accuracy": ("accuracy", "{:.1%}", "{:+.1%}"),
        "f1_macro": ("macro-F1", "{:.3f}", "{:+.3f}"),
        "nll": ("nats", "{:.4f}", "{:+.4f}"),
        "ece": ("calibration error (ECE)", "{:.3f}", "{:+.3f}"),
    },
}
_BETTER = {
    "causal-lm": "Lower bits per byte and perplexity are better; bits per byte compare across tokenizers.",
    "sequence-classification": "Higher accuracy and macro-F1 are better, lower nats and ECE.",
}
# What tells of a machine or a person; a value that could be a path is left out whatever its key.
_PRIVATE = re.compile(r"^(hub_|report_to)|dir$|token|key|secret|deepspeed|fsdp|checkpoint$")
_PLAIN = re.compile(r"[\w.-]{1,40}")

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

{% if adapter %}This is an adapter (peft, `{{ adapter.type }}`): the base model is loaded with it.

{% endif %}```python
{{ snippet }}
```
{% if labels %}
Labels: {{ labels }}.
{% endif %}
## Figures

{% if figures %}The same examples before training and after it. {{ better }}

| set | figure | before | after | Δ |
|---|---|---:|---:|---:|
{% for row in figures %}| {{ row | join(" | ") }} |
{% endfor %}{% else %}Nothing was measured.
{% endif %}
## How it was trained

{% for line in how %}- {{ line }}
{% endfor %}{% if settings %}
| setting | value |
|---|---|
{% for name, value in settings %}| `{{ name }}` | {{ value }} |
{% endfor %}{% endif %}
Versions: {{ versions }}.

## Limits

{% for line in limits %}- {{ line }}
{% endfor %}"""

_CAUSAL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}"{code})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))"""
_CLASSIFIER = """\
from transformers import pipeline

classify = pipeline("text-classification", model="{place}"{code})
print(classify("A text to classify."{options}))"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained("{place}")
config = AutoConfig.from_pretrained("{place}")
base = {auto}.from_pretrained("{base}", config=config, dtype="{dtype}"{code})
model = PeftModel.from_pretrained(base, "{place}")"""


def write_card(
    recipe: Recipe,
    manifest: Mapping[str, Any],
    scorecard: Mapping[str, Any],
    config: Any,
    *,
    dtype: str,
    repository: str | None = None,
    is_adapter: bool = False,
    added_tokens: int = 0,
) -> str:
    """Return the text of a run's model card.

    Args:
        recipe: what the run was told.
        manifest: of the run.
        scorecard: of the run.
        config: the model's configuration.
        dtype: of the weights that are handed on.
        repository: name on the Hub, if it is going to have one.
        is_adapter: whether the card is of an adapter rather than of a whole model.
        added_tokens: how many tokens the run added to the tokenizer.
    """
    classifies = recipe.task == "sequence-classification"
    base, datasets = hub_name(recipe.model), _hub_datasets(recipe)
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if classifies else "text-generation",
        tags=[TAG, recipe.task],
        datasets=datasets or None,
    )
    start = _described(recipe, config, base)
    kind = "a text classifier" if classifies else "a causal language model"
    names = [" ".join(config.id2label[n].split()) for n in sorted(config.id2label)] if classifies else []
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=repository.split("/")[-1] if repository else f"{config.model_type}, adapted",
        summary=f"{start}, adapted to {_sources(recipe, datasets)} as {kind}. Weights in {dtype}.",
        adapter=recipe.adapter if is_adapter else None,
        snippet=_snippet(recipe, config, repository or "path/to/this/folder", is_adapter),
        labels=", ".join(f"`{name}`" for name in names[:50]) + (", …" if len(names) > 50 else ""),
        figures=_figure_rows(scorecard),
        better=_BETTER[recipe.task],
        how=_how(recipe, manifest, added_tokens, is_adapter),
        settings=[(name, value) for name, value in sorted(recipe.training.items()) if _may_be_told(name, value)],
        versions=", ".join(f"{name} {found}" for name, found in manifest.get("versions", {}).items() if found),
        limits=_limits(recipe, scorecard, dtype),
    )
    return str(card).rstrip() + "\n"


def hub_name(section: ModelSection) -> str | None:
    """Return the name of a model that is known to be on the Hub, as its files are in the cache; else None.

    The name of a folder that is here no more looks the same, and is nobody's business.
    """
    name = section.name_or_path
    if name is None or not _is_repository(name):
        return None
    return name if isinstance(try_to_load_from_cache(name, "config.json", revision=section.revision), str) else None


def _hub_datasets(recipe: Recipe) -> list[str]:
    named = [getattr(source, "dataset", None) for source in recipe.data.train]
    return list(dict.fromkeys(name for name in named if name and _is_repository(name)))


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(expand(name)).exists()


def _described(recipe: Recipe, config: Any, base: str | None) -> str:
    if base:
        revision = f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""
        return f"[{base}](https://huggingface.co/{base}){revision}"
    fresh = recipe.model.from_config is not None
    return f"A {'fresh' if fresh else 'private'} model of type `{config.model_type}`"


def _sources(recipe: Recipe, datasets: list[str]) -> str:
    others = sum(getattr(source, "dataset", None) not in datasets for source in recipe.data.train)
    private = f"{others} private source{'s' if others > 1 else ''}" if others else ""
    return " and ".join(part for part in (", ".join(f"`{name}`" for name in datasets), private) if part)


def _snippet(recipe: Recipe, config: Any, place: str, is_adapter: bool) -> str:
    code = ", trust_remote_code=True" if getattr(config, "auto_map", None) else ""
    classifies = recipe.task == "sequence-classification"
    if is_adapter:
        auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        code = (f', revision="{recipe.model.revision}"' if recipe.model.revision else "") + code
        base, dtype = recipe.model.name_or_path, recipe.model.dtype
        return _ADAPTER.format(auto=auto, place=place, base=base, dtype=dtype, code=code)
    if not classifies:
        return _CAUSAL.format(place=place, code=code)
    several = config.problem_type == "multi_label_classification"
    return _CLASSIFIER.format(place=place, code=code, options=", top_k=None" if several else "")


def _figure_rows(scorecard: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, card in scorecard["sets"].items():
        for key, (title, form, change) in _FIGURES[scorecard["task"]].items():
            cells = [form.format(card[w][key]) if key in card.get(w, {}) else "–" for w in ("before", "after")]
            delta = change.format(card["delta"][key]) if key in card.get("delta", {}) else "–"
            if cells != ["–", "–"]:
                rows.append([name, title, *cells, delta])
    return rows


def _how(recipe: Recipe, manifest: Mapping[str, Any], added_tokens: int, is_adapter: bool) -> list[str]:
    total, trainable = manifest.get("parameters"), manifest.get("trainable")
    lines = [
        f"Task: `{recipe.task}`; seed {recipe.training.get('seed', 42)}; {manifest.get('precision', '')}".strip("; ")
    ]
    if total and trainable is not None:
        lines.append(f"{trainable:,} of {total:,} parameters trained ({trainable / total:.1%})")
    if recipe.freezing:
        lines.append("What trained changed with the steps" if recipe.freezing.schedule else "Parts were frozen by name")
    if recipe.adapter:
        options = {k: v for k, v in recipe.adapter.model_dump(mode="json").items() if v not in (None, (), [], {})}
        merged = "" if is_adapter else ", merged into the weights here"
        lines.append(f"Adapter{merged}: `{json.dumps(options)}`")
    lines.append(f"{added_tokens:,} tokens were added to the tokenizer" if added_tokens else "No token was added")
    block = getattr(recipe.data, "block_size", None)
    length = getattr(recipe.data, "max_length", None)
    lines += [f"Blocks of {block:,} tokens"] if block else [f"Texts of at most {length:,} tokens"] if length else []
    return lines


def _limits(recipe: Recipe, scorecard: Mapping[str, Any], dtype: str) -> list[str]:
    lines = [
        "It was measured on the sets above and on nothing else; other text may come out differently.",
        "It has the base model's biases and errors, and may have learned those of the text that it was adapted to.",
        "The licence is not stated here: those of the base model and of the training text decide.",
    ]
    if dtype != recipe.model.dtype:
        lines.append(f"The figures are of the weights in {recipe.model.dtype}, before they were turned into {dtype}.")
    if recipe.task == "sequence-classification":
        return [*lines, "It gives one of its labels to any text, also to one that none of them fits."]
    worse = [n for n, card in scorecard["sets"].items() if card["delta"].get("bits_per_byte", 0) > 0]
    if worse:
        lines.append(f"It predicts {', '.join(f'`{name}`' for name in worse)} worse than the base model does.")
    return [*lines, "It continues text; what it writes may be false, and may repeat what it was trained on."]


def _may_be_told(name: str, value: Any) -> bool:
    plain = isinstance(value, (bool, int, float)) or (isinstance(value, str) and _PLAIN.fullmatch(value))
    return bool(plain) and not _PRIVATE.search(name)
