"""What the recipe names trains, and nothing else; what cannot be is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from kit.errors import UserError
from kit.model.freezing import apply_freezing, check_freezing, count_parameters, transformer_blocks
from kit.recipe.freezing import FreezingSection
from tests.material import make_model
from tests.model.models import MODELS

NEW = range(310, 317)


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def section(**trainable):
    return FreezingSection(trainable=trainable)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def block_names(model, last):
    blocks = list(transformer_blocks(model))[-last:]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def embedding_names(model):
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def test_without_a_section_all_trains():
    model = make_model()
    apply_freezing(model, None, [])
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert count_parameters(model) == (model.num_parameters(), model.num_parameters())


def test_new_tokens(build):
    model = build()
    total = model.num_parameters()
    apply_freezing(model, section(new_tokens=True), NEW)
    assert {name.rpartition(".")[2] for name in trained(model)} <= {"new_rows", "new_bias"}
    bias = model.get_output_embeddings().bias is not None
    assert count_parameters(model) == (total, len(NEW) * (32 * (1 if tied(model) else 2) + bias))


@pytest.mark.parametrize("last", [1, 2])
def test_last_blocks(build, last):
    model = build()
    names = block_names(model, last)
    apply_freezing(model, section(last_blocks=last), [])
    assert trained(model) == names
    assert any(".1." in name for name in names)
    assert any(".0." in name for name in names) == (last == 2)


def test_embeddings(build):
    """One matrix, where input and output are tied."""
    model = build()
    names = embedding_names(model)
    apply_freezing(model, section(embeddings=True), [])
    assert trained(model) == names
    assert len(names) == (1 if tied(model) else 2) + (model.get_output_embeddings().bias is not None)


def test_parts_together(build):
    model = build()
    expected = block_names(model, 1)
    apply_freezing(model, section(new_tokens=True, last_blocks=1), NEW)
    found = trained(model)
    assert expected < found
    assert {name.rpartition(".")[2] for name in found - expected} <= {"new_rows", "new_bias"}
    model = build()
    expected = block_names(model, 1) | embedding_names(model)
    apply_freezing(model, section(embeddings=True, last_blocks=1), NEW)
    assert trained(model) == expected


def test_what_was_frozen_before_does_not_stay_so():
    model = make_model()
    model.requires_grad_(False)
    apply_freezing(model, section(last_blocks=2), [])
    assert trained(model) == block_names(model, 2)


# ---- refused


def test_no_new_tokens():
    model = make_model()
    with pytest.raises(UserError, match=r"new_tokens: all tokens .* already.*embeddings: true"):
        apply_freezing(model, section(new_tokens=True), [])
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_more_blocks_than_there_are():
    with pytest.raises(UserError, match=r"last_blocks: found 3; expected at most 2"):
        apply_freezing(make_model(), section(last_blocks=3), [])


def test_blocks_that_are_not_to_be_told():
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UserError, match=r"T5ForConditionalGeneration .* found encoder.block, decoder.block"):
        transformer_blocks(model)
    model = make_model()
    model.transformer.h = nn.Sequential(*model.transformer.h)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel .* one of 2 modules, found none"):
        transformer_blocks(model)


def test_lists_inside_of_blocks_are_no_blocks():
    model = make_model("llama")
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert transformer_blocks(model) is model.model.layers


def test_nothing_trains():
    model = make_model()
    model.transformer.h = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(UserError, match="nothing would train"):
        apply_freezing(model, section(last_blocks=1), [])


def test_sharding(monkeypatch):
    plain = SimpleNamespace(fsdp=[], deepspeed=None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    check_freezing(None, plain)
    check_freezing(section(new_tokens=True), plain)
    sharded = SimpleNamespace(fsdp=["full_shard"], deepspeed=None)
    check_freezing(section(embeddings=True, last_blocks=1), sharded)
    with pytest.raises(UserError, match=r"new_tokens: .* FSDP .*embeddings: true"):
        check_freezing(section(new_tokens=True), sharded)
    with pytest.raises(UserError, match="DeepSpeed"):
        check_freezing(section(new_tokens=True), SimpleNamespace(fsdp=[], deepspeed="zero3.json"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        check_freezing(section(new_tokens=True), plain)


def test_blocks_alone_train_beside_frozen_embeddings(build):
    model = build()
    apply_freezing(model, section(last_blocks=1), [])
    ids = torch.arange(300, 312)[None]
    model(input_ids=ids).logits.square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
