"""What a log entry says beside the loss: rates by name, tokens, phase, speed, share of peak."""

import json

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from kit.run import train
from kit.training.freezing import FreezingPlan
from kit.training.parameter_groups import Phase
from kit.training.throughput import MEASURED, Throughput, flops_per_token, peak_flops
from tests.material import make_model

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1, "learning_rate": 1e-3}


def history(write_recipe, tmp_path, **sections):
    train(str(write_recipe(**{"training": TRAINING, **sections})), [])
    return [e for e in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in e]


def test_rates_by_what_trains_phases_and_speed(write_recipe, tmp_path):
    schedule = [
        {"trainable": {"head": True}},
        {"step": 2, "trainable": {"last_blocks": 1}, "warmup_steps": 2},
    ]
    entries = history(
        write_recipe, tmp_path,
        model={"name_or_path": None, "from_config": {
            "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64,
            "tie_word_embeddings": False,
        }, "tokenizer": {"vocab_size": 300}},
        freezing={"schedule": schedule, "groups": [{"parts": {"head": True}, "learning_rate": 5e-4}]},
        training={**TRAINING, "lr_scheduler_type": "constant"},
        tracking={"peak_tflops": 1},
    )  # fmt: skip
    assert [entry["phase"] for entry in entries] == [1, 1, 2, 2]
    assert [entry["learning_rate/head"] for entry in entries] == [5e-4] * 4
    assert [entry["learning_rate/blocks_1"] for entry in entries][2:] == [5e-4, 1e-3]
    assert all(entry.keys() >= MEASURED and entry["tokens_per_second"] > 0 < entry["mfu"] for entry in entries)
    assert entries[-1]["seconds_left"] == 0


def test_one_rate_is_named_once_and_tokens_are_counted(write_recipe, tmp_path):
    entries = history(write_recipe, tmp_path)
    assert not [name for entry in entries for name in entry if name.startswith("learning_rate/")]
    assert not [entry for entry in entries if "mfu" in entry or "phase" in entry]  # a CPU's peak is not known
    assert [entry["tokens_seen"] for entry in entries] == [4 * 32 * step for step in (1, 2, 3, 4)]


def test_operations_of_a_token():
    model = make_model("gpt2")
    vocabulary, width, layers, length = 320, 32, 2, 16
    weights = layers * 12 * width**2 + vocabulary * width  # blocks and head; an embedding is looked up
    attention = 4 * layers * length * width
    assert flops_per_token(model, length) == 6 * weights + 3 * attention
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model, length) == 2 * weights + attention
    last = model.transformer.h[-1]
    for parameter in last.parameters():
        parameter.requires_grad_(True)
    # Nothing trains below the last block: its first norm is the first that does; the head passes a gradient on.
    gradients = 12 * width**2 + vocabulary * width
    trains = 2 * weights + 2 * gradients + 2 * 12 * width**2 + attention * (1 + 2 * gradients / weights)
    assert flops_per_token(model, length) == pytest.approx(trains)


def test_experts_are_left_out():
    model = make_model("gpt2")
    model.transformer.experts = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2, 4, 4))])
    assert flops_per_token(model, 16) is None


def test_peaks_by_the_name_of_the_device():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None
    for other in ("NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "Some Other Device"):
        assert peak_flops(other) is None


def test_the_count_goes_on_after_a_resume_and_its_speed_begins_anew(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    throughput = Throughput(FreezingPlan((Phase(0, frozenset({"x"})),)))
    throughput.go_on_from(torch.tensor(10**9))
    figures = throughput.figures(args, TrainerState(global_step=5, max_steps=10))
    assert figures["tokens_seen"] == 10**9
    assert "tokens_per_second" not in figures
    assert "phase" not in figures
