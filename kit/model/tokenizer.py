"""The tokenizer: loaded with the model, or trained on the training documents."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kit.console import say
from kit.errors import UserError
from kit.files import build_once, hash_values
from kit.model.hub import from_hub
from kit.recipe.models import ModelSection, TrainedTokenizer

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(
    section: ModelSection,
    store_dir: str | Path,
    documents: Callable[[], Iterable[str]],
    documents_key: Callable[[], str],
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe.

    Args:
        section: the recipe's `model` section.
        store_dir: where a trained tokenizer is kept for later runs.
        documents: yields the training documents; called only to train.
        documents_key: hash of the training documents; called only where a tokenizer is trained.

    Raises:
        UserError: it cannot be loaded, or it lacks an end-of-text token.
    """
    if isinstance(section.tokenizer, TrainedTokenizer):
        key = hash_values("byte-level BPE", section.tokenizer.vocab_size, documents_key())
        folder = Path(store_dir) / "tokenizers" / key
        build_once(folder, lambda f: _train(f, section.tokenizer.vocab_size, documents()))
        return AutoTokenizer.from_pretrained(folder)
    name = section.tokenizer or section.name_or_path
    revision = section.revision if name == section.name_or_path else None
    with from_hub("model.tokenizer" if section.tokenizer else "model.name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=section.trust_remote_code)
    # For a folder without tokenizer files transformers makes up a tokenizer that knows special tokens alone.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise UserError(f"`{name}` holds no tokenizer; name one with `model.tokenizer`")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of `{name}` has no EOS token, so that no end of a document could be learned; "
            f"set `eos_token` in its tokenizer_config.json"
        )
    return tokenizer


def describe_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what stands before and after each document and what fills up rows."""
    context, why = (
        (tokenizer.bos_token, "BOS") if tokenizer.bos_token_id is not None else (tokenizer.eos_token, "EOS: no BOS")
    )
    pad = tokenizer.pad_token if tokenizer.pad_token_id is not None else f"{tokenizer.eos_token} (no pad token)"
    say(
        f"tokenizer: {len(tokenizer):,} tokens; before each document {context} ({why}), never scored; after it "
        f"{tokenizer.eos_token} (EOS), learned; rows are filled up with {pad}, masked by position"
    )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides how text becomes token ids."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if tokenizer.is_fast:
        return hash_values(_backend(tokenizer).to_str(), tokenizer.split_special_tokens, special)
    return hash_values(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), special)


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids, without special tokens of its own accord."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = _backend(tokenizer)
    # Character offsets are the costlier half of encoding, and nothing here needs them.
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a fast tokenizer's inside that takes every text as it is."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Limits that a tokenizer file may carry would cut or fill up documents unseen.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
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
