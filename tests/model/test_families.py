"""The families of small models that people adapt today, at toy sizes: built, trained by the kit, saved, loaded again.

Each configuration has what sets its family apart (as in the `config.json` on the Hub), with small numbers in it.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.errors import UserError
from kit.model.isolation import check_isolation
from kit.model.loading import check_pretrained, load_causal_lm
from kit.model.saving import save_model, saved_model_difference
from kit.recipe.models import ModelSection
from kit.run import train
from tests.material import make_tokenizer

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_positions": 64, "activation_function": "gelu_new"}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
GEMMA = {**GROUPED, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "GPT-2": {**GPT2, "n_layer": 2},
    "DistilGPT-2": {**GPT2, "n_layer": 1},
    "Pythia": {
        "model_type": "gpt_neox", **SIZES, "use_parallel_residual": True, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    },
    "Qwen3": {
        "model_type": "qwen3", **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}
    },
    "Llama 3.2": {"model_type": "llama", **GROUPED, "rope_parameters": LLAMA3_ROPE},
    "SmolLM2": {
        "model_type": "llama", **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}
    },
    "SmolLM3": {
        "model_type": "smollm3", **SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "no_rope_layer_interval": 4,
    },
    "Gemma 2": {
        "model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma 3": {"model_type": "gemma3_text", **GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def build(tokenizer):
    """A function from the name of a family to its model, with sharper attention than a fresh model has."""

    def fresh(family, sharpen=30.0, **changes):
        keys = {key: changes.pop(key) for key in ("attn_implementation", "dtype") if key in changes}
        config = {**FAMILIES[family], **changes}
        model = load_causal_lm(ModelSection(from_config=config, tokenizer="any", **keys), tokenizer, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "q_proj" in name or "k_proj" in name:
                    parameter.mul_(sharpen)
        return model.eval()

    return fresh


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 45)[None], use_cache=False).logits


# ---- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_family_isolates_packed_documents(build, family):
    check_isolation(build(family), 320)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_reloads(tmp_path, tokenizer, write_recipe, family):
    """The run compares the saved model with the one in memory itself, and fails where they differ."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = {"name_or_path": None, "from_config": FAMILIES[family], "tokenizer": str(tmp_path / "tokenizer")}
    train(str(write_recipe(model=model, training={"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2})), [])
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["reloaded_logits_differ_by"] == 0.0
    # What the run left is a pretrained model like any other.
    section = ModelSection(name_or_path=str(tmp_path / "run/model"))
    reloaded = load_causal_lm(section, tokenizer, seed=0)
    assert torch.equal(logits(reloaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")))
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").eos_token == "<eos>"
    assert check_pretrained(section, block_size=64).model_type == FAMILIES[family]["model_type"]


# ---- Gemma 2: soft-capped attention scores


CAPPED = {"attn_logit_softcapping": 0.5}  # small enough to bite at toy sizes


def test_soft_capped_attention_is_computed_eagerly(build, capsys):
    model = build("Gemma 2", **CAPPED)
    assert model.config._attn_implementation == "eager"
    assert "attention: eager, since SDPA cannot cap attention scores (attn_logit_softcapping: 0.5)" in (
        capsys.readouterr().out
    )
    assert torch.equal(logits(model), logits(build("Gemma 2", **CAPPED, attn_implementation="eager")))


def test_sdpa_would_leave_the_cap_out(build, monkeypatch):
    """Transformers 5.23 fails in the first forward pass, after all the tokenising; older versions compute this."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.models.gemma2 import modeling_gemma2

    def sdpa(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
        output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return output.transpose(1, 2), None

    model = build("Gemma 2", **CAPPED)
    right = logits(model)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="does not support `softcap`"):
        logits(model)
    model.config._attn_implementation = "eager"
    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", sdpa)
    wrong = logits(model)
    monkeypatch.undo()
    assert torch.equal(logits(model), right)
    assert torch.allclose(wrong, logits(build("Gemma 2", attn_logit_softcapping=None)), atol=1e-5)
    assert (wrong - right).abs().max() > 0.01


def test_explicit_sdpa_is_refused_before_anything_is_tokenised(build, tmp_path, tokenizer):
    save_model(build("Gemma 2"), tokenizer, tmp_path / "gemma")
    section = ModelSection(name_or_path=str(tmp_path / "gemma"), attn_implementation="sdpa")
    for refused in (
        lambda: check_pretrained(section, block_size=32),
        lambda: load_causal_lm(section, tokenizer, seed=0),
        lambda: build("Gemma 2", attn_implementation="sdpa"),
    ):
        with pytest.raises(UserError, match=r"model\.attn_implementation: sdpa cannot cap .*: 50\).*`eager`"):
            refused()


def test_sdpa_of_an_architecture_without_it_is_refused(build):
    with pytest.raises(UserError, match=r"model\.attn_implementation: sdpa does not work with `gemma2`"):
        build("Gemma 2", attn_logit_softcapping=None, attn_implementation="sdpa")


def test_final_soft_cap_bounds_the_logits(build):
    model = build("Gemma 2", final_logit_softcapping=0.1)
    assert logits(model).abs().max() <= 0.1
    assert logits(build("Gemma 2", final_logit_softcapping=None)).abs().max() > 0.1


def test_other_families_keep_their_own_kernel(build, capsys):
    for family in FAMILIES.keys() - {"Gemma 2"}:
        assert build(family).config._attn_implementation == "sdpa"
        assert build(family, attn_implementation="eager").config._attn_implementation == "eager"
    assert "attention:" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_saved_gemma_2_is_compared_under_its_own_kernel(build, tokenizer, tmp_path, dtype):
    model = build("Gemma 2", dtype=dtype, **CAPPED)
    save_model(model, tokenizer, tmp_path / "model")
    assert saved_model_difference(model, tmp_path / "model") == 0.0
