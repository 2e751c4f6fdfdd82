"""The model: pretrained, from the Hub or a folder, or fresh from a configuration."""

from pathlib import Path
from typing import Any

import torch
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

from kit.console import warn
from kit.errors import UserError, did_you_mean
from kit.files import hash_file, hash_values
from kit.model.hub import from_hub
from kit.recipe.models import ModelSection

_CONFIGURATIONS = {"config.json", "generation_config.json"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}


def load_causal_lm(section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Load the causal LM of a recipe, on the CPU, in `section.dtype`.

    Raises:
        UserError: it cannot be loaded, is no causal LM, or its weights are incomplete.
    """
    dtype = getattr(torch, section.dtype)
    options = {"dtype": dtype, "attn_implementation": section.attn_implementation}
    if section.from_config is not None:
        # The seed alone decides a fresh model's weights, whatever drew random numbers before.
        set_seed(seed)
        config = _fresh_config(section.from_config, tokenizer)
        try:
            return AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:  # each architecture fails in its own way on sizes that do not go together
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"model.from_config: no model can be built from it: {reason}") from error
    name = section.name_or_path
    config = _override(load_config(section), section.config, "model.config")
    check_config(config, name, block_size=1)
    with from_hub("model.name_or_path", name):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    _check_complete(name, info)
    return model


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the configuration of a pretrained model as it is stored."""
    with from_hub("model.name_or_path", section.name_or_path):
        return AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )


def model_key(section: ModelSection, seed: int) -> str:
    """Return a hash of the weights that a recipe starts from: the files, the Hub commit, or configuration and seed."""
    settings = [section.config, section.dtype, section.attn_implementation]
    if section.from_config is not None:
        # The tokenizer gives the size of the vocabulary and the special ids where the configuration does not.
        return hash_values("fresh", section.from_config, str(section.tokenizer), seed, torch.__version__, settings)
    folder = Path(section.name_or_path)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES or p.name in _CONFIGURATIONS)
        return hash_values([(p.name, hash_file(p)) for p in files], settings)
    commit = getattr(load_config(section), "_commit_hash", None)
    return hash_values(section.name_or_path, commit or section.revision, settings)


def check_alignment(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Check that model, tokenizer and block size fit together.

    Raises:
        UserError: the tokenizer makes ids that the model has no embedding for, or blocks are longer than the model's
            positions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer's largest id is {largest:,}, but the model has {rows:,} embeddings: "
            f"this tokenizer belongs to another model"
        )
    _check_positions(model.config, block_size)


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
    _check_positions(config, block_size)


def _check_positions(config: PreTrainedConfig, block_size: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and block_size > positions:
        raise UserError(
            f"data.block_size: found {block_size:,}; expected at most {positions:,}, the positions that the model has"
        )


def _fresh_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    values = dict(values)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.from_config.model_type: unknown `{model_type}`{did_you_mean(model_type, list(CONFIG_MAPPING))}"
        )
    not_causal = UserError(f"model.from_config.model_type: `{model_type}` has no causal language model")
    if type(CONFIG_MAPPING[model_type]()) not in AutoModelForCausalLM._model_mapping:
        raise not_causal
    values.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    _override(CONFIG_MAPPING[model_type](), values, "model.from_config")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.from_config: {' '.join(str(error).split())}") from error
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
            setattr(config, name, value)
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
