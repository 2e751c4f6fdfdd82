"""A run that was killed and resumed ends bit-identical to one that was not, wherever and however it was killed."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.harness import Fault, run_kit
from tests.history import computed, read_history
from tests.material import documents
from tests.offline_wandb import read_runs

TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "bf16": False,
}

NEVER_STOPS = {"patience": 50}

PREPARATION = "kit.data.store:_write_store"
BEFORE = "kit.evaluation.language_modeling:_score"
STEP = "kit.training.trainer:KitTrainer.training_step"
EVALUATION = "kit.training.trainer:KitTrainer._poll"
SAVE = "transformers:Trainer._save_optimizer_and_scheduler"
MARKER = "kit.training.checkpointing:complete_checkpoint"
ROTATION = "kit.training.checkpointing:rotate_checkpoints"
EXPORT = "kit.stages:save_model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A function that runs the recipe of this module in a folder, and one that gives the uninterrupted result."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n\n".join(documents(20, seed=3)))

    def launch(folder, processes, fault=None, early_stopping=NEVER_STOPS, resume="auto", **changes):
        batch = TRAINING["per_device_train_batch_size"] // processes
        recipe = {
            "task": "causal-lm",
            # Dropout draws random numbers in every step: their state must be resumed too.
            "model": {
                "from_config": {
                    "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32,
                    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
                },
                "tokenizer": {"vocab_size": 300},
            },
            "data": {
                "train": [{"path": str(corpus), "separator": "\n\n\n"}],
                "validation": {"fraction": 0.2},
                "block_size": 32,
                "store_dir": str(folder / "store"),
            },
            "training": {**TRAINING, "per_device_train_batch_size": batch, **changes},
            "evaluation": {"prompts": ["the kit"], "generation": {"max_new_tokens": 8}},
            "run": {"early_stopping": early_stopping, "output_dir": str(folder / "run"), "resume": resume},
            "tracking": {"wandb": {"mode": "offline"}},
        }  # fmt: skip
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return run_kit(["train", path], processes, fault)

    results = {}

    def reference(processes, **changes):
        key = (processes, str(sorted(changes.items())))
        if key not in results:
            folder = tmp_path_factory.mktemp("reference")
            assert launch(folder, processes, **changes) == [0] * processes
            results[key] = folder / "run"
        return results[key]

    return launch, reference


BY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
STOPPED_EARLY = {"early_stopping": {"patience": 1, "threshold": 10.0}}
UNMEASURED = {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping": None}

CASES = [
    (1, Fault("kit.training.run_directory:write_text", 1, signal.SIGKILL), {}),
    (1, Fault(PREPARATION, 1, signal.SIGKILL), {}),
    (1, Fault(BEFORE, 1, signal.SIGTERM), {}),
    (1, Fault(STEP, 13, signal.SIGKILL), {}),
    (1, Fault(STEP, 13, signal.SIGTERM), {}),
    (1, Fault(EVALUATION, 2, signal.SIGKILL), {}),
    (1, Fault(EVALUATION, 2, signal.SIGTERM), {}),
    (1, Fault(SAVE, 2, signal.SIGKILL), {}),
    (1, Fault(SAVE, 2, signal.SIGTERM), {}),
    (1, Fault(MARKER, 2, signal.SIGKILL), {}),
    (1, Fault(ROTATION, 2, signal.SIGKILL), {}),
    (1, Fault(EXPORT, 1, signal.SIGKILL), {}),
    (1, Fault(EXPORT, 1, signal.SIGKILL), STOPPED_EARLY),
    (1, Fault(EVALUATION, 1, signal.SIGTERM), STOPPED_EARLY),
    (1, Fault("kit.stages:Run.measure_all", 1, signal.SIGTERM), UNMEASURED),
    (2, Fault(STEP, 13, signal.SIGKILL, rank=1), {}),
    (2, Fault(STEP, 13, signal.SIGTERM, rank=1), {}),
    (2, Fault(EVALUATION, 2, signal.SIGTERM, rank=0), {}),
    (2, Fault(SAVE, 2, signal.SIGKILL, rank=0), {}),
    (2, Fault(PREPARATION, 1, signal.SIGTERM, rank=0), {}),
]
CASES += [
    (1, Fault(EVALUATION, 2, signal.SIGTERM), BY_EPOCH),
    (1, Fault(STEP, 18, signal.SIGTERM), BY_EPOCH),
]


@pytest.mark.parametrize(("processes", "fault", "changes"), CASES, ids=lambda value: getattr(value, "target", None))
def test_resumed_run_equals_uninterrupted_one(finished, tmp_path, processes, fault, changes):
    launch, reference = finished
    expected = reference(processes, **changes)
    codes = launch(tmp_path, processes, fault, **changes)
    if fault.signal == signal.SIGTERM:
        assert 143 in codes
        manifest = json.loads((tmp_path / "run/manifest.json").read_text())
        saved = [int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")]
        assert (manifest["status"], manifest.get("step", 0)) == ("preempted", max(saved, default=0))
    else:
        assert -signal.SIGKILL in codes
    assert launch(tmp_path, processes, **changes) == [0] * processes
    assert_equal_runs(tmp_path / "run", expected)
    assert_one_wandb_run(tmp_path / "run", expected)


def test_preempted_fresh_start_goes_on_with_the_same_command(finished, tmp_path):
    """`never` begins afresh once; the same command after a preemption must not begin again."""
    launch, reference = finished
    assert launch(tmp_path, 1) == [0]
    assert launch(tmp_path, 1, Fault(STEP, 13, signal.SIGTERM), resume="never") == [143]
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    assert launch(tmp_path, 1, Fault(STEP, 1), resume="never") == [-signal.SIGKILL]
    assert sorted((tmp_path / "run/checkpoints").iterdir()) == saved
    assert launch(tmp_path, 1, resume="never") == [0]
    assert_equal_runs(tmp_path / "run", reference(1))
    assert (tmp_path / "run.1/scorecard.json").is_file()
    assert not (tmp_path / "run.2").exists()


def assert_equal_runs(found, expected):
    assert read_history(found) == read_history(expected)
    assert json.loads((found / "scorecard.json").read_text()) == json.loads((expected / "scorecard.json").read_text())
    assert (found / "samples.json").read_text() == (expected / "samples.json").read_text()
    assert_equal_tensors(load_file(found / "model/model.safetensors"), load_file(expected / "model/model.safetensors"))
    names = sorted(p.name for p in (expected / "checkpoints").iterdir())
    assert sorted(p.name for p in (found / "checkpoints").iterdir()) >= names
    last = max(names, key=lambda name: int(name.split("-")[1]))
    old, new = (folder / "checkpoints" / last for folder in (expected, found))
    assert_equal_tensors(load_file(new / "model.safetensors"), load_file(old / "model.safetensors"))
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_equal_nested(*(torch.load(folder / name, weights_only=True) for folder in (new, old)))
    state, wanted = (json.loads((folder / "trainer_state.json").read_text()) for folder in (new, old))
    for key in ("best_metric", "best_global_step", "epoch", "global_step", "total_flos"):
        assert state[key] == wanted[key], key
    assert [computed(entry) for entry in state["log_history"]] == [computed(entry) for entry in wanted["log_history"]]


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_equal_nested(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_nested(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal_nested(a, b)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def assert_one_wandb_run(found, expected):
    runs, wanted = read_runs(found), read_runs(expected)
    assert len(runs) == len(wanted) == 1
    [run], [uninterrupted] = runs.values(), wanted.values()
    assert [computed(entry) for entry in run.history] == [computed(entry) for entry in uninterrupted.history]
    assert run.config == {**uninterrupted.config, "run": run.config["run"], "data": run.config["data"]}
    assert run.summary == uninterrupted.summary
