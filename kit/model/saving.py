"""The final model: a folder that `from_pretrained` loads alone, and the proof that it does."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.console import is_main_process
from kit.files import replaced_folder
from kit.model.classifier import classifier_positions
from kit.model.configuration import CAUSAL_LM, CLASSIFIER
from kit.model.heads import is_classifier
from kit.model.loading import load_adapted
from kit.model.shards import gather, in_shards
from kit.recipe.models import ModelSection

if TYPE_CHECKING:
    from kit.model.adapter_files import Adapter


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, adapter: "Adapter | None" = None
) -> None:
    """Write model and tokenizer in Hugging Face's format; the folder is whole or absent.

    Of a model with an adapter, only that is written, in peft's format, and what belongs to it. Called on all processes,
    of which the first one writes.
    """
    state = adapter.state() if adapter else whole_state(model)
    if not is_main_process():
        return
    with replaced_folder(folder) as temporary:
        if adapter:
            adapter.write(temporary, state)
        else:
            model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the state of a model in shards, whole on the first process; None of one without, which has it itself."""
    return gather(model.state_dict(keep_vars=True)) if in_shards(model) else None


@torch.no_grad()
def saved_model_difference(model: PreTrainedModel, folder: str | Path, base: ModelSection | None = None) -> float:
    """Load a saved model and return the largest absolute difference of its logits from those in memory.

    Called on all processes; the first one loads and compares, the others return 0.0.

    Args:
        model: in memory.
        folder: what `save_model` wrote of it.
        base: where that is an adapter, how its base model is loaded.

    Raises:
        RuntimeError: they differ at all; a tied head or a resized matrix was not saved as it is.
    """
    in_memory = fixed_logits(model)
    if not is_main_process():
        return 0.0
    if base:
        reloaded = load_adapted(folder, base).get_base_model()
    else:
        # Code that came with the model is not fetched and run anew: its class is here.
        kind = CLASSIFIER if is_classifier(model) else CAUSAL_LM
        loader = type(model) if getattr(model.config, "auto_map", None) else kind.auto_class
        reloaded = loader.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    if in_shards(model):  # and perhaps too large for one device: each layer is there while it computes
        cpu_offload(reloaded, in_memory.device)
    else:
        reloaded.to(model.device)
    difference = (in_memory - fixed_logits(reloaded, in_memory.device)).abs().max().item()
    if difference != 0.0:
        raise RuntimeError(f"{folder} gives other logits than the model in memory: they differ by up to {difference}")
    return difference


@torch.no_grad()
def fixed_logits(model: PreTrainedModel, device: torch.device | None = None) -> torch.Tensor:
    """Return a model's logits of a fixed batch, without dropout; the model stays in its mode.

    Args:
        model: the model.
        device: that it computes on, where its weights are not there throughout.
    """
    config = model.config.get_text_config()
    positions = min(64, classifier_positions(config) or 64)
    ids = torch.randint(config.vocab_size, (2, positions), generator=torch.Generator().manual_seed(0))
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids.to(device or model.device), **cache).logits
    finally:
        model.train(was_training)
