"""A model for sequence classification: its labels, its head, and what of a text it can read.

A head is new where the weights have none for these labels: a language model's, or a classifier's of other labels. The
decoders' classes read the last token that is not the padding token, so the configuration has to name the one that fills
up batches; where that is EOS and a text ends with it, they read the token before, in a batch and alone.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kit.console import say, warn
from kit.errors import UserError
from kit.model.configuration import CAUSAL_LM, CLASSIFIER, fresh_config
from kit.model.heads import draw_anew, head_names, logits_layer, permute_logits
from kit.model.hub import expand
from kit.model.loading import (
    check_pretrained,
    holds_adapter,
    load_adapted,
    load_config,
    load_model,
    stored_kind,
)
from kit.model.shards import whole, write
from kit.model.tokenizer import special_tokens
from kit.recipe.models import ModelSection


def check_classifier(section: ModelSection, trains: bool = False) -> PreTrainedConfig:
    """Check of a model what its configuration alone tells, and return that; a fresh one's without its vocabulary.

    Args:
        section: the recipe's.
        trains: whether the model is going to be trained, not only used.

    Raises:
        UserError: mistakes of `check_pretrained`; it is an adapter, which cannot be trained on, or is a causal LM's.
    """
    if section.from_config is not None:
        return fresh_config(CLASSIFIER.unsettled(section.from_config), None, CLASSIFIER)
    if not holds_adapter(section):
        return check_pretrained(section, block_size=1, kind=CLASSIFIER)
    if trains or stored_kind(section) is not CLASSIFIER:
        raise UserError(
            f"model.name_or_path: `{section.name_or_path}` holds an adapter, not a whole model to make a classifier "
            f"of: `kit merge` makes one of it"
        )
    return load_config(section)


def load_classifier(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], multi: bool, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a model with a logit for each label, on the CPU, in `section.dtype`.

    A classifier of the very same labels keeps its head, its logits put into the order of `names`.

    Args:
        section: the recipe's; an adapter of a classifier is loaded with the model that it belongs to.
        tokenizer: its padding token becomes the configuration's; without one, EOS.
        names: of the labels, by their number.
        multi: whether a text may have any number of labels.
        seed: decides what is new, alone.

    Returns:
        The model, and its parameters that began at random; none where the head is kept.

    Raises:
        UserError: mistakes of `load_model`; the recipe says other labels than the data has.
    """
    settings = label_settings(names, multi)
    _check_recipe_labels(section, settings)
    if holds_adapter(section):
        check_classifier(section, trains=False)
        model = load_adapted(expand(section.name_or_path), section).get_base_model()
        if label_names(model.config) != list(names):
            raise UserError(
                f"model.name_or_path: `{section.name_or_path}` is an adapter that tells apart "
                f"{_listed(label_names(model.config))}, in this order; the data has {_listed(names)}"
            )
        return model, ()
    pad = special_tokens(tokenizer).pad.id
    if section.from_config is not None:
        # RoBERTa's kind counts positions from the padding token's id on: it cannot be without one.
        from_config = {**section.from_config, "pad_token_id": section.from_config.get("pad_token_id", pad)}
        model, new = load_model(
            section.model_copy(update={"from_config": from_config}), tokenizer, seed, CLASSIFIER, settings
        )
    else:
        model, new = _load_labeled(section, names, settings, seed)
    _set_padding(model, tokenizer)
    return model, new


def label_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a classifier's labels, by their number."""
    return [config.id2label[number] for number in sorted(config.id2label)]


def label_settings(names: Sequence[str], multi: bool) -> dict[str, Any]:
    """Return what a configuration says of labels."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "multi_label_classification" if multi else "single_label_classification",
    }


def saved_thresholds(config: PreTrainedConfig, names: Sequence[str]) -> np.ndarray | None:
    """Return the thresholds that were tuned for a model's labels: (classes,); None where none were."""
    saved = (getattr(config, "kit_classifier", None) or {}).get("thresholds")
    return np.array([saved[name] for name in names]) if saved else None


def classifier_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens of a text a model has positions for, special tokens included; None for no limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - text.pad_token_id - 1 if _counts_from_padding(text) else positions


def needs_positions(config: PreTrainedConfig) -> bool:
    """Tell whether a model has to be told positions where the padding is on the left: a decoder that takes them."""
    architecture = CLASSIFIER.auto_class._model_mapping.get(type(config), None)
    decoder = CAUSAL_LM.fits(config) and not getattr(config, "is_encoder_decoder", False)
    return bool(decoder and architecture) and "position_ids" in inspect.signature(architecture.forward).parameters


@torch.no_grad()
def fold_temperature(model: PreTrainedModel, temperature: float) -> None:
    """Divide what gives the logits by a temperature, in place, so that the saved model alone is calibrated.

    Raises:
        UserError: which layer gives the logits cannot be told.
    """
    _, layer = logits_layer(model)
    for parameter in layer.parameters():
        write(parameter, whole(parameter) / temperature)


def _load_labeled(
    section: ModelSection, names: Sequence[str], settings: Mapping[str, Any], seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a pretrained model and see to its head: new, kept, or kept in another order."""
    own = label_names(load_config(section)) if stored_kind(section) is CLASSIFIER else None
    model, new = load_model(section, None, seed, CLASSIFIER, settings)
    if own is None:
        say(f"head: new, for {len(names)} labels: {', '.join(new)} begins at random")
    elif set(own) != set(names) or len(own) != len(names):
        path, layer = logits_layer(model)
        ours = {*new, *(f"{path}.{name}" for name, _ in layer.named_parameters())}
        new = tuple(name for name in head_names(model) if name in ours)
        draw_anew(model, new, seed)
        warn(
            f"`{section.name_or_path}` is a classifier of other labels, {_listed(own)}; the data has {_listed(names)}: "
            f"its head is given up, and {', '.join(new)} begins at random"
        )
    elif new:
        warn(f"`{section.name_or_path}` is a classifier of these labels without a whole head: {', '.join(new)} is new")
    else:
        moved = own != list(names)
        if moved:
            permute_logits(model, [own.index(name) for name in names])
        say(
            f"head: kept, as `{section.name_or_path}` tells the same {len(names)} labels apart"
            + (", put into the order of the data's" if moved else "")
        )
    return model, new


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the padding token's id into the configuration, for decoders to find the last token of a text by."""
    pad, text = special_tokens(tokenizer).pad, model.config.get_text_config()
    if _counts_from_padding(text) and text.pad_token_id != pad.id:
        raise UserError(
            f"the tokenizer ({tokenizer.name_or_path}) fills up with `{pad.token}` ({pad.id}), but the positions of "
            f"this `{text.model_type}` are counted from its padding token's id, {text.pad_token_id}: the tokenizer "
            f"belongs to another model"
        )
    for config in {id(each): each for each in (text, model.config)}.values():
        config.pad_token_id = pad.id
    embeddings = model.get_input_embeddings()
    if pad.id == tokenizer.eos_token_id and getattr(embeddings, "padding_idx", None) == pad.id:
        embeddings.padding_idx = None  # in a text EOS stands for itself, and its row trains


def _check_recipe_labels(section: ModelSection, settings: Mapping[str, Any]) -> None:
    """Check what a recipe says of labels against the data, which settles them."""
    key = "model.config" if section.from_config is None else "model.from_config"
    written = section.config if section.from_config is None else section.from_config
    expected = {"num_labels": len(settings["id2label"]), **settings}
    for name in sorted(CLASSIFIER.settled & written.keys()):
        found = written[name]
        if name == "id2label" and isinstance(found, dict):
            found = {int(number) if str(number).isdecimal() else number: label for number, label in found.items()}
        if found != expected[name]:
            raise UserError(
                f"{key}.{name}: found {written[name]}; expected {expected[name]}, which the data gives "
                f"({_listed(list(settings['id2label'].values()))}); leave the key out"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(f"`{name}`" for name in names[:8]) + more


def _counts_from_padding(config: PreTrainedConfig) -> bool:
    """Tell whether positions begin behind the padding token's id, as RoBERTa's do: its module has a function for it."""
    architecture = CLASSIFIER.auto_class._model_mapping.get(type(config), None)
    module = sys.modules[architecture.__module__] if architecture else None
    name = "create_position_ids_from_input_ids"
    own = (
        [each for each in vars(module).values() if getattr(each, "__module__", None) == module.__name__]
        if module
        else []
    )
    return config.pad_token_id is not None and (hasattr(module, name) or any(hasattr(each, name) for each in own))
