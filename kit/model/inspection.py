"""`kit inspect`: what a model is and what its files hold, read from the files' headers without loading a weight."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_CONFIG_NAME

from kit.console import quiet_libraries, say, table, warn
from kit.errors import UserError, did_you_mean
from kit.files import read_json
from kit.model.architecture import Architecture, build_architecture, in_order
from kit.model.headers import StoredTensor, read_headers, read_tensor
from kit.model.hub import expand, from_hub, is_adapter
from kit.model.tokenizer import lacks_tokenizer
from kit.names import fold_names, number_ranges

# What changes how a model computes and is easily overlooked; shown where it is set.
_NOTABLE = """attn_logit_softcapping final_logit_softcapping sliding_window attention_chunk_size query_pre_attn_scalar
logit_scale logits_scaling residual_multiplier embedding_multiplier scale_attn_by_inverse_layer_idx
reorder_and_upcast_attn num_experts num_local_experts n_routed_experts num_experts_per_tok
q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim is_encoder_decoder
is_decoder add_cross_attention""".split()
_SPECIAL = {"bos": "BOS", "eos": "EOS", "pad": "pad token"}


def inspect_model(name: str, *, revision: str | None, values: str | None, show_all: bool) -> None:
    """Print what a model is and what its files hold, or the values of one tensor.

    Args:
        name: a model folder, a run directory, or a name on the Hub.
        revision: branch, tag or commit of a Hub model.
        values: name of the tensor to read; nothing else is printed then.
        show_all: print a row for every tensor, not one for all that repeat.

    Raises:
        UserError: there is no such model, its configuration is unknown, its files are damaged or pickled, or it holds
            no tensor named `values`.
    """
    quiet_libraries()
    name = _model_folder(expand(name))
    if revision and Path(name).is_dir():
        raise UserError(f"--revision goes with a name on the Hub; {name} is a folder")
    if values is not None and show_all:
        raise UserError("--values shows one tensor, --all every row of the table: keep one")
    config = _load_config(name, revision)
    tensors = read_headers(name, revision)
    if values is not None:
        _print_values(name, revision, config, tensors, values)
        return
    adapter = is_adapter(name)
    architecture = None if adapter else _try_to_build(config, tensors)
    say(f"{'Adapter' if adapter else 'Model'} {name}" + (f" at {revision}" if revision else ""), style="bold")
    for label, text in _facts_of_adapter(name) if adapter else _facts(config, architecture, tensors):
        say(f"  {label:<16}  {text}")
    tensors = in_order(tensors, architecture)
    rows, folded = (tensors, []) if show_all else _fold(tensors)
    _print_table(rows, folded)
    _print_totals(tensors, architecture)
    _print_tokenizer(name, revision, config, architecture)


def _model_folder(name: str) -> str:
    """Return the folder of a run's model for a run directory, else the name itself."""
    path = Path(name)
    if not path.is_dir() or (path / "config.json").is_file():
        return name
    if (path / "model").is_dir():
        return _model_folder(str(path / "model"))
    if (path / "recipe.yaml").is_file() or (path / "manifest.json").is_file():
        raise UserError(f"{name}: the run has no model/ yet; it is written when training ends")
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{name} holds an adapter (adapter_config.json), not a whole model")
    raise UserError(f"{name} has no config.json; expected a model folder, a run directory or a name on the Hub")


def _load_config(name: str, revision: str | None) -> PreTrainedConfig:
    with from_hub("model", name, revision) as options:
        stored, _ = PreTrainedConfig.get_config_dict(name, revision=revision, **options)
        model_type = stored.get("model_type")
        if model_type and model_type not in CONFIG_MAPPING:
            code = "; its code lies with the model (auto_map), and inspecting runs none" if "auto_map" in stored else ""
            raise UserError(
                f"{name}: config.json: unknown model_type `{model_type}`{did_you_mean(str(model_type), CONFIG_MAPPING)}"
                f"{code} (transformers {transformers.__version__})"
            )
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, **options)


def _try_to_build(config: PreTrainedConfig, tensors: list[StoredTensor]) -> Architecture | None:
    try:
        return build_architecture(config, tensors)
    except Exception as error:  # each architecture fails in its own way: a size that does not fit, an absent package
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"the architecture cannot be built, so the files are not compared with it: {reason[:600]}")
        return None


def _fold(tensors: list[StoredTensor], depth: int = 0) -> tuple[list[StoredTensor], list[str]]:
    """Keep the first of blocks that differ in their number alone; return rows, and what was left out.

    Blocks within blocks (the experts of a layer) are folded in turn: `depth` numbers of a name stand already.
    """
    lists: dict[str, dict[str, list[StoredTensor]]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        at = numbers[depth] if len(numbers) > depth else len(parts)
        number = parts[at] if at < len(parts) else ""
        lists.setdefault(".".join(parts[:at]), {}).setdefault(number, []).append(tensor)
    rows, folded = [], []
    for head, blocks in lists.items():
        if "" in blocks:
            rows += blocks.pop("")
        alike: dict[Any, list[str]] = {}
        for number, block in blocks.items():
            cut = len(f"{head}.{number}")
            alike.setdefault(tuple((t.name[cut:], t.shape, t.dtype) for t in block), []).append(number)
        for numbers in alike.values():
            inner, within = _fold(blocks[numbers[0]], depth + 1)
            rows += [replace(row, times=row.times * len(numbers)) for row in inner]
            if len(numbers) > 1:
                folded.append(f"{head}.{number_ranges(numbers[1:])} (as {head}.{numbers[0]})")
            folded += within
    return rows, folded


def _facts(
    config: PreTrainedConfig, architecture: Architecture | None, tensors: list[StoredTensor]
) -> Iterator[tuple[str, str]]:
    """Yield what an architecture is, as label and text; what it does not have is left out."""
    text = config.get_text_config()
    sizes = {
        key: getattr(text, key, None)
        for key in "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "vocab_size max_position_embeddings".split()
    }
    named = ", ".join(config.architectures or ["not named in config.json"])
    built = type(architecture.model).__name__ if architecture else named
    yield "architecture", f"{built} (model_type {config.model_type})" + (f"; config: {named}" if built != named else "")
    kinds = Counter(getattr(text, "layer_types", None) or ())
    layers = _count(sizes["num_hidden_layers"])
    yield "layers", layers + (f": {', '.join(f'{n} {kind}' for kind, n in kinds.items())}" if len(kinds) > 1 else "")
    inner = sizes["intermediate_size"]
    yield "hidden size", _count(sizes["hidden_size"]) + (f"; feed-forward {_count(inner)}" if inner else "")
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(sizes["hidden_size"], int):
        # Latent attention has several sizes of heads, which are among the notable values.
        latent = getattr(text, "kv_lora_rank", None)
        each = "" if latent else f" of size {sizes['head_dim'] or sizes['hidden_size'] // heads}"
        grouped = f"; {shared} for keys and values" if shared not in (None, heads) else ""
        yield "attention heads", f"{heads}{each}{grouped}"
    yield "vocabulary", _count(sizes["vocab_size"])
    rope = getattr(text, "rope_parameters", None)
    yield "positions", _count(sizes["max_position_embeddings"]) + (f"; rotary {_flat(rope)}" if rope else "")
    if architecture:
        pairs = ", ".join(f"{target} is {source}" for target, source in list(architecture.tied.items())[:3])
        yield "tied", f"yes: {pairs}" if pairs else "no"
        if transposed := sorted(
            {n.split(".")[-1] for n, m in architecture.model.named_modules() if isinstance(m, Conv1D)}
        ):
            yield "layout", f"{', '.join(transposed)} hold (in, out), as Conv1D does; a Linear holds (out, in)"
    yield "stored dtype", _dtypes(config, tensors)
    if quantization := getattr(config, "quantization_config", None):
        yield "quantized", f"{_flat(quantization)}; packed matrices, not compared with the architecture"
    known = text.to_dict()  # without the other names of a value that `getattr` knows too
    if notable := {key: value for key in _NOTABLE if (value := known.get(key))}:
        yield "notable", _flat(notable)


def _facts_of_adapter(folder: str) -> Iterator[tuple[str, str]]:
    """Yield what an adapter is and which model it belongs to, as label and text."""
    from kit.model.adapter_files import read_adapter  # peft's import takes seconds

    record, settings = read_adapter(folder), read_json(Path(folder) / ADAPTER_CONFIG_NAME)
    given = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha")}
    given |= {key: "true" for key in ("use_rslora", "use_dora") if settings.get(key)}
    yield "type", settings["peft_type"].lower() + "".join(f", {key} {n}" for key, n in given.items() if n is not None)
    targets = settings.get("target_modules") or ()
    yield "in", targets if isinstance(targets, str) else ", ".join(sorted(targets))
    at = f" at {record['revision']}" if record["revision"] else ""
    yield (
        "base model",
        f"{record['name']}{at} (model_type {record['model_type']}, {record['rows']:,} rows of embeddings)",
    )
    yield (
        "its weights",
        f"{record['dtype']}{', held in 4 bits' if record['load_in_4bit'] else ''}; "
        + (f"fingerprint {record['fingerprint']}"),
    )
    if added := record["rows_with_new_tokens"] - record["rows"]:
        yield "new rows", f"{added:,}, of which {len(record['trained_ids']):,} have trained"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _flat(values: Any) -> str:
    values = values if isinstance(values, dict) else values.to_dict()
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, "default"))


def _dtypes(config: PreTrainedConfig, tensors: list[StoredTensor]) -> str:
    counts = Counter(tensor.dtype for tensor in tensors)
    text = ", ".join(
        f"{dtype} ({n:,} of the tensors)" if len(counts) > 1 else dtype for dtype, n in counts.most_common()
    )
    stated = str(config.dtype).removeprefix("torch.")
    return text + (f"; config.json says {stated}" if config.dtype and stated not in counts else "")


def _binary(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _shape(sizes: Iterable[int]) -> str:
    return " × ".join(map(str, sizes)) or "scalar"


def _print_table(rows: list[StoredTensor], folded: list[str]) -> None:
    cells = []
    for row in rows:
        parameters = f"{row.times:,} × {row.parameters:,}" if row.times > 1 else f"{row.parameters:,}"
        cells.append([row.name, _shape(row.shape), row.dtype, parameters])
    table("Tensors", ["tensor", "shape", "dtype", "parameters"], cells)
    if folded:
        say(f"not shown, being alike: {', '.join(folded)}; --all prints every row")


def _print_totals(tensors: list[StoredTensor], architecture: Architecture | None) -> None:
    size, files = sum(tensor.bytes for tensor in tensors), sorted({tensor.file for tensor in tensors})
    where = f"{len(files)} shards, {files[0]} …" if len(files) > 1 else "".join(files)
    stored = sum(tensor.parameters for tensor in tensors)
    say()
    say(f"files: {len(tensors):,} tensors, {stored:,} parameters, {size:,} bytes ({_binary(size)}) in {where}")
    if architecture is None:
        return
    parts = architecture.parameters()
    total = sum(parts.values())
    shares = ", ".join(f"{part} {number:,} ({number / total:.1%})" for part, number in parts.items())
    say(f"architecture: {total:,} parameters, tied ones counted once: {shares}")
    own = {architecture.own_name(tensor.name) for tensor in tensors}
    for target, source in architecture.tied.items():
        if {target, source} <= own:
            say(f"{target} is stored although it is tied to {source}; on loading they are tied where they are equal")
    if architecture.ignored:
        say(f"left over from older versions, ignored on loading: {fold_names(architecture.ignored)}")
    for name, found, expected in architecture.mismatched[:12]:
        warn(f"{name} is {_shape(found)} in the files, but {_shape(expected)} in the architecture")
    if len(architecture.mismatched) > 12:
        warn(f"{len(architecture.mismatched) - 12:,} more tensors differ in shape")
    if architecture.missing:
        warn(f"in the architecture, not in the files: {fold_names(architecture.missing)}")
    if architecture.unused:
        warn(f"in the files, not used by the architecture: {fold_names(architecture.unused)}")
    if architecture.compared and not (architecture.mismatched or architecture.missing or architecture.unused):
        say("the files hold every tensor of the architecture, in its shape")


def _print_tokenizer(
    name: str, revision: str | None, config: PreTrainedConfig, architecture: Architecture | None
) -> None:
    if lacks_tokenizer(name):
        say("tokenizer: none in this folder")
        return
    try:
        with from_hub("model", name, revision, "tokenizer.json") as options:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, **options)
    except UserError as error:
        warn(f"no tokenizer: {str(error)[:300]}")
        return
    ids = set(tokenizer.get_vocab().values())
    if not ids - set(tokenizer.all_special_ids):
        say("tokenizer: none with this model")
        return
    kinds = {kind: (getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")) for kind in _SPECIAL}
    special = ", ".join(
        f"no {_SPECIAL[kind]}" if number is None else f"{_SPECIAL[kind]} {token} ({number:,})"
        for kind, (token, number) in kinds.items()
    )
    embedding = architecture.model.get_input_embeddings() if architecture else None
    rows = embedding.weight.shape[0] if embedding is not None else config.get_text_config().vocab_size
    fit = f"largest id {max(ids):,}, the embedding has {rows:,} rows"
    say(f"tokenizer: {len(tokenizer):,} tokens ({type(tokenizer).__name__}); {special}; {fit}")
    if max(ids) >= rows:
        warn("the tokenizer makes ids that the embedding has no row for: it belongs to another model")
    for kind, (_, number) in kinds.items():
        stated = getattr(config.get_text_config(), f"{kind}_token_id", None)
        expected = stated if isinstance(stated, list) else [stated]
        if number is not None and stated is not None and number not in expected:
            warn(f"config.json gives {_SPECIAL[kind]} the id {stated}, the tokenizer {number:,}")


def _print_values(
    name: str, revision: str | None, config: PreTrainedConfig, tensors: list[StoredTensor], wanted: str
) -> None:
    found = {tensor.name: tensor for tensor in tensors}
    if wanted not in found:
        architecture = _try_to_build(config, tensors)
        source = architecture and architecture.tied.get(wanted)
        hint = f"; it is tied to `{source}`, which is stored" if source in found else did_you_mean(wanted, found)
        raise UserError(f"--values: {name} holds no tensor `{wanted}`{hint}")
    tensor = found[wanted]
    value = read_tensor(name, revision, tensor).flatten()
    say(f"{wanted} in {tensor.file}", style="bold")
    say(f"  shape       {_shape(tensor.shape)} ({tensor.parameters:,} values)")
    say(f"  dtype       {tensor.dtype}")
    for label, text in _statistics(value):
        say(f"  {label:<10}  {text}")
    say(f"  first 8     {', '.join(f'{number:.6g}' for number in value[:8].double().tolist())}")


def _statistics(values: torch.Tensor) -> Iterator[tuple[str, str]]:
    """Yield label and text of the moments and bounds of `values` (flat), worked out in float64."""

    def finite() -> Iterator[torch.Tensor]:
        # By parts: a copy in float64 of the embedding of a large vocabulary would take gigabytes.
        for part in values.split(1 << 24):
            part = part.double()
            if (part := part[part.isfinite()]).numel():
                yield part

    if number := sum(part.numel() for part in finite()):
        mean = sum(part.sum().item() for part in finite()) / number
        variance = sum((part - mean).square().sum().item() for part in finite()) / number
        yield "mean", f"{mean:.6g}"
        yield "std", f"{variance**0.5:.6g}"
        yield "min", f"{min(part.min().item() for part in finite()):.6g}"
        yield "max", f"{max(part.max().item() for part in finite()):.6g}"
    others = values.numel() - number
    yield "not finite", f"{others:,}" + (" (left out of the figures above)" if others and number else "")
