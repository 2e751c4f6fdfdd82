"""The model: pretrained, from the Hub or a folder, or fresh from a configuration."""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from kit.console import say, warn
from kit.errors import UserError, did_you_mean, is_out_of_memory
from kit.files import hash_file, hash_values
from kit.model.alignment import check_embeddings, check_ids, check_positions, check_special_ids
from kit.model.hub import ADAPTER_RECORD, check_weights, expand, from_hub, is_adapter
from kit.model.quantization import check_quantization, copy_dequantized, keep_unpacked, quantization_config
from kit.recipe.models import ModelSection

if TYPE_CHECKING:
    from peft import PeftModel

_CONFIGURATIONS = {"config.json", "generation_config.json", "adapter_config.json", ADAPTER_RECORD}
# Most `config.json` on the Hub have these; transformers 5 moves what it knows of them into `rope_parameters`.
_FORMER_ROPE_NAMES = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}


def load_causal_lm(section: ModelSection, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> PreTrainedModel:
    """Load the causal LM of a recipe, on the CPU, in `section.dtype`.

    Raises:
        UserError: it cannot be loaded, is no causal LM, or its weights are incomplete or not tied as it says.
    """
    if holds_adapter(section):
        return load_adapted(expand(section.name_or_path), section).get_base_model()
    options = {"dtype": getattr(torch, section.dtype)}
    if section.from_config is not None:
        # The seed alone decides a fresh model's weights, whatever drew random numbers before.
        set_seed(seed)
        config = _fresh_config(section.from_config, tokenizer)
        options["attn_implementation"] = _attention(section, config)
        try:
            return AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:  # each architecture fails in its own way on sizes that do not go together
            if is_out_of_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"model.from_config: no model can be built from it: {reason}") from error
    name = expand(section.name_or_path)
    config = check_pretrained(section, block_size=1)
    options["attn_implementation"] = _attention(section, config)
    if section.load_in_4bit:
        check_quantization(section.load_in_4bit)
        options["quantization_config"] = quantization_config(options["dtype"])
    # On the Hub a bot offers conversions of pickled weights, which transformers would take from its branch: a commit
    # other than the one that was asked for, which nobody has looked at.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    with from_hub("model.name_or_path", name, section.revision, "model.safetensors") as hub_options:
        model, info = AutoModelForCausalLM.from_pretrained(
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
    _check_complete(name, info)
    check_embeddings(model)
    keep_unpacked(model)
    if model.can_generate() and model.generation_config._from_model_config:
        # Made from the file, without what the recipe overrides in it.
        for key in {"bos_token_id", "eos_token_id", "pad_token_id"} & section.config.keys():
            setattr(model.generation_config, key, getattr(config.get_text_config(), key))
    return model


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
    try:
        check_pretrained(base, block_size=1)
    except UserError as error:
        raise UserError(
            f"{folder}: the base model that this adapter belongs to cannot be used: {error}; if it has moved, write "
            f"where it is now as `name` into {Path(folder) / ADAPTER_RECORD}"
        ) from None
    model = load_causal_lm(base, None, seed=0)
    facts = base_facts(model)
    if dequantize and base.load_in_4bit:
        quantized, model = model, load_causal_lm(base.model_copy(update={"load_in_4bit": False}), None, seed=0)
        copy_dequantized(quantized, model)
    return load_adapter(model, folder, facts)


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


def check_pretrained(section: ModelSection, block_size: int) -> PreTrainedConfig:
    """Check of a pretrained model what can be told without loading it, and return its configuration as overridden.

    Raises:
        UserError: it is not to be found, is no causal LM, has fewer positions than a block, names special tokens that
            it has no embedding for, cannot use the attention kernel that the recipe names, or its weights are pickled,
            missing or cut off.
    """
    config = _override(load_config(section), section.config, "model.config")
    check_config(config, section.name_or_path, block_size)
    if isinstance(rows := getattr(config.get_text_config(), "vocab_size", None), int):
        check_special_ids(config.get_text_config(), rows, section.name_or_path)
    _check_sdpa(section, config)
    if Path(name := expand(section.name_or_path)).is_dir():
        check_weights("model.name_or_path", name)
    return config


def model_key(section: ModelSection, seed: int) -> str:
    """Return a hash of the weights that a recipe starts from: the files, the Hub commit, or configuration and seed."""
    settings = [section.config, section.dtype, section.attn_implementation]
    if section.from_config is not None:
        # The tokenizer gives the size of the vocabulary and the special ids where the configuration does not.
        return hash_values("fresh", section.from_config, str(section.tokenizer), seed, torch.__version__, settings)
    folder = Path(expand(section.name_or_path))
    if folder.is_dir():
        suffixes = {".safetensors", ".py"} if section.trust_remote_code else {".safetensors"}
        files = sorted(p for p in folder.iterdir() if p.suffix in suffixes or p.name in _CONFIGURATIONS)
        return hash_values([(p.name, hash_file(p)) for p in files], settings)
    commit = getattr(load_config(section), "_commit_hash", None)
    return hash_values(section.name_or_path, commit or section.revision, settings)


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


def check_config(config: PreTrainedConfig, name: str, block_size: int) -> None:
    """Check that a configuration is a causal LM's and has the positions of a block.

    Raises:
        UserError: it is not, or has not.
    """
    if not _is_causal_lm(config):
        raise UserError(
            f"model.name_or_path: `{name}` is of type `{config.model_type}`, which has no causal language model; "
            f"`task: causal-lm` needs a decoder such as GPT-2 or Llama"
        )
    check_positions(config, block_size)


def _attention(section: ModelSection, config: PreTrainedConfig) -> str | None:
    """Return the attention kernel to ask for; where None, transformers takes the best that the architecture has.

    Gemma 2 caps attention scores inside the softmax's argument, which SDPA's fused kernels cannot do: depending on its
    version transformers falls back, fails in the first forward pass, or leaves the cap out without a word.
    """
    _check_sdpa(section, config)
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if section.attn_implementation is None and cap is not None:
        say(f"attention: eager, since SDPA cannot cap attention scores (attn_logit_softcapping: {cap:g})")
        return "eager"
    return section.attn_implementation


def _check_sdpa(section: ModelSection, config: PreTrainedConfig) -> None:
    """Refuse SDPA for a model that it would compute wrongly, or not at all."""
    if section.attn_implementation != "sdpa":
        return
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if cap is not None:
        reason = f"cannot cap attention scores, as this `{config.model_type}` does (attn_logit_softcapping: {cap:g})"
    elif architecture is not None and not getattr(architecture, "_supports_sdpa", True):
        reason = f"does not work with `{config.model_type}` in transformers {transformers.__version__}"
    else:
        return
    raise UserError(f"model.attn_implementation: sdpa {reason}; leave the key out, or set it to `eager`")


def _fresh_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    values = copy.deepcopy(
        values
    )  # transformers completes `rope_parameters` in place, and the recipe is a key to stores
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.from_config.model_type: unknown `{model_type}`{did_you_mean(model_type, list(CONFIG_MAPPING))}"
        )
    not_causal = UserError(f"model.from_config.model_type: `{model_type}` has no causal language model")
    if type(CONFIG_MAPPING[model_type]()) not in AutoModelForCausalLM._model_mapping:
        raise not_causal
    values.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)  # some vocabularies skip ids
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    class_default = CONFIG_MAPPING[model_type]()
    former = _FORMER_ROPE_NAMES & values.keys() if hasattr(class_default, "rope_parameters") else set()
    present = {name: value for name, value in values.items() if name not in former}
    _override(class_default, present, "model.from_config")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.from_config: {' '.join(str(error).split())}") from error
    for name in former:
        if name in vars(config):  # taken as an attribute that nothing reads, not as a former name
            raise UserError(f"model.from_config.{name}: `{model_type}` has no such attribute; see `rope_parameters`")
    if not _is_causal_lm(config):
        raise not_causal
    return config


def _override(config: PreTrainedConfig, values: dict[str, Any], key: str) -> PreTrainedConfig:
    """Set attributes that the configuration class has; it would take any others without a word."""
    known = set(config.to_dict()) | set(config.attribute_map)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{key}.{name}: `{config.model_type}` has no such attribute{did_you_mean(name, known)}")
        try:
            setattr(config, name, copy.deepcopy(value))
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UserError(f"{key}.{name}: {' '.join(str(error).split())}") from error
    return config


def _is_causal_lm(config: PreTrainedConfig) -> bool:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    # BERT and its like have a causal head for use as decoders; their weights were not trained for it.
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that leave a part of the model at random; name what is in the file and not in the model."""
    wrong = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "mismatched", "unexpected")}
    listed = "; ".join(f"{kind}: {', '.join(keys[:8])}" for kind, keys in wrong.items() if keys)
    if wrong["missing"] or wrong["mismatched"]:
        raise UserError(f"model.name_or_path: the weights of `{name}` do not fit its architecture: {listed}")
    if wrong["unexpected"]:
        warn(f"`{name}` holds tensors that its architecture does not use: {listed}")
