"""Do model, tokenizer and configuration mean the same? Checked at every load, and the ids of roles set for training."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kit.console import say
from kit.errors import UserError
from kit.recipe.vocabulary import VocabularySection

_ROLES = ("bos_token", "eos_token", "pad_token")
_NAMES = tuple(f"{role}_id" for role in _ROLES)


def check_alignment(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
    """Check that model, tokenizer, configuration and block size fit together; say which special tokens differ.

    Raises:
        UserError: the tokenizer or the configuration has ids that the model has no embedding for, blocks are longer
            than the model's positions, or the weights are not tied as the configuration says.
        RuntimeError: the embeddings are not of the size that the configuration gives.
    """
    check_embeddings(model)
    rows = model.get_input_embeddings().weight.shape[0]
    check_ids(tokenizer, rows, model.config.name_or_path)
    check_positions(model.config, block_size)
    for holder, config in _configurations(model):
        check_special_ids(config, rows, model.config.name_or_path, holder)
    _say_differences(model, tokenizer)


def check_embeddings(model: PreTrainedModel) -> None:
    """Check that a model's embeddings are as its configuration says, so that it is saved and loaded as it is.

    A model that was loaded and not resized is of the right size, or it would have been refused for tensors that do not
    fit. Resizing ties matrices that belong together: whatever is wrong has to be found before it.

    Raises:
        UserError: the configuration ties input and output embeddings, and the weights hold two matrices.
        RuntimeError: the input embeddings, the output embeddings and `vocab_size` are not of one size.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = {"input embeddings": inputs.weight.shape[0]}
    if outputs is not None:
        sizes["output embeddings"] = outputs.weight.shape[0]
    # Code that comes with a model may pad its matrices inside.
    if not getattr(model.config, "auto_map", None):
        sizes["config.vocab_size"] = model.config.get_text_config().vocab_size
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size:,}" for name, size in sizes.items())
        raise RuntimeError(f"{_named(model.config.name_or_path)} has embeddings of more than one size: {listed}")
    ties = getattr(model.config, "tie_word_embeddings", False) and getattr(model, "_tied_weights_keys", None)
    if ties and outputs is not None and outputs.weight is not inputs.weight:
        raise UserError(
            f"{_named(model.config.name_or_path)}: its configuration ties the output embeddings to the input "
            f"embeddings (`tie_word_embeddings: true`), but its weights hold two different matrices; if both are "
            f"meant, set `model.config: {{tie_word_embeddings: false}}`"
        )


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: int, name: str | None) -> None:
    """Check that a model of this name with so many embeddings has one for each token.

    Raises:
        UserError: it has not.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer ({tokenizer.name_or_path}) has ids up to {largest:,}, but {_named(name)} has {rows:,} "
            f"embeddings: this tokenizer belongs to another model"
        )


def check_special_ids(config: Any, rows: int, name: str | None, holder: str = "config") -> None:
    """Check that a model of this name with so many embeddings has one for each special token of a configuration.

    Raises:
        UserError: it has not; an embedding for padding could then not even be built.
    """
    for key in _NAMES:
        # Several configurations on the Hub write -1 for none.
        wrong = [number for number in _ids(config, key) if number != -1 and not 0 <= number < rows]
        if wrong:
            mend = f"set another in the recipe, such as `model.config: {{{key}: null}}`"
            raise UserError(
                f"{holder}.{key}: found {wrong[0]}; {_named(name)} has {rows:,} embeddings, for ids from 0 to "
                f"{rows - 1}; {mend if holder == 'config' else 'correct its generation_config.json'}"
            )


def check_positions(config: PreTrainedConfig, block_size: int) -> None:
    """Check that a model has a position for each token of a block.

    Raises:
        UserError: it has fewer.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and block_size > positions:
        raise UserError(
            f"data.block_size: found {block_size:,}; expected at most {positions:,}, the positions that the model has"
        )


def align_configuration(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: VocabularySection | None
) -> None:
    """Write the ids of BOS, EOS and padding, where the section names them, into the model's configurations, in place.

    What ended a generation before goes on ending it, and a list in the configuration stays one, as Trainer does it
    (`align_special_tokens`, of which transformers 5.23 finds nothing left to change).

    Args:
        model: with a row for each id; `config` and `generation_config` are changed.
        tokenizer: after `apply_roles`.
        section: the recipe's `vocabulary` section, if it has one.
    """
    generation = getattr(model, "generation_config", None)
    for role in _ROLES if section else ():
        if getattr(section.roles, role) is None:
            continue
        name, number = f"{role}_id", getattr(tokenizer, f"{role}_id")
        text = model.config.get_text_config()
        ended = [each for each in _ids(generation, name) if each != number] if role == "eos_token" else []
        for config in {id(each): each for each in (text, model.config)}.values():
            value = getattr(config, name, None)
            if isinstance(value, list) and role == "eos_token":
                setattr(config, name, [number, *(each for each in value if each != number)])
            elif config is text or hasattr(config, name):
                setattr(config, name, number)
        if generation is not None:
            setattr(generation, name, [number, *ended] if ended else number)


def _say_differences(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say in one line where tokenizer and configuration both name a token for a role, and not the same.

    That is no mistake: Qwen's base models do it.
    """
    found = {f"{holder}.{name}": _ids(config, name) for holder, config in _configurations(model) for name in _NAMES}
    differences = []
    for key, numbers in found.items():
        holder, name = key.split(".")
        own = getattr(tokenizer, name)
        repeats = holder == "generation_config" and numbers == found.get(f"config.{name}")
        if own is None or own in numbers or numbers in ([], [-1]) or repeats:
            continue
        if holder == "config" and not _is_written(model.config, name):
            continue
        theirs = ", ".join(_described(tokenizer, number) for number in numbers)
        differences.append(f"{name.removesuffix('_id')} is {_described(tokenizer, own)}, and {theirs} in {key}")
    if differences:
        say(f"special tokens, the tokenizer's first: {'; '.join(differences)}")


def _configurations(model: PreTrainedModel) -> list[tuple[str, Any]]:
    generation = getattr(model, "generation_config", None)
    return [("config", model.config.get_text_config()), ("generation_config", generation)]


def _ids(config: Any, name: str) -> list[int]:
    value = getattr(config, name, None)
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _is_written(config: PreTrainedConfig, name: str) -> bool:
    """Tell whether somebody gave a configuration this value; a default of its class says nothing of a vocabulary."""
    text = config.get_text_config()
    if not config.name_or_path or getattr(text, name, None) != getattr(type(text)(), name, None):
        return True
    try:
        values, _ = PreTrainedConfig.get_config_dict(
            config.name_or_path, revision=getattr(config, "_commit_hash", None), local_files_only=True
        )
    except OSError:
        return True
    return name in values or name in (values.get("text_config") or {})


def _described(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return f"`{token}` ({number})" if token is not None else f"no token ({number})"


def _named(name: str | None) -> str:
    return f"the model `{name}`" if name else "the fresh model"
