"""Adapters of peft: small weights that train while the model's own keep every bit, saved apart, merged on request.

Without `target_modules` an adapter goes into every linear layer of the blocks, not into peft's default, which for most
architectures is a part of the attention: QLoRA (arXiv:2305.14314) and "LoRA Without Regret" (Thinking Machines, 2025)
both found that only adapters in all of them, the MLPs above all, learn as full training does. What is defined on other
layers (IA3, LayerNorm tuning) keeps peft's own choice.
"""

import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kit.console import warn
from kit.errors import UserError, did_you_mean, is_out_of_memory
from kit.files import hash_array, hash_file, hash_values, read_json, replaced_folder, write_json
from kit.model.headers import fold_names
from kit.model.new_rows import is_new_rows, new_row_ids, train_new_rows
from kit.recipe.adapter import PEFT_ERRORS, AdapterSection, check_adapter, peft_reason

# They are defined on certain layers, which peft knows per architecture.
_OWN_TARGETS = {"IA3", "LN_TUNING", "BEFT"}
_RECORD, _ROWS_FILE = "base.json", "new_rows.safetensors"
# Facts that must agree, what is easiest to mend first.
_COMPARED = {
    "model_type": "model_type",
    "rows": "the rows of its embeddings",
    "dtype": "weights in",
    "fingerprint": "weights with the fingerprint",
}


def check_quantization(load_in_4bit: bool, key: str = "model.load_in_4bit") -> None:
    """Check that this machine can hold a model in 4 bits, as QLoRA does.

    Raises:
        UserError: it has no CUDA device, or bitsandbytes is not installed.
    """
    if not load_in_4bit:
        return
    missing = [] if torch.cuda.is_available() else ["a CUDA device, which is not there"]
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes, which is not installed (pip install bitsandbytes)")
    if missing:
        raise UserError(f"{key}: 4-bit weights need {' and '.join(missing)}; without the key the adapter is plain LoRA")


# ---- into the model


def add_adapter(model: PreTrainedModel, section: AdapterSection, new_ids: Sequence[int] = ()) -> PeftModel:
    """Put an adapter into a model, in place: it alone trains, and beside it the rows of new tokens.

    What it begins as is drawn from the global generators. To be called once the model is on its device, with its
    embeddings resized, and before its optimizer is created.

    Args:
        model: a plain causal LM.
        section: the recipe's.
        new_ids: of the tokens whose rows train, without gaps; none for no rows.

    Raises:
        UserError: mistakes of `check_adapter`; names that match no module; a tied matrix among the targets; layers that
            this type of adapter cannot go into; an initialisation that changes the base model; nothing trains.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise RuntimeError("the model has an adapter already")
    config = check_adapter(section)
    if getattr(config, "target_modules", None) is None and section.type.upper() not in _OWN_TARGETS:
        config.target_modules = "all-linear"  # in peft's words all but the head
    if hasattr(config, "fan_in_fan_out"):  # how Conv1D of GPT-2 keeps its matrix
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    _check_names(model, config)
    before = {name: (weight, _bits(weight)) for name, weight in model.named_parameters()}
    embeddings, tied = _embeddings(model), _are_tied(_embeddings(model))
    adapted = _inject(model, config)
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


def _bits(weight: torch.Tensor) -> int | None:
    """Return the sum of a tensor's values read as integers: changes through `.data` are counted nowhere else."""
    if weight.is_meta:
        return None
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.detach().flatten().view(kind).sum(dtype=torch.int64).item()


def _inject(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = get_peft_model(model, config)
        except PEFT_ERRORS as error:
            said = f"adapter: peft refuses these settings for {type(model).__name__}: {peft_reason(error)}"
            hint = "; the model's layers: " + ", ".join(_layer_names(model)) if "target_modules" in said else ""
            raise UserError(said + hint) from None
    for text, kind in {" ".join(str(warning.message).split()): warning.category for warning in caught}.items():
        if issubclass(kind, RuntimeWarning):
            raise UserError(f"adapter: {text}")  # keys that match nothing, which peft goes on without
        if issubclass(kind, UserWarning) and "fan_in_fan_out" not in text and "tie_word" not in text:
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
                raise UserError(
                    f"adapter.{key}: `{wanted}` matches no module of this {type(model).__name__}"
                    f"{did_you_mean(wanted, _layer_names(model))}"
                )
    layers = getattr(config, "layers_to_transform", None)
    number = model.config.get_text_config().num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not 0 <= layer < number:
            raise UserError(f"adapter.layers_to_transform: found {layer}; expected a block from 0 to {number - 1}")


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Return the input embedding and the head, each as it was before peft put a layer around it."""
    around = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [getattr(m, "original_module", getattr(m, "base_layer", m)) for m in around if m is not None]


def _are_tied(embeddings: list[nn.Module]) -> bool:
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
    """An adapter in figures: its own parameters, those of new rows, the model's without both, and where it sits."""

    type: str
    parameters: int
    new_row_parameters: int
    base_parameters: int
    target_modules: tuple[str, ...]

    def __str__(self) -> str:
        share = self.parameters / self.base_parameters
        rows = f", and {self.new_row_parameters:,} of new tokens' rows" if self.new_row_parameters else ""
        return (
            f"adapter: {self.type.lower()}, {self.parameters:,} parameters ({share:.2%} of the model's "
            f"{self.base_parameters:,}){rows}, in {len(self.target_modules)} modules: {fold_names(self.target_modules)}"
        )


def describe_adapter(model: PeftModel) -> AdapterDescription:
    """Return how many parameters train, in which modules of the model; `str` of it is one line."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    rows = sum(number for name, number in trained.items() if is_new_rows(name))
    return AdapterDescription(
        type=_type(model),
        parameters=sum(trained.values()) - rows,
        new_row_parameters=rows,
        base_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        target_modules=tuple(model.base_model.targeted_module_names),
    )


def _type(model: PeftModel) -> str:
    return model.peft_config[model.active_adapter].peft_type.value


# ---- saved, and loaded onto the same base again


@dataclasses.dataclass(frozen=True)
class BaseFacts:
    """What tells one base model from another, whatever folder it lies in; `rows` are those of its embeddings."""

    name: str | None
    revision: str | None
    model_type: str
    dtype: str
    rows: int
    fingerprint: str


def base_facts(model: PreTrainedModel, name: str | None = None, revision: str | None = None) -> BaseFacts:
    """Return the facts of a base model as it was loaded: before its embeddings grow and before an adapter.

    The fingerprint covers each tensor's name, shape, type and values; it reads all weights once.
    """
    tensors = []
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        tensors.append((key, str(tensor.dtype), list(tensor.shape), hash_array(values)))
    rows, dtype = len(model.get_input_embeddings().weight), str(model.dtype).removeprefix("torch.")
    return BaseFacts(name, revision, model.config.model_type, dtype, rows, hash_values(tensors))


def save_adapter(model: PeftModel, folder: str | Path, base: BaseFacts, added_ids: Sequence[int] = ()) -> None:
    """Write an adapter in peft's format, with the base it belongs to and the rows that the base does not have.

    Args:
        model: what `add_adapter` returned.
        folder: replaced as a whole.
        base: of the base model as it was loaded.
        added_ids: of all tokens that were added to it, if they may be more than those whose rows train.
    """
    plain = model.get_base_model()
    size, trained = len(_embeddings(plain)[0].weight), list(new_row_ids(plain) or ())
    added = {*added_ids, *trained, *range(base.rows, size)}
    ids, config = torch.tensor(sorted(added), dtype=torch.long), model.peft_config[model.active_adapter]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    with replaced_folder(folder) as temporary:
        # peft would save the whole embeddings where they have grown, and look on the Hub whether they have.
        model.save_pretrained(temporary, save_embedding_layers=False)
        if added:
            rows = {key: whole.detach()[ids.to(whole.device)].cpu() for key, whole in _matrices(plain).items()}
            save_file({"ids": ids, **rows}, temporary / _ROWS_FILE)
        files = {path.name: hash_file(path) for path in sorted(temporary.glob("*.safetensors"))}
        facts = {"rows_with_new_tokens": size, "trained_ids": trained, "files": files}
        write_json(temporary / _RECORD, {**dataclasses.asdict(base), **facts})


def _matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what has a row for each token: input embeddings, and of the head what is not tied to them."""
    inputs, *head = embeddings = _embeddings(model)
    found = {"input": inputs.weight}
    if head and not _are_tied(embeddings):
        found["output"] = head[0].weight
    if head and head[0].bias is not None:
        found["output_bias"] = head[0].bias
    return found


def load_adapter(
    model: PreTrainedModel, folder: str | Path, base: BaseFacts | None = None, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter, and the rows of its new tokens, into the base model that it was trained on, in place.

    Args:
        model: the base model as it was loaded; its embeddings grow here.
        folder: what `save_adapter` wrote.
        base: facts of `model`, if they are known already; else they are taken here, which reads all weights once.
        trainable: whether adapter and rows are to train on.

    Raises:
        UserError: the folder holds no whole adapter of the kit, or the model is not the one that it belongs to.
    """
    record = _read_record(Path(folder))
    base = base or base_facts(model)
    of = " at ".join(part for part in (record["name"], record["revision"]) if part) or "a model without a name"
    for key, what in _COMPARED.items():
        if getattr(base, key) != record[key]:
            raise UserError(
                f"{folder}: this adapter belongs to another base model, {of}: expected {what} {record[key]}, found "
                f"{getattr(base, key)}"
            )
    if (rows := record["rows_with_new_tokens"]) > base.rows:
        with torch.random.fork_rng():
            model.resize_token_embeddings(rows, mean_resizing=False)
    if _ROWS_FILE in record["files"]:
        saved = load_file(Path(folder) / _ROWS_FILE)
        for key, whole in _matrices(model).items():
            whole.data[saved["ids"].to(whole.device)] = saved[key].to(whole.device)
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    if trainable and record["trained_ids"]:
        train_new_rows(model, record["trained_ids"])
    return adapted


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / _RECORD)
        kept = {"rows_with_new_tokens", "trained_ids", *(f.name for f in dataclasses.fields(BaseFacts))} <= set(record)
        whole = kept and all(hash_file(folder / name) == found for name, found in record["files"].items())
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no adapter of the kit: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{folder}: the adapter is damaged: its files are not those that {_RECORD} names")
    return record


# ---- merged


def merge_adapter(model: PeftModel) -> tuple[PreTrainedModel, float]:
    """Merge an adapter into its base model, in place, and compare logits on a fixed batch before and after.

    A merged weight is the rounded sum of two that were multiplied apart, so logits differ by rounding: in float32 by
    some 1e-6 of the largest one, by 1e-4 where the adapter outweighs the base hundreds of times. `MERGE_TOLERANCE` is
    above that; a wrong merge differs by what the adapter does, which is more wherever something was learned.

    Returns:
        The plain model, and the largest absolute difference of its logits, relative to the largest absolute logit.

    Raises:
        UserError: the model has no adapter, or is merged already; its weights are quantised; peft cannot merge this
            type of adapter.
        RuntimeError: the merged model gives other logits.
    """
    if not isinstance(model, PeftModel):
        raise UserError(f"merge: this {type(model).__name__} is a plain model: it has no adapter, or is merged already")
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise UserError("merge: the adapter is merged already")
    plain, kind = model.get_base_model(), _type(model).lower()
    if getattr(plain, "is_quantized", False):
        raise UserError(
            "merge: a merge into quantised weights would round the adapter away; load the base without `load_in_4bit`"
        )
    expected = _logits(plain)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (*PEFT_ERRORS, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"merge: peft cannot merge an adapter of type {kind}: {peft_reason(error)}") from None
    difference = merged_difference(expected, _logits(merged))
    if not difference <= MERGE_TOLERANCE[merged.dtype]:
        raise RuntimeError(f"the merged model gives other logits than the adapted one: by {difference:.2g} of them")
    return merged, difference


# Of the largest logit. In 16 bits each merged weight is rounded, which moves logits as storing the model so does.
MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def merged_difference(adapted: torch.Tensor, merged: torch.Tensor) -> float:
    """Return the largest absolute difference of two models' logits, relative to the largest absolute logit."""
    return ((adapted - merged).abs().max() / adapted.abs().max().clamp(min=1e-30)).item()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Return logits of a fixed batch, as `kit.model.saving` draws it, without dropout."""
    config = model.config.get_text_config()
    positions = min(64, getattr(config, "max_position_embeddings", None) or 64)
    ids = torch.randint(config.vocab_size, (2, positions), generator=torch.Generator().manual_seed(0))
    was_training = model.training
    logits = model.eval()(ids.to(model.device), use_cache=False).logits
    model.train(was_training)
    return logits.double()
