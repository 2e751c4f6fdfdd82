"""The frozen bottom of a model: how far it reaches, passed over without a trace, refused where it cannot be."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kit.model.new_rows import train_new_rows
from kit.model.parts import block_parameters, find_parts
from kit.model.prefix import Prefix, prefix_depth
from tests.model.models import MODELS

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
LMS = {
    **{name: {**SIZES, "num_key_value_heads": 1} for name in ("llama", "qwen3", "gemma3_text", "gemma2", "phi")},
    "gpt2": {"n_layer": 3, "n_head": 2, "n_embd": 32},
    "gpt_neox": SIZES,
    "opt": {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "ffn_dim": 64,
            "word_embed_proj_dim": 32},
}  # fmt: skip
ENCODERS = {
    "bert": SIZES,
    "distilbert": {"n_layers": 3, "n_heads": 2, "dim": 32, "hidden_dim": 64},
    "modernbert": {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
}
ALL = [*LMS, *ENCODERS]


def make(kind, **config):
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind in LMS else AutoModelForSequenceClassification
    values = {**(LMS | ENCODERS)[kind], "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = auto.from_config(AutoConfig.for_model(kind, **values, max_position_embeddings=64, **config))
    return model.train()


def batch_of(kind):
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    if kind in LMS:  # two packed documents
        return {"input_ids": ids, "position_ids": torch.arange(12).remainder(7).expand(2, 12), "use_cache": False}
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids.where(mask.bool(), torch.zeros(())).long(), "attention_mask": mask}


def freeze_but_last_block(model):
    trainable = set(block_parameters(model)[-1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return trainable


def in_evaluation_mode(model):
    """As frozen modules are in training; the tail, in these, has no dropout to differ by."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def checked(model, batch, depth=2):
    prefix = Prefix(model, depth)
    return prefix, prefix.check(lambda given: model(**given).logits, batch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ALL)
def test_logits_and_gradients_are_the_same_bits_without_the_first_blocks(kind, checkpointing):
    model, batch = make(kind), batch_of(kind)
    in_evaluation_mode(model)
    trainable = freeze_but_last_block(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prefix, why = checked(model, batch)
    assert why is None
    assert prefix.width == 32

    def step():
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if n in trainable}

    with prefix.captured() as found:
        whole, gradients = step()
    calls = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in list(prefix.blocks[0].children())]
    with prefix.replaced(found[0]):
        short, of_short = step()
    for handle in handles:
        handle.remove()
    assert not calls
    assert torch.equal(whole, short)
    assert gradients.keys() == of_short.keys() == trainable
    assert all(torch.equal(gradients[name], of_short[name]) for name in trainable)
    assert torch.equal(step()[0], whole), "the blocks compute again"


@pytest.mark.parametrize("kind", ALL)
def test_the_depth_is_the_number_of_blocks_below_what_trains(kind):
    model = make(kind)
    blocks, parts = block_parameters(model), find_parts(model)
    assert prefix_depth(model, blocks[2]) == (2, "")
    assert prefix_depth(model, {*blocks[1], *parts["final_norm"]}) == (1, "")
    depth, why = prefix_depth(model, blocks[0])
    assert depth == 0
    assert "first block" in why
    depth, why = prefix_depth(model, {*parts["embeddings"], *blocks[2]})
    assert depth == 0
    assert "trains" in why


def test_a_head_of_its_own_leaves_all_blocks_and_a_tied_one_none():
    untied = MODELS["gpt2-untied"]()
    assert prefix_depth(untied, find_parts(untied)["head"]) == (2, "")
    tied = MODELS["gpt2"]()
    depth, why = prefix_depth(tied, find_parts(tied)["head"])
    assert depth == 0
    assert "one matrix" in why


def test_new_rows_train_in_the_embeddings():
    model = MODELS["gpt2"]()
    train_new_rows(model, [318, 319])
    trainable = {name for name, _ in model.named_parameters() if "new_" in name} | set(block_parameters(model)[1])
    depth, why = prefix_depth(model, trainable)
    assert depth == 0
    assert "rows of new tokens" in why


def test_an_adapter_counts_where_it_is():
    from peft import LoraConfig, inject_adapter_in_model

    for layers, depth in ((None, 0), ([1], 1)):
        model = MODELS["llama"]()
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], layers_to_transform=layers), model)
        found, why = prefix_depth(model, {name for name, _ in model.named_parameters() if "lora" in name})
        assert found == depth
        assert ("adapter" in why) == (depth == 0)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt"])
def test_dropout_that_stays_on_is_a_reason(kind):
    dropout = {"embd_pdrop": 0.3} if kind == "gpt2" else {}
    if kind == "bert":
        dropout = {"hidden_dropout_prob": 0.3}
    if kind == "opt":
        dropout = {"dropout": 0.3}
    model = make(kind, **dropout)
    _, why = checked(model, batch_of(kind))
    assert "dropout" in why
    assert model.training


class Carrying(nn.Module):
    """A block that leaves its output to the next one beside the way that everybody knows."""

    def __init__(self, block, note):  # noqa: D107
        super().__init__()
        self.block, self.note = block, note

    def forward(self, hidden_states, *args, **kwargs):
        before = self.note.get("left", 0)
        self.note["left"] = self.block(hidden_states, *args, **kwargs)
        return self.note["left"] + before


@pytest.mark.parametrize("resets", [True, False])
def test_blocks_that_pass_on_more_are_refused_with_the_name_of_the_architecture(resets):
    model, batch = make("gpt2"), batch_of("gpt2")
    in_evaluation_mode(model)
    note = {}
    for number, block in enumerate(model.transformer.h):
        model.transformer.h[number] = Carrying(block, note)
    # Reset at the beginning of each pass, or of the pass before, where only the first block writes.
    model.transformer.wte.register_forward_hook(lambda *_: note.update(left=0) if resets else None)
    if not resets:
        model.transformer.h[1] = model.transformer.h[1].block
        model.transformer.h[0].register_forward_pre_hook(lambda *_: note.clear())
    before = model(**batch).logits
    _, why = checked(model, batch)
    assert "GPT2LMHeadModel" in why
    assert torch.equal(model(**batch).logits, before)


def test_blocks_that_return_more_than_hidden_states_or_fail_are_refused():
    model, batch = make("gpt2"), batch_of("gpt2")
    in_evaluation_mode(model)
    own = model.transformer.h[1].forward

    def two_tensors(hidden, *args, **kwargs):
        out = own(hidden, *args, **kwargs)
        return out, out

    model.transformer.h[1].forward = two_tensors
    model.transformer.h[2].forward = lambda hidden, *args, **kwargs: hidden[0]
    assert "more than hidden states" in checked(model, batch)[1]
    model.transformer.h[1].forward = own

    def wants_second(hidden, *args, **kwargs):
        raise KeyError("cache of the first block")

    model.transformer.h[2].forward = wants_second
    assert "KeyError" in checked(model, batch)[1]


def test_blocks_that_return_tuples_do_so_when_they_are_passed_over():
    model, batch = make("gpt2"), batch_of("gpt2")
    in_evaluation_mode(model)
    for block in model.transformer.h[:2]:
        block.forward = lambda hidden, *a, _own=block.forward, **k: (_own(hidden, *a, **k), None)
    for block in model.transformer.h[1:]:
        block.forward = lambda hidden, *a, _own=block.forward, **k: _own(hidden[0], *a, **k)
    assert checked(model, batch)[1] is None


def test_an_exception_leaves_the_model_as_it_was():
    model, batch = make("llama"), batch_of("llama")
    before = model(**batch).logits
    prefix = Prefix(model, 2)
    with pytest.raises(RuntimeError, match=r"shape|size"), prefix.replaced(torch.zeros(1, 3, 7)):
        model(**batch)
    with pytest.raises(ZeroDivisionError), prefix.captured():
        raise ZeroDivisionError
    assert torch.equal(model(**batch).logits, before)
    assert not any("forward" in vars(block) for block in prefix.blocks)


def test_the_key_is_of_what_lies_below_alone():
    model = make("llama")
    prefix = Prefix(model, 2)
    key = prefix.key()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1)
        model.lm_head.weight.add_(1)
        model.model.norm.weight.add_(1)
    assert prefix.key() == key
    for tensor in (model.model.layers[1].mlp.up_proj.weight, model.model.embed_tokens.weight):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        assert prefix.key() != key
        key = prefix.key()
    assert Prefix(model, 1).key() != key
