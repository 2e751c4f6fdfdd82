"""Runs under DeepSpeed's ZeRO-2 and ZeRO-3, on two processes without a GPU: all is as under DDP.

They need deepspeed (`pip install -e '.[deepspeed]'`), and a C++ compiler at their first run.
"""

import os
import signal

import pytest
import torch

from kit.tasks import causal_lm
from tests.classifiers import labeled_rows, save_base, write_rows
from tests.classifiers import write_recipe as write_classifier
from tests.harness import Fault, run_kit
from tests.history import read_history
from tests.training.test_nonfinite import Poison
from tests.training.test_sharding import ALONE, LORA, PROMPTS, SCHEDULE, TRAINING, VOCABULARY, read, weights
from tests.training.zero_on_cpu import zero2_on_cpu, zero3_on_cpu

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install -e '.[deepspeed]'")
os.environ["DS_ACCELERATOR"] = "cpu"  # before the server of forks starts, which hands its environment on
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("zero", [zero2_on_cpu, zero3_on_cpu], ids=["zero2", "zero3"]),
]
# A group is summed as one flat tensor, in another order, which Adam's division makes larger in the first steps: most
# for the biases of keys, whose gradient is nothing but rounding.
CLOSE = {"rtol": 0, "atol": 5e-5}


@pytest.fixture
def both(write_recipe, tiny_models, tmp_path, zero):
    """A function that runs a recipe under DDP and under ZeRO; it returns both run directories."""

    def run(architecture="gpt2", training=None, **sections):
        for name, change in (("ddp", None), ("zero", zero)):
            path = write_recipe(
                name,
                model={"name_or_path": str(tiny_models(architecture))},
                training=TRAINING | {"per_device_train_batch_size": 2, "max_grad_norm": 0.5} | (training or {}),
                evaluation=PROMPTS,
                run={"output_dir": str(tmp_path / name)},
                **sections,
            )
            assert run_kit(["train", path], 2, change=change) == [0, 0]
        return tmp_path / "ddp", tmp_path / "zero"

    return run


def assert_close(one, other, **close):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], **(close or CLOSE)), (name, (one[name] - other[name]).abs().max())


def assert_alike(ddp, zero, **close):
    ours, theirs = (read_history(folder) for folder in (ddp, zero))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        one.pop("total_flos", None), other.pop("total_flos", None)  # Trainer's, which counts no shards of ZeRO-3
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    for name in ("model", "checkpoints/checkpoint-2"):
        assert_close(weights(ddp / name), weights(zero / name), **close)
    assert read(ddp / "samples.json") == read(zero / "samples.json")
    assert read(zero / "manifest.json")["reloaded_logits_differ_by"] == 0.0


def test_phases_follow_one_another_under_zero(both, tiny_models):
    ddp, zero = both("llama", freezing=SCHEDULE, training={"save_steps": 1, "eval_steps": 1})
    assert_alike(ddp, zero)
    before = weights(tiny_models("llama"))
    for step in range(1, 7):
        after = weights(zero / f"checkpoints/checkpoint-{step}")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        norm, block = "model.norm.", "model.layers.1."
        allowed = (norm,) if step <= 2 else (norm, block) if step <= 4 else ("",)
        assert moved == {name for name in before if name.startswith(allowed)}, step
        before = after


def test_an_adapter_with_new_tokens_trains_under_zero(both):
    ddp, zero = both(vocabulary=VOCABULARY, freezing={"trainable": {"new_tokens": True}}, adapter=LORA)
    assert_alike(ddp, zero)
    ours, theirs = (read(folder / "model/base.json") for folder in (ddp, zero))
    assert ours["rows_with_new_tokens"] == theirs["rows_with_new_tokens"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_new_rows_alone_train_under_zero(both, architecture):
    ddp, zero = both(architecture, vocabulary=VOCABULARY, freezing=ALONE)
    assert_alike(ddp, zero)


def test_a_classifier_trains_in_bf16_under_zero(tmp_path, zero):
    base = save_base(tmp_path / "base", "bert")
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))
    sections = {
        "training": {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "bf16": True},
        "freezing": {"trainable": {"last_blocks": 1, "head": True}},
        "evaluation": {"temperature_scaling": True},
    }
    for name, change in (("ddp", None), ("zero", zero)):
        path = write_classifier(tmp_path / f"{name}.yaml", base, rows, **sections)
        assert run_kit(["train", path], 2, change=change) == [0, 0]
    ours, theirs = (weights(tmp_path / name / "model") for name in ("ddp", "zero"))
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())
    ours, theirs = (read(tmp_path / name / "model/config.json")["kit_classifier"] for name in ("ddp", "zero"))
    assert ours["temperature"] == pytest.approx(theirs["temperature"], rel=1e-2)


def test_a_run_under_zero_that_was_killed_goes_on_bit_for_bit(write_recipe, tmp_path, zero):
    schedule = [{"trainable": {"new_tokens": True}}, {"step": 3, "trainable": {"last_blocks": 1}}]
    for name in ("straight", "killed"):
        path = write_recipe(
            name, training=TRAINING, run={"output_dir": str(tmp_path / name)},
            vocabulary=VOCABULARY, freezing={"schedule": schedule},
        )  # fmt: skip
        if name == "killed":  # in step 3 and, gone on with from step 2, in step 5
            fault = Fault("kit.training.trainer:KitTrainer.training_step", 6, signal.SIGKILL)
            for _ in range(2):
                assert -signal.SIGKILL in run_kit(["train", path], 2, fault, change=zero)
        assert run_kit(["train", path], 2, change=zero) == [0, 0]
    ours, theirs = (weights(tmp_path / name / "model") for name in ("straight", "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_history(tmp_path / "straight") == read_history(tmp_path / "killed")


def spoil_zero2():
    zero2_on_cpu()
    _spoil_third_step()


def spoil_zero3():
    zero3_on_cpu()
    _spoil_third_step()


def _spoil_third_step():
    healthy, steps = causal_lm.loss_sum, []

    def loss_sum(model, batch, args):
        steps.append(model.training)
        loss = healthy(model, batch, args)
        return Poison.apply(loss) if sum(steps) == 3 and os.environ["RANK"] == "1" else loss

    causal_lm.loss_sum = loss_sum


def test_a_gradient_that_is_no_number_ends_a_run_under_zero_before_it_moves(write_recipe, tmp_path, zero):
    training = {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2}
    path = write_recipe(training=training)
    change = spoil_zero2 if zero is zero2_on_cpu else spoil_zero3
    assert run_kit(["train", path], 2, change=change) == [2, 2]
    message = read(tmp_path / "run/manifest.json")["message"]
    assert "step 3: the gradient is no number" in message
    assert "the optimizer has not moved" in message
