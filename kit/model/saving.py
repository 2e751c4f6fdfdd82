"""The final model: a folder that `from_pretrained` loads alone, and the proof that it does."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kit.files import replaced_folder
from kit.model.loading import load_adapted
from kit.recipe.models import ModelSection

if TYPE_CHECKING:
    from kit.model.adapter_files import Adapter


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, adapter: "Adapter | None" = None
) -> None:
    """Write model and tokenizer in Hugging Face's format; the folder is whole or absent.

    Of a model with an adapter, only that is written, in peft's format, and what belongs to it.
    """
    with replaced_folder(folder) as temporary:
        if adapter:
            adapter.write(temporary)
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@torch.no_grad()
def saved_model_difference(model: PreTrainedModel, folder: str | Path, base: ModelSection | None = None) -> float:
    """Load a saved model and return the largest absolute difference of its logits from those in memory.

    Args:
        model: in memory.
        folder: what `save_model` wrote of it.
        base: where that is an adapter, how its base model is loaded.

    Raises:
        RuntimeError: they differ at all; a tied head or a resized matrix was not saved as it is.
    """
    if base:
        reloaded = load_adapted(folder, base).get_base_model()
    else:
        # Code that came with the model is not fetched and run anew: its class is here.
        loader = type(model) if getattr(model.config, "auto_map", None) else AutoModelForCausalLM
        reloaded = loader.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    reloaded = reloaded.to(model.device).eval()
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    positions = min(64, getattr(config, "max_position_embeddings", None) or 64)
    input_ids = torch.randint(config.vocab_size, (2, positions), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    try:
        logits = [each(input_ids, use_cache=False).logits for each in (model, reloaded)]
    finally:
        model.train(was_training)
    difference = (logits[0] - logits[1]).abs().max().item()
    if difference != 0.0:
        raise RuntimeError(f"{folder} gives other logits than the model in memory: they differ by up to {difference}")
    return difference
