"""The kernel of packed rows: chosen by what is at hand, tried out, and told where documents begin.

No GPU is needed: a stand-in for flash-attention's kernel attends document by document, by the borders that it is given.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kit.errors import UserError
from kit.model import attention
from kit.model.attention import (
    Circumstances,
    document_borders,
    loaded_kernel,
    packed_kernel,
    rank_kernels,
    settle_attention,
    use_kernel,
    why_not,
)
from kit.model.chunked_loss import give_losses
from tests.material import ARCHITECTURES, make_model

GPU = Circumstances("GPT2LMHeadModel")
VOCAB = 320
# The last piece of the first row, padding included, goes on where the second row begins.
POSITIONS = torch.tensor([[*range(5), *range(7)], [0, *range(8), *range(3)]])
ARGS = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash-attention's varlen kernel does, with SDPA over each document; (rows, heads, positions, channels)."""
    assert attention_mask is None
    rows, heads, positions, channels = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    flat = [x.transpose(0, 1).reshape(heads, rows * positions, channels) for x in (query, key, value)]
    borders = kwargs["cu_seq_lens_q"].tolist()
    assert borders == kwargs["cu_seq_lens_k"].tolist()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(b - a for a, b in pairwise(borders))
    parts = [
        scaled_dot_product_attention(*(x[:, a:b] for x in flat), is_causal=True, scale=scaling)
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=1).reshape(heads, rows, positions, channels).permute(1, 2, 0, 3), None


def leaking_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What transformers does with flash-attention and packed batches of several rows, unless it is told the borders."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


@pytest.fixture
def kernel(monkeypatch):
    """A function that puts a stand-in in the place of flash-attention, on this CPU."""

    def put(function):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", function)
        given = replace(GPU, installed=frozenset({"flash_attention_2"}))
        monkeypatch.setattr(attention, "circumstances", lambda model, args: given)

    return put


def batch():
    ids = torch.randint(VOCAB, POSITIONS.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False}


# ---- The choice ----


def test_on_cpus_nothing_is_chosen_and_nothing_is_said(capsys):
    model = make_model("gpt2", VOCAB)
    settle_attention(model, None, ARGS, VOCAB)
    assert capsys.readouterr().out == ""
    assert packed_kernel(model) == "sdpa"
    assert rank_kernels(None, replace(GPU, device="mps")) == ([], {})


def test_on_gpus_flash_attention_comes_before_flex_attention():
    kernels = ["flash_attention_3", "flash_attention_2", "flex_attention"]
    assert rank_kernels(None, GPU) == (kernels, {})
    only_flex = replace(GPU, installed=frozenset({"flex_attention"}))
    usable, refused = rank_kernels(None, only_flex)
    assert usable == ["flex_attention"]
    assert refused == dict.fromkeys(kernels[:2], "is not installed")


def test_sdpa_and_eager_stay_where_the_recipe_names_them():
    assert rank_kernels("sdpa", GPU) == rank_kernels("eager", GPU) == ([], {})


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        ("flash_attention_2", {"device": "cpu"}, "needs a CUDA device, and this is `cpu`"),
        ("flash_attention_2", {"installed": frozenset()}, "is not installed"),
        ("flash_attention_2", {"half": False}, "bf16 or fp16 alone, and this run trains in fp32"),
        ("flex_attention", {"supported": frozenset()}, "transformers has it not for GPT2LMHeadModel"),
        ("flex_attention", {"dropout": 0.1}, "has no attention dropout, and this model has 0.1"),
        ("flash_attention_3", {"dropout": 0.1}, "has no attention dropout"),
        ("flex_attention", {"head_size": 8}, "needs heads of at least 16 channels, and these have 8"),
    ],
)
def test_a_kernel_that_cannot_be_used_is_passed_over_or_refused_by_its_reason(kernel, change, reason):
    given = replace(GPU, **change)
    assert why_not(kernel, GPU) is None
    assert reason in why_not(kernel, given)
    assert kernel not in rank_kernels(None, given)[0]
    with pytest.raises(UserError, match=rf"model\.attn_implementation: {kernel} .*; leave the key out"):
        rank_kernels(kernel, given)
    assert why_not("flash_attention_2", replace(GPU, dropout=0.1)) is None
    assert why_not("flex_attention", replace(GPU, half=False)) is None


def test_circumstances_are_the_models_own():
    model = make_model("gpt2", VOCAB)
    model.config.attn_pdrop = 0.2
    found = attention.circumstances(model, ARGS)
    assert (found.architecture, found.device, found.half, found.dropout) == ("GPT2LMHeadModel", "cpu", False, 0.2)
    assert found.head_size == model.config.n_embd // model.config.n_head
    assert "flash_attention_2" in found.supported
    assert "flex_attention" in attention.circumstances(make_model("llama", VOCAB), ARGS).supported
    assert attention.circumstances(model.bfloat16(), ARGS).half


# ---- Borders ----


def test_borders_are_told_row_after_row():
    found = document_borders(POSITIONS)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 5, 12, 13, 21, 24]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_with_borders_gives_the_logits_and_gradients_of_the_mask(architecture, training, kernel):
    kernel(varlen_attention)
    model = make_model(architecture, VOCAB).double().train(training)
    results = []
    for name in ("sdpa", "flash_attention_2"):
        use_kernel(model, name)
        logits = model(**batch()).logits
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
        assert model.config._attn_implementation == name
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_in_chunks_and_activation_checkpointing_go_through_it_too(architecture, kernel):
    kernel(varlen_attention)
    model = make_model(architecture, VOCAB).double().train()
    give_losses(model)
    labels = torch.randint(VOCAB, POSITIONS.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for name, checkpointing in (("sdpa", False), ("flash_attention_2", False), ("flash_attention_2", True)):
        use_kernel(model, name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch(), shift_labels=labels).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for found in gradients[1:]:
        for ours, theirs in zip(found, gradients[0], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-9, rtol=1e-7)


def test_what_is_not_packed_goes_through_the_kernel_that_the_model_was_loaded_with(kernel):
    def refuse(*args, **kwargs):
        raise AssertionError("not packed")

    kernel(refuse)
    model = make_model("llama", VOCAB).eval()
    ids = batch()["input_ids"]
    expected = model(input_ids=ids, use_cache=False).logits
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    use_kernel(model, "flash_attention_2")
    assert (packed_kernel(model), loaded_kernel(model)) == ("flash_attention_2", "sdpa")
    with pytest.raises(AssertionError, match="not packed"):
        model(**batch())
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), generated)
    assert model.config._attn_implementation == "sdpa"


# ---- The trial ----


def test_a_kernel_that_isolates_is_put_in_place_and_told(kernel, capsys):
    kernel(varlen_attention)
    model = make_model("llama", VOCAB)
    settle_attention(model, None, ARGS, VOCAB)
    assert packed_kernel(model) == "flash_attention_2"
    told = capsys.readouterr().out
    assert told == "attention: flash_attention_2 for packed rows, without a mask; sdpa for all else\n"


def borders_of_the_first_row(*args, **kwargs):
    borders = torch.tensor([0, 8, 16, 24, 32])
    wrong = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 8, "max_length_k": 8}
    return varlen_attention(*args, **{**kwargs, **wrong})


def wrong_scale(*args, scaling=None, **kwargs):
    return varlen_attention(*args, scaling=8.0, **kwargs)


def failing(*args, **kwargs):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (leaking_attention, "lets packed documents see each other"),
        (borders_of_the_first_row, "lets packed documents see each other"),
        (wrong_scale, "gives other logits here than sdpa"),
        (failing, "fails here: RuntimeError: no kernel image is available"),
    ],
)
def test_a_kernel_that_leaks_fails_or_computes_otherwise_is_passed_over_or_refused(kernel, capsys, function, reason):
    kernel(function)
    model = make_model("llama", VOCAB)
    with torch.no_grad():  # so that attention matters
        for parameter in model.parameters():
            parameter.mul_(4)
    expected = model.eval()(**batch()).logits
    settle_attention(model, None, ARGS, VOCAB)
    printed = capsys.readouterr().out
    assert printed.startswith("attention: sdpa, with a mask where a row holds several pieces: ")
    assert reason in printed
    assert packed_kernel(model) == model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch()).logits, expected)
    with pytest.raises(UserError, match=rf"model\.attn_implementation: flash_attention_2 .*{reason}.*the key out"):
        settle_attention(model, "flash_attention_2", ARGS, VOCAB)


def test_a_model_that_is_not_on_a_device_is_not_tried(kernel, capsys):
    kernel(failing)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False)
    model = make_model("llama", VOCAB)
    settle_attention(model, None, on_gpu, VOCAB)
    assert "flash_attention_2 cannot be tried out" in capsys.readouterr().out
    assert packed_kernel(model) == "sdpa"
    settle_attention(model, "flash_attention_2", on_gpu, VOCAB)
    assert "untried" in capsys.readouterr().out
    assert packed_kernel(model) == "flash_attention_2"


# ---- Batches without a border ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_one_piece_and_padding_need_no_mask(architecture, monkeypatch):
    """The CPU's fast path; transformers sees it from the positions, which padding has to go on with."""
    from transformers import masking_utils

    model = make_model(architecture, VOCAB).eval()
    ids = batch()["input_ids"]
    plain = model(input_ids=ids, use_cache=False).logits
    masks = []
    original = masking_utils.sdpa_mask
    seen = lambda *args, **kwargs: masks.append(original(*args, **kwargs)) or masks[-1]  # noqa: E731
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", seen)
    whole = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(model(input_ids=ids, position_ids=whole, use_cache=False).logits, plain)
    assert masks == [None]
    model(**batch())
    assert masks[1].shape[-2:] == (ids.shape[1], ids.shape[1])


# ---- Real kernels ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel_name", ["flash_attention_3", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_kernels_isolate_and_agree_with_the_mask(architecture, kernel_name):
    args = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False)
    model = make_model(architecture, VOCAB).cuda()
    if reason := why_not(kernel_name, attention.circumstances(model, args)):
        pytest.skip(f"{kernel_name} {reason}")
    settle_attention(model, kernel_name, args, VOCAB)
    assert packed_kernel(model) == kernel_name
    inputs = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch().items()}
    gradients = []
    for name in (kernel_name, "sdpa"):
        use_kernel(model, name)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.train()(**inputs).logits.float().square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.05
