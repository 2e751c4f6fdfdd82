"""The room that a run takes on disk is known before it trains; a disk that fills up meanwhile costs no checkpoint."""

import os
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from kit.errors import UserError
from kit.files import read_json, read_seal
from kit.recipe.models import CausalLmRecipe
from kit.run import train
from kit.training import disk
from kit.training.disk import check_room, size_of
from kit.training.plan import StepPlan
from kit.training.trainer import KitTrainer
from tests.material import make_model

Usage = namedtuple("Usage", "total used free")
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "save_steps": 1}
# Of the tiny GPT-2: 37,760 parameters; Adam keeps two numbers for each.
WEIGHTS = 4 * 37_760
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "x", "eval_strategy": "steps", "eval_steps": 1}
CHECKPOINT = 3 * WEIGHTS


@pytest.fixture
def room(monkeypatch):
    """A function that sets how much is free wherever the kit looks."""
    return lambda free, total=1 << 40: monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda _: Usage(total, total - free, free)
    )


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"save_total_limit": 1}, 2 * CHECKPOINT),
        ({"save_total_limit": 2}, 3 * CHECKPOINT),
        # The best one stays too.
        ({"save_total_limit": 1, **BEST}, 3 * CHECKPOINT),
        # The new one replaces none: four, and the model.
        ({"save_total_limit": 4}, 4 * CHECKPOINT + WEIGHTS),
        ({"save_total_limit": 1, "optim": "sgd"}, 2 * WEIGHTS),
        # A run whose checkpoints are all kept may have them taken away on the way.
        ({}, 2 * CHECKPOINT + WEIGHTS),
        ({"save_strategy": "no"}, WEIGHTS),
        ({"save_strategy": "no", "save_minutes": 60}, 2 * CHECKPOINT),
        ({"save_total_limit": 1, "save_minutes": 60}, 3 * CHECKPOINT),
    ],
)
def test_what_is_needed_is_what_lies_there_at_once(tmp_path, room, settings, needed):
    minutes = settings.get("save_minutes")
    training = {key: value for key, value in settings.items() if key != "save_minutes"}
    recipe = CausalLmRecipe.model_validate(
        {
            "task": "causal-lm",
            "model": {"name_or_path": "x"},
            "data": {"train": [{"path": "x"}]},
            "run": {"save_minutes": minutes},
        }
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **{**TRAINING, **training})
    plan = StepPlan(rows=16, rows_per_step=4, steps_per_epoch=4, steps=4, args=args)
    room(needed)
    assert "are free" in check_room(make_model(), recipe, plan, tmp_path / "run/checkpoints")
    room(needed - 1)
    with pytest.raises(UserError) as error:
        check_room(make_model(), recipe, plan, tmp_path / "run/checkpoints")
    assert str(error.value).startswith(f"run.output_dir: {tmp_path} has ")
    assert f"{disk.in_units(needed)} are needed" in str(error.value)


def test_run_without_room_ends_before_it_trains(write_recipe, tmp_path, room):
    room(CHECKPOINT)
    with pytest.raises(UserError, match=r"^run\.output_dir: .*`run\.output_dir=…`"):
        train(str(write_recipe(training=TRAINING)), [])
    assert not (tmp_path / "run/checkpoints").exists()
    assert read_json(tmp_path / "run/manifest.json")["status"] == "user-error"


def test_size_of_a_checkpoint_is_that_of_the_files(write_recipe, tmp_path):
    train(str(write_recipe(training=TRAINING)), [])
    names = ("model.safetensors", "optimizer.pt")
    size = sum((tmp_path / "run/checkpoints/checkpoint-4" / name).stat().st_size for name in names)
    assert CHECKPOINT < size < 1.1 * CHECKPOINT


def test_adapter_needs_no_room_for_the_model(write_recipe, tmp_path, room):
    recipe = str(write_recipe(training=TRAINING | {"save_total_limit": 1}, adapter={"type": "lora", "r": 2}))
    room(WEIGHTS // 2)
    train(recipe, [])
    assert size_of(tmp_path / "run/model") < WEIGHTS


def test_what_lies_there_counts_as_written(write_recipe, tmp_path, room):
    recipe = str(write_recipe(training=TRAINING | {"save_total_limit": 2}))
    train(recipe, [])
    (tmp_path / "run/scorecard.json").unlink()
    room(CHECKPOINT + 100)
    train(recipe, [f"run.resume={tmp_path}/run/checkpoints/checkpoint-3"])
    (tmp_path / "run/scorecard.json").unlink()
    room(WEIGHTS + 100)  # nothing but the model is left to write
    train(recipe, [])


def test_file_system_that_tells_nothing_is_no_reason_to_stop(write_recipe, room):
    room(0, total=0)
    train(str(write_recipe(training=TRAINING)), [])


def test_unlimited_checkpoints_that_will_not_fit_are_told(write_recipe, room, capsys):
    recipe = str(write_recipe(training=TRAINING))
    room(3 * CHECKPOINT)
    train(recipe, [])
    assert "not enough for all 4 checkpoints" in capsys.readouterr().out.replace("\n", " ")
    room(10 * CHECKPOINT)
    train(recipe, ["run.resume=never"])
    assert "not enough" not in capsys.readouterr().out


def test_full_disk_in_a_save_leaves_the_checkpoint_before_and_the_run_goes_on(write_recipe, tmp_path, monkeypatch):
    """Somebody else fills the disk after the run has begun."""
    small = tmp_path / "small"
    small.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "kit-test", small]).returncode:
        pytest.skip("needs to mount a file system")
    try:
        recipe = str(write_recipe(training=TRAINING | {"save_total_limit": 1}))
        train(recipe, [])
        expected = torch.load(tmp_path / "run/checkpoints/checkpoint-4/optimizer.pt", weights_only=True)
        filler = small / "filler"
        original = KitTrainer.training_step

        def fill(self, *args, **kwargs):
            if self.state.global_step == 2 and not filler.exists():
                left = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
                filler.write_bytes(bytes(left - WEIGHTS - 100_000))  # no room for the optimizer's state
            return original(self, *args, **kwargs)

        monkeypatch.setattr(KitTrainer, "training_step", fill)
        with pytest.raises(UserError, match="the disk is full") as error:
            train(recipe, [f"run.output_dir={small}/run"])
        assert f"({small}/run)" in str(error.value)
        [left] = Path(small, "run/checkpoints").iterdir()
        assert left.name == "checkpoint-2"
        assert read_seal(left)
        assert read_json(small / "run/manifest.json")["status"] == "user-error"
        filler.write_bytes(b"")
        train(recipe, [f"run.output_dir={small}/run"])
        ours = torch.load(small / "run/checkpoints/checkpoint-4/optimizer.pt", weights_only=True)
        for state, other in zip(ours["state"].values(), expected["state"].values(), strict=True):
            assert all(torch.equal(state[key], other[key]) for key in state)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
