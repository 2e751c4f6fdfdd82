"""Runs with a freezing plan, through the command: what trains in which phase, also resumed and in two processes."""

import itertools
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from kit.check import check
from kit.run import train
from tests.harness import Fault, run_kit

SCHEDULE = [
    {"trainable": {"final_norm": True}},
    {"step": 2, "trainable": {"last_blocks": 1}, "warmup_steps": 2},
    {"step": 4, "trainable": "all"},
]
TRAINING = {"max_steps": 6, "save_steps": 1, "weight_decay": 0.1, "learning_rate": 1e-2, "logging_steps": 1}


@pytest.fixture
def recipe(write_recipe, tiny_models, tmp_path):
    def write(name, architecture="gpt2", training=None, **freezing):
        return write_recipe(
            name,
            model={"name_or_path": str(tiny_models(architecture))},
            training=TRAINING | (training or {}),
            freezing=freezing,
            run={"output_dir": str(tmp_path / name)},
        )

    return write


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_each_phase_moves_what_it_names(recipe, tiny_models, tmp_path, architecture):
    train(str(recipe("run", architecture, schedule=SCHEDULE)), [])
    states = [weights(tiny_models(architecture))]
    states += [weights(tmp_path / f"run/checkpoints/checkpoint-{step}") for step in range(1, 7)]
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(states)]
    is_gpt2 = architecture == "gpt2"
    norm, block = ("transformer.ln_f.", "transformer.h.1.") if is_gpt2 else ("model.norm.", "model.layers.1.")
    for step, names in enumerate(moved):
        allowed = (norm,) if step < 2 else (norm, block) if step < 4 else ("",)
        assert {n for n in states[0] if n.startswith(allowed)} == names, step
    rows = json.loads((tmp_path / "run/freezing.json").read_text())
    assert {row["from_step"] for row in rows} == {0, 2, 4}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_in_a_phase_and_resumed(recipe, tmp_path, step):
    for name in ("straight", "killed"):
        path = recipe(name, schedule=SCHEDULE, layer_decay=0.5)
        if name == "killed":
            fault = Fault("kit.training.trainer:KitTrainer.training_step", call=step + 1, signal=signal.SIGKILL)
            assert run_kit(["train", path], fault=fault) == [-9]
        assert run_kit(["train", path]) == [0]
    a, b = (weights(tmp_path / name / "model") for name in ("straight", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_equal_one(recipe, tmp_path):
    one = recipe("one", schedule=SCHEDULE)
    two = recipe("two", schedule=SCHEDULE, training={"per_device_train_batch_size": 2})
    assert run_kit(["train", one, "model.dtype=float64"]) == [0]
    assert run_kit(["train", two, "model.dtype=float64"], processes=2) == [0, 0]
    a, b = (weights(tmp_path / name / "model") for name in ("one", "two"))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-9, atol=1e-12)


def test_frozen_parts_are_proven_and_said(recipe, tiny_models, tmp_path, capsys):
    train(str(recipe("run", frozen={"embeddings": True, "position_embeddings": True, "first_blocks": 1})), [])
    out = capsys.readouterr().out
    assert "frozen: 14 tensors, bit for bit as they were before training" in out
    before, after = weights(tiny_models()), weights(tmp_path / "run/model")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {
        name for name in before if name.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0."))
    }


def test_a_frozen_tensor_that_moved_ends_the_run(recipe, monkeypatch):
    from kit.training.trainer import KitTrainer

    step = KitTrainer.training_step

    def meddle(self, model, *args, **kwargs):
        with torch.no_grad():
            model.transformer.wpe.weight[3] += 1
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(KitTrainer, "training_step", meddle)
    with pytest.raises(RuntimeError, match=r"1 frozen tensors have changed in training: transformer.wpe.weight"):
        train(str(recipe("run", trainable={"last_blocks": 1})), [])


def test_the_probe_tries_each_phase(recipe, tmp_path, capsys):
    """Its time and memory would else be those of the cheapest one."""
    check(str(recipe("run", schedule=SCHEDULE)), [], probe=True)
    out = " ".join(capsys.readouterr().out.split())
    for phase in (1, 2, 3):
        assert f"step {phase}: phase {phase} of 3" in out
    assert "probe: 4 steps" in out
    assert "all 6 steps take at most, at the rate of the last phase," in out
