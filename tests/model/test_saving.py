"""The final model is a folder that `from_pretrained` alone loads to the same logits; whole, or not there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.model.saving import save_model, saved_model_difference
from kit.run import train
from tests.material import ARCHITECTURES, make_model, make_tokenizer


def logits(model):
    ids = torch.arange(2 * 40).reshape(2, 40) % 320
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def shift(model):
    """Change every weight, as training does, so that nothing equals a fresh initialisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


CASES = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_from_pretrained_alone_gives_the_same_logits(tmp_path, architecture, tied):
    model, tokenizer = shift(make_model(architecture, tie_word_embeddings=tied)), make_tokenizer()
    save_model(model, tokenizer, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(model), logits(reloaded))
    head, embedding = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    assert saved_model_difference(model, tmp_path / "model") == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(tmp_path, dtype):
    model = shift(make_model()).to(dtype)
    save_model(model, make_tokenizer(), tmp_path / "model")
    assert saved_model_difference(model, tmp_path / "model") == 0.0
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight"]
)
def test_a_changed_tensor_is_noticed(tmp_path, name):
    model = shift(make_model())
    save_model(model, make_tokenizer(), tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="other logits than the model in memory"):
        saved_model_difference(model, tmp_path / "model")


def test_comparison_leaves_mode_and_random_numbers_alone(tmp_path):
    model = make_model()
    save_model(model, make_tokenizer(), tmp_path / "model")
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    saved_model_difference(model, tmp_path / "model")
    assert model.training
    assert torch.equal(torch.rand(3), expected)


class FailsToSave:
    """A tokenizer on a full disk."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("half of i")
        raise OSError("No space left on device")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space"):
        save_model(make_model(), FailsToSave(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_model_before(tmp_path):
    first = make_model(seed=1)
    save_model(first, make_tokenizer(), tmp_path / "model")
    with pytest.raises(OSError, match="No space"):
        save_model(make_model(seed=2), FailsToSave(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert saved_model_difference(first, tmp_path / "model") == 0.0


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_stays_as_the_model_came(tiny_models, write_recipe, tmp_path, use_cache):
    """Trainer writes `use_cache: false` into the configuration that it saves; generation is slow ever after."""
    recipe = write_recipe(model={"name_or_path": str(tiny_models(use_cache=use_cache))})
    train(str(recipe), [])
    folders = [tmp_path / "run/model", *(tmp_path / "run/checkpoints").glob("checkpoint-*")]
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["use_cache"] is use_cache


def test_settings_for_generation_are_kept(tiny_models, write_recipe, tmp_path):
    import shutil

    source = shutil.copytree(tiny_models(), tmp_path / "source")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 3, "temperature": 0.6}))
    train(str(write_recipe(model={"name_or_path": str(source)})), [])
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (saved["max_new_tokens"], saved["temperature"]) == (3, 0.6)
