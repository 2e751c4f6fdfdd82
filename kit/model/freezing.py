"""What can be told of a recipe's `freezing` section before its model is there, and what of a model trains."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kit.errors import UserError
from kit.model.new_rows import is_new_rows
from kit.model.parts import select
from kit.model.quantization import number_of_values
from kit.recipe.freezing import FreezingSection, Parts


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


def check_random_parameters(section: FreezingSection | None, model: PreTrainedModel, new: Collection[str]) -> None:
    """Check that what begins at random trains at some time.

    Args:
        section: the recipe's.
        model: the model.
        new: its parameters that no weights were found for. Biases and norms among them begin at 0 or 1, not at random.

    Raises:
        UserError: a matrix of them is frozen throughout; or a part or a pattern does not fit the model.
    """
    if section is None:
        return

    def named(key: str, parts: Parts) -> set[str]:
        return {name for names in select(model, parts.model_dump(), f"freezing.{key}").values() for name in names}

    every = {name for name, _ in model.named_parameters()}
    trained, how = every, ""
    if section.frozen is not None:
        trained, how = every - named("frozen", section.frozen), "leave it out of `freezing.frozen`"
    elif section.all_trainable and "all" not in section.all_trainable:
        of_phases = [(key, parts) for key, parts in section.named_parts() if key.endswith("trainable")]
        trained = {name for key, parts in of_phases for name in named(key, parts)}
        how = f"add `head: true` to `freezing.{of_phases[0][0]}`"
    for name in new:
        if name not in trained and model.get_parameter(name).dim() > 1:
            raise UserError(f"freezing: {name} begins at random and would never train, nor tell classes apart: {how}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters there are, and how many train: of a frozen matrix, the new rows alone."""
    total = sum(number_of_values(p) for name, p in model.named_parameters() if not is_new_rows(name))
    return total, sum(number_of_values(p) for p in model.parameters() if p.requires_grad)
