"""Which parameters train: the parts that a recipe's `freezing` section names, and nothing else."""

import os
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from kit.errors import UserError
from kit.model.new_rows import is_new_rows, train_new_rows
from kit.recipe.freezing import FreezingSection


def check_freezing(section: FreezingSection | None, args: TrainingArguments) -> None:
    """Check that what a recipe wants frozen goes together with how its training is spread over devices.

    Raises:
        UserError: rows of new tokens are to train alone in a model that FSDP or DeepSpeed cuts into shards.
    """
    if section is None or not section.trainable.new_tokens:
        return
    sharding = {
        "FSDP": args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        "DeepSpeed": args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
    }
    for name, used in sharding.items():
        if used:
            raise UserError(
                f"freezing.trainable.new_tokens: rows cannot train alone in matrices that {name} cuts into shards; "
                f"`freezing.trainable.embeddings: true` trains the whole matrices, which works there"
            )


def check_blocks(section: FreezingSection | None, config: PreTrainedConfig) -> None:
    """Check that a model of this configuration has as many blocks as are to train.

    Raises:
        UserError: it has fewer.
    """
    wanted = section.trainable.last_blocks if section else None
    there = getattr(config.get_text_config(), "num_hidden_layers", None)
    if wanted and there and wanted > there:
        raise UserError(
            f"freezing.trainable.last_blocks: found {wanted}; expected at most {there}, the blocks that the model has"
        )


def check_new_tokens(section: FreezingSection | None, number: int) -> None:
    """Check that there are new tokens where their rows are to train alone.

    Raises:
        UserError: there are none.
    """
    if section and section.trainable.new_tokens and not number:
        raise UserError(
            "freezing.trainable.new_tokens: all tokens of `vocabulary` are in the tokenizer already, so that no row is "
            "new; `freezing.trainable.embeddings: true` trains theirs with all others"
        )


def apply_freezing(model: PreTrainedModel, section: FreezingSection | None, new_ids: Sequence[int]) -> None:
    """Freeze all parameters but those of the parts that train; without a section leave them as they are.

    To be called once the model is on its device, and before its optimizer is created. Tied embeddings are one matrix:
    with `embeddings: true` the head trains too.

    Args:
        model: the model.
        section: the recipe's.
        new_ids: of the tokens that `vocabulary` added.

    Raises:
        UserError: there are no new tokens, or fewer blocks than asked for, or they are not to be told; nothing trains.
    """
    if section is None:
        return
    parts = section.trainable
    check_new_tokens(section, len(new_ids))
    check_blocks(section, model.config)
    blocks = transformer_blocks(model)[-parts.last_blocks :] if parts.last_blocks else []
    model.requires_grad_(False)
    for block in blocks:
        block.requires_grad_(True)
    if parts.embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                module.requires_grad_(True)
    if parts.new_tokens:
        train_new_rows(model, new_ids)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freezing.trainable: {parts.written()} holds no parameter of this model: nothing would train")


def transformer_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's blocks, from input to output: its only list of as many modules as it has hidden layers.

    Raises:
        UserError: it has none, or several, as an encoder with a decoder may.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    }
    # Blocks may hold lists of their own, say of experts, that happen to be as long.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        found = f"found {', '.join(outermost)}" if outermost else "found none"
        raise UserError(
            f"freezing.trainable.last_blocks: {type(model).__name__} does not tell which list of modules its blocks "
            f"are: expected one of {number} modules, {found}"
        )
    return lists[outermost[0]]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters there are, and how many train: of a frozen matrix, the new rows alone."""
    total = sum(p.numel() for name, p in model.named_parameters() if not is_new_rows(name))
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)
