"""Labelled rows, tiny models to classify them with, and recipes: what the tests of whole runs are made of."""

import csv
import json
import random
from pathlib import Path

import yaml

from tests.material import ARCHITECTURES, WORDS, make_model, make_tokenizer

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
ENCODERS = {
    "bert": {**SMALL, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {**SMALL, "max_position_embeddings": 68},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
    "modernbert": {**SMALL, "max_position_embeddings": 64},
}
# What rows of a class are full of.
MARKS = {"ham": ("tensor", "kit"), "spam": ("loss", "epoch"), "eggs": ("layer", "batch")}


def labeled_rows(number: int, seed: int = 0, names=("ham", "spam"), rare: int = 3, noise: float = 0.15):
    """Return (label, text) of different texts; each `rare`-th row is of the first class, a few bear a wrong label."""
    rng = random.Random(seed)
    rows, seen = [], set()
    while len(rows) < number:
        place = len(rows)
        name = names[0] if place % rare == 0 else names[1 + place % (len(names) - 1)]
        words = [rng.choice(WORDS + list(MARKS[name]) * 12) for _ in range(rng.randint(2, 14))]
        if (text := " ".join(words)) not in seen:
            seen.add(text)
            rows.append((rng.choice(names) if rng.random() < noise else name, text))
    return rows


def multi_rows(number: int, seed: int = 0):
    """Return (labels, text); labels are joined by `|`, and a few rows have none."""
    rng = random.Random(seed)
    rows, seen = [], set()
    while len(rows) < number:
        chosen = [name for name in MARKS if rng.random() < 0.45]
        pool = WORDS + [word for name in chosen for word in MARKS[name] * 15]
        if (text := " ".join(rng.choice(pool) for _ in range(rng.randint(3, 14)))) not in seen:
            seen.add(text)
            rows.append(("|".join(chosen), text))
    return rows


def write_rows(path: Path, rows, columns=("label", "text")) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def encoder_tokenizer():
    """Return a tokenizer that puts a text, or a pair, between special tokens, as BERT's does."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return tokenizer


def save_base(folder: Path, architecture: str, labels=None, multi=False, **config) -> Path:
    """Save a tiny language model, or a classifier of `labels`, with its tokenizer; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    encoder = architecture in ENCODERS
    tokenizer = encoder_tokenizer() if encoder else make_tokenizer()
    values = {**(ENCODERS if encoder else ARCHITECTURES)[architecture], "vocab_size": len(tokenizer), **config}
    values |= {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if encoder:
        names = ("pad", "cls", "sep")
        values |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"[{name.upper()}]") for name in names}
        if architecture == "roberta":
            values["pad_token_id"] = 1  # from which on it counts positions
    if labels:
        problem = "multi_label_classification" if multi else "single_label_classification"
        # Logits that differ, so that a test of them can fail.
        values |= {"id2label": dict(enumerate(labels)), "problem_type": problem, "initializer_range": 0.2}
        values |= {"label2id": {name: number for number, name in enumerate(labels)}}
        values.setdefault("pad_token_id", tokenizer.eos_token_id)
    torch.manual_seed(0)
    if architecture == "roberta":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    if labels or encoder:
        auto = AutoModelForSequenceClassification if labels else AutoModelForMaskedLM
        auto.from_config(AutoConfig.for_model(architecture, **values)).save_pretrained(folder)
    else:
        make_model(architecture, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(path: Path, base: Path, rows: Path, **sections) -> Path:
    """Write a recipe of a small classifier into `path`'s folder; sections are merged into those that it has."""
    recipe = {
        "task": "sequence-classification",
        "model": {"name_or_path": str(base)},
        "data": {"train": [{"path": str(rows)}], "store_dir": str(path.parent / "store")},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-2,
            "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        },
        "evaluation": {"baselines": ["majority"], "bootstrap_resamples": 100},
        "run": {"output_dir": str(path.with_suffix(""))},
    }  # fmt: skip
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(recipe))
    return path


def read(path: Path):
    """Return what a JSON file holds."""
    return json.loads(path.read_text())
