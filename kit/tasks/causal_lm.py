"""Causal language modelling: predict the next token of domain text.

Each task module has the same functions; `kit.stages` calls them and knows no task by name.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from kit.data import corpus as corpora
from kit.data.blocks import IGNORE_INDEX
from kit.data.cleaning import Selections
from kit.data.corpus import (
    DEFAULT_SET,
    Corpus,
    EvaluationDocuments,
    TokenCoding,
    build_corpus,
    recode,
    training_documents,
    training_documents_key,
)
from kit.data.ledger import check_dropped, print_ledger
from kit.errors import UserError
from kit.evaluation import samples, scorecard
from kit.evaluation.language_modeling import evaluate_documents
from kit.model.alignment import align_configuration, check_alignment
from kit.model.chunked_loss import count_logits_at_once, give_losses
from kit.model.embeddings import resize_and_initialise
from kit.model.freezing import check_blocks, check_new_tokens
from kit.model.isolation import check_isolation
from kit.model.loading import check_pretrained, check_vocabulary, holds_adapter, load_causal_lm, model_type
from kit.model.quantization import check_quantization
from kit.model.roles import apply_roles, compare_with_chat
from kit.model.tokenizer import (
    decoder,
    describe_special_tokens,
    encoder,
    load_tokenizer,
    special_tokens,
    tokenizer_key,
)
from kit.model.vocabulary import Extension, extend_tokenizer
from kit.recipe.models import Recipe
from kit.tasks import causal_lm_examples

Figures = dict[str, float | int]

# What an evaluation during training logs of each set, and what a best model can be chosen by.
LOGGED_FIGURES = ("bits_per_byte", "nats_per_token", "perplexity", "token_accuracy", "eos_nats")
HIGHER_IS_BETTER = {"token_accuracy"}
DEFAULT_FIGURE = "bits_per_byte"
SHOWN_FIGURE = ("bits_per_byte", "bits/byte")

# How figures are shown is the scorecard's; a document of each source as the model sees it, that of its own module.
print_figures = scorecard.print_figures
print_scorecard = scorecard.print_scorecard
print_examples = causal_lm_examples.print_examples


def check_early(recipe: Recipe, trains: bool = True) -> None:
    """Check of the model what its configuration alone tells, before hours of tokenising.

    Args:
        recipe: the recipe.
        trains: whether the model is going to be trained, not only measured.

    Raises:
        UserError: it cannot be found, is no causal LM, has fewer positions than a block or fewer blocks than are to
            train, or its weights are unusable; it is an adapter itself.
    """
    check_quantization(recipe.model.load_in_4bit)
    if trains and holds_adapter(recipe.model):
        raise UserError(
            f"model.name_or_path: `{recipe.model.name_or_path}` holds an adapter, not a whole model to train: "
            f"`kit merge` makes one of it"
        )
    if recipe.model.name_or_path is not None:
        check_blocks(recipe.freezing, check_pretrained(recipe.model, recipe.data.block_size))


def set_names(recipe: Recipe) -> list[str]:
    """Return the evaluation sets that are measured on the way; the best model is chosen by the first."""
    return list(recipe.evaluation.sets) or ([DEFAULT_SET] if recipe.data.validation is not None else [])


def sources_key(recipe: Recipe) -> str:
    """Return a hash of the content of every source that is trained or measured on."""
    return corpora.sources_key(recipe.data, recipe.evaluation.sets)


def prepare_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, or train it on the training documents."""
    tokenizer = load_tokenizer(
        recipe.model,
        recipe.data.store_dir,
        lambda: training_documents(recipe.data),
        lambda: training_documents_key(recipe.data),
    )
    check_vocabulary(recipe.model, tokenizer)
    return tokenizer


def extend_vocabulary(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, Extension | None]:
    """Return a copy of the tokenizer with what the recipe's `vocabulary` adds, and what that was."""
    if recipe.vocabulary is None:
        return tokenizer, None
    extended = copy.deepcopy(tokenizer)
    extension = extend_tokenizer(extended, recipe.vocabulary, model_type(recipe.model))
    check_new_tokens(recipe.freezing, len(extension.rows))
    apply_roles(extended, recipe.vocabulary)
    for template in dict.fromkeys(source.template for source in recipe.data.train if source.template is not None):
        compare_with_chat(extended, recipe.vocabulary.roles, template)
    return extended, extension


def prepare_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """Tokenise the recipe's sources and lay out training rows and evaluation sets."""
    return build_corpus(recipe.data, recipe.evaluation.sets, token_coding(tokenizer), seed)


def recode_examples(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Selections]:
    """Return the corpus with the same evaluation documents as another tokenizer encodes them, and the training ones."""
    coding = token_coding(tokenizer)
    sets = {
        name: EvaluationDocuments(name, tuple(recode(documents.stores, recipe.data, coding)))
        for name, documents in corpus.sets.items()
    }
    return replace(corpus, sets=sets), recode(corpus.training, recipe.data, coding)


def token_coding(tokenizer: PreTrainedTokenizerBase) -> TokenCoding:
    """Return what the data needs to know of a tokenizer."""
    special = special_tokens(tokenizer)
    return TokenCoding(
        key=tokenizer_key(tokenizer),
        encode=encoder(tokenizer),
        decode=decoder(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=special.eos.id,
        context_token_id=special.context.id,
        pad_token_id=special.pad.id,
    )


def print_data(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print what stands around documents, and where every token of the corpus went."""
    describe_special_tokens(tokenizer)
    print_ledger(corpus.ledger)


def check_data(corpus: Corpus, recipe: Recipe) -> None:
    """Refuse a run that leaves out more of a source than the recipe allows.

    Raises:
        UserError: it does.
    """
    check_dropped(corpus.ledger, recipe.data.max_dropped)


def begins_as(corpus: Corpus, args: TrainingArguments) -> list[Any]:
    """Return what a model that was loaded depends on beside its weights: nothing."""
    return []


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seed: int) -> PreTrainedModel:
    """Load the recipe's model and check that it fits tokenizer, block size and packing.

    Raises:
        UserError: it does not.
    """
    model = load_causal_lm(recipe.model, tokenizer, seed)
    check_alignment(model, tokenizer, recipe.data.block_size)
    give_losses(model)
    if recipe.data.packing:
        check_isolation(model, len(tokenizer))
    return model


def extend_model(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, extension: Extension, seed: int
) -> None:
    """Give the tokens that were added to the tokenizer their rows, in place, and the configuration their ids."""
    vocabulary = recipe.vocabulary
    size = max(tokenizer.get_vocab().values()) + 1
    resize_and_initialise(model, extension, size, vocabulary.initialize, vocabulary.pad_to_multiple_of, seed)
    align_configuration(model, tokenizer, vocabulary)
    check_alignment(model, tokenizer, recipe.data.block_size)


def loss_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of label positions of a batch, what `loss_sum` is to be divided by: int64 scalar."""
    return batch["shift_labels"].ne(IGNORE_INDEX).sum()


def count_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of tokens of a batch that the model learns from: int64 scalar."""
    return loss_weight(batch)


def loss_sum(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], args: TrainingArguments) -> torch.Tensor:
    """Return the sum of -ln p over the label positions of a batch, in nats: scalar with gradient.

    Args:
        model: the causal LM that gives losses, wrapped for several processes where there are several.
        batch: `input_ids`, `shift_labels` and, where rows are packed, `position_ids`: int64 (rows, positions).
        args: `label_smoothing_factor` is honoured.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "shift_labels"}
    # With a cache transformers no longer tells packed documents apart, whatever the configuration says: never one.
    smoothing = {"label_smoothing": args.label_smoothing_factor}
    return model(**inputs, shift_labels=batch["shift_labels"], **smoothing, use_cache=False).loss


def largest_batch(corpus: Corpus, recipe: Recipe, args: TrainingArguments) -> dict[str, torch.Tensor]:
    """Return a micro-batch as large as they get; its values mean nothing."""
    names = corpus.collate([corpus.rows[0]])
    shape = (args.per_device_train_batch_size, recipe.data.block_size)
    return {name: torch.zeros(shape, dtype=torch.long) for name in names}


def count_logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many logits of a micro-batch exist at a time."""
    return count_logits_at_once(model, batch["input_ids"].numel())


def describe_steps(corpus: Corpus, recipe: Recipe, rows_per_step: int, epochs: float) -> tuple[str, str]:
    """Return in words the tokens of an optimizer step and those of the run."""
    block_size, per_epoch = recipe.data.block_size, sum(row.trained for row in corpus.ledger)
    return (
        f" × {block_size:,} tokens = {rows_per_step * block_size:,} tokens",
        f" = about {per_epoch * epochs:,.0f} label positions",
    )


def evaluate(
    model: torch.nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Figures]:
    """Return the figures of each evaluation set; `poll` is called between batches and may raise to interrupt."""
    context = token_coding(tokenizer).context_token_id
    batch_size = args.per_device_eval_batch_size
    return {
        name: evaluate_documents(model, documents, recipe.data.block_size, context, batch_size, poll).figures()
        for name, documents in corpus.sets.items()
    }


def evaluate_all(
    model: torch.nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    known: Mapping[str, Figures] | None = None,
    details: bool = True,
) -> dict[str, Any]:
    """Return the `figures` of each evaluation set; `known` where they have just been measured."""
    return {"figures": known or evaluate(model, corpus, recipe, tokenizer, args)}


def measured_by(corpus: Corpus, recipe: Recipe, args: TrainingArguments) -> list[Any]:
    """Return what the figures of a model depend on, beside the model and its tokenizer."""
    sets = {name: documents.key for name, documents in corpus.sets.items()}
    return [sets, recipe.data.block_size, recipe.evaluation.model_dump(mode="json")]


def measure_baselines(
    corpus: Corpus, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> dict[str, Any]:
    """Return what the trained model is compared with beside the base model: nothing."""
    return {}


def settle(model: PreTrainedModel, corpus: Corpus, recipe: Recipe, args: TrainingArguments) -> None:
    """Do to the trained model what is left to do: nothing."""


def make_scorecard(
    corpus: Corpus,
    recipe: Recipe,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    untrained: Mapping[str, Figures],
) -> dict[str, Any]:
    """Return the scorecard; see `kit.evaluation.scorecard`."""
    return scorecard.make_scorecard("causal-lm", before["figures"], after["figures"], untrained)


def prompts(recipe: Recipe) -> Sequence[str]:
    """Return the texts that the model is shown before and after."""
    return recipe.evaluation.prompts


def check_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Check that the prompts and their continuations have room.

    Raises:
        UserError: one has not.
    """
    samples.check_prompts(model, tokenizer, recipe.evaluation.prompts, **recipe.evaluation.generation.model_dump())


def sample(
    model: PreTrainedModel, corpus: Corpus, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> list[list[str]]:
    """Return continuations of the recipe's prompts."""
    generation = recipe.evaluation.generation.model_dump()
    return samples.continue_prompts(model, tokenizer, recipe.evaluation.prompts, **generation)
