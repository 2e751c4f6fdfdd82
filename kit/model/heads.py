"""The head of a sequence classifier: what stands behind the base model, and which of its layers gives the logits."""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from kit.errors import UserError
from kit.model.parts import find_parts


def is_classifier(model: nn.Module) -> bool:
    """Tell whether a model classifies sequences: each architecture has a class of its own, which is called so."""
    return type(model).__name__.endswith("ForSequenceClassification")


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameters of a classifier's head in the model's order: of all behind the base model, and a pooler."""
    try:
        return find_parts(model)["head"]
    except UserError:  # its blocks cannot be told, which is no matter here
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        every = model.named_parameters()
        return tuple(name for name, p in every if id(p) not in inside or "pooler" in name.split("."))


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the outermost modules that hold nothing but the head's parameters, and together all of them."""
    head, found = set(head_names(model)), []
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and names and names <= head and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return tuple(found)


def logits_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Return the linear layer behind the base model that gives the logits, and its name.

    Where an adapter trains a copy of the head, it is the copy's.

    Raises:
        UserError: there is none, or more than one that might be it.
    """
    inside = {id(module) for module in model.base_model.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and module.out_features == model.config.num_labels
        and "original_module" not in name.split(".")
    }
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise UserError(
            f"{type(model).__name__}: expected one linear layer behind the base model with {model.config.num_labels} "
            f"outputs, the number of labels; found {listed}"
        )
    return next(iter(found.items()))


@torch.no_grad()
def permute_logits(model: PreTrainedModel, order: list[int]) -> None:
    """Put the logits into another order, in place: the first becomes what was at `order[0]`."""
    _, layer = logits_layer(model)
    for parameter in layer.parameters():
        parameter.copy_(parameter[order].clone())


def draw_anew(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Initialise parameters as the architecture does, in place, from the seed alone, and leave all others as they are.

    What `from_pretrained` draws for missing weights depends on whatever drew random numbers before.
    """
    if not names:
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor._is_hf_initialized = name not in names
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.initialize_weights()
