"""Models are loaded whole or refused in one line; what is loaded is what the recipe says."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kit.errors import UserError
from kit.model.loading import check_vocabulary, load_causal_lm, model_key
from kit.recipe.models import ModelSection
from tests.material import make_tokenizer

FRESH = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A copy of the tiny GPT-2 to break."""
    return shutil.copytree(tiny_models(), tmp_path / "tiny-gpt2")


@pytest.fixture
def load(tokenizer):
    return lambda name=None, seed=0, **keys: load_causal_lm(
        ModelSection(name_or_path=name and str(name), **keys), tokenizer, seed
    )


@pytest.fixture
def refusal(load):
    def message(*args, **keys):
        with pytest.raises(UserError) as error:
            load(*args, **keys)
        return str(error.value)

    return message


@pytest.fixture
def fresh(load):
    return lambda seed=0, **changes: load(seed=seed, from_config={**FRESH, **changes}, tokenizer="any")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- pretrained


def test_a_folder_gives_its_own_weights(load, folder):
    model = load(folder, revision="no-such-branch")  # a folder has no revisions
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_of_every_weight(load, fresh, folder, dtype):
    models = [load(folder, dtype=dtype), load(from_config=FRESH, tokenizer="any", dtype=dtype)]
    for model in models:
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_config_overrides_reach_the_modules(load, folder):
    model = load(folder, config={"attn_pdrop": 0.3, "embd_pdrop": 0.2})
    assert model.config.attn_pdrop == 0.3
    assert model.transformer.h[0].attn.attn_dropout.p == 0.3
    assert model.transformer.drop.p == 0.2


def test_attention_kernel(load, folder):
    assert load(folder, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"atn_pdrop": 0.1}, ["model.config.atn_pdrop", "`gpt2`", "did you mean `attn_pdrop`"]),
        ({"vocab_size": "many"}, ["model.config.vocab_size", "expected int"]),
        # A width other than the stored one: transformers raises a RuntimeError that names no tensor.
        ({"n_embd": 64}, ["do not fit its architecture", "mismatched", "transformer.h.0.attn.c_attn.weight"]),
    ],
)
def test_config_overrides_that_do_not_fit(refusal, folder, config, words):
    message = refusal(folder, config=config)
    assert all(word in message for word in words), message


def test_encoders_are_refused(refusal, tmp_path):
    """BERT loads as a causal LM in transformers; its weights were trained to see both sides."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "bert")
    message = refusal(tmp_path / "bert")
    assert "type `bert`" in message
    assert "no causal language model" in message


def test_missing_tensor_is_named(refusal, folder):
    """Transformers initialises a missing tensor at random and goes on."""
    change_tensors(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    message = refusal(folder)
    assert "missing: transformer.h.1.mlp.c_fc.weight" in message
    assert "h.0" not in message


def test_unexpected_tensor_is_told(load, folder, capsys):
    change_tensors(folder, lambda tensors: tensors.update({"transformer.extra.weight": torch.ones(2)}))
    load(folder)
    assert "transformer.extra.weight" in capsys.readouterr().out


def test_complete_weights_give_no_warning(load, folder, capsys):
    load(folder)
    assert "warning" not in capsys.readouterr().out


def test_missing_folder_names_the_place_and_its_neighbour(refusal, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    message = refusal("./tiny-gtp2")
    assert str(folder.parent / "tiny-gtp2") in message
    assert "did you mean `tiny-gpt2`" in message


def test_a_file_is_no_model(refusal, folder):
    assert "is a file" in refusal(folder / "model.safetensors")


# ---- fresh


def test_fresh_weights_depend_on_the_seed_alone(fresh):
    torch.manual_seed(1)
    first = fresh(seed=3).state_dict()
    torch.manual_seed(2)
    torch.rand(100)
    again, other = fresh(seed=3).state_dict(), fresh(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_fresh_model_takes_size_and_special_ids_from_the_tokenizer(fresh, tokenizer):
    model = fresh()
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert fresh(vocab_size=400).get_input_embeddings().num_embeddings == 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gtp2"}, ["model.from_config.model_type", "`gtp2`", "did you mean `gpt2`"]),
        ({"model_type": 2}, ["unknown `2`"]),
        ({"model_type": "vit"}, ["`vit` has no causal language model"]),
        ({"n_layers": 2}, ["model.from_config.n_layers", "did you mean `n_layer`"]),
        ({"n_embd": 33}, ["model.from_config", "divisible"]),
        ({"n_embd": "wide"}, ["model.from_config.n_embd", "expected int"]),
    ],
)
def test_fresh_config_that_cannot_be(tokenizer, changes, words):
    with pytest.raises(UserError) as error:
        load_causal_lm(ModelSection(from_config={**FRESH, **changes}, tokenizer="any"), tokenizer, 0)
    assert all(word in str(error.value) for word in words), error.value


def test_fresh_encoder_is_refused_unless_it_is_a_decoder(load, refusal):
    """A BERT that attends to both sides reads the token that it is to predict: its loss falls to nothing."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = {"model_type": "bert", **sizes}
    assert "`bert` has no causal language model" in refusal(from_config=bert, tokenizer="any")
    assert load(from_config={**bert, "is_decoder": True}, tokenizer="any").config.is_decoder


LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def test_rope_under_the_names_of_published_configurations(load):
    """Most `config.json` on the Hub predate `rope_parameters`; a name that is dropped would be a silent mistake."""
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    one, other = (load(from_config=values, tokenizer="any").config.rope_parameters for values in (old, new))
    assert one == other
    assert one["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "rotary_pct"), ("gpt_neox", "rope_theta"), ("gpt2", "rope_theta")]
)
def test_rope_names_of_another_family(refusal, model_type, name):
    """Llama's configuration takes Pythia's `rotary_pct` as an attribute that nothing reads."""
    message = refusal(from_config={"model_type": model_type, name: 0.5}, tokenizer="any")
    assert message.startswith(f"model.from_config.{name}: `{model_type}` has no such attribute")


def test_loading_leaves_the_recipe_alone(tokenizer):
    """Transformers completes `rope_parameters` in place: the key of the weights changed by loading them."""
    section = ModelSection(from_config={**LLAMA, "rope_parameters": {"rope_theta": 5e5}}, tokenizer="any")
    before = model_key(section, 0)
    load_causal_lm(section, tokenizer, 0)
    assert model_key(section, 0) == before


# ---- model and tokenizer together; the rest is in test_alignment.py


def test_tokenizer_of_another_model_is_found_before_anything_is_tokenised(folder, tmp_path):
    make_tokenizer(400).save_pretrained(tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    for section in (
        ModelSection(name_or_path=str(folder), tokenizer=str(tmp_path / "other")),
        ModelSection(from_config={**FRESH, "vocab_size": 320}, tokenizer=str(tmp_path / "other")),
    ):
        with pytest.raises(UserError) as error:
            check_vocabulary(section, other)
        assert str(tmp_path / "other") in str(error.value)
        assert (section.name_or_path or "fresh model") in str(error.value)
    check_vocabulary(ModelSection(from_config=FRESH, tokenizer="any"), other)
    check_vocabulary(ModelSection(name_or_path=str(folder)), make_tokenizer())


# ---- the key of the weights


def key(name, seed=0, **keys):
    return model_key(ModelSection(name_or_path=str(name), **keys), seed)


def test_model_key_is_of_content_not_of_place(folder, tmp_path):
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (elsewhere / "README.md").write_text("notes")
    assert key(folder) == key(elsewhere) == key(folder, seed=1)


@pytest.mark.parametrize(
    "keys", [{"config": {"attn_pdrop": 0.1}}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}]
)
def test_model_key_covers_settings(folder, keys):
    assert key(folder, **keys) != key(folder)


def test_model_key_covers_weights_and_config_file(folder):
    keys = [key(folder)]
    change_tensors(folder, lambda tensors: tensors["transformer.wte.weight"][0].add_(1e-3))
    keys.append(key(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    keys.append(key(folder))
    assert len(set(keys)) == 3


def test_model_key_of_a_fresh_model():
    def fresh_key(seed=0, tokenizer="any", **changes):
        return model_key(ModelSection(from_config={**FRESH, **changes}, tokenizer=tokenizer), seed)

    others = [
        fresh_key(seed=1),
        fresh_key(n_layer=2),
        # The size of the vocabulary, which the configuration does not give, comes with the tokenizer.
        fresh_key(tokenizer={"vocab_size": 300}),
        fresh_key(tokenizer={"vocab_size": 301}),
    ]
    assert len({fresh_key(), *others}) == 5
    assert fresh_key() == fresh_key()


# ---- remote code


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:39], COMMIT.upper()])
def test_remote_code_needs_a_pinned_commit(revision):
    with pytest.raises(ValidationError, match="pinned to a full commit hash"):
        ModelSection(name_or_path="team/model", trust_remote_code=True, revision=revision)


def test_remote_code_with_a_commit():
    assert ModelSection(name_or_path="team/model", trust_remote_code=True, revision=COMMIT).trust_remote_code
