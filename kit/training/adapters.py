"""The adapter of a run: put into the model alike on every process."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kit.console import say, warn
from kit.files import hash_array, hash_values
from kit.model.adapter import add_adapter, describe_adapter
from kit.model.adapter_files import Adapter, BaseFacts
from kit.model.parts import adapter_names
from kit.recipe.models import Recipe


def insert_adapter(
    model: PreTrainedModel, recipe: Recipe, base: BaseFacts, new_ids: Sequence[int], seed: int
) -> Adapter:
    """Put a recipe's adapter into its model, in place; only it trains then, and the rows of new tokens if asked for.

    Args:
        model: with the rows of its new tokens, on its device.
        recipe: with an `adapter`.
        base: facts of the model as it was loaded.
        new_ids: of the tokens that `vocabulary` added.
        seed: of what the adapter begins as.

    Raises:
        UserError: the adapter does not fit the model.
    """
    trained = new_ids if recipe.freezing and recipe.freezing.new_tokens else ()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = add_adapter(model, recipe.adapter, trained)
    description = describe_adapter(adapted)
    say(str(description))
    if description.parameters > description.base_parameters:
        warn("the adapter has more parameters than the model that it adapts: a lower rank would do")
    return Adapter(adapted, base, tuple(new_ids))


def adapter_key(model: PreTrainedModel) -> str:
    """Return a hash of what a model's adapter holds."""
    own = set(adapter_names(model))
    weights = {name: p.detach().cpu().float().numpy() for name, p in model.named_parameters() if name in own}
    return hash_values([(name, hash_array(values)) for name, values in weights.items()])
