"""Rows of added tokens begin as the recipe asks for, by id, and the old ones keep every bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.model.embeddings import resize_and_initialise
from kit.model.vocabulary import AddedRow, Extension, extend_tokenizer
from kit.recipe.vocabulary import VocabularySection
from tests.material import make_model, make_tokenizer
from tests.model.models import MODELS

DATA = Path(__file__).parents[3] / "shared" / "data"


def section(**values):
    return VocabularySection(**values)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def extended(initialize="subword-mean", tokens=("kinase",), special=("<|user|>", "<|assistant|>"), described=False):
    tokenizer = make_tokenizer()
    special = [{"content": token, "description": "a corpus"} if described else token for token in special]
    return tokenizer, extend_tokenizer(
        tokenizer, section(tokens=list(tokens), special_tokens=special, initialize=initialize)
    )


def parts(model):
    """Copies of all that has a row for each token."""
    outputs = model.get_output_embeddings()
    found = {"inputs": model.get_input_embeddings().weight, "outputs": outputs.weight, "bias": outputs.bias}
    return {name: p.detach().clone() for name, p in found.items() if p is not None}


def grow(model, extension, initialize="subword-mean", multiple=64, seed=0):
    size = max([extension.old_size, *(row.id + 1 for row in extension.rows)])
    return resize_and_initialise(model, extension, size, initialize, multiple, seed)


def logits(model, ids=(1, 5, 320, 321, 322)):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_rows_are_the_means_of_the_right_rows(build):
    model = build()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = parts(model)
    _, extension = extended()
    grow(model, extension)
    after = parts(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert after.keys() == before.keys()
    for name, old in before.items():
        new = after[name]
        assert len(new) == 384
        assert torch.equal(new[:320], old)
        mean = old.numpy().astype(np.float64).mean(0)
        for row in extension.rows:
            expected = old.numpy().astype(np.float64)[list(row.pieces)].mean(0) if row.pieces else mean
            np.testing.assert_allclose(new[row.id].numpy(), expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(new[324:].numpy(), np.broadcast_to(mean, new[324:].shape), rtol=1e-6, atol=1e-8)
    assert model.config.vocab_size == 384
    assert model.get_input_embeddings().num_embeddings == 384
    assert [row.method for row in extension.rows] == ["mean", "mean", "subword-mean", "subword-mean"]


def test_saved_model_computes_the_same(build, tmp_path):
    model = build()
    grow(model, extended()[1])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert logits(model).shape[-1] == 384
    assert torch.equal(logits(loaded), logits(model))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_padding_rows_are_used_first_and_do_not_count(build):
    model = build(vocab_size=330)
    with torch.no_grad():
        model.get_input_embeddings().weight[320:] = 1e6
        model.get_output_embeddings().weight[320:] = 1e6
    before = parts(model)
    _, extension = extended()
    grow(model, extension)
    after = parts(model)
    for name in ("inputs", "outputs"):
        assert len(after[name]) == 330
        assert torch.equal(after[name][324:], before[name][324:])
        torch.testing.assert_close(after[name][320], before[name][:320].mean(0))
    assert model.config.vocab_size == 330


@pytest.mark.parametrize(("multiple", "size"), [(1, 324), (64, 384), (100, 400)])
def test_size(multiple, size):
    model = make_model("llama", tie_word_embeddings=False)
    grow(model, extended()[1], multiple=multiple)
    assert {len(p) for p in parts(model).values()} == {size}


def test_never_shrinks():
    model = make_model("gpt2", vocab_size=1000)
    grow(model, extended()[1], multiple=64)
    assert model.config.vocab_size == len(parts(model)["inputs"]) == 1000


@pytest.mark.parametrize("method", ["mean", "mean-covariance", "zeros", "random"])
def test_methods(build, method):
    model, again, other = build(), build(), build()
    old = parts(model)
    _, extension = extended(method)
    for which, seed in ((model, 1), (again, 1), (other, 2)):
        grow(which, extension, method, seed=seed)
    new, same, different = parts(model), parts(again), parts(other)
    ids = [row.id for row in extension.rows]
    for name in old:
        assert torch.equal(new[name], same[name])
        assert torch.equal(new[name][:320], old[name])
        drawn = (method == "random" and name != "bias") or method == "mean-covariance"
        if old[name].std() > 0:
            assert torch.equal(new[name][ids], different[name][ids]) != drawn
        if method == "zeros":
            assert not new[name][320:].any()
        if method in ("mean", "mean-covariance"):
            mean = old[name].mean(0).expand_as(new[name][ids])
            torch.testing.assert_close(new[name][ids], mean, atol=1e-4, rtol=1e-4)
    if method == "random":
        assert 0.5 < new["inputs"][ids].std() / old["inputs"].std() < 1.5


@pytest.mark.parametrize("method", ["random", "mean-covariance"])
@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "bert-untied"])
def test_untied_matrices_draw_rows_of_their_own(name, method):
    """Even where all their old rows are alike."""
    model = MODELS[name]()
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    _, extension = extended(method)
    grow(model, extension, method)
    new, ids = parts(model), [row.id for row in extension.rows]
    assert not (new["inputs"][ids] == new["outputs"][ids]).all(1).any()


def test_holes_do_not_count(build):
    """Ids below the tokenizer's size that are no token's: what their rows hold says nothing of tokens."""
    model, holes = build(), (7, 100, 319)
    before = parts(model)
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            matrix[list(holes)] = 1e6
    tokens = [number for number in range(320) if number not in holes]
    grow(model, Extension((AddedRow("x", 320, False, (), "mean", "x"),), (), 320, holes), "mean")
    for name in ("inputs", "outputs"):
        torch.testing.assert_close(parts(model)[name][320], before[name][tokens].mean(0))


@pytest.mark.parametrize("method", ["random", "mean-covariance"])
def test_global_random_state_is_left_alone(method):
    model, extension = make_model("gpt2"), extended(method)[1]
    state = torch.get_rng_state()
    grow(model, extension, method)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_old_rows_covariance():
    """Independent of how it is drawn: many samples against numpy's covariance."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            torch.randn(320, 32, generator=torch.Generator().manual_seed(0)) * 1e3
        )
    old = parts(model)["inputs"].numpy().astype(np.float64)
    rows = tuple(AddedRow(f"w{i}", 320 + i, False, (), "mean-covariance", f"w{i}") for i in range(4000))
    model.double()
    resize_and_initialise(model, Extension(rows, (), 320), 4320, "mean-covariance", 1, 0)
    sample = parts(model)["inputs"][320:].numpy()
    np.testing.assert_allclose(sample.mean(0), old.mean(0), atol=1e-2)
    expected = 1e-9 * np.cov(old.T, bias=True)
    assert np.abs(np.cov(sample.T) - expected).max() < 0.1 * np.diag(expected).max()


def test_description():
    model = make_model("gpt2")
    old = parts(model)["inputs"]
    _, extension = extended("zeros", described=True)
    grow(model, extension, "zeros")
    pieces = ids_of(make_tokenizer(), "a corpus")
    torch.testing.assert_close(parts(model)["inputs"][320], old[pieces].mean(0))


def test_half_precision_keeps_its_type_and_old_rows():
    model = make_model("llama", tie_word_embeddings=False).to(torch.bfloat16)
    old = parts(model)
    _, extension = extended()
    grow(model, extension)
    for name, new in parts(model).items():
        assert new.dtype == torch.bfloat16
        assert torch.equal(new[:320], old[name])
        row = extension.rows[-1]
        assert torch.equal(new[row.id], old[name][list(row.pieces)].double().mean(0).to(torch.bfloat16))


def test_real_model_understands_an_added_word_at_once(tmp_path):
    folder = DATA / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    old = logits(model, (1, 5, 9, 300))
    extension = extend_tokenizer(tokenizer, section(tokens=["elephant", "butterfly"]))
    grow(model, extension)
    assert torch.equal(logits(model, (1, 5, 9, 300))[..., :512], old[..., :512])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Once there was an elephant.")["input_ids"]
    assert extension.rows[0].id in ids
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
