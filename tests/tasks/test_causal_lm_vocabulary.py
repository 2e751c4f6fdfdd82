"""What a recipe's `vocabulary` comes to in a causal LM: each part of it reaches tokenizer, model and arguments."""

import pytest

from kit.recipe.loading import load_recipe
from kit.recipe.models import ModelSection
from kit.tasks import causal_lm
from tests.material import make_tokenizer, save_tiny_model

NEW = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


@pytest.mark.parametrize("ends", [[0, 5], [5, 6], 5])
def test_extended_model_names_the_ids_of_roles(write_recipe, tmp_path, ends):
    """By itself, before any Trainer: a model that is only evaluated or saved ends its texts as well."""
    vocabulary = {"special_tokens": list(NEW.values()), "roles": NEW}
    folder = save_tiny_model(tmp_path / "llama", "llama", eos_token_id=ends)
    recipe = load_recipe(write_recipe(model={"name_or_path": str(folder)}, vocabulary=vocabulary))
    tokenizer = causal_lm.prepare_tokenizer(recipe)
    extended, extension = causal_lm.extend_vocabulary(recipe, tokenizer)
    model = causal_lm.load_model(recipe, tokenizer, None, 0)
    assert model.config.eos_token_id == ends
    causal_lm.extend_model(model, recipe, extended, extension, 0)

    begin, end, pad = (extended.convert_tokens_to_ids(token) for token in NEW.values())
    assert min(begin, end, pad) >= len(tokenizer)
    assert (model.config.bos_token_id, model.config.pad_token_id) == (begin, pad)
    assert model.config.eos_token_id == ([end, *ends] if isinstance(ends, list) else end)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.pad_token_id) == (begin, pad)
    assert generation.eos_token_id == [end, *(ends if isinstance(ends, list) else [ends])]


@pytest.mark.parametrize(("model_type", "added", "rows"), [("gpt2", False, 2), ("qwen2", True, 1)])
def test_words_are_added_as_the_model_type_asks_for(write_recipe, model_type, added, rows):
    """`AutoTokenizer` builds the tokenizer of a Qwen 2 from its merges, so that a word in the model would be lost."""
    recipe = load_recipe(write_recipe(vocabulary={"tokens": ["kinase"]}))
    section = ModelSection(from_config={"model_type": model_type}, tokenizer="any")
    tokenizer, extension = causal_lm.extend_vocabulary(recipe.model_copy(update={"model": section}), make_tokenizer())
    assert len(extension.rows) == rows
    assert ("kinase" in tokenizer.get_added_vocab()) == added
