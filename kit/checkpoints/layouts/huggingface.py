"""Hugging Face's own layout: a model folder with config.json, or its bare tensors beside one."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.errors import UserError
from kit.names import fold_names

NAME = "hf"
CONFIG = "config.json"  # where settings keep the one that lies beside a checkpoint
ABOUT = "Hugging Face's model folder: config.json, model.safetensors, tokenizer."
# Constants that older versions wrote beside the weights.
BUFFERS = (r".*\.(attn|attention)\.(bias|masked_bias)", r".*rotary_emb\.inv_freq")
SUFFIXES = ("",)


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor that a model of this configuration is saved with; a tied head is no tensor of its own."""
    tied = tied_names(config)
    return {name: tuple(t.shape) for name, t in _empty_model(config).state_dict().items() if name not in tied}


def tied_names(config: PreTrainedConfig) -> set[str]:
    """Return the names of tensors that are others, such as a tied head."""
    return set(_empty_model(config).all_tied_weights_keys) if config.tie_word_embeddings else set()


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    return _built(type(config), config.to_json_string(use_diff=False))


@lru_cache(maxsize=4)
def _built(kind: type[PreTrainedConfig], config: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind.from_dict(json.loads(config)))


def read_config(checkpoint: Checkpoint, given: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration that lies beside the tensors.

    Raises:
        UserError: there is none, or what is given disagrees with it.
    """
    stored = checkpoint.settings.get(CONFIG) or checkpoint.settings.get("config")
    if not isinstance(stored, dict) or "model_type" not in stored:
        raise UserError(
            f"{checkpoint.path}: no config.json beside it; expected Hugging Face's model folder, or --config"
        )
    for name, value in given.items():
        if stored.get(name, value) != value:
            raise UserError(f"{checkpoint.path}: --set says {name} {value}, config.json {stored[name]}")
    stored = {**stored, **given}
    try:
        config = AutoConfig.for_model(stored.pop("model_type"), **stored)
        expected_shapes(config)
    except Exception as error:  # each architecture fails in its own way
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint.path}: config.json describes no causal language model: {reason}") from error
    return config


def rename(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return a checkpoint's tensors under the names that a whole model has, and notes.

    A file of the bare model without its head (`wte.weight`) is one of the whole model (`transformer.wte.weight`).
    """
    expected = expected_shapes(config)
    if any(name in expected for name in checkpoint.tensors):
        return dict(checkpoint.tensors), []
    prefix = f"{_prefix(config)}."
    renamed = {name if name in expected else prefix + name: tensor for name, tensor in checkpoint.tensors.items()}
    return renamed, [f"names begin with `{prefix}` in the whole model"]


def _prefix(config: PreTrainedConfig) -> str:
    return model_class(config).base_model_prefix


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a configuration's causal language model."""
    return AutoModelForCausalLM._model_mapping[type(config)]


@torch.no_grad()
def logits_of_tensors(tensors: Mapping[str, LazyTensor], config: PreTrainedConfig, input_ids: Tensor) -> Tensor:
    """Return the logits of a model's tensors in Hugging Face's code, in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    places = model.state_dict()  # of a tied head too, which is the embeddings
    for name, tensor in tensors.items():
        places[name].copy_(tensor.read())
    return model.eval()(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def logits_of_folder(folder: Path, input_ids: Tensor) -> Tensor:
    """Return the logits of a model folder as `from_pretrained` loads it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(input_ids=input_ids, use_cache=False).logits


def embeddings_name(config: PreTrainedConfig) -> str:
    """Return the name of the input embeddings, which a tied head is."""
    model = _empty_model(config)
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def why_not(checkpoint: Checkpoint) -> str | None:
    """Return why the configuration beside a checkpoint does not describe its tensors, by names and shapes, or None."""
    try:
        config = read_config(checkpoint, {})
    except UserError as error:
        return str(error)
    tensors, _ = rename(checkpoint, config)
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in tensors]:
        return f"config.json describes tensors that are not there: {fold_names(missing)}"
    wrong = [f"`{n}` {tensors[n].shape}, not {shape}" for n, shape in expected.items() if tensors[n].shape != shape]
    return f"config.json describes other shapes: {'; '.join(wrong[:3])}" if wrong else None
