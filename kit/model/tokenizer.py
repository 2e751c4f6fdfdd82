"""The tokenizer: loaded with the model, or trained on the training documents."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kit.console import say
from kit.errors import UserError, did_you_mean, nearest
from kit.files import build_once, hash_values
from kit.model.encoding import FastEncoder, SlowEncoder
from kit.model.hub import expand, from_hub
from kit.recipe.models import ModelSection, TrainedTokenizer

END_OF_TEXT = "<|endoftext|>"
# What ends documents in tokenizers that do not say so themselves.
USUAL_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt")


@dataclass(frozen=True)
class SpecialToken:
    """A token with a role of its own, and why it was given that role."""

    token: str
    id: int
    reason: str


@dataclass(frozen=True)
class SpecialTokens:
    """What stands before each document, after it, and in what fills up rows."""

    context: SpecialToken
    eos: SpecialToken
    pad: SpecialToken


def load_tokenizer(
    section: ModelSection,
    store_dir: str | Path,
    documents: Callable[[], Iterable[str]],
    documents_key: Callable[[], str],
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe, with the EOS token that `choose_special_tokens` gives it.

    Args:
        section: the recipe's `model` section.
        store_dir: where a trained tokenizer is kept for later runs.
        documents: yields the training documents; called only to train.
        documents_key: hash of the training documents; called only where a tokenizer is trained.

    Raises:
        UserError: it cannot be loaded, or no token of it can end a document.
    """
    if isinstance(section.tokenizer, TrainedTokenizer):
        key = hash_values("byte-level BPE", section.tokenizer.vocab_size, documents_key())
        folder = Path(store_dir) / "tokenizers" / key
        build_once(folder, lambda f: _train(f, section.tokenizer.vocab_size, documents()))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = _load(section)
    own_eos = "eos_token" in tokenizer.special_tokens_map
    config_eos = None if own_eos or section.eos_token else _written_eos(section)
    tokenizer.chosen_special_tokens = chosen = choose_special_tokens(tokenizer, section.eos_token, config_eos)
    if chosen.eos.token != tokenizer.eos_token:
        # Registered, not only named, as loading the saved tokenizer will do: both have to read a text alike.
        registered = tokenizer.added_tokens_decoder.get(chosen.eos.id, chosen.eos.token)
        tokenizer.add_special_tokens({"eos_token": registered})
    return tokenizer


def choose_special_tokens(
    tokenizer: PreTrainedTokenizerBase, eos_token: str | None = None, config_eos: int | list[int] | None = None
) -> SpecialTokens:
    """Decide what stands before each document (BOS, else EOS), after it and in padding (pad, else EOS).

    What ends a document is the first of these that there is: `eos_token`; the tokenizer's EOS; the token of
    `config_eos`; SEP; BOS; a token with a usual name.

    Args:
        tokenizer: with or without special tokens.
        eos_token: the recipe's `model.eos_token`.
        config_eos: `eos_token_id` of the model's configuration; of several, the first counts.

    Raises:
        UserError: the tokenizer has no token `eos_token`, or none that can end a document.
    """
    vocabulary = tokenizer.get_vocab()
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if eos_token is not None and eos_token not in vocabulary:
        special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        near = nearest(eos_token, special) or nearest(eos_token, vocabulary)
        hint = did_you_mean(eos_token, [near] if near else special)
        raise UserError(f"model.eos_token: the tokenizer ({name}) has no token `{eos_token}`{hint}")
    own = tokenizer.special_tokens_map
    if isinstance(config_eos, (list, tuple)):
        config_eos = config_eos[0] if config_eos else None
    of_config = next((token for token, number in vocabulary.items() if number == config_eos), None)
    candidates = [
        (eos_token, "`model.eos_token`"),
        (own.get("eos_token"), "EOS"),
        (of_config, "`eos_token_id` of the model's configuration, as the tokenizer has no EOS"),
        (own.get("sep_token"), "SEP, as neither tokenizer nor configuration has an EOS"),
        (own.get("bos_token"), "BOS, as there is neither EOS nor SEP"),
        *((usual, "by its name, as the tokenizer has no EOS, SEP or BOS") for usual in USUAL_EOS),
    ]
    found = [SpecialToken(token, vocabulary[token], why) for token, why in candidates if token in vocabulary]
    if not found:
        raise UserError(
            f"the tokenizer ({name}) has no EOS, SEP or BOS token and none called "
            f"{', '.join(USUAL_EOS)}, so that no end of a document could be learned; name one of its tokens with "
            f"`model.eos_token`"
        )
    eos = found[0]

    def own_or_eos(role: str, what: str) -> SpecialToken:
        token = own.get(role)
        if token in vocabulary:
            return SpecialToken(token, vocabulary[token], what)
        return replace(eos, reason=f"EOS, as there is no {what}")

    return SpecialTokens(own_or_eos("bos_token", "BOS"), eos, own_or_eos("pad_token", "pad token"))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return the special tokens that were chosen when the tokenizer was loaded, or choose them now."""
    return getattr(tokenizer, "chosen_special_tokens", None) or choose_special_tokens(tokenizer)


def describe_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what stands before and after each document and what fills up rows, each with the reason."""
    chosen = special_tokens(tokenizer)
    say(
        f"tokenizer: {len(tokenizer):,} tokens; before each document {chosen.context.token} ({chosen.context.reason}), "
        f"never scored; after it {chosen.eos.token} ({chosen.eos.reason}), learned; rows are filled up with "
        f"{chosen.pad.token} ({chosen.pad.reason}), masked by position"
    )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides how text becomes token ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if tokenizer.is_fast:
        return hash_values(_backend(tokenizer).to_str(), tokenizer.split_special_tokens, special)
    settings = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hash_values(type(tokenizer).__name__, vocabulary, tokenizer.split_special_tokens, settings, special)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids, without special tokens of its own accord; it can be pickled."""
    return FastEncoder(_backend(tokenizer)) if tokenizer.is_fast else SlowEncoder(tokenizer)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Return a function from the token ids of a document to its text."""
    if tokenizer.is_fast:
        # `tokenizer.decode` looks at every id in Python, which takes longer than decoding.
        return lambda ids: tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _load(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `model.tokenizer` names, or the model's own."""
    key = "model.tokenizer" if section.tokenizer else "model.name_or_path"
    name = expand(section.tokenizer or section.name_or_path)
    revision = None if section.tokenizer and section.tokenizer != section.name_or_path else section.revision
    none = UserError(f"{key}: `{name}` holds no tokenizer; name one with `model.tokenizer`")
    if lacks_tokenizer(name):
        raise none
    with from_hub(key, name, revision, "tokenizer_config.json") as options:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=section.trust_remote_code, **options
        )
    # Where the files are missing on the Hub, transformers makes up a tokenizer that knows special tokens alone.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise none
    return tokenizer


def lacks_tokenizer(name: str) -> bool:
    """Tell whether `name` is a folder without any file of a tokenizer, for which transformers would make one up."""
    folder = Path(name)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _written_eos(section: ModelSection) -> int | list[int] | None:
    """Return `eos_token_id` as the configuration gives it; a default of its class says nothing of a vocabulary."""
    if section.from_config is not None:
        return section.from_config.get("eos_token_id")
    if "eos_token_id" in section.config:
        return section.config["eos_token_id"]
    name = expand(section.name_or_path)
    with from_hub("model.name_or_path", name, section.revision) as options:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=section.revision, **options)
    return values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a fast tokenizer's inside that takes every text as it is."""
    return _plain(tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens)


@functools.lru_cache(maxsize=4)  # a run asks for the key of its tokenizer many times
def _plain(backend_json: str, split_special_tokens: bool) -> Tokenizer:
    backend = Tokenizer.from_str(backend_json)
    # Limits that a tokenizer file may carry would cut or fill up documents unseen.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens
    return backend


def _train(folder: Path, vocab_size: int, documents: Iterable[str]) -> dict[str, Any]:
    """Train a byte-level BPE tokenizer (Radford et al. 2019) and save it; one special token, END_OF_TEXT."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    say(f"training a byte-level BPE tokenizer of {vocab_size:,} tokens")
    backend.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer)}
