"""Tokens and texts as people read them, each on one line."""

from collections.abc import Iterable

from tokenizers import decoders, models
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


def readable_tokens(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Return the readable text of token ids: spaces, ends of lines and parts of characters shown as what they are."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    # `##ase` says more than WordPiece's decoder, which guesses spaces.
    decoder = backend and (None if isinstance(backend.model, models.WordPiece) else backend.decoder)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    whole = tokenizer.get_added_vocab()  # as they are, never as bytes

    def readable(token: str) -> str:
        if token in whole:
            return visible(token, space=" ")
        if isinstance(decoder, decoders.ByteLevel) and {*token} <= byte_of.keys():
            return visible(bytes(byte_of[letter] for letter in token).decode("utf-8", errors="backslashreplace"))
        # Behind a letter, since decoders take the space off what begins a text.
        text = decoder.decode(["a", token]).removeprefix("a") if decoder else token.replace("▁", " ")
        return visible(token if "\ufffd" in text else text)

    tokens = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in set(ids)}
    return {id_: f"[{id_}]" if token is None else readable(token) for id_, token in tokens.items()}


def visible(text: str, space: str = "␣") -> str:
    """Return a text on one line: spaces as `space`, ends of lines as ⏎, tabs as ⇥, what cannot be printed escaped."""
    text = text.translate({ord(" "): space, ord("\n"): "⏎", ord("\t"): "⇥"})
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
