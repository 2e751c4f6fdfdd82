"""QLoRA: the base in 4 bits, on the kernels that bitsandbytes has for CPUs. CUDA's are not tested here."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kit.errors import UserError
from kit.merge import merge
from kit.model.loading import load_adapted, load_causal_lm
from kit.model.quantization import check_quantization
from kit.recipe.models import ModelSection
from kit.run import evaluate, train

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("library", [None, object()])
def test_where_it_is_refused(monkeypatch, device, library):
    monkeypatch.setattr("torch.cuda.is_available", lambda: device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: library)
    check_quantization(False)
    if device and library:
        check_quantization(True)
        return
    with pytest.raises(UserError, match="load_in_4bit") as error:
        check_quantization(True)
    assert ("CUDA device" in str(error.value)) == (not device)
    assert ("bitsandbytes" in str(error.value)) == (library is None)


@pytest.fixture
def on_the_cpu(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr("kit.model.quantization._has_device", lambda: True)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def gradients(model):
    model.train()
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_evaluation_changes_no_gradient(on_the_cpu, tiny_models, architecture):
    section = ModelSection(name_or_path=str(tiny_models(architecture)), load_in_4bit=True)
    model = load_causal_lm(section, None, seed=0)
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert len(packed) == (8 if architecture == "gpt2" else 14)  # all linear layers of the two blocks, and no head
    before = gradients(model)
    logits(model)
    after = gradients(model)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_trained_evaluated_and_merged(on_the_cpu, write_recipe, tiny_models, tmp_path, architecture):
    base = tiny_models(architecture)
    recipe = write_recipe(
        model={"name_or_path": str(base), "load_in_4bit": True},
        adapter={"type": "lora", "r": 4},
        vocabulary={"special_tokens": ["<|x|>"]},
        freezing={"trainable": {"new_tokens": True}},
        training={"max_steps": 4, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2},
    )
    train(str(recipe), [])
    run = tmp_path / "run"
    record = json.loads((run / "model/base.json").read_text())
    assert record["load_in_4bit"]
    rows = json.loads((run / "freezing.json").read_text())
    total = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    parts = [row["parameters"] for row in rows if row["part"] not in ("adapter", "new tokens")]
    assert total <= sum(parts) < 1.5 * total  # values, not bytes; rows in multiples of 64
    evaluate(str(run), [], None, str(tmp_path / "figures.json"))
    scorecard = json.loads((run / "scorecard.json").read_text())["sets"]["domain"]["after"]
    assert json.loads((tmp_path / "figures.json").read_text())["sets"]["domain"] == scorecard

    merge(str(run), None)
    adapted = load_adapted(run / "model", ModelSection(name_or_path=str(base))).get_base_model()
    plain = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not hasattr(plain.config, "quantization_config")
    assert any(isinstance(m, Conv1D) for m in plain.modules()) == (architecture == "gpt2")
    want, found = logits(adapted), logits(plain)
    assert (want - found).abs().max() < 1e-4 * want.abs().max()
    moved = logits(load_causal_lm(ModelSection(name_or_path=str(base)), None, seed=0))
    assert (want[..., :320] - moved).abs().max() > 1e-2 * want.abs().max()
