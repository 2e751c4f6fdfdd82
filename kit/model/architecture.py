"""An architecture without its weights, and how stored tensors fit it; nothing is allocated and no value is read."""

import copy
import re
from dataclasses import dataclass, field

import torch
import transformers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from kit.model.headers import StoredTensor
from kit.names import natural_key


@dataclass
class Architecture:
    """A model built on the meta device (no memory, no values), and how the stored tensors fit it.

    Attributes:
        model: the model.
        compared: whether the tensors were compared with it; a quantized model's are packed and were not.
        missing: tensors that it has and the files have not; those tied to a stored one are not counted.
        unused: tensors of the files that it has no place for, not even after transformers' conversions.
        ignored: tensors of the files that its class knows as leftovers, such as the causal masks of old GPT-2 files.
        mismatched: name, stored shape and expected shape of tensors that differ in shape.
    """

    model: PreTrainedModel
    compared: bool = True
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, list[int], list[int]]] = field(default_factory=list)

    def own_name(self, stored: str) -> str | None:
        """Return the model's name for a stored tensor: with or without the base model's prefix, or None."""
        return next((name for name in _spellings(stored, self.model) if name in self._names), None)

    def __post_init__(self) -> None:
        self._names = set(self.model.state_dict())
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters of each part, tied matrices counted once."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        parts = {"token embedding": 0, "blocks": 0, "output head": 0, "rest": 0}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self.tied:
                continue
            if embedding is not None and parameter is getattr(embedding, "weight", None):
                part = "token embedding"
            elif head is not None and any(parameter is own for own in head.parameters()):
                part = "output head"
            else:
                part = "blocks" if re.search(r"\.\d+\.", name) else "rest"
            parts[part] += parameter.numel()
        return {part: number for part, number in parts.items() if number}


def in_order(tensors: list[StoredTensor], architecture: Architecture | None) -> list[StoredTensor]:
    """Sort as the architecture computes; a tensor that is stored in another form comes after its nearest relatives."""
    last: dict[str, int] = {}
    for index, name in enumerate(architecture.model.state_dict() if architecture else ()):
        parts = name.split(".")
        last.update({".".join(parts[: n + 1]): index for n in range(len(parts))})

    def place(tensor: StoredTensor) -> tuple[int, bool, list[tuple[int, int, str]]]:
        own = architecture and architecture.own_name(tensor.name)
        if own:
            return last[own], False, []
        best, index = 0, len(last)
        for name in _spellings(tensor.name, architecture.model) if architecture else ():
            parts = name.split(".")
            shared = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in last), 0)
            if shared > best:
                best, index = shared, last[".".join(parts[:shared])]
        return index, True, natural_key(tensor.name)

    return sorted(tensors, key=place)


def build_architecture(config: PreTrainedConfig, tensors: list[StoredTensor]) -> Architecture:
    """Build the model of a configuration on the meta device and let transformers load the tensors' shapes into it.

    It is transformers' own loader that renames, merges and ties, so what it would find wrong is what is found here.
    The matrices of a quantized model are packed and not compared.
    """
    config = copy.deepcopy(config)
    compared = not hasattr(config, "quantization_config")
    if not compared:
        del config.quantization_config
    shapes = {t.name: torch.empty(t.shape, device="meta") for t in tensors} if compared else {}
    model, info = _model_class(config).from_pretrained(
        None, config=config, state_dict=shapes, device_map="meta", output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    architecture = Architecture(model, compared)
    if compared:
        architecture.missing = sorted(info["missing_keys"], key=natural_key)
        architecture.unused = sorted(info["unexpected_keys"], key=natural_key)
        architecture.mismatched = sorted(
            ((name, list(stored), list(own)) for name, stored, own in info["mismatched_keys"]),
            key=lambda row: natural_key(row[0]),
        )
        # The loader leaves these out of its report; two buffers of old files it leaves out for every class.
        known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
        left = [t.name for t in tensors if architecture.own_name(t.name) is None]
        left = [name for name in left if any(re.search(pattern, name) for pattern in known)]
        architecture.ignored = [name for name in left if not set(_spellings(name, model)) & set(architecture.unused)]
    return architecture


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    causal = type(config) in AutoModelForCausalLM._model_mapping and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    found = (AutoModelForCausalLM if causal else AutoModel)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _spellings(name: str, model: PreTrainedModel) -> list[str]:
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]
