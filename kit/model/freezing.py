"""What can be told of a recipe's `freezing` section before its model is there, and what of a model trains."""

import os

from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from kit.errors import UserError
from kit.model.new_rows import is_new_rows
from kit.model.quantization import number_of_values
from kit.recipe.freezing import FreezingSection
from kit.recipe.models import Recipe


def check_sharding(recipe: Recipe, args: TrainingArguments) -> None:
    """Check that what a recipe freezes goes together with how its training is spread over devices.

    Raises:
        UserError: FSDP or DeepSpeed cuts parameters into shards, of which a plan by names has not been tried.
    """
    key = next((name for name in ("freezing", "adapter") if getattr(recipe, name)), None)
    if key is None:
        return
    sharding = {
        "FSDP": args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        "DeepSpeed": args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
    }
    for name, used in sharding.items():
        if used:
            raise UserError(
                f"{key}: not with {name}, which cuts parameters into shards: what is frozen, or trains at a rate of "
                f"its own, could not be followed and proven there; leave out one of the two"
            )


def check_blocks(section: FreezingSection | None, config: PreTrainedConfig) -> None:
    """Check that a model of this configuration has as many blocks as a recipe names.

    Raises:
        UserError: it has fewer.
    """
    there = getattr(config.get_text_config(), "num_hidden_layers", None)
    for key, parts in section.named_parts() if section and there else ():
        for name in ("first_blocks", "last_blocks"):
            if (getattr(parts, name) or 0) > there:
                raise UserError(
                    f"freezing.{key}.{name}: found {getattr(parts, name)}; expected at most {there}, the blocks that "
                    f"the model has"
                )


def check_new_tokens(section: FreezingSection | None, number: int) -> None:
    """Check that there are new tokens where their rows are to train alone.

    Raises:
        UserError: there are none.
    """
    if section and section.new_tokens and not number:
        raise UserError(
            "freezing.trainable.new_tokens: all tokens of `vocabulary` are in the tokenizer already, so that no row is "
            "new; `embeddings: true` and `head: true` in its place train theirs with all others"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters there are, and how many train: of a frozen matrix, the new rows alone."""
    total = sum(number_of_values(p) for name, p in model.named_parameters() if not is_new_rows(name))
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)
