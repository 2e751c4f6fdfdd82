"""What the kit decides beside the recipe's `training` section, and what it refuses before a model is loaded."""

import pytest
import torch
from transformers import TrainingArguments

from kit.errors import UserError
from kit.model import precision
from kit.recipe.models import CausalLmRecipe
from kit.tasks import causal_lm
from kit.training import arguments as arguments_module
from kit.training.arguments import make_training_arguments


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function from a recipe's sections to its training arguments and the line about precision."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def arguments(training=None, validation=True, sets=None, **run):
        data = {"train": [{"path": "a.txt"}], "validation": {"fraction": 0.1} if validation else None}
        recipe = CausalLmRecipe(
            task="causal-lm",
            model={"name_or_path": "gpt2"},
            data=data,
            training=training or {},
            evaluation={"sets": sets or {}},
            run=run,
        )
        return make_training_arguments(recipe, causal_lm, tmp_path / "checkpoints")

    return arguments


@pytest.fixture
def refusal(make):
    def message(*args, **keys):
        with pytest.raises(UserError) as error:
            make(*args, **keys)
        return str(error.value)

    return message


EVALUATES = {"eval_strategy": "steps", "eval_steps": 5}

# ---- what the recipe says is what Trainer gets


def test_values_of_the_recipe_arrive(make):
    values = {
        "learning_rate": 1.25e-4, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "weight_decay": 0.07, "warmup_steps": 7, "seed": 11, "optim": "adafactor", "gradient_accumulation_steps": 3,
        "label_smoothing_factor": 0.1, "save_total_limit": 2, "logging_steps": 4,
    }  # fmt: skip
    args, _ = make({**values, "bf16": False})
    assert {name: getattr(args, name) for name in values} == values


def test_what_the_kit_leaves_out_is_transformers_default(make):
    args, _ = make({"bf16": False})
    default = TrainingArguments(use_cpu=True, dataloader_pin_memory=False, output_dir=args.output_dir)
    decided = {
        "logging_nan_inf_filter", "remove_unused_columns", "disable_tqdm", "metric_for_best_model", "greater_is_better",
    }  # fmt: skip
    different = {n for n, v in default.to_dict().items() if args.to_dict()[n] != v}
    # transformers' default of `disable_tqdm` follows how quiet the libraries were told to be.
    assert different | {"disable_tqdm"} == decided


def test_a_loss_of_nan_is_not_hidden(make):
    assert make()[0].logging_nan_inf_filter is False


def test_checkpoints_stay_where_they_are_whatever_the_working_directory(make, tmp_path, monkeypatch):
    assert make()[0].output_dir == str(tmp_path / "checkpoints")


# ---- the global batch


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(1, 4, 6), (2, 4, 3), (3, 8, 1), (6, 1, 4)])
def test_accumulation_follows_from_the_global_batch(make, monkeypatch, processes, batch, accumulation):
    # Only arithmetic is asked here: no process waits for another one.
    monkeypatch.setattr(arguments_module, "announced_processes", lambda: (processes, "WORLD_SIZE"))
    given = {"per_device_train_batch_size": batch}
    assert make(given, global_batch_size=24)[0].gradient_accumulation_steps == accumulation
    both = {**given, "gradient_accumulation_steps": accumulation}
    assert make(both, global_batch_size=24)[0].gradient_accumulation_steps == accumulation


def test_a_global_batch_that_cannot_be(refusal, monkeypatch):
    monkeypatch.setattr(arguments_module, "announced_processes", lambda: (5, "WORLD_SIZE"))
    message = refusal({"per_device_train_batch_size": 4}, global_batch_size=36)
    assert "found 36, which is no multiple of 4 rows (`training.per_device_train_batch_size`) × 5 processes" in message
    assert message.endswith("each alone: `run.global_batch_size`: 20 or 40; processes: 3 or 9")
    message = refusal({"per_device_train_batch_size": 4}, global_batch_size=15)
    assert message.endswith("`run.global_batch_size`: 20; `training.per_device_train_batch_size`: 3")


def test_a_global_batch_and_another_accumulation_contradict_each_other(refusal):
    message = refusal({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, global_batch_size=16)
    assert "found 16, but 4 rows (`training.per_device_train_batch_size`) × 1 process × 3" in message
    assert "= 12; leave the latter out" in message


# ---- precision


@pytest.mark.parametrize(
    ("training", "bf16", "words"),
    [
        ({"bf16": True}, True, "bf16 (recipe)"),
        ({"bf16": False}, False, "fp32 (recipe)"),
        ({"fp16": False}, False, "fp32 (recipe)"),
    ],
)
def test_precision_of_the_recipe(make, training, bf16, words):
    args, line = make({**training, "use_cpu": True})
    assert (args.bf16, args.fp16, line) == (bf16, False, words)


@pytest.mark.parametrize("unit", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
@pytest.mark.parametrize("has_it", [True, False])
def test_precision_of_the_machine(make, monkeypatch, unit, has_it):
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, unit, lambda: has_it, raising=False)
    args, line = make({"use_cpu": True})
    assert args.bf16 is has_it
    assert args.fp16 is False
    assert line.startswith("bf16 (the CPU has " if has_it else "fp32 (the CPU")


@pytest.mark.parametrize(("instructions", "library"), [(True, True), (False, True), (True, False)])
def test_precision_of_an_arm_machine(make, monkeypatch, instructions, library):
    """Instructions that no library uses multiply nothing: torch for macOS has no oneDNN."""
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    args, line = make({"use_cpu": True})
    assert args.bf16 is (instructions and library)
    assert "Arm's BF16 matrix products" in line


def test_use_cpu_asks_the_cpu_although_there_is_a_gpu(make, monkeypatch):
    """On a GPU machine the GPU's abilities would decide for a run that does not touch it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: pytest.fail("asked the GPU"))
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert precision.supports_bf16(use_cpu=True) == (True, "the CPU has AMX")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is refused on CPUs only")
def test_a_launch_file_that_asks_for_the_cpu_is_heard(make, monkeypatch):
    """Trainer tells accelerate what it wants itself, and would take the GPU."""
    monkeypatch.setattr("kit.training.arguments.has_accelerator", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args, _ = make()
    assert args.use_cpu


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_shards_that_a_launch_file_asks_for_on_a_cpu(refusal, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    assert "FSDP and DeepSpeed are ignored on CPUs" in refusal()


@pytest.mark.parametrize("training", [{"fp16": True}, {"fp16": True, "use_cpu": True}])
def test_fp16_on_a_cpu(refusal, training):
    assert refusal(training).startswith("training.fp16: ")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_of_the_launch_file(make, refusal, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    message = refusal()
    assert f"mixed_precision to {precision}" in message
    assert "training.bf16" in message
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make()


# ---- evaluation, best model, early stopping


def test_early_stopping_without_evaluations(refusal):
    assert "run.early_stopping needs evaluations" in refusal(early_stopping={})


def test_best_model_without_evaluations(refusal):
    message = refusal({"load_best_model_at_end": True, "save_strategy": "no"})
    assert "load_best_model_at_end" in message


def test_evaluations_of_nothing(make, refusal):
    assert "`data.validation` or `evaluation.sets`" in refusal(EVALUATES, validation=False)
    make(EVALUATES, validation=False, sets={"general": {"path": "b.txt"}})
    make(validation=False)


def test_early_stopping_counts_on_after_a_resume(make):
    args, _ = make(EVALUATES, early_stopping={"patience": 2})
    assert args.restore_callback_states_from_checkpoint


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (None, "domain_bits_per_byte"),
        ({"medical": {"split": "validation"}, "general": {"path": "b.txt"}}, "medical_bits_per_byte"),
        ({"general": {"path": "b.txt"}, "medical": {"split": "validation"}}, "general_bits_per_byte"),
    ],
)
def test_default_metric_is_the_first_sets_bits_per_byte(make, sets, expected):
    args, _ = make(EVALUATES, sets=sets)
    assert args.metric_for_best_model == f"eval_{expected}"
    assert args.greater_is_better is False


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("figure", causal_lm.LOGGED_FIGURES)
def test_direction_follows_the_metric(make, prefix, figure):
    metric = f"{prefix}domain_{figure}"
    args, _ = make({**EVALUATES, "metric_for_best_model": metric})
    assert args.metric_for_best_model == f"eval_domain_{figure}"
    assert args.greater_is_better is (figure == "token_accuracy")


@pytest.mark.parametrize(
    ("metric", "near"),
    [("domain_bit_per_byte", "domain_bits_per_byte"), ("eval_domain_perplexty", "domain_perplexity")],
)
def test_unknown_metric_names_the_nearest(refusal, metric, near):
    message = refusal({**EVALUATES, "metric_for_best_model": metric})
    assert f"`{metric}`" in message
    assert f"did you mean `{near}`" in message


def test_metric_of_a_set_that_is_not_there(refusal):
    sets = {"medical": {"split": "validation"}}
    message = refusal({**EVALUATES, "metric_for_best_model": "loss"}, sets=sets)
    assert "valid: medical_bits_per_byte" in message


@pytest.mark.parametrize(("figure", "wrong"), [("bits_per_byte", True), ("token_accuracy", False)])
def test_direction_that_contradicts_the_metric(make, refusal, figure, wrong):
    training = {**EVALUATES, "metric_for_best_model": f"domain_{figure}"}
    message = refusal({**training, "greater_is_better": wrong})
    assert f"training.greater_is_better: found {wrong}" in message
    make({**training, "greater_is_better": not wrong})


def test_what_transformers_refuses_is_one_line(refusal):
    message = refusal({"optim": "no_such_optimizer"})
    assert message.startswith("training: ")
    assert "\n" not in message
