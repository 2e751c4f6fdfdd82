"""From texts to token ids, in this process or in one that is given a copy: what is imported here is imported there."""

from typing import Any

from tokenizers import Tokenizer


class FastEncoder:
    """Encodes texts with a tokenizer's Rust inside, without special tokens of its own accord."""

    def __init__(self, backend: Tokenizer) -> None:
        """Take a backend that neither truncates nor pads."""
        self.backend = backend

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        # Character offsets are the costlier half of encoding, and nothing here needs them.
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def __getstate__(self) -> tuple[str, bool]:
        # The flag is no part of the tokenizer's own serialised form.
        return self.backend.to_str(), self.backend.encode_special_tokens

    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.backend = Tokenizer.from_str(state[0])
        self.backend.encode_special_tokens = state[1]


class SlowEncoder:
    """Encodes texts with a tokenizer that is written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a `PreTrainedTokenizer`."""
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
