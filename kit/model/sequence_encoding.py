"""From texts to what a classifier reads: as the tokenizer's own call gives it, special tokens and all, cut to a length.

So `pipeline("text-classification")` with the saved tokenizer reads a text as training did.
"""

import copy
from collections.abc import Sequence

from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from kit.errors import UserError
from kit.files import hash_values
from kit.model.tokenizer import special_tokens, tokenizer_key

Encoded = tuple[list[int], list[int] | None, int]


def prepare_for_pipeline(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation: str, config: PreTrainedConfig
) -> None:
    """Give a tokenizer, in place, what `pipeline(…, truncation=True)` needs to read texts as training does.

    To be called before `sequence_encoder`: what the tokenizer returns changes for a model without types of tokens.
    The pipeline has no `head+tail`; of longer texts it reads the beginning then.

    Args:
        tokenizer: padding goes to the right, with EOS where it has no padding token.
        max_length: tokens of a text that are read; None for all.
        truncation: `head`, `tail` or `head+tail`.
        config: of the model.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = special_tokens(tokenizer).pad.token
    tokenizer.model_max_length = max_length or VERY_LARGE_INTEGER
    names = tokenizer.model_input_names
    # GPT-2 would add the embedding of token 0 to each position; others take no such argument.
    if (getattr(config.get_text_config(), "type_vocab_size", None) or 0) < 2:
        names = [name for name in names if name != "token_type_ids"]
    sides = {"padding_side": "right", "truncation_side": "left" if truncation == "tail" else "right"}
    for key, value in {**sides, "model_input_names": names}.items():
        setattr(tokenizer, key, value)
        tokenizer.init_kwargs[key] = value  # what is saved are the keys that it was made with
    _forget_limits(tokenizer)


def sequence_encoder(tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation: str) -> "SequenceEncoder":
    """Return what encodes texts, and pairs of texts, as `tokenizer(text, pair)` does; it can be pickled.

    Args:
        tokenizer: what it is set to is copied; limits that its file carries do not count.
        max_length: tokens of a text that are kept, special tokens included; None for all.
        truncation: what is kept of a longer text: `head`, its beginning; `tail`, its end; `head+tail`, half of each,
            the odd token from the beginning. Of a pair the longer text is cut first, as transformers does it.

    Raises:
        UserError: `max_length` leaves no room for a token of a text.
    """
    return SequenceEncoder(tokenizer, max_length, truncation)


def sequence_coding_key(tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation: str) -> str:
    """Return a hash of everything that decides what `sequence_encoder` makes of a text."""
    types = "token_type_ids" in tokenizer.model_input_names
    # Of a fast tokenizer the template of special tokens is a part of its own serialised form.
    pattern = None if tokenizer.is_fast else str(getattr(tokenizer, "special_tokens_pattern", None))
    special = [getattr(tokenizer, f"{name}_id") for name in ("cls_token", "sep_token")]
    return hash_values(tokenizer_key(tokenizer), types, pattern, special, max_length, truncation)


class SequenceEncoder:
    """Encodes texts with a copy of a tokenizer; see `sequence_encoder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, truncation: str) -> None:
        """Take a tokenizer of any kind."""
        if truncation not in ("head", "tail", "head+tail"):
            raise ValueError(f"truncation: {truncation}; expected head, tail or head+tail")
        self.tokenizer, self.max_length, self.truncation = copy.deepcopy(tokenizer), max_length, truncation
        _forget_limits(self.tokenizer)
        self._check_room(pair=False)

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoded]:
        """Return of each text its token ids, their types where the tokenizer gives any, and its length before the cut.

        Args:
            texts: the texts.
            pairs: second texts, one for each.

        Raises:
            UserError: `max_length` leaves no room for a token of a pair.
        """
        encoded: list[Encoded | None] = [None] * len(texts)
        # To the call of a fast tokenizer an empty second text is none; to that of a slow one it is a text.
        paired = [pairs is not None and bool(pair or not self.tokenizer.is_fast) for pair in pairs or texts]
        for pair in (False, True):
            chosen = [number for number, each in enumerate(paired) if each is pair]
            seconds = [pairs[number] for number in chosen] if pair else None
            for number, row in zip(chosen, self._alike([texts[number] for number in chosen], seconds), strict=True):
                encoded[number] = row
        return encoded

    def _alike(self, texts: list[str], pairs: list[str] | None) -> list[Encoded]:
        """Encode texts of which all have a second text, or none has."""
        if not texts:
            return []
        self._check_room(pairs is not None)
        whole = self._call(texts, pairs)
        lengths = [len(ids) for ids in whole["input_ids"]]
        encoded = list(
            zip(whole["input_ids"], whole.get("token_type_ids") or [None] * len(texts), lengths, strict=True)
        )
        long = [number for number, length in enumerate(lengths) if self.max_length and length > self.max_length]
        if long:
            cut = self._cut([texts[n] for n in long], [pairs[n] for n in long] if pairs else None)
            for number, (ids, types) in zip(long, cut, strict=True):
                encoded[number] = (ids, types, lengths[number])
        return encoded

    def _call(self, texts: list[str], pairs: list[str] | None, side: str | None = None) -> BatchEncoding:
        self.tokenizer.truncation_side = side or "right"
        limit = {"truncation": "longest_first", "max_length": self.max_length} if side else {"truncation": False}
        return self.tokenizer(texts, pairs, padding=False, return_attention_mask=False, verbose=False, **limit)

    def _cut(self, texts: list[str], pairs: list[str] | None) -> list[tuple[list[int], list[int] | None]]:
        """Return ids and types of texts that are too long."""
        if self.truncation == "head+tail" and not self.tokenizer.is_fast:
            return [self._halves_of(text, pair) for text, pair in zip(texts, pairs or [None] * len(texts), strict=True)]
        cut = self._call(texts, pairs, "left" if self.truncation == "tail" else "right")
        rows, types = cut["input_ids"], cut.get("token_type_ids") or [None] * len(texts)
        if self.truncation == "head+tail":
            ends = self._call(texts, pairs, "left")["input_ids"]
            belongs = [encoding.sequence_ids for encoding in cut.encodings]
            rows = [_joined(*each) for each in zip(rows, ends, belongs, strict=True)]
        return list(zip(rows, types, strict=True))

    def _halves_of(self, text: str, pair: str | None) -> tuple[list[int], list[int] | None]:
        """Return ids and types of one text, or pair, from a tokenizer that does not tell which is where."""
        tokenizer = self.tokenizer
        special = tokenizer.num_special_tokens_to_add(pair=pair is not None)
        texts = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, pair) if each is not None]
        excess = sum(map(len, texts)) + special - self.max_length
        kept = tokenizer.truncate_sequences(*texts, num_tokens_to_remove=excess)[: len(texts)]
        halves = [
            [*ids[: (len(rest) + 1) // 2], *ids[len(ids) - len(rest) // 2 :]]
            for ids, rest in zip(texts, kept, strict=True)
        ]
        built = tokenizer.prepare_for_model(*halves, return_attention_mask=False)
        return built["input_ids"], built.get("token_type_ids")

    def _check_room(self, pair: bool) -> None:
        special = self.tokenizer.num_special_tokens_to_add(pair=pair)
        if self.max_length is not None and self.max_length <= special:
            what = "pair of texts" if pair else "text"
            raise UserError(
                f"data.max_length: found {self.max_length}; expected at least {special + 1}: the tokenizer adds "
                f"{special} special tokens to each {what}"
            )


def _joined(head: list[int], tail: list[int], texts: list[int | None]) -> list[int]:
    """Return what is cut to its beginning, with the second half of each text from what is cut to its end.

    Both have the same special tokens at the same places, and as many tokens of each text.

    Args:
        head: token ids.
        tail: token ids.
        texts: which text each position belongs to, 0 or 1; None for special tokens.
    """
    joined = list(head)
    for text in (0, 1):
        places = [place for place, each in enumerate(texts) if each == text]
        for place in places[(len(places) + 1) // 2 :]:
            joined[place] = tail[place]
    return joined


def _forget_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take away what a tokenizer's file says of cutting and filling up, in place."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
