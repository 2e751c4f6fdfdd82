"""The model: pretrained, from the Hub or a folder, or fresh from a configuration."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from kit.console import warn
from kit.errors import UserError, is_out_of_memory
from kit.files import hash_file, hash_values, read_json
from kit.model.alignment import check_embeddings, check_ids, check_special_ids
from kit.model.configuration import (
    CAUSAL_LM,
    CLASSIFIER,
    Kind,
    attention,
    check_config,
    check_sdpa,
    fresh_config,
    override,
    with_settings,
)
from kit.model.heads import draw_anew, head_modules, head_names
from kit.model.hub import ADAPTER_RECORD, check_weights, expand, from_hub, is_adapter
from kit.model.quantization import check_quantization, copy_dequantized, keep_unpacked, quantization_config
from kit.recipe.models import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel

_CONFIGURATIONS = {"config.json", "generation_config.json", "adapter_config.json", ADAPTER_RECORD}


def load_causal_lm(section: ModelSection, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> PreTrainedModel:
    """Load the causal LM of a recipe, on the CPU, in `section.dtype`.

    Raises:
        UserError: it cannot be loaded, is no causal LM, or its weights are incomplete or not tied as it says.
    """
    if holds_adapter(section):
        if stored_kind(section) is not CAUSAL_LM:
            raise UserError(
                f"model.name_or_path: `{section.name_or_path}` is a classifier, not a causal language model"
            )
        return load_adapted(expand(section.name_or_path), section).get_base_model()
    return load_model(section, tokenizer, seed, CAUSAL_LM)[0]


def load_model(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    kind: Kind,
    settings: Mapping[str, Any] = {},
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a whole model, on the CPU, in `section.dtype`, and tell which of its parameters began at random.

    Args:
        section: the recipe's.
        tokenizer: of a fresh model.
        seed: of random weights; nothing else decides them.
        kind: what it is loaded as.
        settings: the attributes of its configuration that are settled by the data.

    Raises:
        UserError: it cannot be loaded, is of another kind, or its weights are incomplete or not tied as it says.
    """
    if section.from_config is None:
        return _load_pretrained(section, seed, kind, settings)
    # The seed alone decides a fresh model's weights, whatever drew random numbers before.
    set_seed(seed)
    config = with_settings(fresh_config(kind.unsettled(section.from_config), tokenizer, kind), settings)
    kernel = attention(section, config, kind)
    try:
        model = kind.auto_class.from_config(config, dtype=getattr(torch, section.dtype), attn_implementation=kernel)
    except Exception as error:  # each architecture fails in its own way on sizes that do not go together
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"model.from_config: no model can be built from it: {reason}") from error
    return model, tuple(name for name, _ in model.named_parameters())


def _load_pretrained(
    section: ModelSection, seed: int, kind: Kind, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    name = expand(section.name_or_path)
    config = with_settings(check_pretrained(section, block_size=1, kind=kind), settings)
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    options["attn_implementation"] = attention(section, config, kind)
    if section.load_in_4bit:
        check_quantization(section.load_in_4bit)
        options["quantization_config"] = quantization_config(options["dtype"])
        if kind.new_head:
            # Which trains whole, and so is not to be rounded.
            with torch.device("meta"):
                empty = kind.auto_class.from_config(config, trust_remote_code=section.trust_remote_code)
            options["quantization_config"].llm_int8_skip_modules = list(head_modules(empty))
    # On the Hub a bot offers conversions of pickled weights, which transformers would take from its branch: a commit
    # other than the one that was asked for, which nobody has looked at.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with from_hub("model.name_or_path", name, section.revision, "model.safetensors") as hub_options:
        model, info = kind.auto_class.from_pretrained(
            name,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
            **hub_options,
        )
    new = _check_complete(name, model, info, kind)
    draw_anew(model, new, seed)
    check_embeddings(model)
    keep_unpacked(model)
    if model.can_generate() and model.generation_config._from_model_config:
        # Made from the file, without what the recipe overrides in it.
        for key in {"bos_token_id", "eos_token_id", "pad_token_id"} & section.config.keys():
            setattr(model.generation_config, key, getattr(config.get_text_config(), key))
    return model, new


def holds_adapter(section: ModelSection) -> bool:
    """Tell whether a recipe's model is a folder with an adapter rather than a whole model."""
    return section.name_or_path is not None and is_adapter(expand(section.name_or_path))


def load_adapted(folder: str | Path, section: ModelSection, dequantize: bool = False) -> "PeftModel":
    """Load the base model that an adapter belongs to, with the adapter in it, not merged.

    Args:
        folder: what `Adapter.write` wrote.
        section: of it counts whether code that comes with the base may run; all else is in the adapter's record.
        dequantize: hold the base in `dtype` where it was in 4 bits, with the values that it had there.

    Raises:
        UserError: the base cannot be loaded or is another one, or the adapter is damaged.
    """
    from kit.model.adapter_files import base_facts, load_adapter, read_adapter  # peft's import takes seconds

    record = read_adapter(folder)
    if not record["name"]:
        raise UserError(f"{folder}: {ADAPTER_RECORD} names no base model: write where it is as `name`")
    known = {name: record[name] for name in ("revision", "load_in_4bit", "dtype", "config", "attn_implementation")}
    # A folder is looked for where it was; one that is gone is not to be asked of the Hub as a name.
    places = [place for place in (record["path"], expand(record["name"])) if place and Path(place).is_dir()]
    name = places[0] if places else record["path"] or record["name"]
    base = section.model_copy(update={**known, "name_or_path": name})
    kind, settings = _adapted_kind(folder)
    try:
        check_pretrained(base, block_size=1, kind=kind)
    except UserError as error:
        raise UserError(
            f"{folder}: the base model that this adapter belongs to cannot be used: {error}; if it has moved, write "
            f"where it is now as `name` into {Path(folder) / ADAPTER_RECORD}"
        ) from None
    model, _ = load_model(base, None, 0, kind, settings)
    facts = base_facts(model)
    if dequantize and base.load_in_4bit:
        quantized, plain = model, base.model_copy(update={"load_in_4bit": False})
        model, _ = load_model(plain, None, 0, kind, settings)
        copy_dequantized(quantized, model)
    return load_adapter(model, folder, facts)


def _adapted_kind(folder: str | Path) -> tuple[Kind, dict[str, Any]]:
    """Return what the base model of an adapter is loaded as; a classifier's labels are in the adapter's folder."""
    if read_json(Path(folder) / ADAPTER_CONFIG_NAME)["task_type"] != "SEQ_CLS":
        return CAUSAL_LM, {}
    config = AutoConfig.from_pretrained(folder)
    names = ("id2label", "label2id", "problem_type", "kit_classifier")
    return CLASSIFIER, {name: getattr(config, name) for name in names if hasattr(config, name)}


def stored_kind(section: ModelSection) -> Kind:
    """Return what a pretrained model was saved as: a classifier, or what a causal LM is made of."""
    if holds_adapter(section):
        return _adapted_kind(expand(section.name_or_path))[0]
    saved_as = getattr(load_config(section), "architectures", None) or ()
    return CLASSIFIER if any(str(name).endswith("ForSequenceClassification") for name in saved_as) else CAUSAL_LM


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the configuration of a pretrained model as it is stored."""
    name = expand(section.name_or_path)
    with from_hub("model.name_or_path", name, section.revision) as options:
        return AutoConfig.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code, **options
        )


def model_type(section: ModelSection) -> str:
    """Return the `model_type` of a recipe's model."""
    return str(section.from_config["model_type"]) if section.from_config else load_config(section).model_type


def check_pretrained(section: ModelSection, block_size: int, kind: Kind = CAUSAL_LM) -> PreTrainedConfig:
    """Check of a pretrained model what can be told without loading it, and return its configuration as overridden.

    Raises:
        UserError: it is not to be found, is of another kind, has fewer positions than a block, names special tokens
            that it has no embedding for, cannot use the attention kernel that the recipe names, or its weights are
            pickled, missing or cut off.
    """
    config = override(load_config(section), kind.unsettled(section.config), "model.config")
    check_config(config, section.name_or_path, block_size, kind)
    if isinstance(rows := getattr(config.get_text_config(), "vocab_size", None), int):
        check_special_ids(config.get_text_config(), rows, section.name_or_path)
    check_sdpa(section, config, kind)
    if Path(name := expand(section.name_or_path)).is_dir():
        check_weights("model.name_or_path", name)
    return config


def model_key(section: ModelSection, seed: int) -> str:
    """Return a hash of the weights that a recipe starts from: the files, the Hub commit, or configuration and seed."""
    settings = [section.config, section.dtype, section.attn_implementation, section.load_in_4bit]
    if section.from_config is not None:
        # The tokenizer gives the size of the vocabulary and the special ids where the configuration does not.
        return hash_values("fresh", section.from_config, str(section.tokenizer), seed, torch.__version__, settings)
    folder = Path(expand(section.name_or_path))
    if folder.is_dir():
        suffixes = {".safetensors", ".py"} if section.trust_remote_code else {".safetensors"}
        files = sorted(p for p in folder.iterdir() if p.suffix in suffixes or p.name in _CONFIGURATIONS)
        return hash_values([(p.name, _hash_once(p, (s := p.stat()).st_size, s.st_mtime_ns)) for p in files], settings)
    commit = getattr(load_config(section), "_commit_hash", None)
    return hash_values(section.name_or_path, commit or section.revision, settings)


@functools.cache  # of 70 billion parameters it takes minutes, and a run asks at its start and when it has loaded them
def _hash_once(file: Path, size: int, changed_ns: int) -> str:
    return hash_file(file)


def check_vocabulary(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check by its configuration alone that a model has an embedding for each id, before anything is tokenised.

    Raises:
        UserError: the tokenizer belongs to another model.
    """
    if section.from_config is not None:
        rows = section.from_config.get("vocab_size")
    else:
        rows = getattr(load_config(section).get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        check_ids(tokenizer, rows, section.name_or_path)


def _check_complete(name: str, model: PreTrainedModel, info: dict[str, Any], kind: Kind) -> tuple[str, ...]:
    """Refuse weights that leave a part of the model at random; name what is in the file and not in the model.

    Returns:
        The parameters that the weights do not give: of a head that may be new, in the model's order.
    """
    wrong = {what: {str(each) for each in _keys(info, what)} for what in ("missing", "mismatched", "unexpected")}
    new = ()
    if kind.new_head:
        new = tuple(key for key in head_names(model) if key in wrong["missing"] | wrong["mismatched"])
        base = f"{model.base_model_prefix}."
        # Nobody wants the head that the weights were trained with, such as an LM's, or a pooler that nothing reads.
        wrong["unexpected"] = {k for k in wrong["unexpected"] if k.startswith(base) and ".pooler." not in k}
        wrong["missing"], wrong["mismatched"] = wrong["missing"] - {*new}, wrong["mismatched"] - {*new}
    listed = "; ".join(f"{what}: {', '.join(sorted(keys)[:8])}" for what, keys in wrong.items() if keys)
    if wrong["missing"] or wrong["mismatched"]:
        raise UserError(f"model.name_or_path: the weights of `{name}` do not fit its architecture: {listed}")
    if wrong["unexpected"]:
        warn(f"`{name}` holds tensors that its architecture does not use: {listed}")
    return new


def _keys(info: dict[str, Any], what: str) -> list[str]:
    """Return the names of tensors; of those of another shape transformers gives the shapes too."""
    return [key if isinstance(key, str) else key[0] for key in info.get(f"{what}_keys") or ()]
