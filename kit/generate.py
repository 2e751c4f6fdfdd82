"""`kit generate`: continue a prompt with a run's model or any other."""

from pathlib import Path
from typing import Any

from kit.console import quiet_libraries, say
from kit.errors import UserError
from kit.evaluation.samples import continue_prompts
from kit.model.alignment import check_alignment
from kit.model.configuration import CLASSIFIER
from kit.model.loading import load_causal_lm, stored_kind
from kit.model.tokenizer import load_tokenizer
from kit.recipe.models import ModelSection
from kit.training.run_directory import model_of


def generate(
    model: str, prompt: str, *, revision: str | None, max_length: int | None, max_new_tokens: int | None, **options: Any
) -> None:
    """Print continuations of a prompt, the prompt included; see `continue_prompts` for the options.

    Raises:
        UserError: the model cannot be loaded or is a classifier, or both lengths are given.
    """
    if max_length is not None and max_new_tokens is not None:
        raise UserError("--max-length counts the prompt's tokens and --max-new-tokens does not: give one of them")
    quiet_libraries()
    model = model_of(model)
    section = ModelSection(name_or_path=model, revision=revision)
    tokenizer = load_tokenizer(section, Path(), lambda: (), lambda: "")
    if stored_kind(section) is CLASSIFIER:
        raise UserError(f"{model} is a classifier, which continues no text; `kit predict` gives labels with it")
    loaded = load_causal_lm(section, tokenizer, seed=0)
    check_alignment(loaded, tokenizer, block_size=1)
    if max_length is None and max_new_tokens is None:
        max_new_tokens = 50
    [samples] = continue_prompts(
        loaded, tokenizer, [prompt], max_length=max_length, max_new_tokens=max_new_tokens, **options
    )
    for number, text in enumerate(samples, start=1):
        say(f"--- {number}" if len(samples) > 1 else "")
        say(text)
