"""Liger Kernel's loss is taken where a head is one matrix and it is faster and right; elsewhere the kit's own is."""

import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional as F

from kit.model import liger_loss
from kit.model.chunked_loss import compute_whole_logits, give_losses
from kit.model.new_rows import train_new_rows
from tests.model.test_chunked_loss import VOCAB, assert_same, batch, build, chunked, stock


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for Liger Kernel that computes on CPUs; returns what it was called with."""
    calls = []

    def fused(hidden, weight, target, bias=None, label_smoothing=0.0, reduction="mean", softcap=None):
        calls.append(hidden.shape)
        logits = F.linear(hidden, weight, bias)
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing) * fused.factor

    fused.factor = 1.0
    functional = ModuleType("functional")
    functional.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(liger_loss, "find_spec", lambda name: name)
    monkeypatch.setattr(liger_loss, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    return fused, calls


def clock(monkeypatch, of_own, of_liger):
    """Let the clock say that the kit's own loss, measured first, takes `of_own` seconds, and Liger's `of_liger`."""
    steps = [each for seconds in (of_own, of_liger) for each in (0.0, seconds) * (liger_loss._REPEATS + 1)]
    ticks = iter(steps)
    now = [0.0]

    def perf_counter():
        now[0] += next(ticks)
        return now[0]

    monkeypatch.setattr(liger_loss, "time", ModuleType("time"))
    monkeypatch.setattr(liger_loss.time, "perf_counter", perf_counter, raising=False)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi", "gemma2"])
def test_the_faster_one_is_taken_and_told(architecture, liger, monkeypatch, capsys):
    calls = liger[1]
    for of_liger, name in ((1.0, "Liger Kernel"), (3.0, "the kit")):
        model = build(architecture)
        give_losses(model)
        clock(monkeypatch, 2.0, of_liger)
        calls.clear()
        assert_same(chunked(model, *batch(), 0.1), stock(model, *batch(), 0.1))
        assert f"loss: {name}'s ({of_liger * 1e3:.1f} ms against 2000.0 ms" in capsys.readouterr().out
        measured = liger_loss._REPEATS + 1
        assert len(calls) == measured + (name == "Liger Kernel")
        chunked(model, *batch())
        assert len(calls) == measured + 2 * (name == "Liger Kernel")
        assert "loss:" not in capsys.readouterr().out


def test_a_wrong_one_is_not_taken_however_fast(liger, monkeypatch, capsys):
    model = build("llama")
    give_losses(model)
    liger[0].factor = 2.0
    clock(monkeypatch, 2.0, 1.0)
    assert_same(chunked(model, *batch()), stock(model, *batch()))
    assert "but it gives" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["adapter", "new rows", "scaled", "several layers", "evaluation"])
def test_a_head_that_is_more_than_a_matrix_is_the_kits(kind, liger):
    model = build({"scaled": "granite", "several layers": "bert"}.get(kind, "llama"))
    give_losses(model)
    if kind == "adapter":
        model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.to(torch.float64)
    if kind == "new rows":
        train_new_rows(model, range(VOCAB - 3, VOCAB))
        model.train()
    with torch.set_grad_enabled(kind != "evaluation"):
        model(input_ids=batch()[0], shift_labels=batch()[1], use_cache=False)
    assert not liger[1]


def test_without_the_package_it_is_the_kits(liger, monkeypatch):
    model = build("llama")
    give_losses(model)
    monkeypatch.setattr(liger_loss, "find_spec", lambda name: None)
    chunked(model, *batch())
    assert not liger[1]


def test_on_another_device_it_is_the_kits(liger, monkeypatch):
    model = build("llama")
    give_losses(model)
    monkeypatch.setattr(liger_loss, "_DEVICE", "cuda")
    chunked(model, *batch())
    assert not liger[1]


def test_with_whole_logits_or_float16_it_is_the_kits(liger):
    model = build("llama").float()
    give_losses(model)
    with torch.autocast("cpu", torch.float16):
        chunked(model, *batch())
    compute_whole_logits(model)
    chunked(model, *batch())
    assert not liger[1]


@pytest.mark.gpu
def test_on_a_gpu_both_are_equal_but_for_rounding():
    pytest.importorskip("liger_kernel")
    model = build("llama").float().cuda()
    give_losses(model)
    input_ids, labels = (tensor.cuda() for tensor in batch())
    hidden = model.model(input_ids=input_ids).last_hidden_state.flatten(0, 1)
    ligers = liger_loss.liger_loss(model, labels.flatten(), 0.0)(hidden)
    logits = model.lm_head(hidden)
    torch.testing.assert_close(ligers, F.cross_entropy(logits, labels.flatten(), reduction="sum"), rtol=1e-4, atol=0)
