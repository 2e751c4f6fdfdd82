"""How a run stands, from before its first attempt on."""

import signal

import pytest

from kit import run
from kit.errors import UserError
from kit.training.resolving import status
from kit.training.run_directory import exit_code, read_status
from tests.harness import Fault, run_kit


def test_prepared_is_a_status_of_its_own_until_a_run_begins(write_recipe, tmp_path):
    recipe = str(write_recipe())
    run.prepare(recipe, [])
    assert status(recipe, []) == (str(tmp_path / "run"), "prepared", None)
    assert exit_code("prepared") == 1
    with pytest.raises(UserError):
        run.train(recipe, ["training.fp16=true"])
    assert read_status(tmp_path / "run") == "user-error"
    run.prepare(recipe, [])
    assert read_status(tmp_path / "run") == "prepared"
    run.train(recipe, [])
    assert status(recipe, []) == (str(tmp_path / "run"), "done", None)
    run.prepare(recipe, [])
    assert read_status(tmp_path / "run") == "done"


def test_preparation_that_is_cut_off_is_not_prepared(write_recipe, tmp_path):
    fault = Fault("kit.stages:Run.measure", 1, signal.SIGTERM)
    assert run_kit(["prepare", write_recipe()], fault=fault) == [143]
    assert read_status(tmp_path / "run") == "missing"


def test_status_names_the_newest_whole_checkpoint(write_recipe, tmp_path):
    recipe = str(write_recipe(training={"max_steps": 9, "save_steps": 2}))
    fault = Fault("kit.training.trainer:KitTrainer.training_step", 6, signal.SIGKILL)
    assert run_kit(["train", recipe], fault=fault) == [-9]
    assert status(recipe, []) == (str(tmp_path / "run"), "killed", "checkpoint-4")
    (tmp_path / "run/checkpoints/checkpoint-4/complete.json").unlink()
    assert status(recipe, [])[2] == "checkpoint-2"
    run.prepare(recipe, [])
    assert read_status(tmp_path / "run") == "killed"


def test_status_of_a_refused_start_is_the_refusal_until_the_run_goes_on(write_recipe, tmp_path):
    """A script behind a launcher would else queue a job again that can never begin."""
    recipe = str(write_recipe(training={"max_steps": 5, "save_steps": 2}))
    fault = Fault("kit.training.trainer:KitTrainer.training_step", 4, signal.SIGTERM)
    assert run_kit(["train", recipe], fault=fault) == [143]
    assert read_status(tmp_path / "run") == "preempted"
    assert run_kit(["train", recipe, "training.learning_rate=0.5"]) == [2]
    assert read_status(tmp_path / "run") == "user-error"
    assert run_kit(["train", recipe]) == [0]
    assert read_status(tmp_path / "run") == "done"
    assert run_kit(["train", recipe, "training.learning_rate=0.5"]) == [2]
    assert read_status(tmp_path / "run") == "done"
