"""The `training` section against the installed TrainingArguments."""

import pytest
import transformers
from transformers import TrainingArguments

from kit.errors import UserError
from kit.recipe.training_arguments import allowed_names, check_training_arguments, installed_arguments
from kit.recipe.training_names import REFUSED, REMOVED

on_pinned_version = pytest.mark.skipif(
    transformers.__version__ != "5.23.0", reason="the tables of names were verified against transformers 5.23.0"
)


def refused(values):
    """Return the message that the values are refused with."""
    with pytest.raises(UserError) as error:
        check_training_arguments(values, lambda name: f"r.yaml:{list(values).index(name) + 1}")
    return str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"learning_rate": 1, "num_train_epochs": 2, "warmup_steps": 0.1, "max_grad_norm": 0},
        {"max_steps": 10, "warmup_steps": 3, "logging_steps": 1, "eval_steps": 0.5, "eval_strategy": "steps"},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        {"report_to": "tensorboard"},
        {"report_to": ["none"]},
        {"debug": "underflow_overflow"},
        {"include_num_input_tokens_seen": True},
        {"include_num_input_tokens_seen": "non_padding", "log_level": "info"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 100, "save_steps": 200},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "best"},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "bits_per_byte"},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"optim_target_modules": ["q_proj"], "neftune_noise_alpha": 5},
    ],
)
def test_what_is_accepted_builds_the_arguments(tmp_path, values):
    checked = check_training_arguments(values, str)
    assert checked == values
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **checked)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_are_mapped_to_the_installed_one(tmp_path, name):
    checked = check_training_arguments({name: True, f"{name}_kwargs": {"use_reentrant": False}}, str)
    newest = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in installed_arguments())
    assert checked == {newest: True, f"{newest}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **checked)
    assert arguments.gradient_checkpointing is True


def test_null_takes_a_value_back():
    assert check_training_arguments({"num_train_epochs": None, "max_steps": 5}, str) == {"max_steps": 5}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        # names
        ({"learning_rat": 1}, ["r.yaml:1: training.learning_rat: unknown key", "did you mean `learning_rate`?"]),
        ({"block_size": 8}, ["`block_size` belongs under `data`"]),
        ({"batch_size": 8}, ["did you mean `training.per_device_train_batch_size`?"]),
        ({"zzzzz": 8}, ["training.zzzzz: unknown key"]),
        ({"warmup_ratio": 0.1}, ["no longer has this name", "share of the training steps: `warmup_steps: 0.1`"]),
        ({"evaluation_strategy": "steps"}, ["write `eval_strategy`"]),
        ({"overwrite_output_dir": True}, ["`run.resume: never`"]),
        ({"group_by_length": True}, ["train_sampling_strategy", "shuffles its rows itself"]),
        ({"no_cuda": True}, ["write `use_cpu`"]),
        ({"per_gpu_train_batch_size": 1}, ["write `per_device_train_batch_size`"]),
        ({"logging_dir": "x"}, ["TENSORBOARD_LOGGING_DIR"]),
        ({"output_dir": "x"}, ["does not take this key", "`run.output_dir`"]),
        ({"resume_from_checkpoint": "x"}, ["`run.resume`"]),
        ({"hub_token": None}, ["HF_TOKEN"]),
        ({"hub_of_the_future": 1}, ["does not take this key"]),
        ({"gradient_checkpointing": True, "activation_checkpointing": True}, ["two names of one setting"]),
        # types
        ({"learning_rate": "fast"}, ['found the text "fast"; expected a number']),
        ({"learning_rate": True}, ["found the boolean true; expected a number"]),
        ({"max_steps": 10.0}, ["found the number 10.0; expected an integer; write 10"]),
        ({"bf16": "yes"}, ['found the text "yes"; expected true or false']),
        ({"bf16": 1}, ["found the number 1; expected true or false"]),
        ({"tf32": 0}, ["expected true or false"]),
        ({"seed": [1]}, ["found a list; expected an integer"]),
        ({"learning_rate": float("nan")}, ["expected a finite number"]),
        ({"weight_decay": float("inf")}, ["expected a finite number"]),
        ({"optim_target_modules": [1]}, ["found a list; expected text or a list"]),
        # choices
        ({"optim": "adamw_toch"}, ['found the text "adamw_toch"', "did you mean `adamw_torch`?"]),
        ({"optim": "qqq"}, ['found the text "qqq"', "one of `adamw_torch`"]),
        ({"lr_scheduler_type": "cosin"}, ["did you mean `cosine`?"]),
        ({"eval_strategy": "epochs"}, ["one of `no`, `steps`, `epoch`", "did you mean `epoch`?"]),
        ({"eval_strategy": False}, ["found the boolean false; expected one of `no`, `steps`, `epoch`"]),
        ({"eval_strategy": ["no"]}, ["found a list; expected one of"]),
        ({"save_strategy": 3}, ["one of `no`, `steps`, `epoch`, `best`"]),
        ({"debug": "underflow"}, ['found the text "underflow"', "`underflow_overflow`"]),
        ({"debug": ["tpu"]}, ['found the text "tpu"']),
        ({"log_level": "inf"}, ["did you mean `info`?"]),
        ({"include_num_input_tokens_seen": "padding"}, ["`non_padding`"]),
        ({"report_to": "wandb"}, ["tracking: {wandb"]),
        ({"report_to": ["tensorboard", "wandb"]}, ["tracking: {wandb"]),
        ({"report_to": "all"}, ["name the trackers"]),
        ({"report_to": "tensorbord"}, ["unknown tracker", "did you mean `tensorboard`?"]),
        # ranges
        ({"per_device_train_batch_size": 0}, ["found the number 0; expected at least 1"]),
        ({"per_device_eval_batch_size": -1}, ["at least 1"]),
        ({"gradient_accumulation_steps": 0}, ["at least 1"]),
        ({"learning_rate": -1e-5}, ["at least 0"]),
        ({"weight_decay": -0.1}, ["at least 0"]),
        ({"num_train_epochs": -1}, ["at least 0"]),
        ({"warmup_steps": -1}, ["at least 0"]),
        ({"warmup_steps": 2.5}, ["a whole number of steps, or a share"]),
        ({"max_steps": 0}, ["at least 1 (or -1"]),
        ({"max_steps": -2}, ["at least 1 (or -1"]),
        ({"adam_beta1": 1.0}, ["less than 1"]),
        ({"adam_beta2": -0.1}, ["at least 0"]),
        ({"adam_epsilon": 0}, ["greater than 0"]),
        ({"logging_steps": 0}, ["greater than 0"]),
        ({"eval_steps": 0}, ["greater than 0"]),
        ({"save_steps": 1.5}, ["a whole number of steps, or a share"]),
        # contradictions
        (
            {"num_train_epochs": 3, "max_steps": 10},
            ["r.yaml:2: training.max_steps: contradicts `num_train_epochs`", "null"],
        ),
        ({"bf16": True, "fp16": True}, ["training.fp16: contradicts `bf16`"]),
        ({"load_best_model_at_end": True}, ["set `eval_strategy`"]),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            ["`save_strategy` is `steps`", "`eval_strategy` is `epoch`"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 30, "save_steps": 100},
            ["a multiple"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 100},
            ["a multiple"],
        ),
        ({"save_strategy": "best"}, ["training.save_strategy: `best` saves nothing"]),
        ({"save_strategy": "best", "eval_strategy": "steps"}, ["`metric_for_best_model`"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["set `eval_strategy`"]),
        ({"dataloader_prefetch_factor": 2}, ["`dataloader_num_workers`"]),
    ],
)
def test_what_is_refused(values, parts):
    found = refused(values)
    assert "\n" not in found, "one mistake is one line"
    for part in parts:
        assert part in found


def test_max_steps_of_minus_one_does_not_contradict_epochs():
    values = {"num_train_epochs": 3, "max_steps": -1}
    assert check_training_arguments(values, str) == values


def test_all_mistakes_are_told_at_once():
    assert [line.split(": ")[:2] for line in refused({"bf16": 1, "seed": 0, "outptu": 2}).splitlines()] == [
        ["r.yaml:1", "training.bf16"],
        ["r.yaml:3", "training.outptu"],
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_key_gives_its_reason(name):
    assert refused({name: True}).startswith(f"r.yaml:1: training.{name}: the kit does not take this key: ")
    assert name not in allowed_names()


@pytest.mark.parametrize("name", REMOVED)
def test_every_removed_name_gives_its_successor(name):
    assert REMOVED[name] in refused({name: True})


@on_pinned_version
def test_the_tables_of_names_fit_the_installed_version():
    assert set(REFUSED) <= set(installed_arguments())
    assert not set(REMOVED) & set(installed_arguments())


def test_raw_text_explains_what_yaml_made_of_it(message):
    found = message("training: {eval_strategy: no}\n")
    assert "found `no`, which YAML reads as the boolean false; expected one of `no`, `steps`, `epoch`" in found
    assert 'write "no" in quotes' in found
    assert 'r.yaml:6: training.learning_rate: found the text "1e-4"; expected a number; remove the quotes' in (
        message("training:\n  learning_rate: '1e-4'\n")
    )


def test_contradictions_name_the_other_place(write, message):
    write("training: {num_train_epochs: 3}\n", "base.yaml")
    found = message("extends: base.yaml\ntraining: {max_steps: 5}\n", whole=True)
    assert "r.yaml:2: training.max_steps: contradicts `num_train_epochs` (base.yaml:5)" in found
