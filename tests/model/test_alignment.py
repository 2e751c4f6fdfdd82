"""Model, tokenizer and configuration mean the same, or it is said; what a recipe's roles set is what is saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer_utils import align_special_tokens

from kit.errors import UserError
from kit.model.alignment import align_configuration, check_alignment, check_embeddings
from kit.model.loading import load_causal_lm
from kit.model.roles import apply_roles
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.models import ModelSection
from kit.recipe.vocabulary import VocabularySection
from tests.material import ARCHITECTURES, make_model, make_tokenizer

FRESH = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
NEW = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def save(tmp_path):
    """A function that saves a model with tokenizer, changes the files and returns the folder."""

    def save(model, config=None, generation=None):
        model.save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        for name, changes in (("config.json", config), ("generation_config.json", generation)):
            path = tmp_path / "model" / name
            if name == "generation_config.json" and changes is None:
                path.unlink(missing_ok=True)  # most older models have none
                continue
            values = {**json.loads(path.read_text()), **(changes or {})}
            path.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))
        return tmp_path / "model"

    return save


def load(folder, **keys):
    return load_causal_lm(ModelSection(name_or_path=str(folder), **keys), make_tokenizer(), 0)


def extended(roles=NEW):
    """Return a section, a tokenizer with its tokens in these roles."""
    section = VocabularySection(special_tokens=list(roles.values()), roles=roles)
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, section)
    apply_roles(tokenizer, section)
    return section, tokenizer


def special_ids(model):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return [[getattr(holder, name) for name in names] for holder in (model.config, model.generation_config)]


# ---- sizes


def test_tokenizer_of_another_model(tokenizer):
    check_alignment(make_model(vocab_size=320), tokenizer, block_size=64)
    with pytest.raises(UserError, match=r"ids up to 319, but the fresh model has 319 embeddings.* another model"):
        check_alignment(make_model(vocab_size=319), tokenizer, block_size=64)


def test_padded_matrices_are_fine(tokenizer, capsys):
    check_alignment(make_model(vocab_size=384), tokenizer, block_size=64)
    assert capsys.readouterr().out == ""


def test_fresh_model_has_an_embedding_for_the_largest_id(tokenizer):
    """Some vocabularies skip ids: their number of tokens is not enough embeddings."""
    vocabulary = {token: 2 * number for token, number in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: vocabulary
    model = load_causal_lm(ModelSection(from_config=FRESH, tokenizer="any"), tokenizer, 0)
    check_alignment(model, tokenizer, block_size=8)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_block_size_beyond_the_positions(tokenizer, architecture):
    model = make_model(architecture)
    check_alignment(model, tokenizer, block_size=64)
    with pytest.raises(UserError, match=r"data\.block_size: found 65; expected at most 64"):
        check_alignment(model, tokenizer, block_size=65)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("part", ["input", "output", "config"])
def test_sizes_that_differ_are_our_own_fault(architecture, part):
    model = make_model(architecture, tie_word_embeddings=False)
    if part == "config":
        model.config.vocab_size = 384
    elif part == "input":
        model.set_input_embeddings(nn.Embedding(384, 32))
    else:
        model.set_output_embeddings(nn.Linear(32, 384, bias=False))
    with pytest.raises(RuntimeError, match=r"more than one size: .*384"):
        check_embeddings(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_models(architecture, tied, tokenizer, save):
    model = make_model(architecture, tie_word_embeddings=tied)
    check_alignment(model, tokenizer, block_size=8)
    model.resize_token_embeddings(400, mean_resizing=False)
    check_embeddings(model)
    loaded = load(save(model))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


def test_two_matrices_that_should_be_one(save):
    """Transformers warns and leaves them apart; the next resize would throw one of them away."""
    folder = save(make_model("llama", tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(320, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"two different matrices; .* `model\.config: \{tie_word_embeddings: false\}`"):
        load(folder)
    model = load(folder, config={"tie_word_embeddings": False})
    assert torch.equal(model.get_output_embeddings().weight, tensors["lm_head.weight"])


# ---- ids of the configurations


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_beyond_the_embeddings(name, tokenizer):
    for holder in ("config", "generation_config"):
        model = make_model()
        setattr(getattr(model, holder), name, 320)
        with pytest.raises(UserError, match=rf"^{holder}\.{name}: found 320; the fresh model has 320 embeddings"):
            check_alignment(model, tokenizer, block_size=8)
    model = make_model()
    model.generation_config.eos_token_id = [0, 1000]
    with pytest.raises(UserError, match="eos_token_id: found 1000"):
        check_alignment(model, tokenizer, block_size=8)
    model = make_model(**{name: -1})  # of old conversions, for none
    check_alignment(model, tokenizer, block_size=8)


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id"])
def test_an_id_beyond_the_embeddings_can_be_taken_back(name, save, tokenizer):
    """An embedding for such padding, which many a fine-tuned Llama names, cannot even be built."""
    folder = save(make_model("llama"), config={name: 320})
    with pytest.raises(UserError, match=rf"`model\.config: \{{{name}: null\}}`") as error:
        load(folder)
    assert str(folder) in str(error.value)
    model = load(folder, config={name: None})
    check_alignment(model, tokenizer, block_size=8)
    assert all(320 not in ids for ids in special_ids(model))


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        ({}, None, None),
        ({"eos_token_id": 5}, None, ["eos_token is `<eos>` (0), and `%` (5) in config.eos_token_id"]),
        ({"eos_token_id": [5, 0]}, None, None),
        ({"eos_token_id": [5, 6]}, None, ["`%` (5), `&` (6)"]),
        ({"bos_token_id": 5, "pad_token_id": 5}, None, None),  # the tokenizer has neither
        ({}, {"eos_token_id": 5}, ["`%` (5) in generation_config.eos_token_id"]),
        ({"eos_token_id": 5}, {"eos_token_id": 5}, ["config.eos_token_id"]),
        ({}, {"eos_token_id": [0, 5]}, None),
        ({"eos_token_id": 2}, None, ["`\"` (2)"]),  # Llama's default, written
        ({"eos_token_id": "drop"}, None, None),  # and not written
        ({"vocab_size": 320, "eos_token_id": 319}, None, ["(319)"]),
    ],
)  # fmt: skip
def test_differences_are_said(config, generation, said, save, tokenizer, capsys):
    model = load(save(make_model("llama"), config, generation))
    assert model.config.eos_token_id == (2 if config.get("eos_token_id") == "drop" else model.config.eos_token_id)
    check_alignment(model, tokenizer, block_size=8)
    found = capsys.readouterr().out
    if said is None:
        assert found == ""
    else:
        assert found.count("\n") == 1
        assert all(part in found for part in said), found


def test_all_differences_are_one_line(save, tokenizer, capsys):
    tokenizer.bos_token, tokenizer.pad_token = "%", "$"
    model = load(save(make_model("llama", 384), {"bos_token_id": 380, "eos_token_id": 5, "pad_token_id": 7}))
    check_alignment(model, tokenizer, block_size=8)
    found = capsys.readouterr().out
    assert found.count("\n") == 1
    assert "bos_token is `%` (5), and no token (380) in config.bos_token_id; eos_token is" in found


# ---- ids of a recipe's roles


def test_roles_are_set_and_stay_when_trainer_aligns():
    section, tokenizer = extended()
    model = make_model(vocab_size=384)
    align_configuration(model, tokenizer, section)
    begin, end, pad = (tokenizer.convert_tokens_to_ids(token) for token in NEW.values())
    assert special_ids(model) == [[begin, end, pad], [begin, [end, 0], pad]]
    align_special_tokens(model, tokenizer)
    assert special_ids(model) == [[begin, end, pad], [begin, [end, 0], pad]]
    align_configuration(model, tokenizer, section)
    assert special_ids(model) == [[begin, end, pad], [begin, [end, 0], pad]]


def test_lists_of_eos_keep_what_they_hold():
    """Chat models end an answer with one token and a text with another."""
    section, tokenizer = extended({"eos_token": "<|end|>"})
    end = tokenizer.eos_token_id
    model = make_model(vocab_size=384, eos_token_id=[5, 6], pad_token_id=7)
    model.generation_config = GenerationConfig(eos_token_id=[6, 8, end], bos_token_id=3)
    align_configuration(model, tokenizer, section)
    assert special_ids(model) == [[0, [end, 5, 6], 7], [3, [end, 6, 8], None]]
    align_special_tokens(model, tokenizer)
    # That of transformers 5.17 makes the configuration's list one id, repeats one in the other, and takes away the BOS
    # and padding that the tokenizer has none of; what ends a generation stays.
    [bos, eos, pad], [generation_bos, ends, generation_pad] = special_ids(model)
    assert eos in ([end, 5, 6], end)
    assert (ends[0], sorted(set(ends))) == (end, [6, 8, end])
    assert [bos, generation_bos, pad, generation_pad] in ([0, 3, 7, None], [None] * 4)


def test_a_default_of_the_class_ends_no_generation(save):
    """Llama's 2, which nobody wrote, is a quotation mark to this tokenizer."""
    section, tokenizer = extended({"eos_token": "<|end|>"})
    model = load(save(make_model("llama", 384), {"eos_token_id": "drop"}))
    assert model.config.eos_token_id == 2
    align_configuration(model, tokenizer, section)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (320, 320)
    align_special_tokens(model, tokenizer)
    assert model.config.eos_token_id == 320
    assert model.generation_config.eos_token_id in (320, [320])  # a list with transformers 5.17


@pytest.mark.parametrize("roles", [None, {"user": "<|user|>", "assistant": "<|assistant|>"}])
def test_without_such_roles_nothing_is_set(roles):
    section, tokenizer = extended(roles) if roles else (None, make_tokenizer())
    model = make_model(vocab_size=384)
    before = special_ids(model)
    align_configuration(model, tokenizer, section)
    assert special_ids(model) == before


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 5}])
def test_what_is_set_is_saved(save, tmp_path, generation, capsys):
    section, tokenizer = extended()
    model = load(save(make_model("llama", 384), None, generation))
    align_configuration(model, tokenizer, section)
    check_alignment(model, tokenizer, block_size=8)
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert special_ids(loaded) == special_ids(model)
    check_alignment(loaded, AutoTokenizer.from_pretrained(tmp_path / "out"), block_size=8)
    assert capsys.readouterr().out == ""
    shutil.rmtree(tmp_path / "out")
