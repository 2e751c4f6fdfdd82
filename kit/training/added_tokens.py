"""The tokens that a run adds: audited before training and after it, printed, and kept in `vocabulary.json`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.console import is_main_process, say
from kit.data.cleaning import Selections
from kit.data.corpus import Corpus
from kit.files import hash_array, hash_values, write_json
from kit.model.tokenizer import special_tokens
from kit.model.vocabulary import Extension
from kit.model.vocabulary_audit import (
    Audit,
    TextFigures,
    audit_after,
    audit_as_json,
    audit_before,
    initial_rows,
    print_movement,
)

Figures = Mapping[str, float | int]


@dataclass(frozen=True)
class Base:
    """What there was before tokens were added: the tokenizer, and the same documents in its tokens."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    training: Selections


@dataclass(frozen=True)
class AddedTokens:
    """What is known of the tokens that a run adds, before it trains them.

    Attributes:
        audit: of the texts and the tokens.
        initial: by matrix what the new rows began as: (rows, width).
    """

    audit: Audit
    initial: dict[str, torch.Tensor]

    @property
    def key(self) -> str:
        """Hash of what the new rows began as."""
        return hash_values([hash_array(rows.numpy()) for rows in self.initial.values()])


def audit_added_tokens(
    model: PreTrainedModel,
    rows_before: int,
    extension: Extension,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    base: Base,
) -> AddedTokens:
    """Count what was added to a model and what it does to the texts.

    Args:
        model: with its new rows, not trained yet.
        rows_before: rows of its input embeddings without them.
        extension: what was added.
        tokenizer: with it.
        corpus: the documents in the tokens of `tokenizer`.
        base: the same without what was added.
    """
    initial = initial_rows(model, extension)
    sets = {name: (documents.stores, base.corpus.sets[name].stores) for name, documents in corpus.sets.items()}
    audit = audit_before(
        extension,
        (_figures(corpus.training, base.training), corpus.training_tokens()),
        {name: (_figures(after, before), _tokens(after)) for name, (after, before) in sets.items()},
        base.tokenizer,
        tokenizer,
        rows_before,
        model.get_input_embeddings().weight.shape[0],
        initial,
        special_tokens(tokenizer),
    )
    return AddedTokens(audit, initial)


def _figures(after: Selections, before: Selections) -> TextFigures:
    return TextFigures(
        documents=sum(len(documents) for _, documents in after),
        num_bytes=int(sum(store.num_bytes[documents].sum() for store, documents in after)),
        tokens_before=sum(store.count_tokens(documents) for store, documents in before),
        tokens_after=sum(store.count_tokens(documents) for store, documents in after),
    )


def _tokens(selections: Selections) -> Iterator[np.ndarray]:
    return (store.document(index) for store, documents in selections for index in documents)


def report_untrained(before: Mapping[str, Figures], untrained: Mapping[str, Figures]) -> None:
    """Print what the new tokens do to the figures before any training."""
    for name, figures in untrained.items():
        old, new = before[name]["bits_per_byte"], figures["bits_per_byte"]
        say(f"{name}: {old:.4f} bits per byte become {new:.4f} with the new tokens, before any training")


def save_audit(
    added: AddedTokens,
    path: Path,
    untrained: Mapping[str, Figures],
    trained: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
) -> None:
    """Write the audit to `path`; of a trained model also print and write how far its new rows moved, and whereto.

    Called on all processes, of which the first one writes.
    """
    movements = audit_after(added.audit, trained[0], added.initial, trained[1]) if trained else None
    if movements:
        print_movement(added.audit, movements)
    if is_main_process():
        write_json(path, {**audit_as_json(added.audit, movements), "untrained": dict(untrained)})
