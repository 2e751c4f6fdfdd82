"""A loss or gradient that is NaN or infinite ends a run, or leaves a step out, before anything has moved."""

import copy
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kit.errors import UserError
from kit.files import read_json
from kit.run import train
from kit.tasks import causal_lm
from kit.training.trainer import KitTrainer
from tests.harness import run_kit
from tests.material import documents, make_tokenizer

MARK = "Q"  # stands in no other text, and no token but its own holds it
[MARKED] = make_tokenizer()(MARK)["input_ids"]
STEPS = 11  # of an epoch


class Poison(torch.autograd.Function):
    """Leaves a value as it is, and makes its gradient infinite."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def poison(how):
    """Spoil the loss of every batch with a marked row."""
    healthy = causal_lm.loss_sum

    def loss_sum(model, batch, args):
        loss = healthy(model, batch, args)
        if not (batch["input_ids"] == MARKED).any():
            return loss
        return loss * float("nan") if how == "loss" else Poison.apply(loss)

    causal_lm.loss_sum = loss_sum


def poison_loss():
    poison("loss")


@pytest.fixture
def spoiled(monkeypatch):
    """A function that spoils losses or gradients until the test ends."""
    monkeypatch.setattr(causal_lm, "loss_sum", causal_lm.loss_sum)
    return poison


@pytest.fixture
def recipe(tmp_path, tiny_models):
    """A function that writes a recipe for an epoch of 32 documents, some of them marked.

    Alone, document 3 is in step 6, after shuffling; with 17 there are two steps with a marked one.
    """

    def write(marks=(3,), name="recipe", run=(), **training):
        texts = documents(32, seed=7, longest=12)
        for index in marks:
            texts[index] = f"{MARK} {index}"
        corpus = tmp_path / f"corpus{'-'.join(map(str, marks))}.txt"
        corpus.write_text("\n".join(texts))
        values = {
            "task": "causal-lm",
            "model": {"name_or_path": str(tiny_models())},
            "data": {
                "train": [{"path": str(corpus), "sample_by": "line"}],
                "block_size": 60,
                "packing": False,
                "store_dir": str(tmp_path / "store"),
            },
            "training": {
                "num_train_epochs": 1, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-2,
                "logging_steps": 1, "save_steps": 1, "lr_scheduler_type": "linear", **training,
            },
            "run": {"output_dir": str(tmp_path / name), **dict(run)},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def state(trainer):
    """Return weights and optimizer state, copied."""
    optimizer = trainer.optimizer.state_dict() if trainer.optimizer else {}
    return copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(optimizer)


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def watched(monkeypatch):
    """The trainer of the run, and weights and optimizer state before each of its steps."""
    seen = {"before": []}
    original = KitTrainer.training_step

    def spy(self, *args, **kwargs):
        seen["trainer"] = self
        if len(seen["before"]) == self.state.global_step:
            seen["before"].append(state(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(KitTrainer, "training_step", spy)
    return seen


def history(folder, key="loss"):
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in e]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"per_device_train_batch_size": 1}])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_run_ends_before_anything_moves_and_names_the_documents(recipe, tmp_path, spoiled, watched, how, settings):
    accumulation = 4 // settings.get("per_device_train_batch_size", 4)
    path = recipe(gradient_accumulation_steps=accumulation, logging_steps=100, **settings)
    spoiled(how)
    with pytest.raises(UserError) as error:
        train(path, [])
    message, step = str(error.value), watched["trainer"].state.global_step
    assert step == 5
    assert_equal(state(watched["trainer"]), watched["before"][step])
    assert not torch.equal(*(weights["lm_head.weight"] for weights, _ in watched["before"][step - 1 : step + 1]))
    assert f"step {step + 1}: the {how} is no number" in message
    named = [line for line in message.splitlines() if "document " in line]
    assert len(named) == (1 if how == "loss" else 4)
    assert any("document 4 of" in line and "corpus3.txt:4)" in line for line in named)
    assert "`run.skip_nonfinite_steps`" in message
    manifest = read_json(tmp_path / "recipe/manifest.json")
    assert (manifest["status"], manifest["message"]) == ("user-error", message)
    assert sorted(p.name for p in (tmp_path / "recipe/checkpoints").iterdir())[-1] == f"checkpoint-{step}"


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_skipped_step_moves_nothing_but_the_learning_rate(recipe, tmp_path, spoiled, watched, how, optim):
    spoiled(how)
    train(recipe(run={"skip_nonfinite_steps": 1}, optim=optim), [])
    [skipped] = {e["step"] for e in history(tmp_path / "recipe", "learning_rate")} ^ set(range(1, STEPS + 1))
    before = watched["before"]
    # The rate of the optimizer's groups has gone on, as it does after each step.
    for _, optimizer in before[skipped - 1 : skipped + 1]:
        for group in optimizer["param_groups"]:
            group.pop("lr")
    assert_equal(before[skipped], before[skipped - 1])
    rates = {e["step"]: e["learning_rate"] for e in history(tmp_path / "recipe")}
    assert rates == {step: pytest.approx(1e-2 * (1 - (step - 1) / STEPS)) for step in rates}
    assert next(e["step"] for e in history(tmp_path / "recipe", "skipped_steps")) == skipped + 1
    assert read_json(tmp_path / "recipe/manifest.json")["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "recipe").values())


def test_logged_means_leave_the_skipped_step_out(recipe, tmp_path, spoiled):
    spoiled("loss")
    each = recipe(name="each", run={"skip_nonfinite_steps": 1})
    train(each, [])
    losses = {e["step"]: e["loss"] for e in history(tmp_path / "each")}
    train(recipe(name="fours", run={"skip_nonfinite_steps": 1}, logging_steps=4), [])
    for entry in history(tmp_path / "fours"):
        first = (entry["step"] - 1) // 4 * 4 + 1
        steps = [losses[s] for s in range(first, entry["step"] + 1) if s in losses]
        assert entry["loss"] == pytest.approx(sum(steps) / len(steps), rel=1e-5)
    assert len(losses) == STEPS - 1
    for name in ("each", "fours"):
        [entry] = history(tmp_path / name, "train_loss")
        assert entry["train_loss"] == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


def test_only_so_many_steps_are_skipped_also_over_a_resume(recipe, tmp_path, spoiled):
    spoiled("loss")
    path = recipe(marks=(3, 17), run={"skip_nonfinite_steps": 1})
    with pytest.raises(UserError, match="1 steps have been left out, as many as") as first:
        train(path, [])
    with pytest.raises(UserError) as second:
        train(path, [])
    assert str(second.value) == str(first.value)
    # The recipe stays the same: the run goes on with more patience.
    train(path, ["run.skip_nonfinite_steps=2"])
    assert read_json(tmp_path / "recipe/manifest.json")["skipped_steps"] == 2
    train(recipe(marks=(3, 17), name="whole", run={"skip_nonfinite_steps": 2}), [])
    assert_equal(weights(tmp_path / "recipe"), weights(tmp_path / "whole"))


def test_resumed_run_equals_the_uninterrupted_one_with_skipped_steps_between(recipe, tmp_path, spoiled):
    spoiled("loss")
    path = recipe(marks=(3, 17), run={"skip_nonfinite_steps": 2}, logging_steps=3)
    train(path, [])
    run = tmp_path / "recipe"
    expected, lines = weights(run), history(run)
    for step in range(1, STEPS):
        (run / "scorecard.json").unlink()
        train(path, [f"run.resume={run}/checkpoints/checkpoint-{step}"])
        assert_equal(weights(run), expected)
        for ours, theirs in zip(history(run), lines, strict=True):
            for key in ("step", "loss", "learning_rate", "skipped_steps"):
                assert ours.get(key) == theirs.get(key)
        assert read_json(run / "manifest.json")["skipped_steps"] == 2


def test_one_process_with_nan_ends_both_with_the_same_message(recipe, tmp_path, spoiled):
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    path = recipe(per_device_train_batch_size=2, **sgd)
    output = tmp_path / "output"
    assert run_kit(["train", path], 2, change=poison_loss, output=output) == [2, 2]
    message = read_json(tmp_path / "recipe/manifest.json")["message"]
    assert output.read_text().count(message) == 1
    [where] = [line for line in message.splitlines() if "micro-batch" in line]
    assert where.split(",")[0].strip() in ("process 0", "process 1")
    [named] = [line for line in message.splitlines() if "document " in line]
    assert "corpus3.txt:4)" in named
    # Both leave the same step out as a process alone does, of the same rows.
    assert run_kit(["train", path, "run.skip_nonfinite_steps=1"], 2, change=poison_loss) == [0, 0]
    spoiled("loss")
    train(recipe(name="alone", run={"skip_nonfinite_steps": 1}, **sgd), [])
    ours, theirs = weights(tmp_path / "recipe"), weights(tmp_path / "alone")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
