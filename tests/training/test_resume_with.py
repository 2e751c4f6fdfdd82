"""A run goes on with what `run.resume_with` names, and with nothing else; what is named then holds."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kit.errors import UserError
from kit.recipe.loading import load_recipe
from kit.run import train
from tests.harness import Fault, run_kit
from tests.material import documents

STEP = "kit.training.trainer:KitTrainer.training_step"
RATE = 2e-3


@pytest.fixture
def launch(tmp_path, tiny_models):
    """A function that runs the recipe of this module in a folder, and returns exit codes and output."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(documents(60, seed=3)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "task": "causal-lm",
                "model": {"name_or_path": str(tiny_models())},
                "data": {
                    "train": [{"path": str(corpus), "sample_by": "line"}],
                    "block_size": 64,
                    "store_dir": str(tmp_path / "store"),
                },
                "training": {
                    "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": RATE, "weight_decay": 0.1,
                    "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_steps": 5, "logging_steps": 2,
                    "bf16": False,
                },
                "run": {"global_batch_size": 8},
            }
        )
    )  # fmt: skip

    def launch(name, *overrides, processes=1, fault=None):
        output = tmp_path / f"{name}.log"
        output.write_text("")
        arguments = ["train", recipe, f"run.output_dir={tmp_path / name}", *overrides]
        codes = run_kit(arguments, processes, fault=fault, output=output)
        return codes, output.read_text()

    return launch


def read(folder):
    """Return the log entries that hold a loss."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if "loss" in entry]


def cosine(step, rate, steps, warmup=2):
    if step < warmup:
        return rate * step / warmup
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_another_number_of_processes_goes_on_as_one_would_have(launch, tmp_path):
    """With two, then with one again: the same rows in each step, and each log line's loss over all its steps."""
    assert launch("straight")[0] == [0]
    assert launch("moved", fault=Fault(STEP, call=4 * 6 + 1))[0] == [-9]  # step 5 is saved; the line of 5 and 6 is not
    codes, output = launch("moved", processes=2)
    assert codes == [2, 2]
    assert "world_size: 1 -> 2 (`run.resume_with: [world_size]` would allow it)" in output
    named = "run.resume_with=[world_size]"
    codes, output = launch("moved", named, processes=2, fault=Fault(STEP, call=2 * 5 + 1))
    assert -9 in codes
    assert "random states" in output
    assert "2 × 2 × 2 = 8 rows per step" in output
    assert launch("moved", named)[0] == [0]
    for found, expected in zip(read(tmp_path / "moved"), read(tmp_path / "straight"), strict=True):
        assert found["step"] == expected["step"]
        for name in ("loss", "grad_norm", "learning_rate", "tokens_seen"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    straight, moved = (load_file(tmp_path / name / "model/model.safetensors") for name in ("straight", "moved"))
    for name, tensor in straight.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=1e-5)
    resumes = json.loads((tmp_path / "moved/manifest.json").read_text())["resumes"]
    assert [r["differences"] for r in resumes] == [["world_size: 1 -> 2"], ["world_size: 2 -> 1"]]
    assert [r["checkpoint"].rpartition("-")[2] for r in resumes] == ["5", "10"]
    assert json.loads((tmp_path / "moved/manifest.json").read_text())["topology"]["global_batch_size"] == 8


def test_the_new_schedule_holds_from_the_next_step_on(launch, tmp_path):
    changes = ["training.learning_rate=5e-4", "training.max_steps=20", "training.logging_steps=1"]
    names = "run.resume_with=[training.learning_rate,training.max_steps,training.logging_steps]"
    assert launch("run", fault=Fault(STEP, call=4 * 6 + 1))[0] == [-9]
    assert launch("run", *changes)[0] == [2]
    assert launch("run", *changes, names, fault=Fault(STEP, call=1))[0] == [-9]  # has saved nothing: says it once more
    codes, output = launch("run", *changes, names, fault=Fault(STEP, call=4 * 6 + 1))
    assert codes == [-9]
    assert "training.learning_rate: 0.002 -> 5e-4" in output
    codes, output = launch("run", *changes, names)
    assert codes == [0]
    assert "no difference to" in output
    entries = read(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [2, 4, *range(6, 21)]
    for entry in entries:
        # The rate that a line gives is the one that its step was made with.
        rate, steps = (RATE, 12) if entry["step"] <= 5 else (5e-4, 20)
        assert entry["learning_rate"] == pytest.approx(cosine(entry["step"] - 1, rate, steps)), entry["step"]
    state = torch.load(tmp_path / "run/checkpoints/checkpoint-20/optimizer.pt", weights_only=True)
    assert {group["initial_lr"] for group in state["param_groups"]} == {5e-4}


def test_a_finished_run_goes_on_for_more_steps(launch, tmp_path):
    assert launch("run")[0] == [0]
    more = ["training.max_steps=16", "run.resume_with=[training.max_steps,training.weight_decay]"]
    codes, output = launch("run", *more, "training.weight_decay=0.05")
    assert codes == [0]
    assert "checkpoint-12 on the run differs" in output
    assert [entry["step"] for entry in read(tmp_path / "run")] == [*range(2, 17, 2)]
    state = torch.load(tmp_path / "run/checkpoints/checkpoint-16/optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.05, 0.0]
    assert "is finished: nothing to do" in launch("run", *more, "training.weight_decay=0.05")[1]


def test_a_finished_run_that_goes_on_is_compared_with_the_processes_of_now(launch, tmp_path):
    own = ["run.global_batch_size=null", "training.per_device_train_batch_size=4"]
    assert launch("run", *own)[0] == [0]
    half = ["run.global_batch_size=null", "training.max_steps=14"]  # 2 rows × 2 processes
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    codes, output = launch("run", *half, "run.resume_with=[training.max_steps]", processes=2)
    assert codes == [2, 2]
    assert "world_size: 1 -> 2 (`run.resume_with: [world_size]` would allow it)" in output
    assert "global_batch_size: " not in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert launch("run", *half, "run.resume_with=[training.max_steps,world_size]", processes=2)[0] == [0, 0]


# ---- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "no such key; did you mean `training.learning_rate`?"),
        ("training.learning_rat", "no such key; did you mean `training.learning_rate`?"),
        ("worldsize", "no such key; did you mean `world_size`?"),
        ("xyz", "no such key; expected `world_size` or a key of `training`, `run` or `evaluation`"),
        ("model.name_or_path", "it says what the model and its data are"),
        ("freezing", "it says what the model and its data are"),
        ("evaluation.sets", "it says what the model and its data are"),
        ("training.seed", "rows would be left out or seen twice"),
        ("training.gradient_accumulation_steps", "rows would be left out or seen twice"),
        ("run.global_batch_size", "rows would be left out or seen twice"),
        ("training.optim", "the state of the optimizer"),
        ("training.metric_for_best_model", "another metric"),
        ("run.output_dir", "may differ without being named"),
        ("tracking.wandb.project", "may differ without being named"),
    ],
)
def test_what_cannot_be_named(write_recipe, name, message):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(run={"resume_with": ["world_size", name]}))
    assert f"`{name}`: " in str(error.value)
    assert message in str(error.value)


def test_what_can_be_named(write_recipe):
    names = [
        "world_size", "training.learning_rate", "training.lr_scheduler_kwargs.min_lr", "run.early_stopping",
        "run.early_stopping.patience", "evaluation.prompts", "evaluation.generation.seed",
    ]  # fmt: skip
    assert list(load_recipe(write_recipe(run={"resume_with": names})).run.resume_with) == names


# ---- what holds afterwards


TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "save_steps": 2, "logging_steps": 1,
    "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
}  # fmt: skip
PHASES = [
    {"trainable": {"last_blocks": 1, "final_norm": True}},
    {"trainable": "all", "step": 2, "warmup_steps": 4},
]


def groups_of(checkpoint):
    """Return what an optimizer's groups hold beside their parameters, and the schedule's state."""
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    return groups, torch.load(checkpoint / "scheduler.pt", weights_only=True)


def test_each_group_has_the_rates_of_a_run_that_began_so(write_recipe, tmp_path):
    """Trainer would go on with the checkpoint's: its rates, decay, betas, and the schedule's base rates."""
    freezing = {"schedule": PHASES, "layer_decay": 0.5}
    recipe = str(write_recipe(training=TRAINING, freezing=freezing))
    changes = {
        "max_steps": 8, "learning_rate": 3e-4, "weight_decay": 0.02, "adam_beta2": 0.95, "warmup_steps": 1,
        "lr_scheduler_type": "linear",
    }  # fmt: skip
    train(recipe, [])
    overrides = [f"training.{name}={value}" for name, value in changes.items()]
    named = ",".join(f"training.{name}" for name in changes)
    train(recipe, [*overrides, f"run.resume_with=[{named}]"])
    train(recipe, [*overrides, f"run.output_dir={tmp_path / 'fresh'}"])
    found, expected = (groups_of(tmp_path / name / "checkpoints/checkpoint-8") for name in ("run", "fresh"))
    assert found == expected
    assert len(found[0]) > 4
    for step in (6, 7, 8):
        ours, theirs = (read(tmp_path / name)[step - 1]["learning_rate"] for name in ("run", "fresh"))
        assert ours == theirs


def test_groups_that_would_be_others_are_refused(write_recipe):
    """The group of the larger rate comes first: state would go to the parameters of the other one."""
    groups = [{"parts": {"last_blocks": 1}, "learning_rate": 5e-4}]
    recipe = str(write_recipe(training=TRAINING, freezing={"groups": groups}))
    train(recipe, [])
    changes = ["training.max_steps=6", "run.resume_with=[training.max_steps,training.learning_rate]"]
    for rate in (1e-4, 5e-4):
        with pytest.raises(UserError, match="fall into other groups than the checkpoint's"):
            train(recipe, [*changes, f"training.learning_rate={rate}"])


def test_more_patience_goes_on_and_evaluates_as_the_recipe_says(write_recipe, tmp_path):
    training = {**TRAINING, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
    stops = {"early_stopping": {"patience": 1, "threshold": 10.0}}
    recipe = str(write_recipe(training=training, run={"output_dir": str(tmp_path / "run"), **stops}))
    train(recipe, [])
    assert read(tmp_path / "run")[-1]["step"] == 4
    names = "run.resume_with=[run.early_stopping,training.eval_steps,training.save_steps]"
    changes = ["run.early_stopping.patience=2", "training.eval_steps=3", "training.save_steps=3", names]
    train(recipe, changes)
    assert read(tmp_path / "run")[-1]["step"] == 6
    history = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert [entry["step"] for entry in history if "eval_domain_bits_per_byte" in entry] == [2, 4, 6]
