"""A folder that holds a run: what the same recipe, or one that differs in a key, means there."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.harness import Fault, run_kit
from tests.material import documents

STEP = "kit.training.trainer:KitTrainer.training_step"


@pytest.fixture
def launch(tmp_path, tiny_models):
    """A function that runs a recipe with overrides in a folder of its own name, and returns exit code and output."""
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
                    "validation": {"fraction": 0.2},
                    "block_size": 64,
                    "store_dir": str(tmp_path / "store"),
                },
                "training": {
                    "num_train_epochs": 2,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "learning_rate": 1e-3,
                    "save_steps": 3,
                    "bf16": False,
                },
            }
        )
    )

    def launch(name, *overrides, fault=None):
        output = tmp_path / f"{name}.log"
        output.write_text("")
        [code] = run_kit(["train", recipe, f"run.output_dir={tmp_path / name}", *overrides], fault=fault, output=output)
        return code, output.read_text()

    return launch


def test_a_run_goes_on_with_another_split_of_the_same_global_batch(launch, tmp_path):
    """What is advised where memory runs out has to be of use to a run that has saved something."""
    assert launch("straight")[0] == 0
    assert launch("cut", fault=Fault(STEP, call=10))[0] == -9
    code, output = launch(
        "cut",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=4",
        "training.gradient_checkpointing=true",
        "training.per_device_eval_batch_size=2",
    )
    assert code == 0
    assert "resuming from" in output
    assert "other settings of the same effect than before" in output
    assert "training.per_device_train_batch_size: 4 -> 2" in output
    straight, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("straight", "cut"))
    for name, tensor in straight.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("training.per_device_train_batch_size=2", "run.global_batch_size: 8 -> 4 (a step would be another place"),
        ("training.learning_rate=2e-3", "training.learning_rate: 0.001 -> 0.002"),
        ("data.block_size=32", "data.block_size: 64 -> 32"),
    ],
)
def test_a_run_does_not_go_on_as_another(launch, override, difference):
    assert launch("cut", fault=Fault(STEP, call=10))[0] == -9
    code, output = launch("cut", override)
    assert code == 2
    assert difference in output
