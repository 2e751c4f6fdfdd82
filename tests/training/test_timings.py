"""The table of `kit check --probe` tells what a run takes, from times that are measured without touching the model."""

import copy

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from kit.model.chunked_loss import count_logits_at_once, give_losses
from kit.tasks import causal_lm
from kit.training import timings
from tests.material import make_model

VOCABULARY = 320


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.fixture
def choices(args, monkeypatch):
    """A function that returns the model, as it was before and is after its choices were measured, and these."""
    # One product of a tiny matrix is enough here.
    monkeypatch.setattr(timings, "_SIZES", (8,))

    def measure(model=None, steps=10, compiles=False, **changes):
        model = model or make_model()
        give_losses(model)
        before = copy.deepcopy(model.state_dict())
        vars(args).update(changes)
        ids = torch.zeros((2, 16), dtype=torch.long)
        batch = {"input_ids": ids, "shift_labels": ids}
        rows = timings.measure_choices(model, args, causal_lm, batch, "fp32 (recipe)", steps, compiles)
        return model, before, {row.what: row for row in rows}

    return measure


def test_model_gradients_mode_and_random_state_stay(choices):
    model = make_model(resid_pdrop=0.5)
    model.eval()
    torch.manual_seed(3)
    expected = torch.random.get_rng_state()
    model, before, _ = choices(model)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_precision_of_products_stays_what_it_was(choices):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        choices()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_choices_are_those_of_the_run(choices):
    _, _, rows = choices()
    assert rows["precision"].taken == "fp32 (recipe)"
    assert [line.split(":")[0] for line in rows["precision"].measured.split("\n")] == ["fp32", "bf16"]
    assert rows["optimizer"].taken == "adamw_torch_fused"
    lines = rows["optimizer"].measured.split("\n")
    assert [line.split(":")[0] for line in lines] == ["adamw_torch_fused", "adamw_torch"]
    assert all(" s for a step over " in line for line in lines)
    assert rows["attention"].taken == "sdpa"
    assert (rows["torch_compile"].taken, "`--compile`" in rows["torch_compile"].measured) == ("off", True)


def test_fused_and_plain_adamw_are_what_is_measured(choices, monkeypatch):
    made = []
    adamw = torch.optim.AdamW.__init__

    def spy(self, *args, **kwargs):
        made.append(kwargs.get("fused", False))
        adamw(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", spy)
    choices()
    assert made == [True, False]


def test_only_what_trains_and_no_more_than_the_bound_is_cloned(choices, monkeypatch):
    model = make_model()
    for parameter in model.transformer.wte.parameters():
        parameter.requires_grad_(False)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"over {trains:,} values" in choices(model)[2]["optimizer"].measured
    monkeypatch.setattr(timings, "_MOST_VALUES", 1000)
    assert "over 1,000 values" in choices(make_model())[2]["optimizer"].measured


def test_an_optimizer_that_cannot_be_tried_alone_is_named(choices):
    _, _, rows = choices(optim=OptimizerNames.LOMO)
    assert "lomo: not measured" in rows["optimizer"].measured


def test_loss_in_chunks_is_compared_with_whole_logits_and_stays_in_chunks(choices, monkeypatch):
    monkeypatch.setattr("kit.model.chunked_loss._CHUNK_BYTES", 4 * VOCABULARY * 5)
    model, _, rows = choices()
    assert rows["loss"].taken == "logits of 5 positions at a time"
    assert "all 32 at once: " in rows["loss"].measured
    assert count_logits_at_once(model, 32) == 5 * VOCABULARY


def test_whole_logits_without_room_are_not_tried(choices, monkeypatch):
    monkeypatch.setattr("kit.model.chunked_loss._CHUNK_BYTES", 4 * VOCABULARY * 5)
    monkeypatch.setattr(timings, "_free_memory", lambda device: 1000)
    assert "not measured" in choices()[2]["loss"].measured


def test_what_cannot_be_compiled_is_told(choices):
    row = choices(compiles=True, torch_compile_backend="no_such_backend")[2]["torch_compile"]
    assert row.measured.startswith("cannot compile here (")


def test_compiled_model_is_measured(choices):
    """The backend `eager` traces the model and needs no C++ compiler."""
    row = choices(compiles=True, torch_compile_backend="eager")[2]["torch_compile"]
    assert "compiled: " in row.measured
    assert "pay" in row.measured


@pytest.mark.parametrize(
    ("cost", "gain", "words"),
    [
        (10.0, 0.5, "pays from step 20 of 100"),
        (10.0, 0.3, "pays from step 34 of 100"),
        (10.0, 0.05, "does not pay in 100 steps, but from step 200 on"),
        (10.0, 0.0, "does not pay, it is no faster"),
        (10.0, -1.0, "does not pay, it is no faster"),
    ],
)
def test_when_compiling_pays(cost, gain, words):
    assert timings.when_it_pays(cost, gain, 100) == words
