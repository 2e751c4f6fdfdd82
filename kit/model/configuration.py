"""The configuration of a model: what the models of a task are loaded as, and what a recipe may say of it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from kit.console import say
from kit.errors import UserError, did_you_mean
from kit.model.alignment import check_positions
from kit.recipe.models import PACKED_ATTENTION, ModelSection

# Most `config.json` on the Hub have these; transformers 5 moves what it knows of them into `rope_parameters`.
_FORMER_ROPE_NAMES = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}


@dataclass(frozen=True)
class Kind:
    """What the models of a task are loaded as.

    Attributes:
        auto_class: of transformers.
        task: as recipes call it.
        what: it is, for messages.
        example: of architectures that have one, for messages.
        settled: attributes of the configuration that follow from the data, not from the recipe.
        new_head: whether the head may be missing from the weights, and then begins at random.
    """

    auto_class: Any
    task: str
    what: str
    example: str
    settled: frozenset[str] = frozenset()
    new_head: bool = False

    def fits(self, config: PreTrainedConfig) -> bool:
        """Tell whether an architecture has a model of this kind."""
        if type(config) not in self.auto_class._model_mapping:
            return self.auto_class.__name__ in (getattr(config, "auto_map", None) or {})
        # BERT and its like have a causal head for use as decoders; their weights were not trained for it.
        masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        return self is not CAUSAL_LM or not masked

    def unsettled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a recipe's attributes of the configuration is the recipe's to say."""
        return {name: value for name, value in values.items() if name not in self.settled}


CAUSAL_LM = Kind(AutoModelForCausalLM, "causal-lm", "causal language model", "a decoder such as GPT-2 or Llama")
CLASSIFIER = Kind(
    AutoModelForSequenceClassification,
    "sequence-classification",
    "sequence classifier",
    "a model such as GPT-2, Llama or BERT",
    settled=frozenset({"num_labels", "id2label", "label2id", "problem_type"}),
    new_head=True,
)


def check_config(config: PreTrainedConfig, name: str, block_size: int, kind: Kind = CAUSAL_LM) -> None:
    """Check that a configuration is of a kind and, a causal LM's, has the positions of a block.

    Raises:
        UserError: it is not, or has not.
    """
    if not kind.fits(config):
        raise UserError(
            f"model.name_or_path: `{name}` is of type `{config.model_type}`, which has no {kind.what}; "
            f"`task: {kind.task}` needs {kind.example}"
        )
    if kind is CAUSAL_LM:
        check_positions(config, block_size)


def attention(section: ModelSection, config: PreTrainedConfig, kind: Kind) -> str | None:
    """Return the attention kernel to load with; where None, transformers takes the best that the architecture has.

    What only packed rows go through is put in place later (`kit.model.attention`).

    Gemma 2 caps attention scores inside the softmax's argument, which SDPA's fused kernels cannot do: depending on its
    version transformers falls back, fails in the first forward pass, or leaves the cap out without a word.
    """
    check_sdpa(section, config, kind)
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    wanted = None if section.attn_implementation in PACKED_ATTENTION else section.attn_implementation
    if wanted is None and cap is not None:
        say(f"attention: eager, since SDPA cannot cap attention scores (attn_logit_softcapping: {cap:g})")
        return "eager"
    return wanted


def check_sdpa(section: ModelSection, config: PreTrainedConfig, kind: Kind) -> None:
    """Refuse SDPA for a model that it would compute wrongly, or not at all."""
    if section.attn_implementation != "sdpa":
        return
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    architecture = kind.auto_class._model_mapping.get(type(config), None)
    if cap is not None:
        reason = f"cannot cap attention scores, as this `{config.model_type}` does (attn_logit_softcapping: {cap:g})"
    elif architecture is not None and not getattr(architecture, "_supports_sdpa", True):
        reason = f"does not work with `{config.model_type}` in transformers {transformers.__version__}"
    else:
        return
    raise UserError(f"model.attn_implementation: sdpa {reason}; leave the key out, or set it to `eager`")


def fresh_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, kind: Kind) -> PreTrainedConfig:
    """Return the configuration of a fresh model; what it does not say of the vocabulary, the tokenizer does.

    Raises:
        UserError: there is no such type of model, none of this kind, or an attribute that it has not.
    """
    # Transformers completes `rope_parameters` in place, and the recipe is a key to stores.
    values = copy.deepcopy(values)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.from_config.model_type: unknown `{model_type}`{did_you_mean(model_type, list(CONFIG_MAPPING))}"
        )
    unfit = UserError(f"model.from_config.model_type: `{model_type}` has no {kind.what}")
    if type(CONFIG_MAPPING[model_type]()) not in kind.auto_class._model_mapping:
        raise unfit
    if tokenizer is not None:
        values.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)  # some vocabularies skip ids
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            values.setdefault(name, getattr(tokenizer, name))
    class_default = CONFIG_MAPPING[model_type]()
    former = _FORMER_ROPE_NAMES & values.keys() if hasattr(class_default, "rope_parameters") else set()
    present = {name: value for name, value in values.items() if name not in former}
    override(class_default, present, "model.from_config")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.from_config: {' '.join(str(error).split())}") from error
    for name in former:
        if name in vars(config):  # taken as an attribute that nothing reads, not as a former name
            raise UserError(f"model.from_config.{name}: `{model_type}` has no such attribute; see `rope_parameters`")
    if not kind.fits(config):
        raise unfit
    return config


def override(config: PreTrainedConfig, values: dict[str, Any], key: str) -> PreTrainedConfig:
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


def with_settings(config: PreTrainedConfig, settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Set attributes that the data settles, in place, and return the configuration."""
    for name, value in settings.items():
        setattr(config, name, copy.deepcopy(value))
    return config
