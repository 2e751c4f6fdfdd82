"""The loss in chunks is that of whole logits, and so is its gradient, whatever the head; whole logits never exist."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kit.model import chunked_loss
from kit.model.chunked_loss import compute_whole_logits, count_logits_at_once, give_losses
from kit.model.new_rows import train_new_rows
from tests.material import make_model

VOCAB, POSITIONS = 97, 5
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
OF_GPT2 = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 64,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
HEADS = {
    "gpt2": OF_GPT2,  # tied
    "llama": SIZES,  # a head of its own
    "gpt_neox": SIZES,
    "qwen3": SIZES,
    "phi": SIZES,  # a bias
    "gemma2": {**SIZES, "final_logit_softcapping": 2.0},
    "cohere": {**SIZES, "logit_scale": 0.3},
    "granite": {**SIZES, "logits_scaling": 3.0},
    "opt": {
        **SIZES,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },  # the head takes what its decoder returns
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bert": {**SIZES, "is_decoder": True},  # a head of several layers
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 4 * VOCAB * POSITIONS)


def build(architecture, **changes):
    torch.manual_seed(0)
    ids = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB, **{**HEADS[architecture], **ids, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():  # biases begin as zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids, labels = torch.randint(VOCAB, (2, rows, length), generator=generator)
    labels[0, :4] = -100
    return input_ids, labels


def stock(model, input_ids, labels, smoothing=0.0):
    """Return loss and gradients of whole logits, computed by torch's own cross-entropy."""
    logits = type(model).forward(model, input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing)
    return loss.detach(), gradients(model, loss)


def chunked(model, input_ids, labels, smoothing=0.0):
    loss = model(input_ids=input_ids, shift_labels=labels, label_smoothing=smoothing, use_cache=False).loss
    return loss.detach(), gradients(model, loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("architecture", HEADS)
def test_loss_and_gradient_are_those_of_whole_logits(architecture, smoothing, capsys):
    model = build(architecture)
    give_losses(model)
    expected = stock(model, *batch(), smoothing)
    assert expected[1]
    assert_same(chunked(model, *batch(), smoothing), expected)
    assert "whole logits" not in capsys.readouterr().out


@pytest.mark.parametrize("architecture", HEADS)
def test_no_call_of_the_head_makes_more_logits_than_a_chunk_has(architecture):
    model = build(architecture)
    give_losses(model)
    made = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, out: made.append(out.numel() // VOCAB))
    loss = model(input_ids=batch()[0], shift_labels=batch()[1], use_cache=False).loss
    with torch.no_grad():
        model(input_ids=batch()[0], shift_labels=batch()[1], use_cache=False)
    hook.remove()
    assert loss.requires_grad
    assert max(made) == POSITIONS
    assert sum(made) >= 2 * 21
    assert count_logits_at_once(model, 21) == POSITIONS * VOCAB


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_without_gradient_every_position_is_told_apart(architecture):
    model = build(architecture)
    give_losses(model)
    input_ids, labels = batch()
    with torch.no_grad():
        found = model(input_ids=input_ids, shift_labels=labels, use_cache=False)
        logits = type(model).forward(model, input_ids=input_ids, use_cache=False).logits
    nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(found.nats, nats, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss, nats.sum(), rtol=1e-12, atol=0)
    assert torch.equal(found.correct, logits.argmax(-1) == labels)
    assert (found.nats[0, :4] == 0).all()
    assert not found.correct[0, :4].any()


def test_without_labels_the_model_does_what_it_did():
    model = build("gpt2")
    expected = model(input_ids=batch()[0], labels=batch()[0], use_cache=False)
    give_losses(model)
    found = model(input_ids=batch()[0], labels=batch()[0], use_cache=False)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_a_batch_without_any_label_gives_zeros_to_every_parameter():
    model = build("llama")
    give_losses(model)
    loss, found = chunked(model, batch()[0], torch.full_like(batch()[1], -100))
    assert loss == 0
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("frozen", ["head", "all but head", "first block"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi"])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(architecture, frozen):
    model = build(architecture)
    give_losses(model)
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    first = {id(p) for p in blocks[0].parameters()}
    for parameter in model.parameters():
        is_frozen = {"head": head, "first block": first}.get(frozen, {id(parameter)} - head)
        parameter.requires_grad_(id(parameter) not in is_frozen)
    assert_same(chunked(model, *batch()), stock(model, *batch()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi"])
def test_rows_of_new_tokens_train_alone(architecture):
    model = build(architecture)
    model.resize_token_embeddings(VOCAB + 3)
    give_losses(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    train_new_rows(model, range(VOCAB, VOCAB + 3))
    model.train()
    input_ids, labels = batch()
    input_ids[1, 2], labels[1, 1] = VOCAB + 1, VOCAB + 1
    expected = stock(model, input_ids, labels)
    assert any("new_rows" in name for name in expected[1])
    assert_same(chunked(model, input_ids, labels), expected)


def test_an_adapter_in_the_head_counts():
    model = build("llama")
    give_losses(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    model.to(torch.float64)
    expected = stock(model, *batch())
    assert any("lm_head.lora_A" in name for name in expected[1])
    assert_same(chunked(model, *batch()), expected)


def test_with_float16_the_gradient_is_scaled_before_it_is_rounded():
    model = make_model("gpt2", VOCAB)
    give_losses(model)
    scale, input_ids, labels = 2.0**12, *batch()
    labels[labels >= 0] = 3

    def scaled(compute):
        with torch.autocast("cpu", torch.float16):
            loss = compute(model(**given, use_cache=False))
        return gradients(model, loss * scale)

    given = {"input_ids": input_ids}
    expected = scaled(lambda out: F.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten(), reduction="sum"))
    given = {"input_ids": input_ids, "shift_labels": labels}
    found = scaled(lambda out: out.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.02, atol=0.01 * gradient.abs().max().item(), msg=name)


def test_in_bfloat16_it_is_as_near_as_rounding_allows():
    model = make_model("llama", VOCAB)
    give_losses(model)
    input_ids, labels = batch()
    _, exact = chunked(copy.deepcopy(model).double(), input_ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(input_ids=input_ids, shift_labels=labels, use_cache=False).loss
        logits = model(input_ids=input_ids, use_cache=False).logits
    theirs = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)

    def error(found):
        return max((found[name] - exact[name]).norm() / exact[name].norm() for name in exact)

    assert error(gradients(model, ours)) < 1.2 * error(gradients(model, theirs))


def test_a_copy_computes_with_its_own_weights():
    model = build("gpt2")
    give_losses(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert chunked(model, *batch())[0] != chunked(twin, *batch())[0]
    assert_same(chunked(twin, *batch()), stock(twin, *batch()))


def test_a_model_whose_logits_need_more_than_hidden_states_goes_on_with_whole_ones(monkeypatch, capsys):
    model = build("gpt2")
    kind, plain = type(model), type(model).forward

    def forward(self, input_ids=None, **kwargs):
        outputs = plain(self, input_ids=input_ids, **kwargs)
        bonus = 1.0 if input_ids is None else F.one_hot(input_ids, VOCAB)  # a copy mechanism
        return outputs.__class__(logits=outputs.logits + bonus)

    monkeypatch.setattr(kind, "forward", forward)
    give_losses(model)
    assert "loss: whole logits, as GPT2LMHeadModel has no head to be called in chunks" in capsys.readouterr().out
    assert_same(chunked(model, *batch()), stock(model, *batch()))
    assert count_logits_at_once(model, 21) == 21 * VOCAB


def test_whole_logits_on_demand_are_equal():
    model = build("gemma2")
    give_losses(model)
    expected = chunked(model, *batch())
    compute_whole_logits(model)
    assert_same(chunked(model, *batch()), expected)


def test_gradients_of_bfloat16_weights_are_rounded_once(monkeypatch):
    """As of whole logits: terms that are small beside the sum so far are not lost."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 4 * VOCAB)
    model = make_model("llama", VOCAB, tie_word_embeddings=False)
    input_ids, labels = batch(rows=40, length=50)
    give_losses(model.to(torch.bfloat16))
    assert vars(model)["_losses_from"] == "model"
    _, exact = chunked(copy.deepcopy(model).double(), input_ids, labels)
    _, found = chunked(model, input_ids, labels)
    wanted = exact["lm_head.weight"]
    assert (found["lm_head.weight"].double() - wanted).norm() < 0.01 * wanted.norm()
