"""Sequence classification: tell classes of texts apart.

The functions are those of `kit.tasks.causal_lm`, where there is something to do; `kit.stages` calls them alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from kit.console import say, warn
from kit.data import labeled_examples
from kit.data.labeled_corpus import LabeledCorpus, SequenceCoding, build_labeled_corpus, labeled_sources_key
from kit.errors import UserError
from kit.evaluation import classification_scorecard
from kit.evaluation.calibration import fit_temperature, tune_thresholds
from kit.evaluation.classification import predict_logits, probabilities
from kit.evaluation.classification_metrics import classification_figures, confusion, decide, per_class_figures
from kit.evaluation.intervals import bootstrap_intervals
from kit.evaluation.mistakes import confident_mistakes, prediction_lines
from kit.model.classifier import (
    check_classifier,
    classifier_positions,
    fold_temperature,
    load_classifier,
    needs_positions,
    saved_thresholds,
)
from kit.model.freezing import check_blocks, check_random_parameters
from kit.model.loading import check_vocabulary
from kit.model.sequence_encoding import prepare_for_pipeline, sequence_coding_key, sequence_encoder
from kit.model.tokenizer import load_tokenizer, special_tokens
from kit.recipe.classification import ClassificationRecipe
from kit.tasks import classification_baselines, classification_examples

Figures = dict[str, float | int]

# What an evaluation during training logs of each set, and what a best model can be chosen by.
LOGGED_FIGURES = ("f1_macro", "accuracy", "nll", "ece")
HIGHER_IS_BETTER = {"f1_macro", "accuracy"}
DEFAULT_FIGURE = "f1_macro"
SHOWN_FIGURE = ("f1_macro", "macro-F1")

print_scorecard = classification_scorecard.print_classification_scorecard
print_figures = classification_scorecard.print_classification_figures
print_examples = classification_examples.print_examples
measure_baselines = classification_baselines.measure_baselines
count_tokens = labeled_examples.count_tokens

_NOT_FOR_THE_MODEL = ("labels", "weights")


def check_early(recipe: ClassificationRecipe, trains: bool = True) -> None:
    """Check of the model what its configuration alone tells.

    Raises:
        UserError: it cannot be found, is no classifier, has fewer positions than `data.max_length`; its weights are
            unusable; it is an adapter. The best model is to be kept, and there is no validation.
    """
    training, stops = recipe.training, recipe.run.early_stopping
    keeps_best = (stops or training.get("load_best_model_at_end")) and not training.get("metric_for_best_model")
    if trains and keeps_best and set_names(recipe)[:1] != ["validation"]:
        raise UserError(
            f"{'run.early_stopping' if stops else 'training.load_best_model_at_end'}: there is no validation to choose "
            f"the best model by; give `data.split.validation` or `data.validation`, or leave it out"
        )
    config = check_classifier(recipe.model, trains)
    _max_length(recipe, config)
    check_blocks(recipe.freezing, config)


def set_names(recipe: ClassificationRecipe) -> list[str]:
    """Return the evaluation sets that are measured on the way; the best model is chosen by the first."""
    there = {
        "validation": recipe.data.validation is not None or recipe.data.split.validation > 0,
        "train_sample": recipe.evaluation.train_sample > 0,
    }
    return [name for name, is_there in there.items() if is_there]


def sources_key(recipe: ClassificationRecipe) -> str:
    """Return a hash of the content of every source that is trained or measured on."""
    return labeled_sources_key(recipe.data, recipe.evaluation)


def prepare_tokenizer(recipe: ClassificationRecipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, and have it pad and cut as the trained model will want it."""
    tokenizer = load_tokenizer(recipe.model, recipe.data.store_dir, tuple, str)
    check_vocabulary(recipe.model, tokenizer)
    config = check_classifier(recipe.model)
    prepare_for_pipeline(tokenizer, _max_length(recipe, config), recipe.data.truncation, config)
    return tokenizer


def extend_vocabulary(
    recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, None]:
    """Return the tokenizer as it is: a classifier's recipe adds no words."""
    return tokenizer, None


def prepare_examples(recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LabeledCorpus:
    """Read, split, balance and encode the recipe's rows.

    All of it has seeds of its own, so that runs of several seeds are measured on the same rows.
    """
    corpus = build_labeled_corpus(recipe.data, recipe.evaluation, sequence_coding(recipe, tokenizer))
    classification_baselines.check_baselines(corpus, recipe, tokenizer)
    return corpus


def sequence_coding(recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase) -> SequenceCoding:
    """Return what the data needs to know of tokenizer and model."""
    config = check_classifier(recipe.model)
    cut = (_max_length(recipe, config), recipe.data.truncation)
    return SequenceCoding(
        key=sequence_coding_key(tokenizer, *cut),
        encode=sequence_encoder(tokenizer, *cut),
        pad_token_id=tokenizer.pad_token_id,
        positions=needs_positions(config),
    )


def _max_length(recipe: ClassificationRecipe, config: PreTrainedConfig) -> int | None:
    """Return the tokens of a text that are read, special tokens included; None for no limit.

    Raises:
        UserError: the recipe asks for more than the model has positions.
    """
    positions, asked = classifier_positions(config), recipe.data.max_length
    if positions and asked and asked > positions:
        raise UserError(f"data.max_length: found {asked:,}; expected at most {positions:,}, the positions of the model")
    return asked or positions


def print_data(corpus: LabeledCorpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print where every row went, and the classes of each part."""
    pad = special_tokens(tokenizer).pad
    say(
        f"tokenizer: {len(tokenizer):,} tokens; batches are filled up with {pad.token} ({pad.reason}), masked by length"
    )
    corpus.report()


def check_data(corpus: LabeledCorpus, recipe: ClassificationRecipe) -> None:
    """Refuse what a run must not leave out unasked: nothing, as `on_bad_label` and the like ask for each cause."""


def begins_as(corpus: LabeledCorpus, args: TrainingArguments) -> list[Any]:
    """Return what a model that was loaded depends on beside its weights: its new head, which the seed decides."""
    return [corpus.labels.names, args.seed]


def load_model(
    recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase, corpus: LabeledCorpus, seed: int
) -> PreTrainedModel:
    """Load the recipe's model with an output for each label, and note in its configuration how texts are read.

    Raises:
        UserError: it cannot be loaded, or a new head is among what does not train.
    """
    model, new = load_classifier(recipe.model, tokenizer, corpus.labels.names, corpus.labels.multi, seed)
    check_random_parameters(recipe.freezing, model, new)
    model.config.use_cache = False  # there is no next token
    source, earlier = recipe.data.train[0], getattr(model.config, "kit_classifier", None) or {}
    if set(earlier.get("thresholds", corpus.labels.names)) != set(corpus.labels.names):
        earlier = {}  # of a classifier of other labels, whose head is given up
    model.config.kit_classifier = {
        **earlier,
        "max_length": _max_length(recipe, model.config),
        "truncation": recipe.data.truncation,
        "text_column": source.text_column,
        "text_pair_column": source.text_pair_column,
        "template": source.template,
    }
    return model


def loss_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weights of a batch's examples, summed: what `loss_sum` is to be divided by."""
    weights = batch["weights"]
    return (weights.mean(-1) if weights.dim() > 1 else weights).double().sum()


def loss_sum(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], args: TrainingArguments) -> torch.Tensor:
    """Return the sum over the examples of a batch of weight × loss, in nats: scalar with gradient.

    The loss of an example is the cross-entropy of its class, or with several labels the mean binary cross-entropy
    over all of them.

    Args:
        model: the classifier, wrapped for several processes where there are several.
        batch: `input_ids`, `attention_mask` and what else the model takes: (rows, positions); `labels`: int64 (rows,)
            or float (rows, classes); `weights`: float, of the same shape as `labels`.
        args: `label_smoothing_factor` is honoured.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in _NOT_FOR_THE_MODEL}
    logits, smoothing = model(**inputs).logits, args.label_smoothing_factor
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = batch["weights"].to(logits.dtype)
    if weights.dim() == 1:
        return (weights * F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smoothing)).sum()
    targets = batch["labels"].to(logits.dtype) * (1 - smoothing) + smoothing / 2
    return (weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).mean(-1).sum()


def largest_batch(
    corpus: LabeledCorpus, recipe: ClassificationRecipe, args: TrainingArguments
) -> dict[str, torch.Tensor]:
    """Return a micro-batch as large as they get."""
    longest = np.argsort(-corpus.rows.lengths, kind="stable")[: args.per_device_train_batch_size]
    if corpus.max_tokens_per_batch:
        most = corpus.max_tokens_per_batch // int(corpus.rows.lengths[longest[0]])
        longest = longest[: max(1, most)]
    return corpus.collate([corpus.rows[index] for index in longest.tolist()])


def count_logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many logits of a micro-batch exist at a time."""
    return len(batch["input_ids"]) * model.config.num_labels


def describe_steps(
    corpus: LabeledCorpus, recipe: ClassificationRecipe, rows_per_step: int, epochs: float
) -> tuple[str, str]:
    """Return in words what is to be said of the rows of an optimizer step, and the tokens of the run."""
    return (
        " at most" if corpus.max_tokens_per_batch else "",
        f" = about {corpus.rows.lengths.sum() * epochs:,.0f} tokens",
    )


# ---- Measured


def evaluate(
    model: torch.nn.Module,
    corpus: LabeledCorpus,
    recipe: ClassificationRecipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Figures]:
    """Return the figures of the sets that are measured on the way; `poll` is called between batches."""
    names = [name for name in corpus.sets if name not in corpus.final_sets]
    return {name: _figures(_logits(model, corpus, name, args, poll), corpus, name, None) for name in names}


def evaluate_all(
    model: PreTrainedModel,
    corpus: LabeledCorpus,
    recipe: ClassificationRecipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    known: Mapping[str, Figures] | None = None,
    details: bool = True,
) -> dict[str, Any]:
    """Return `figures` of every set, the test among them, `details`, and `files` to write beside the scorecard."""
    labels = corpus.labels
    thresholds = saved_thresholds(model.config, labels.names)
    figures, found, files = {}, {}, {}
    for name, measured in corpus.sets.items():
        logits = _logits(model, corpus, name, args)
        likely = probabilities(logits, labels.multi)
        predicted = decide(likely, labels.multi, thresholds)
        figures[name] = _figures(logits, corpus, name, thresholds)
        if not details:
            continue
        found[name] = {
            "predicted": predicted.astype(int).tolist(),
            "intervals": bootstrap_intervals(measured.labels, predicted, *_resampled(corpus, recipe)),
            "per_class": per_class_figures(predicted, measured.labels, labels.names, labels.multi),
            "confusion": confusion(predicted, measured.labels, labels.names, labels.multi),
        }
        if name != "train_sample":
            shown = (likely, predicted, measured.labels, measured.where, labels.names, labels.multi)
            files["predictions.jsonl"] = files.get("predictions.jsonl", "") + prediction_lines(name, *shown)
        if name == "validation" and recipe.evaluation.mistakes:
            mistakes = confident_mistakes(
                likely, measured.labels, measured.texts, measured.pairs, measured.where, labels.names, labels.multi,
                recipe.evaluation.mistakes, thresholds,
            )  # fmt: skip
            files["mistakes.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mistakes)
    return {"figures": figures, "details": found, "files": files}


def _logits(
    model: torch.nn.Module,
    corpus: LabeledCorpus,
    name: str,
    args: TrainingArguments,
    poll: Callable[[], None] = lambda: None,
) -> np.ndarray:
    rows = corpus.sets[name].rows
    most = args.per_device_eval_batch_size * int(rows.lengths.max())
    return predict_logits(model, rows, corpus.collate, most, poll, name)


def _figures(logits: np.ndarray, corpus: LabeledCorpus, name: str, thresholds: np.ndarray | None) -> Figures:
    labels = corpus.labels
    likely = probabilities(logits, labels.multi)
    return classification_figures(likely, corpus.sets[name].labels, labels.names, labels.multi, thresholds)


def settle(
    model: PreTrainedModel, corpus: LabeledCorpus, recipe: ClassificationRecipe, args: TrainingArguments
) -> None:
    """Fit to validation what the recipe asks for of the trained model: a temperature; of several labels, thresholds.

    The temperature goes into the head, so that the saved model alone gives the probabilities.
    """
    labels, known = corpus.labels, model.config.kit_classifier
    # What an earlier training came to is not this one's.
    settled = {key: value for key, value in known.items() if key not in ("temperature", "thresholds")}
    model.config.kit_classifier = settled
    if "validation" not in corpus.sets:
        if recipe.evaluation.temperature_scaling or labels.multi:
            warn("there is no validation: the temperature stays 1 and every threshold 0.5")
        return
    truth, logits = corpus.sets["validation"].labels, _logits(model, corpus, "validation", args)
    if recipe.evaluation.temperature_scaling:
        settled["temperature"] = temperature = fit_temperature(logits, truth, labels.multi)
        fold_temperature(model, temperature)
        logits = _logits(model, corpus, "validation", args)
        say(f"temperature {temperature:.3f}, which fits validation best, is now a part of the head")
    if labels.multi:
        tuned = tune_thresholds(probabilities(logits, labels.multi), truth)
        settled["thresholds"] = dict(zip(labels.names, tuned.tolist(), strict=True))
        say("thresholds tuned on validation: " + ", ".join(f"{k} {v:.3f}" for k, v in settled["thresholds"].items()))


def measured_by(corpus: LabeledCorpus, recipe: ClassificationRecipe, args: TrainingArguments) -> list[Any]:
    """Return what the figures of a model depend on, beside the model and its tokenizer."""
    return [corpus.key, recipe.evaluation.model_dump(mode="json"), recipe.data.split.seed]


# ---- Shown


def make_scorecard(
    corpus: LabeledCorpus,
    recipe: ClassificationRecipe,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    untrained: Mapping[str, Figures],
) -> dict[str, Any]:
    """Return the scorecard, with the baselines and how far the classifier is from TF-IDF on the same rows."""
    baselines, labels = before["baselines"]["sets"], {name: of.labels for name, of in corpus.sets.items()}
    return classification_scorecard.make_classification_scorecard(
        before["figures"],
        after["figures"],
        {name: {key: each["figures"] for key, each in of.items()} for name, of in baselines.items()},
        classification_scorecard.with_differences(after["details"], baselines, labels, *_resampled(corpus, recipe)),
        before["baselines"]["notes"],
    )


def _resampled(corpus: LabeledCorpus, recipe: ClassificationRecipe) -> tuple[int, bool, int, int]:
    """Return the last arguments of the functions that resample rows."""
    labels = corpus.labels
    return len(labels.names), labels.multi, recipe.evaluation.bootstrap_resamples, recipe.data.split.seed


def prompts(recipe: ClassificationRecipe) -> Sequence[str]:
    """Return the texts that the model is shown before and after."""
    return recipe.evaluation.examples


def check_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: ClassificationRecipe) -> None:
    """Check the texts that the model is shown: a text of any length can be classified."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    corpus: LabeledCorpus,
    recipe: ClassificationRecipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> list[list[str]]:
    """Return the label of each of the recipe's examples, with its probability."""
    texts, labels = list(recipe.evaluation.examples), corpus.labels
    if not texts:
        return []
    thresholds = saved_thresholds(model.config, labels.names)
    shown = []
    was_training = model.training
    model.eval()
    for encoded in corpus.encode(texts, None):
        batch = {name: t.to(model.device) for name, t in corpus.collate_encoded([encoded]).items()}
        likely = probabilities(model(**batch).logits.double().cpu().numpy(), labels.multi)
        [predicted] = decide(likely, labels.multi, thresholds)
        numbers = np.flatnonzero(predicted) if labels.multi else [predicted]
        shown.append([", ".join(f"{labels.names[n]} ({likely[0, n]:.3f})" for n in numbers) or "no label"])
    model.train(was_training)
    return shown
