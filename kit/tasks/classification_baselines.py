"""What a classifier is compared with, on the rows that it is measured on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainingArguments

from kit.data.labeled_corpus import LabeledCorpus, LabeledSet
from kit.errors import UserError
from kit.evaluation.classification import probabilities
from kit.evaluation.classification_metrics import classification_figures, decide
from kit.evaluation.zero_shot import check_question, zero_shot
from kit.model.loading import load_causal_lm, load_config
from kit.model.tokenizer import special_tokens
from kit.recipe.classification import ClassificationRecipe, ZeroShot

_SEED = 0
_ZERO_SHOT_POSITIONS = 512  # of a text and its prompt, times the rows of an evaluation batch

Likely = dict[str, tuple[np.ndarray, np.ndarray]]  # by set: int64 (rows,), which ones; float64 (rows, classes)


def measure_baselines(
    corpus: LabeledCorpus, recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> dict[str, Any]:
    """Return `sets`, with `figures` and `predicted` of each baseline that the recipe asks for, and `notes` on them.

    To be called on all processes, which all learn alike: the main one alone would let the others wait too long.

    Each learns from the training rows that the classifier learns from, before noise and repetition, and is measured on
    the same rows.
    """
    wanted, labels = recipe.evaluation.baselines, corpus.labels
    names = [name for name in corpus.sets if name != "train_sample"]
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    notes = []
    if "zero_shot" in wanted and (reason := _why_not_asked(recipe, corpus, tokenizer)):
        wanted, notes = [name for name in wanted if name != "zero_shot"], [f"zero-shot: {reason}"]
    for baseline in wanted:
        likely = _BASELINES[baseline](corpus, recipe, tokenizer, args, names)
        for name, (rows, of_rows) in likely.items():
            if len(rows) < len(corpus.sets[name]):
                notes.append(f"{name}: {baseline} of a sample of {len(rows):,} of {len(corpus.sets[name]):,} rows")
            truth = corpus.sets[name].labels[rows]
            predicted = decide(of_rows, labels.multi, None)
            found[name][baseline] = {
                "figures": classification_figures(of_rows, truth, labels.names, labels.multi),
                "predicted": predicted.astype(int).tolist() if len(rows) == len(corpus.sets[name]) else None,
            }
    return {"sets": found, "notes": notes}


def check_baselines(corpus: LabeledCorpus, recipe: ClassificationRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check before the model is loaded that it can be asked for labels as the recipe says; see `_why_not_asked`."""
    if "zero_shot" in recipe.evaluation.baselines:
        _why_not_asked(recipe, corpus, tokenizer)


def _asked(recipe: ClassificationRecipe, corpus: LabeledCorpus) -> tuple[ZeroShot, list[str], int]:
    """Return how the model is asked, the words of each label, and the positions that it has."""
    asked, config = recipe.evaluation.zero_shot, load_config(recipe.model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _ZERO_SHOT_POSITIONS
    return asked, [asked.words.get(name, name) for name in corpus.labels.names], positions


def _majority(corpus: LabeledCorpus, recipe: Any, tokenizer: Any, args: Any, names: Sequence[str]) -> Likely:
    from kit.evaluation.baselines import majority  # scikit-learn, a second that a causal LM's run is spared

    labels, train = corpus.labels, corpus.train.labels
    rows = {name: np.arange(len(corpus.sets[name])) for name in names}
    return {name: (r, majority(train, len(labels.names), len(r), labels.multi)) for name, r in rows.items()}


def _tfidf_logreg(
    corpus: LabeledCorpus, recipe: ClassificationRecipe, tokenizer: Any, args: Any, names: Sequence[str]
) -> Likely:
    from kit.evaluation.baselines import tfidf_logreg

    validation = corpus.sets.get("validation")
    texts = {name: _texts(corpus.sets[name]) for name in names}
    weights = "balanced" if recipe.data.balancing and recipe.data.balancing.method == "oversample" else None
    if corpus.class_weights is not None:
        weights = dict(enumerate(corpus.class_weights.tolist()))
    found = tfidf_logreg(
        _texts(corpus.train),
        corpus.train.labels,
        texts,
        corpus.labels.multi,
        weights,
        _SEED,
        (_texts(validation), validation.labels) if validation else None,
        len(corpus.labels.names),
    )
    return {name: (np.arange(len(texts[name])), likely) for name, likely in found.items()}


def _texts(rows: LabeledSet) -> list[str]:
    from kit.evaluation.baselines import join_pairs

    return join_pairs(rows.texts, rows.pairs)


def _zero_shot(
    corpus: LabeledCorpus,
    recipe: ClassificationRecipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    names: Sequence[str],
) -> Likely:
    labels = corpus.labels
    model = load_causal_lm(recipe.model, tokenizer, args.seed).to(args.device)
    asked, words, positions = _asked(recipe, corpus)
    context = special_tokens(tokenizer).context.id
    found: Likely = {}
    for name in names:
        texts = _texts(corpus.sets[name])
        chosen = np.sort(np.random.default_rng(_SEED).permutation(len(texts))[: asked.max_rows])
        texts = [texts[index] for index in chosen.tolist()]
        most = args.per_device_eval_batch_size * _ZERO_SHOT_POSITIONS
        scores = zero_shot(
            model, tokenizer, texts, labels.names, asked.prompt, words, positions, most, context, name=name
        )
        found[name] = (chosen, probabilities(scores, multi=False))
    return found


_BASELINES = {"majority": _majority, "tfidf_logreg": _tfidf_logreg, "zero_shot": _zero_shot}


def _why_not_asked(
    recipe: ClassificationRecipe, corpus: LabeledCorpus, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return why the untrained model is not asked for labels, in words.

    Raises:
        UserError: words of a label that is not there, or of two; a prompt of the recipe's own that does not fit.
    """
    if corpus.labels.multi:
        return "not asked, since a text may have several labels"
    if recipe.model.from_config is not None:
        return "not asked, since a fresh model knows nothing"
    if unknown := sorted(set(recipe.evaluation.zero_shot.words) - set(corpus.labels.names)):
        raise UserError(
            f"evaluation.zero_shot.words: `{unknown[0]}` is no label; expected {', '.join(corpus.labels.names)}"
        )
    architectures = getattr(load_config(recipe.model), "architectures", None) or ()
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return f"not asked, since {recipe.model.name_or_path} is no causal language model"
    asked, words, positions = _asked(recipe, corpus)
    try:
        check_question(tokenizer, corpus.labels.names, asked.prompt, words, positions)
    except UserError as error:
        if asked.prompt or asked.words:
            raise
        return f"not asked, since the usual question does not do ({error})"
    return None
