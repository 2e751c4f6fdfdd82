"""Adapters of peft: small weights that train while the model's own keep every bit, saved apart, merged on request.

Without `target_modules` an adapter goes into every linear layer of the blocks, not into peft's default, which for most
architectures is a part of the attention: QLoRA (arXiv:2305.14314) and "LoRA Without Regret" (Thinking Machines, 2025)
both found that only adapters in all of them, the MLPs above all, learn as full training does. What is defined on other
layers (IA3, LayerNorm tuning) keeps peft's own choice.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Sequence

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kit.console import warn
from kit.errors import UserError, suggest
from kit.model.configuration import CAUSAL_LM, CLASSIFIER
from kit.model.heads import head_modules, is_classifier
from kit.model.new_rows import is_new_rows, train_new_rows
from kit.model.parts import adapter_names, transformer_blocks
from kit.model.quantization import number_of_values
from kit.names import fold_names
from kit.recipe.adapter import PEFT_ERRORS, AdapterSection, check_adapter, peft_reason

# They are defined on certain layers, which peft knows per architecture.
_OWN_TARGETS = {"IA3", "LN_TUNING", "BEFT"}
_EXPECTED = re.compile("fan_in_fan_out|tie_word")  # warnings of what the kit looks after


def add_adapter(model: PreTrainedModel, section: AdapterSection, new_ids: Sequence[int] = ()) -> PeftModel:
    """Put an adapter into a model, in place: it alone trains, and beside it the rows of new tokens.

    What it begins as is drawn from the global generators. To be called once the model is on its device, with its
    embeddings resized, and before its optimizer is created.

    Args:
        model: a plain causal LM, or a classifier, whose head trains whole beside the adapter.
        section: the recipe's.
        new_ids: of the tokens whose rows train, without gaps; none for no rows.

    Raises:
        UserError: mistakes of `check_adapter`; names that match no module; a tied matrix among the targets; layers that
            this type of adapter cannot go into; an initialisation that changes the base model; nothing trains.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise RuntimeError("the model has an adapter already")
    config = check_adapter(section, (CLASSIFIER if is_classifier(model) else CAUSAL_LM).task)
    head = _whole_head(model, config)
    if section.type.upper() not in _OWN_TARGETS and not getattr(config, "target_parameters", None):
        _set_default_targets(model, config)
    if hasattr(config, "fan_in_fan_out"):  # how Conv1D of GPT-2 keeps its matrix
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    _check_names(model, config)
    before = {name: (weight, _bits(weight)) for name, weight in model.named_parameters()}
    embeddings, tied = plain_embeddings(model), are_tied(plain_embeddings(model))
    adapted = _inject(model, config, section)
    _check_layers(adapted, config)
    _check_head(adapted, head)
    _check_embeddings(adapted, embeddings, tied, new_ids)
    if changed := [name for name, (weight, bits) in before.items() if _bits(weight) != bits]:
        raise UserError(
            f"adapter: these settings change the base model's own weights ({fold_names(changed)}), so that the adapter "
            f"would not fit the base model that others have; leave out `init_lora_weights` or what else asks for it"
        )
    if new_ids:
        train_new_rows(model, new_ids)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise UserError(f"adapter: `{section.type}` has no weights to train in this model's layers")
    return adapted


def _whole_head(model: PreTrainedModel, config: PeftConfig) -> dict[str, int]:
    """Have a classifier's head trained and saved whole: by itself peft takes the part of it that it knows the name of.

    Returns:
        The numbers of parameters of the head's modules by their names.

    Raises:
        UserError: a part of the head is to be copied by itself.
    """
    if not is_classifier(model):
        return {}
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in head_modules(model)}
    inside = [name for name, _ in model.named_modules() if any(name.startswith(f"{module}.") for module in sizes)]
    for wanted in sorted(config.modules_to_save or ()):
        if matched := [name for name in inside if name.endswith(wanted)]:
            raise UserError(
                f"adapter.modules_to_save: `{wanted}` matches `{matched[0]}`, a part of the classifier's head, which "
                f"trains whole in any case; leave it out, or write longer names of other modules"
            )
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *sizes})
    return sizes


def _check_head(adapted: PeftModel, head: dict[str, int]) -> None:
    """Check that all of a classifier's head trains, and no adapter is inside: a head at random must not stay so."""
    modules = dict(adapted.get_base_model().named_modules())
    for name, size in head.items():
        copies = getattr(modules[name], "modules_to_save", {})
        training = sum(p.numel() for copy_ in copies.values() for p in copy_.parameters() if p.requires_grad)
        if training != size:
            raise UserError(
                f"adapter: `{name}` is of the classifier's head and has to train whole, which these settings prevent: "
                f"take it out of `target_modules` and `modules_to_save`"
            )


def _set_default_targets(model: PreTrainedModel, config: PeftConfig) -> None:
    if getattr(config, "target_modules", None) is not None:
        return
    config.target_modules = "all-linear"  # in peft's words all but the head
    if getattr(config, "layers_to_transform", None) is not None:
        # Which peft follows only where targets are listed.
        found = [
            n for b in transformer_blocks(model) for n, m in b.named_modules() if isinstance(m, nn.Linear | Conv1D)
        ]
        config.target_modules = {name.rpartition(".")[2] for name in found}


def _check_layers(adapted: PeftModel, config: PeftConfig) -> None:
    """Check that an adapter for some blocks went into no other."""
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return
    plain = adapted.get_base_model()
    blocks, wanted = transformer_blocks(plain), {layers} if isinstance(layers, int) else set(layers)
    allowed = {id(module) for number in wanted for module in blocks[number].modules()}
    modules = dict(plain.named_modules())
    if astray := [name for name in adapted.base_model.targeted_module_names if id(modules[name]) not in allowed]:
        raise UserError(
            f"adapter.layers_to_transform: found {sorted(wanted)}, but peft goes into {fold_names(astray)} too; "
            f"give `layers_pattern`, the name of the list that the blocks are in"
        )


def insert_alike(model: PreTrainedModel, config: PeftConfig) -> None:
    """Put another model's adapter into one of the same architecture, in place, with weights of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there was to say was said of the first model
        get_peft_model(model, copy.deepcopy(config))


def _bits(weight: torch.Tensor) -> int | None:
    """Return the sum of a tensor's values read as integers: changes through `.data` are counted nowhere else."""
    if weight.is_meta:
        return None
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().flatten().view(kind).sum(dtype=torch.int64).item()


def _inject(model: PreTrainedModel, config: PeftConfig, section: AdapterSection) -> PeftModel:
    layers = "; the model's layers: " + ", ".join(_layer_names(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = get_peft_model(model, config)
        except PEFT_ERRORS as error:
            # A module that no adapter goes into peft shows with all that is in it.
            reason = re.sub(r"^(Target module \w+)\(.*\) (is not supported)", r"\1 \2", peft_reason(error))
            hint = layers if "target" in reason.lower() else ""
            raise UserError(
                f"adapter: peft refuses these settings for {type(model).__name__}: {reason}{hint}"
            ) from None
    for text, kind in {" ".join(str(warning.message).split()): warning.category for warning in caught}.items():
        if "_pattern keys did not match" in text:
            # Peft would go on without them; it also writes such keys itself, for experts.
            if {"rank_pattern", "alpha_pattern"} & set(section.options()):
                raise UserError(f"adapter: {text.replace(' and were ignored', '').rstrip('.')}{layers}")
        elif issubclass(kind, UserWarning | RuntimeWarning) and not _EXPECTED.search(text):
            warn(f"peft: {text}")
    return adapted


def _layer_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of modules that hold a matrix, each once."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if "weight" in m._parameters})


def _check_names(model: nn.Module, config: PeftConfig) -> None:
    """Check that each name and pattern matches a module: peft is content when one of them does."""
    names = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        value = getattr(config, key, None)
        for wanted in [value] if isinstance(value, str) else sorted(value or ()):
            if isinstance(value, str):
                try:
                    found = value.lower() == "all-linear" or any(re.fullmatch(value, name) for name in names)
                except re.error as error:
                    raise UserError(f"adapter.{key}: `{value}` is no regular expression: {error}") from None
            else:
                found = any(name == wanted or name.endswith(f".{wanted}") for name in names)
            if not found:
                layers = _layer_names(model)
                if isinstance(value, str) and any(name.endswith(f".{wanted}") for name in names):
                    hint = f"; a text is a regular expression for whole names: write `[{wanted}]`"
                else:
                    hint = f"{suggest(wanted, layers) or '.'} Its layers: {', '.join(layers)}"
                if wanted == "all-linear":
                    hint = "; write it without the list"
                raise UserError(f"adapter.{key}: `{wanted}` matches no module of this {type(model).__name__}{hint}")
    layers = getattr(config, "layers_to_transform", None)
    number = model.config.get_text_config().num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not 0 <= layer < number:
            raise UserError(f"adapter.layers_to_transform: found {layer}; expected a block from 0 to {number - 1}")


def plain_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Return the input embedding and the head, each as it was before peft put a layer around it."""
    around = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [getattr(m, "original_module", getattr(m, "base_layer", m)) for m in around if m is not None]


def are_tied(embeddings: list[nn.Module]) -> bool:
    """Return whether what `plain_embeddings` returned is one matrix."""
    return len(embeddings) == 2 and embeddings[0].weight is embeddings[1].weight


def _check_embeddings(adapted: PeftModel, embeddings: list[nn.Module], tied: bool, new_ids: Sequence[int]) -> None:
    """Refuse adapters of tied matrices, and whole copies beside rows; `embeddings` and `tied` are as they were before.

    peft would add to one of the two uses of a tied matrix, and merge into both.
    """
    if tied and (name := _name_around(adapted, embeddings, ("original_module", "base_layer"))):
        raise UserError(
            f"adapter: `{name}` holds the matrix that embeddings and head share; an adapter would change one of its "
            f"two uses, and a merge both: take it out of `target_modules` and `modules_to_save`"
        )
    if new_ids and (name := _name_around(adapted, embeddings, ("original_module",))):
        raise UserError(
            f"adapter.modules_to_save: in `{name}` whole embeddings or the whole head train, so that the rows of new "
            f"tokens cannot train alone; leave out one of the two"
        )


def _name_around(adapted: PeftModel, parts: list[nn.Module], kinds: tuple[str, ...]) -> str | None:
    """Return the name of a module of peft that was put around one of the parts, or around what holds it."""
    for name, module in adapted.named_modules():
        inner = [m for kind in kinds for m in (module._modules.get(kind) or nn.Identity()).modules()]
        if any(m is part for m in inner for part in parts):
            return name.removeprefix("base_model.model.")
    return None


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """An adapter in figures.

    Attributes:
        type: as peft names it.
        parameters: of the adapter.
        new_row_parameters: of the rows of new tokens.
        own_parameters: of the base model's, those that train too, such as with `bias: all`.
        base_parameters: of the base model, rows included.
        target_modules: the modules, or parameters, that it is in.
        saved_modules: what trains whole, as a copy.
    """

    type: str
    parameters: int
    new_row_parameters: int
    own_parameters: int
    base_parameters: int
    target_modules: tuple[str, ...]
    saved_modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.parameters / self.base_parameters
        rows = f", and {self.new_row_parameters:,} of new tokens' rows" if self.new_row_parameters else ""
        rows += f", and {self.own_parameters:,} of the base model's own" if self.own_parameters else ""
        return (
            f"adapter: {self.type.lower()}, {self.parameters:,} parameters ({share:.2%} of the model's "
            f"{self.base_parameters:,}){rows}, in {len(self.target_modules)} modules: {fold_names(self.target_modules)}"
            + (f"; and copies of {', '.join(self.saved_modules)}" if self.saved_modules else "")
        )


def describe_adapter(model: PeftModel) -> AdapterDescription:
    """Return how many parameters train, in which modules of the model; `str` of it is one line."""
    plain = model.get_base_model()
    own = set(adapter_names(plain))
    sizes = {name: (number_of_values(p), p.requires_grad) for name, p in plain.named_parameters()}
    rows = sum(number for name, (number, _) in sizes.items() if is_new_rows(name))
    base = {name: size for name, size in sizes.items() if name not in own and not is_new_rows(name)}
    targets = (*model.base_model.targeted_module_names, *getattr(model.base_model, "targeted_parameter_names", ()))
    return AdapterDescription(
        type=_kind(model.peft_config[model.active_adapter]),
        parameters=sum(number for name, (number, trains) in sizes.items() if name in own and trains),
        new_row_parameters=rows,
        own_parameters=sum(number for number, trains in base.values() if trains),
        base_parameters=sum(number for number, _ in base.values()),
        target_modules=targets,
        saved_modules=_saved_modules(model),
    )


def _saved_modules(model: PeftModel) -> tuple[str, ...]:
    """Return the names under which modules train as copies; of a classifier peft lists some that it has not."""
    names = set(getattr(model.peft_config[model.active_adapter], "modules_to_save", None) or ())
    copied = [path for path, module in model.named_modules() if hasattr(module, "original_module")]
    return tuple(sorted(name for name in names if any(f".{path}".endswith(f".{name}") for path in copied)))


def _kind(config: PeftConfig) -> str:
    variants = [key for key in ("use_rslora", "use_dora") if getattr(config, key, False)]
    return " with ".join([config.peft_type.value, " and ".join(variants)] if variants else [config.peft_type.value])


def adapter_type(model: PeftModel) -> str:
    """Return the type of a model's adapter as `peft.PeftType` names it, such as `LORA`."""
    return model.peft_config[model.active_adapter].peft_type.value
