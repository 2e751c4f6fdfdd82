"""The plan of a run is what Trainer does: compared with Trainer itself, on a model of one parameter."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from kit.data.sampling import EpochBatches, LengthBatches
from kit.errors import UserError
from kit.training.plan import plan_steps


class OneParameter(torch.nn.Module):
    """A model that has a loss."""

    def __init__(self):
        """Start anywhere."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, **kwargs):
        return {"loss": (self.weight * x.float()).mean()}


class Counting(Trainer):
    """Trainer that counts its evaluations and checkpoints instead of doing them."""

    evaluations = 0
    checkpoints = 0

    def evaluate(self, *args, **kwargs):
        self.evaluations += 1
        metrics = {"eval_loss": 1.0 / self.evaluations}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args, **kwargs):
        self.checkpoints += 1


def trainer_for(tmp_path, rows, **changes):
    """Return a Trainer over `rows` rows of data."""
    values = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
    data = [{"x": torch.ones(1)} for _ in range(rows)]
    return Counting(OneParameter(), TrainingArguments(**values, **changes), train_dataset=data, eval_dataset=data[:1])


LENGTHS = [{"max_steps": 1}, {"max_steps": 7}, *({"num_train_epochs": epochs} for epochs in (0.3, 1, 1.01, 2.5, 3))]
BATCHES = [(1, 1), (4, 1), (3, 2), (2, 5)]
STOPS = [
    {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
    {"eval_strategy": "epoch", "save_strategy": "epoch"},
    {"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.25},
    {"eval_strategy": "no", "save_strategy": "no"},
    {"eval_strategy": "steps", "logging_steps": 5, "eval_on_start": True, "eval_delay": 3},
    {"eval_strategy": "epoch", "eval_delay": 1, "save_strategy": "no"},
]


@pytest.mark.parametrize("length", LENGTHS, ids=str)
@pytest.mark.parametrize(("batch", "accumulation"), BATCHES)
def test_plan_is_what_trainer_does(tmp_path, length, batch, accumulation):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    # Two of the strategies each, another pair for every setting.
    first = LENGTHS.index(length) + BATCHES.index((batch, accumulation))
    for rows, stops in ((11, STOPS[first % 6]), (12, STOPS[(first + 3) % 6])):
        trainer = trainer_for(tmp_path, rows, **length, **sizes, **stops)
        plan = plan_steps(rows, trainer.args)
        trainer.train()
        found = (plan.steps, plan.steps, *plan.stops)
        state = trainer.state
        assert found == (state.max_steps, state.global_step, trainer.evaluations, trainer.checkpoints), (rows, stops)


def test_checkpoints_of_the_best_model_are_at_most_so_many(tmp_path):
    trainer = trainer_for(
        tmp_path,
        8,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="loss",
    )
    plan = plan_steps(8, trainer.args)
    trainer.train()
    assert plan.stops == (3, 3)
    assert trainer.checkpoints <= 3


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("length", LENGTHS, ids=str)
@pytest.mark.parametrize(("batch", "accumulation"), BATCHES)
def test_plan_of_several_processes(tmp_path, monkeypatch, processes, length, batch, accumulation):
    """That the processes really do so is the matter of `test_check.py`; here only Trainer's arithmetic is asked."""
    trainer = trainer_for(
        tmp_path, 1, **length, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    for rows in range(processes * batch * accumulation, 70):
        plan = plan_steps(rows, trainer.args)
        _, per_epoch, *_, max_steps = trainer.set_initial_training_values(
            trainer.args, EpochBatches(rows, batch, 0, processes, 0)
        )
        assert (plan.steps_per_epoch, plan.steps) == (per_epoch, max_steps)
        assert plan.rows_per_step == processes * batch * accumulation
        assert plan.epochs == plan.steps / per_epoch


@pytest.mark.parametrize("lengths", [None, np.random.default_rng(0).integers(1, 60, 45)], ids=["plain", "sorted"])
def test_a_step_holds_the_same_rows_on_any_number_of_processes(lengths):
    """With one global batch: 12 rows in 12, 6, 4, … micro-batches of each process."""

    def rows(processes, batch):
        accumulation = 12 // (processes * batch)
        parts = [EpochBatches(45, batch, 3, processes, rank, lengths, accumulation) for rank in range(processes)]
        return rows_of_steps(parts, accumulation)

    expected = rows(1, 12)
    assert len(expected) == 4
    assert all(rows(p, b) == expected for p, b in [(1, 3), (2, 6), (2, 3), (3, 4), (6, 1), (12, 1)])


@pytest.mark.parametrize("max_tokens", [None, 70])
def test_so_does_a_step_of_batches_of_similar_length(max_tokens):
    """Of one batch size: it says where batches are cut."""
    lengths = np.random.default_rng(0).integers(1, 60, 45)

    def rows(processes):
        parts = [LengthBatches(lengths, 2, 3, processes, rank, max_tokens) for rank in range(processes)]
        return rows_of_steps(parts, 6 // processes)

    expected = rows(1)
    assert sorted(row for step in expected for row in step) == list(range(45))
    assert all(rows(processes) == expected for processes in (2, 3, 6))


def rows_of_steps(parts, accumulation):
    """Return the rows of each optimizer step of an epoch, sorted, whichever process has them."""
    micro_batches = [[row for batch in together for row in batch if row >= 0] for together in zip(*parts, strict=True)]
    starts = range(0, len(micro_batches), accumulation)
    return [sorted(row for batch in micro_batches[start : start + accumulation] for row in batch) for start in starts]


def test_rows_that_fill_no_global_batch_are_refused(tmp_path, monkeypatch):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert plan_steps(8, arguments).steps_per_epoch == 1
    with pytest.raises(UserError, match=r"the 7 rows of an epoch do not fill one global batch of 8 \(4 × 2\); lower "):
        plan_steps(7, arguments)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UserError, match=r"one global batch of 16 \(4 × 2 × 2 processes\)"):
        plan_steps(15, arguments)
