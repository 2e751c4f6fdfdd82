"""The final model: a folder that `from_pretrained` loads alone, and the proof that it does."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kit.files import replaced_folder


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write model and tokenizer in Hugging Face's format; the folder is whole or absent."""
    with replaced_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@torch.no_grad()
def saved_model_difference(model: PreTrainedModel, folder: str | Path) -> float:
    """Load a saved model and return the largest absolute difference of its logits from those in memory.

    Raises:
        RuntimeError: they differ at all; a tied head or a resized matrix was not saved as it is.
    """
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    ).to(model.device)
    reloaded.eval()
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    positions = min(64, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 64)
    input_ids = torch.randint(model.config.get_text_config().vocab_size, (2, positions), generator=generator)
    input_ids = input_ids.to(model.device)
    difference = (
        (model(input_ids, use_cache=False).logits - reloaded(input_ids, use_cache=False).logits).abs().max().item()
    )
    model.train(was_training)
    if difference != 0.0:
        raise RuntimeError(f"{folder} gives other logits than the model in memory: they differ by up to {difference}")
    return difference
