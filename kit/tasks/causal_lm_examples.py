"""A document of every source of a causal LM's corpus, as the model sees it."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from kit.console import say, warn
from kit.data.corpus import Corpus
from kit.data.store import TokenStore
from kit.model.tokenizer import decoder

_SAMPLE_TOKENS = 32
_CHUNK = 1 << 24  # tokens


def print_examples(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a document of every source as the model sees it: where tokens begin, and how it ends."""
    stores = {
        store.key: (store, documents, "trains")
        for store, documents in ((part.store, part.documents) for part in corpus.rows.parts)
    }
    for name, documents in corpus.sets.items():
        for store, chosen in documents.stores:
            stores.setdefault(store.key, (store, chosen, f"evaluation set `{name}`"))
    for name, documents in corpus.sets.items():
        tokens = int(documents.lengths.sum())
        say(
            f"evaluation set `{name}`: {len(documents.lengths):,} documents, {documents.num_bytes:,} bytes, {tokens:,} "
            f"tokens"
        )
    for store, documents, use in stores.values():
        if not len(documents):
            continue
        num_bytes, tokens = int(store.num_bytes[documents].sum()), store.count_tokens(documents)
        say(
            f"\n{store.name} ({use}): {len(documents):,} documents, {num_bytes:,} bytes, "
            f"{num_bytes / tokens:.2f} bytes per token; its first, with `│` between tokens:"
        )
        say(f"  {_show_tokens(store, int(documents[0]), corpus.rows.context_token_id, tokenizer)}")
        ends = (
            np.count_nonzero(store.tokens[i : i + _CHUNK] == store.tokens[-1])
            for i in range(0, len(store.tokens), _CHUNK)
        )
        inside = sum(ends) - store.num_documents
        if inside:
            warn(
                f"{store.name}: the text holds {tokenizer.eos_token} {inside:,} times, which is read as the token that "
                f"ends documents"
            )


def _show_tokens(store: TokenStore, document: int, context: int, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = store.document(document).tolist()
    # A few more than are shown: they tell whether the last one shown ends in the middle of a character.
    pieces = [tokenizer.decode([context]), *_pieces(ids[: _SAMPLE_TOKENS + 8], tokenizer)[:_SAMPLE_TOKENS]]
    if len(ids) > _SAMPLE_TOKENS:
        pieces.append(f" … {len(ids) - _SAMPLE_TOKENS:,} more … ")
    pieces.append(tokenizer.decode([int(store.tokens[store.offsets[document + 1] - 1])]))
    return "│".join(piece.replace("\n", "⏎").replace("\t", "⇥") for piece in pieces)


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text that each token adds; a character of several tokens comes with the last of them."""
    decode, pieces, shown = decoder(tokenizer), [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append(whole[len(shown) :])
        shown = max(shown, whole, key=len)
    return pieces
