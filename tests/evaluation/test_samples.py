"""Samples are drawn with a seed of their own: they repeat, and leave the run's random numbers alone."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kit.errors import UserError
from kit.evaluation.samples import continue_prompts, print_samples
from kit.model.loading import load_causal_lm
from kit.recipe.models import ModelSection
from tests.material import make_model, make_tokenizer

LLAMA = Path(__file__).parents[3] / "shared/data/stories260K/hf"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=0.5)  # uneven enough that a most probable token stands out


@pytest.fixture
def sample(model, tokenizer):
    def draw(*prompts, **options):
        options = {"seed": 1, "max_new_tokens": 12, **options}
        return continue_prompts(model, tokenizer, prompts, **options)

    return draw


def test_same_seed_same_text(sample):
    first = sample("the kit")
    torch.rand(7)
    assert sample("the kit") == first
    assert sample("the kit", seed=2) != first


def test_other_prompts_change_nothing(sample):
    [alone] = sample("a corpus", num_return_sequences=2)
    assert sample("the kit", "a corpus", "model", num_return_sequences=2)[1] == alone


def test_random_numbers_outside_stay(sample):
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sample("the kit")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_given_back_and_dropout_is_off(tokenizer, training):
    dropping = make_model(resid_pdrop=0.5, embd_pdrop=0.5)
    plain = make_model()
    dropping.train(training)
    prompts = {"seed": 1, "max_new_tokens": 8}
    assert continue_prompts(dropping, tokenizer, ["the"], **prompts) == continue_prompts(
        plain, tokenizer, ["the"], **prompts
    )
    assert dropping.training is training


def test_mode_is_given_back_after_a_mistake(model, sample):
    model.train()
    with pytest.raises(UserError):
        sample("the kit", max_new_tokens=1_000)
    assert model.training


def test_prompt_comes_first(sample):
    [[text]] = sample("naïve Größe")
    assert text.startswith("naïve Größe")
    assert len(text) > len("naïve Größe")


def test_number_of_sequences(sample):
    [texts] = sample("the kit", num_return_sequences=4)
    assert len(texts) == 4
    assert len(set(texts)) > 1
    assert sample() == []


def token_count(monkeypatch, model):
    """Record the lengths of what the model generates, special tokens included."""
    lengths = []
    original = type(model).generate

    def spy(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        lengths.append(output.shape[1])
        return output

    monkeypatch.setattr(type(model), "generate", spy)
    return lengths


def test_lengths(sample, model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    lengths = token_count(monkeypatch, model)
    prompt = len(tokenizer("the kit reads")["input_ids"])
    sample("the kit reads", max_new_tokens=9)
    sample("the kit reads", max_new_tokens=None, max_length=20)
    sample("the kit reads", max_new_tokens=None, max_length=64)
    sample("the kit reads", max_new_tokens=64 - prompt)
    assert lengths == [prompt + 9, 20, 64, 64]


def test_settings_of_the_model_do_not_shorten(tiny_models, tmp_path, tokenizer, monkeypatch):
    """A `max_new_tokens` in generation_config.json wins over a `max_length` that is asked for."""
    folder = shutil.copytree(tiny_models(), tmp_path / "model")
    file = folder / "generation_config.json"
    settings = {**json.loads(file.read_text()), "max_new_tokens": 2, "eos_token_id": None}
    file.write_text(json.dumps(settings))
    model = load_causal_lm(ModelSection(name_or_path=str(folder)), tokenizer, 0)
    lengths = token_count(monkeypatch, model)
    continue_prompts(model, tokenizer, ["the"], seed=1, max_length=30)
    assert lengths == [30]


def test_max_length_within_the_prompt(sample, tokenizer):
    prompt = len(tokenizer("the kit reads")["input_ids"])
    with pytest.raises(UserError, match=rf"max_length: found {prompt}, but the prompt alone has {prompt} tokens"):
        sample("the kit reads", max_new_tokens=None, max_length=prompt)


@pytest.mark.parametrize("length", [{"max_new_tokens": 62}, {"max_new_tokens": None, "max_length": 65}])
def test_more_than_the_positions(sample, tokenizer, length):
    prompt = len(tokenizer("the kit reads")["input_ids"])
    with pytest.raises(UserError, match=rf"has 64: ask for at most {64 - prompt} new tokens"):
        sample("the kit reads", **length)


def test_greedy_takes_the_most_probable_token(sample, model, tokenizer):
    ids = tokenizer("the kit")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    for seed in (1, 2):
        assert sample("the kit", do_sample=False, max_new_tokens=6, seed=seed) == [[expected]]
    assert sample("the kit", top_k=1, max_new_tokens=6) == [[expected]]
    assert sample("the kit", temperature=1e-4, max_new_tokens=6) == [[expected]]


def test_several_greedy_continuations(sample):
    with pytest.raises(UserError, match="num_return_sequences: found 2"):
        sample("the kit", do_sample=False, num_return_sequences=2)


def test_all_tokens_with_top_k_0(tokenizer):
    """Among all 320 tokens of a nearly even model, 50 different ones come up soon."""
    even = make_model(initializer_range=1e-4)
    options = {"seed": 1, "max_new_tokens": 40, "num_return_sequences": 8}
    drawn = {
        top_k: {token for text in continue_prompts(even, tokenizer, ["a"], top_k=top_k, **options)[0] for token in text}
        for top_k in (1, 0)
    }
    assert len(drawn[0]) > 50 > len(drawn[1])


@pytest.mark.parametrize("bos", [None, "<bos>", "<eos>"])
def test_what_stands_before_a_prompt(bos, monkeypatch):
    """Llama's prompts begin with BOS, GPT-2's with nothing; an empty one and a chat with whatever begins a document."""
    tokenizer = make_tokenizer(318)
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    model = make_model()
    given = []
    original = type(model).generate

    def spy(self, inputs, **kwargs):
        given.append(inputs[0].tolist())
        return original(self, inputs, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    begun = tokenizer.eos_token + "the"
    continue_prompts(model, tokenizer, ["the kit", "", "<|user|>the", begun], seed=1, max_new_tokens=2)
    ids, chat, as_given = tokenizer(["the kit", "<|user|>the", begun], add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id] if bos == "<bos>" else []
    context = first or [tokenizer.eos_token_id]
    assert given == [[*first, *ids], context, [*context, *chat], [*first, *as_given]]


def generating(monkeypatch, model, *numbers):
    """Let a model continue every prompt with these tokens."""

    def generate(self, inputs, **kwargs):
        return torch.cat([inputs, torch.tensor([numbers] * len(inputs))], dim=1)

    monkeypatch.setattr(type(model), "generate", generate)


def test_markers_of_a_chat_are_shown(model, monkeypatch):
    """And what begins, ends and fills up a text is not, wherever it stands."""
    tokenizer = make_tokenizer()
    own = {"bos_token": "<bos>", "pad_token": "<pad>", "extra_special_tokens": ["<|user|>", "<|assistant|>"]}
    tokenizer.add_special_tokens(own)
    text = "<|user|>What is Größe ?<|assistant|>the kit"
    rest = tokenizer("a corpus <|user|> the", add_special_tokens=False)["input_ids"]
    generating(monkeypatch, model, *rest, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id)
    [[shown]] = continue_prompts(model, tokenizer, [text], seed=1, max_new_tokens=2)
    assert shown == f"{text}a corpus <|user|> the"


@pytest.mark.skipif(not LLAMA.exists(), reason="the stories model is not in ../shared/data")
def test_markers_of_a_chat_beside_the_spaces_of_a_llama(model, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    rest = tokenizer(" upon a time", add_special_tokens=False)["input_ids"]
    generating(monkeypatch, model, *rest, tokenizer.eos_token_id)
    plain = continue_prompts(model, tokenizer, ["Once"], seed=1, max_new_tokens=2)
    ids = [tokenizer.bos_token_id, *tokenizer("Once", add_special_tokens=False)["input_ids"], *rest]
    assert plain == [[tokenizer.decode(ids, skip_special_tokens=True)]]
    assert plain[0][0].startswith("Once")  # without the space that stands between BOS and text
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    [[shown]] = continue_prompts(model, tokenizer, ["<|user|>What?<|assistant|>"], seed=1, max_new_tokens=2)
    # This tokenizer reads a space after each special token, and that is shown as it is read.
    assert shown == "<|user|> What?<|assistant|>  upon a time"


def test_printing(capsys):
    print_samples([{"prompt": "a\n[b]", "before": ["a\n[b] :smile:"], "after": []}])
    out = capsys.readouterr().out
    assert "prompt: 'a\\n[b]'" in out
    assert "before: a\n    [b] :smile:" in out
