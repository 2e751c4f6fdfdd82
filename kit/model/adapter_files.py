"""Adapters as files: saved with what they belong to, loaded onto the same base again, merged into it."""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

from kit.errors import UserError, is_out_of_memory
from kit.files import hash_array, hash_file, hash_values, read_json, write_json
from kit.model.adapter import adapter_type, are_tied, plain_embeddings
from kit.model.heads import head_names, is_classifier
from kit.model.hub import ADAPTER_RECORD, expand
from kit.model.new_rows import new_row_ids, train_new_rows
from kit.model.saving import fixed_logits
from kit.model.shards import gather, whole_shape, write, write_rows
from kit.recipe.adapter import PEFT_ERRORS, peft_reason
from kit.recipe.models import ModelSection

_ROWS_FILE = "new_rows.safetensors"
# Facts that must agree, what is easiest to mend first.
_COMPARED = {
    "model_type": "model_type",
    "rows": "rows of embeddings:",
    "dtype": "weights in",
    "fingerprint": "weights with the fingerprint",
}


# ---- saved, and loaded onto the same base again


@dataclasses.dataclass(frozen=True)
class BaseFacts:
    """What tells one base model from another, where it is, and how it was loaded.

    Attributes:
        name: as the recipe has it, a folder or a name on the Hub.
        revision: of a Hub model, the commit where it is known.
        path: of a folder, absolute: whoever loads the adapter may be in another working directory.
        model_type: of its configuration.
        dtype: of its weights in memory.
        rows: of its embeddings.
        fingerprint: of its weights.
        load_in_4bit: whether its linear layers are quantised.
        config: attributes of its configuration that the recipe overrides.
        attn_implementation: what the recipe asks for.
    """

    name: str | None
    revision: str | None
    path: str | None
    model_type: str
    dtype: str
    rows: int
    fingerprint: str
    load_in_4bit: bool
    config: dict[str, Any]
    attn_implementation: str | None


def base_facts(model: PreTrainedModel, section: ModelSection | None = None) -> BaseFacts:
    """Return the facts of a base model as it was loaded: before its embeddings grow and before an adapter.

    The fingerprint covers each tensor's name, shape, type and values; it reads all weights once. A classifier's head
    is left out: it trains whole beside the adapter, which holds it.

    Args:
        model: the model.
        section: how it was loaded.
    """
    name = section and section.name_or_path
    tensors, head = [], set(head_names(model) if is_classifier(model) else ())
    for key, tensor in sorted((key, tensor) for key, tensor in model.state_dict().items() if key not in head):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        tensors.append((key, str(tensor.dtype), list(tensor.shape), hash_array(values)))
    return BaseFacts(
        name=name,
        revision=getattr(model.config, "_commit_hash", None) or (section and section.revision),
        path=str(Path(expand(name)).absolute()) if name and Path(expand(name)).is_dir() else None,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        rows=len(model.get_input_embeddings().weight),
        fingerprint=hash_values(tensors),
        load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)),
        config=section.config if section else {},
        attn_implementation=section and section.attn_implementation,
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in a model, and what belongs to it in a file.

    Attributes:
        model: what `add_adapter` returned.
        base: facts of the base model as it was loaded.
        added_ids: of all tokens that were added to it, if they may be more than those whose rows train.
    """

    model: PeftModel
    base: BaseFacts
    added_ids: Sequence[int] = ()

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `write` needs of the model's state: whole, on the first process; called on all of them."""
        state, plain = self.model.state_dict(keep_vars=True), self.model.get_base_model()
        own = get_peft_model_state_dict(self.model, state, save_embedding_layers=False)
        wanted = {id(tensor) for tensor in (*own.values(), *(_matrices(plain).values() if self._new_ids() else ()))}
        return gather({name: tensor for name, tensor in state.items() if id(tensor) in wanted})

    def _new_ids(self) -> list[int]:
        """Return the ids of all rows that the base does not have, or not as they are here."""
        plain = self.model.get_base_model()
        size = whole_shape(plain_embeddings(plain)[0].weight)[0]
        return sorted({*self.added_ids, *(new_row_ids(plain) or ()), *range(self.base.rows, size)})

    def write(self, folder: str | Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write the adapter in peft's format into a folder that exists, with the rows that the base does not have.

        What stands in `base.json` says which model it belongs to; configuration and generation settings are those of
        the model with its new tokens. `state` is what the method of that name returned on the first process.
        """
        folder, plain = Path(folder), self.model.get_base_model()
        size, trained = whole_shape(plain_embeddings(plain)[0].weight)[0], list(new_row_ids(plain) or ())
        added = self._new_ids()
        ids = torch.tensor(added, dtype=torch.long)
        of_peft = self.model.peft_config[self.model.active_adapter]
        of_peft.base_model_name_or_path, of_peft.revision = self.base.name, self.base.revision
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft takes a bias for what FSDP has left of a matrix
            # It would save the whole embeddings where they have grown, and look on the Hub whether they have.
            self.model.save_pretrained(folder, save_embedding_layers=False, state_dict=dict(state))
        (folder / "README.md").unlink(missing_ok=True)  # peft's, a form that nobody has filled in
        config = copy.deepcopy(plain.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # is said in the record; here it would quantise the merged model
        config.save_pretrained(folder)
        if plain.can_generate():
            plain.generation_config.save_pretrained(folder)
        if added:
            names = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
            rows = {key: state[names[id(matrix)]][ids] for key, matrix in _matrices(plain).items()}
            save_file({"ids": ids, **rows}, folder / _ROWS_FILE)
        written = sorted([*folder.glob("*.safetensors"), folder / ADAPTER_CONFIG_NAME])
        files = {path.name: hash_file(path) for path in written}
        facts = {"rows_with_new_tokens": size, "trained_ids": trained, "files": files}
        record = {**dataclasses.asdict(self.base), **facts}
        write_json(folder / ADAPTER_RECORD, {**record, "hash": _hash_of(record)})

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `write` wrote of this very adapter, in place.

        Raises:
            RuntimeError: they are another adapter's.
        """
        folder = Path(folder)
        record = read_adapter(folder)
        weights = load_peft_weights(str(folder), device="cpu")
        ours = self.model.state_dict(keep_vars=True)
        ours = get_peft_model_state_dict(self.model, ours, save_embedding_layers=False)
        if differing := ours.keys() ^ weights.keys():
            raise RuntimeError(f"{folder} and the adapter in memory differ: {sorted(differing)[:5]}")
        for name, tensor in ours.items():
            write(tensor, weights[name])
        _restore_rows(self.model.get_base_model(), folder, record)


def _matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what has a row for each token: input embeddings, and of the head what is not tied to them."""
    inputs, *head = embeddings = plain_embeddings(model)
    found = {"input": inputs.weight}
    if head and not are_tied(embeddings):
        found["output"] = head[0].weight
    if head and head[0].bias is not None:
        found["output_bias"] = head[0].bias
    return found


def load_adapter(
    model: PreTrainedModel, folder: str | Path, base: BaseFacts | None = None, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter, and the rows of its new tokens, into the base model that it was trained on, in place.

    Args:
        model: the base model as it was loaded; its embeddings grow here, and special ids become those of the adapter.
        folder: what `Adapter.write` wrote.
        base: facts of `model`, if they are known already; else they are taken here, which reads all weights once.
        trainable: whether adapter and rows are to train on.

    Raises:
        UserError: the folder holds no whole adapter of the kit, or the model is not the one that it belongs to.
    """
    folder = Path(folder)
    record = read_adapter(folder)
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
    _restore_rows(model, folder, record)
    _restore_ids(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there was to say was said when the adapter was made
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    if trainable and record["trained_ids"]:
        train_new_rows(model, record["trained_ids"])
    return adapted


def _restore_rows(model: PreTrainedModel, folder: Path, record: dict[str, Any]) -> None:
    if _ROWS_FILE in record["files"]:
        saved = load_file(folder / _ROWS_FILE)
        for key, matrix in _matrices(model).items():
            write_rows(matrix, saved["ids"], saved[key])


def _restore_ids(model: PreTrainedModel, folder: Path) -> None:
    """Take over special ids and generation settings, which new tokens and their roles may have changed."""
    ours, saved = (config.get_text_config() for config in (model.config, type(model.config).from_pretrained(folder)))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours, name, getattr(saved, name, None))
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Return what `base.json` says of an adapter: the fields of `BaseFacts`, its rows and files.

    Raises:
        UserError: the folder holds no whole adapter of the kit.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_RECORD).is_file():
        raise UserError(
            f"{folder}: no adapter of the kit: {ADAPTER_RECORD} is missing; of one that peft alone wrote, "
            f"`PeftModel.from_pretrained(…).merge_and_unload()` makes a plain model"
        )
    try:
        record = read_json(folder / ADAPTER_RECORD)
        whole = record.pop("hash") == _hash_of(record) and isinstance(record["name"], str | None)
        changed = [name for name, found in record["files"].items() if hash_file(folder / name) != found]
    except FileNotFoundError as error:
        raise UserError(f"{folder}: the adapter is damaged: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, changed = False, []
    if changed or not whole:
        what = f"{changed[0]} is another file than it was" if changed else f"{ADAPTER_RECORD} was changed"
        raise UserError(f"{folder}: the adapter is damaged: {what}")
    return record


def _hash_of(record: dict[str, Any]) -> str:
    """Return a hash of a record but for where the base lies, which whoever moves it may write anew."""
    return hash_values({name: value for name, value in record.items() if name not in ("name", "revision", "path")})


# ---- merged


def merge_adapter(model: PeftModel) -> tuple[PreTrainedModel, float]:
    """Merge an adapter into its base model, in place, and compare logits on a fixed batch before and after.

    A merged weight is the rounded sum of two that were multiplied apart, so logits differ by rounding: by some 1e-6 of
    the largest one, by 1e-4 where the adapter outweighs the base hundreds of times. More than `MERGE_ROUNDING` is taken
    for right only if it is small beside what the adapter does to the logits. Weights in 16 bits are merged and compared
    in float32, and then rounded to what they were: this rounding moves logits as storing the base in 16 bits does.

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
    plain, kind = model.get_base_model(), adapter_type(model).lower()
    if getattr(plain, "is_quantized", False):
        raise UserError(
            "merge: a merge into quantised weights would round the adapter away; load the base without `load_in_4bit`"
        )
    stored = plain.dtype
    types = {name.replace(".base_layer.", "."): weight.dtype for name, weight in plain.named_parameters()}
    precision = torch.promote_types(stored, torch.float32)
    for weight in plain.parameters():
        weight.data = weight.data.to(torch.promote_types(weight.dtype, precision))
    expected = fixed_logits(plain).double()
    with model.disable_adapter():
        effect = merged_difference(expected, fixed_logits(plain).double())
    _put_copies_in_place(plain)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (*PEFT_ERRORS, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"merge: peft cannot merge an adapter of type {kind}: {peft_reason(error)}") from None
    difference = merged_difference(expected, fixed_logits(merged).double())
    if not difference <= MERGE_ROUNDING[precision] + effect / 1000:
        raise RuntimeError(
            f"the merged model gives other logits than the adapted one: by {difference:.2g} of the largest, "
            f"where the adapter moves them by {effect:.2g}"
        )
    for name, weight in merged.named_parameters():
        weight.data = weight.data.to(types.get(name, stored))
    return merged, difference


def _put_copies_in_place(model: PreTrainedModel) -> None:
    """Put trained copies of modules that hold layers where these were: peft does so with single layers alone."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "original_module") and not hasattr(module.original_module, "weight"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.modules_to_save[module.active_adapters[0]])


MERGE_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}  # of the largest logit


def merged_difference(adapted: torch.Tensor, merged: torch.Tensor) -> float:
    """Return the largest absolute difference of two models' logits, relative to the largest absolute logit."""
    return ((adapted - merged).abs().max() / adapted.abs().max().clamp(min=1e-30)).item()
