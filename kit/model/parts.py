"""The parts that every architecture has, found in the model's own structure, as names of its parameters.

What leads from the base model to its blocks is a chain of modules (`transformer`; `bert`, `bert.encoder`). The modules
beside this chain are what the base model has besides blocks: embeddings before them, the final norm after them. All
outside of the base model is the head. Every parameter is in at least one of `embeddings`, `position_embeddings`, a
block, `final_norm`, `head`, `new_tokens` and `other`; `biases` and `norms` cut across these.

A parameter is known by the name under which `named_parameters()` lists it, which for tied matrices is the first of
their names. A matrix that embeds and is the head as well is in both parts, under one name: whoever freezes one of the
two parts and trains the other finds the conflict as a name that both hold. `tied_names` tells the other names.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kit.errors import UserError
from kit.model.new_rows import is_new_rows

PARTS = ("embeddings", "position_embeddings", "final_norm", "head", "biases", "norms", "new_tokens")
_WITHOUT_STRUCTURE = ("biases", "norms", "new_tokens")  # parts that any module has or has not, whatever its blocks
_FIELDS = (*PARTS, "first_blocks", "last_blocks", "patterns")
_POSITIONS = re.compile(r"posi|pos_emb|wpe|rel_emb|relative", re.IGNORECASE)
_NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def select(model: PreTrainedModel, parts: Mapping[str, Any], key: str) -> dict[str, tuple[str, ...]]:
    """Return the parameters of the parts that a section of a recipe names.

    Args:
        model: the model; where `new_tokens` is asked for, `train_new_rows` has been called on it.
        parts: the section's fields, of which false, None and empty ones count as absent: `embeddings`,
            `position_embeddings`, `final_norm`, `head`, `biases`, `norms`, `new_tokens` (bool), `first_blocks`,
            `last_blocks` (number of blocks), `patterns` (texts; see `match_pattern`).
        key: of the section in the recipe, for messages, such as `freezing.trainable`.

    Returns:
        For each part its label (`head`, `last_blocks: 2`, `pattern .*bias`), to names of parameters in the model's
        order; no part is empty, and one parameter may be in several.

    Raises:
        UserError: the model has no such part, fewer blocks, or no parameter that a pattern matches; its parts cannot be
            told; a pattern is no regular expression.
        ValueError: a field is none of those above.
    """
    if unknown := [field for field in parts if field not in _FIELDS]:
        raise ValueError(f"parts of a model: {', '.join(unknown)}; expected some of {', '.join(_FIELDS)}")
    wanted = [part for part in PARTS if parts.get(part)]
    selected: dict[str, tuple[str, ...]] = {}
    if wanted:
        cut_across = {"biases": bias_names, "norms": norm_names, "new_tokens": new_token_names}
        structural = any(part not in _WITHOUT_STRUCTURE for part in wanted)
        found = find_parts(model, key) if structural else {part: cut_across[part](model) for part in wanted}
        for part in wanted:
            if not found[part]:
                raise _without(model, part, key)
            selected[part] = found[part]
    for field in ("first_blocks", "last_blocks"):
        if (number := parts.get(field)) is not None:
            selected[f"{field}: {number}"] = _some_blocks(model, field, number, key)
    for pattern in parts.get("patterns") or ():
        selected[f"pattern {pattern}"] = match_pattern(model, pattern, f"{key}.patterns")
    return selected


def find_parts(model: PreTrainedModel, key: str = "freezing") -> dict[str, tuple[str, ...]]:
    """Return the model's parts but for its blocks, as names of parameters in the model's order.

    - `embeddings`: the matrix of the tokens, and all else that makes of ids what the first block reads: token types,
      projections, and the norm of the sum (BERT, ModernBERT), so that with `embeddings` and the first blocks frozen
      nothing trains below what is frozen, and no gradient has to get there.
    - `position_embeddings`: tables of positions; rotary embeddings have no parameters.
    - `final_norm`: what normalises the output of the last block. BERT's kind has none.
    - `head`: all outside of the base model, the output embedding, and the base model's pooler. What DeBERTa has as
      its own pooler and RoBERTa as a layer of its classifier is BERT's pooler; it serves the head alone, and is as
      newly initialised as the head where a masked LM becomes a classifier.
    - `biases`: every parameter called a bias, those of norms included.
    - `norms`: all parameters of normalising modules, wherever these are.
    - `new_tokens`: the rows that `train_new_rows` made; they are in no other part.
    - `other`: what is in none of `embeddings`, `position_embeddings`, a block, `final_norm`, `head`, `new_tokens`.

    Args:
        model: the model.
        key: in the recipe, for messages.

    Returns:
        All of these parts; those that the model has not are empty.

    Raises:
        UserError: the model does not tell which of its modules are its blocks, or the embeddings of its tokens.
    """
    found: dict[str, set[str]] = {part: set() for part in ("embeddings", "position_embeddings", "final_norm", "head")}
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    tokens = _token_embeddings(model, key)
    for path, module in _beside_the_blocks(model, key):
        name = path.rpartition(".")[2].lower()
        if any(inner is tokens for inner in module.modules()) or "emb" in name or isinstance(module, nn.Embedding):
            positions = _position_parameters(path, module, tokens, model)
            for parameter in module.parameters():
                part = "position_embeddings" if id(parameter) in positions else "embeddings"
                found[part].add(first_name[id(parameter)])
        elif _is_norm(module) and not _normalises_positions(path, model):
            found["final_norm"] |= {first_name[id(parameter)] for parameter in module.parameters()}
        elif "pooler" in name:
            found["head"] |= {first_name[id(parameter)] for parameter in module.parameters()}
    found["head"] |= {first_name[id(parameter)] for parameter in _head_parameters(model)}
    blocks = {name for block in block_parameters(model, key) for name in block}
    placed = blocks.union(*found.values())
    kept = {part: _in_order(model, names) for part, names in found.items()}
    cut_across = {"biases": bias_names(model), "norms": norm_names(model), "new_tokens": new_token_names(model)}
    other = tuple(name for name, _ in model.named_parameters() if name not in placed and not is_new_rows(name))
    return {**kept, **cut_across, "other": other}


def bias_names(model: nn.Module) -> tuple[str, ...]:
    """Return all parameters that are called a bias (`bias`, `in_proj_bias`), those of norms and heads included."""
    return _in_order(model, {name for name, _ in model.named_parameters() if name.endswith("bias")})


def norm_names(model: nn.Module) -> tuple[str, ...]:
    """Return all parameters of normalising modules: in blocks, around them, and in the head."""
    inside = {id(parameter) for module in model.modules() if _is_norm(module) for parameter in module.parameters()}
    return _in_order(model, {name for name, parameter in model.named_parameters() if id(parameter) in inside})


def new_token_names(model: nn.Module) -> tuple[str, ...]:
    """Return the rows, and the head's biases, of new tokens that train alone; nothing before `train_new_rows`."""
    return tuple(name for name, _ in model.named_parameters() if is_new_rows(name))


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the parameters that peft has put into a model, and the copies of modules that it trains whole."""
    return _in_order(model, set().union(*adapters_by_module(model).values()))


def adapters_by_module(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of such parameters by the name of the module that they were put around."""
    found: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        # Not by peft's classes: the import takes seconds, and most models have no adapter.
        own = ("modules_to_save",) if hasattr(module, "original_module") else getattr(module, "adapter_layer_names", ())
        for part in own:
            inside = getattr(module, part, None)
            if isinstance(inside, nn.Module):
                names = {f"{path}.{part}.{name}" for name, _ in inside.named_parameters()}
                found.setdefault(path, set()).update(names)
    return found


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return every further name of a parameter that has several, to the first, by which all functions here know it."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first_name[id(parameter)] for name, parameter in every if name != first_name[id(parameter)]}


def block_parameters(model: PreTrainedModel, key: str = "freezing") -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each block, from input to output. Blocks that share a parameter all hold it.

    Raises:
        UserError: the model does not tell which of its modules are its blocks.
    """
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = transformer_blocks(model, key)
    return tuple(_in_order(model, {first_name[id(parameter)] for parameter in block.parameters()}) for block in blocks)


def transformer_blocks(model: PreTrainedModel, key: str = "freezing.trainable.last_blocks") -> nn.ModuleList:
    """Return the blocks, from input to output: the base model's only list of as many modules as it has hidden layers.

    Raises:
        UserError: it has none, or several, as an encoder with a decoder may.
    """
    return _blocks(model, key)[1]


def match_pattern(model: nn.Module, pattern: str, key: str) -> tuple[str, ...]:
    r"""Return the parameters whose whole name a regular expression matches.

    Any of the names of a tied matrix counts (`lm_head\.weight`); it is returned under its first. The rows of new tokens
    are matched by no pattern.

    Raises:
        UserError: the pattern matches nothing, or is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'{key}: "{pattern}" is no regular expression ({error}); expected one that matches whole names of '
            f"parameters, such as `{_first_parameter(model).replace('.', '[.]')}`"
        ) from None
    every = {name: name for name, _ in model.named_parameters()} | tied_names(model)
    every = {name: first for name, first in every.items() if not is_new_rows(name)}
    matched = {first for name, first in every.items() if compiled.fullmatch(name)}
    if matched:
        return _in_order(model, matched)
    inside = next((name for name in every if pattern and compiled.search(name)), None)
    if inside:
        hint = f"it matches a piece of `{inside}`, but the whole name has to match (`.*` stands for any text)"
    else:
        hint = f"the nearest name is `{_nearest_name(pattern, every)}`"
    raise UserError(f'{key}: "{pattern}" matches no parameter of {type(model).__name__}; {hint}')


def _nearest_name(pattern: str, names: Iterable[str]) -> str | None:
    """Return the name that is nearest to a pattern, as a whole or from as many of its last components."""
    plain = re.sub(r"\\(.)|\[(.)\]|\.[*+?]+|[\^$*+?()|]", lambda found: found[1] or found[2] or "", pattern).strip(".")
    ends: dict[str, str] = {}
    for name in names:
        ends[name] = name
        ends.setdefault(".".join(name.split(".")[-plain.count(".") - 1 :]), name)
    nearest = difflib.get_close_matches(plain, ends, n=1, cutoff=0.0)
    return ends[nearest[0]] if nearest else None


def _some_blocks(model: PreTrainedModel, field: str, number: int, key: str) -> tuple[str, ...]:
    blocks = block_parameters(model, f"{key}.{field}")
    if not 1 <= number <= len(blocks):
        raise UserError(
            f"{key}.{field}: found {number}; expected 1 to {len(blocks)}, the number of blocks that the model has"
        )
    chosen = blocks[:number] if field == "first_blocks" else blocks[-number:]
    return _in_order(model, {name for block in chosen for name in block})


def _in_order(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in the model's order, without the rows of new tokens."""
    names = set(names)
    return tuple(name for name, _ in model.named_parameters() if name in names and not is_new_rows(name))


def _blocks(model: PreTrainedModel, key: str) -> tuple[str, nn.ModuleList]:
    """Return the name that the list of blocks has in the base model, and the list."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    }
    # Blocks may hold lists of their own, say of experts, that happen to be as long.
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        found = f"found {', '.join(outermost)}" if outermost else "found none"
        told = f"does not tell which list of modules its blocks are: expected one of {number} modules, {found}"
        raise _not_told(model, told, key)
    return outermost[0], lists[outermost[0]]


def _token_embeddings(model: PreTrainedModel, key: str) -> nn.Module:
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:
        tokens = None
    if tokens is None:
        raise _not_told(model, "does not tell which module embeds its tokens", key)
    return tokens


def _beside_the_blocks(model: PreTrainedModel, key: str) -> list[tuple[str, nn.Module]]:
    """Return the modules beside the chain that leads from the base model to its blocks, with their names in it."""
    steps = _blocks(model, key)[0].split(".")
    chain = [".".join(steps[:length]) for length in range(len(steps) + 1)]
    beside = []
    for path in chain[:-1]:
        for name, module in model.base_model.get_submodule(path).named_children():
            full = f"{path}.{name}".lstrip(".")
            if full not in chain:
                beside.append((full, module))
    return beside


def _head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return what is outside of the base model, and the output embedding, wherever it is, also under a tied name."""
    inside = {id(module) for module in model.base_model.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    output = model.get_output_embeddings()
    modules = outside if output is None else [*outside, *output.modules()]
    # Of each module its own parameters alone, as those that hold the base model are outside of it.
    return [p for module in modules for name, p in module.named_parameters(recurse=False) if not is_new_rows(name)]


def _position_parameters(path: str, module: nn.Module, tokens: nn.Module, model: PreTrainedModel) -> set[int]:
    """Return the identities of the parameters, in a module that embeds, of its tables of positions."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    positions: set[int] = set()
    for name, inner in module.named_modules(prefix=path):
        if not isinstance(inner, nn.Embedding) or inner is tokens:
            continue
        # Some begin with a row or two that stand for padding.
        rows = inner.num_embeddings
        sized = isinstance(longest, int) and longest <= rows <= longest + 2
        types = getattr(config, "type_vocab_size", None)
        if _POSITIONS.search(f"{name} {type(inner).__name__}") or (sized and rows not in (types, config.vocab_size)):
            positions |= {id(parameter) for parameter in inner.parameters()}
    return positions


def _normalises_positions(path: str, model: PreTrainedModel) -> bool:
    """Return whether a norm stands beside a table of relative positions, which then is what it normalises (DeBERTa)."""
    parent = model.base_model.get_submodule(path.rpartition(".")[0])
    return any("rel_emb" in name for name, _ in parent.named_children())


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises: every architecture has a class of its own for it, which is called so."""
    own = list(module.parameters(recurse=False))
    if isinstance(module, _NORM_LAYERS):
        return True
    named = "norm" in type(module).__name__.lower() and not list(module.children())
    return named and bool(own) and all(parameter.dim() <= 1 for parameter in own)


def _without(model: PreTrainedModel, part: str, key: str) -> UserError:
    try:
        there = [name for name in PARTS if find_parts(model, key)[name]]
        there.append(f"{len(transformer_blocks(model, key))} blocks")
    except UserError:  # the parts that need no structure are all that can be told
        there = [name for name, found in (("biases", bias_names(model)), ("norms", norm_names(model))) if found]
    return UserError(f"{key}.{part}: {type(model).__name__} has none; it has {', '.join(there) or 'no known part'}")


def _not_told(model: PreTrainedModel, told: str, key: str) -> UserError:
    """Return an error that shows the modules of model and base model, for patterns to be written from."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_children():
        inner = dict(module.named_children()) if module is model.base_model else {}
        modules |= {f"{name}.{child}": grandchild for child, grandchild in inner.items()} or {name: module}
    counts = (f"{name} ({sum(p.numel() for p in module.parameters()):,})" for name, module in modules.items())
    return UserError(
        f"{key}: {type(model).__name__} {told}. Its modules, with their numbers of parameters: {', '.join(counts)}; "
        f"`patterns` on names of parameters, `biases` and `norms` work with every architecture"
    )


def _first_parameter(model: nn.Module) -> str:
    return next((name for name, _ in model.named_parameters()), "lm_head.weight")
