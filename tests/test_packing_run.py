"""Whole runs on best-fit rows, and on an attention kernel of packed rows in the place of flash-attention's."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.harness import Fault, run_kit

STEP = "kit.training.trainer:KitTrainer.training_step"
TRAINING = {
    "max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1,
    "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-3, "bf16": False,
}  # fmt: skip


def put_stand_in():
    """Let the kit find flash-attention for two rows and more on this CPU; it is computed document by document."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from kit.model import attention
    from tests.model.test_attention import GPU, varlen_attention

    ALL_ATTENTION_FUNCTIONS._global_mapping["flash_attention_2"] = varlen_attention
    attention.circumstances = lambda model, args: replace(GPU, installed=frozenset({"flash_attention_2"}))


@pytest.fixture
def train(write_recipe, tmp_path):
    """A function that trains on best-fit rows in a folder of its own, and returns the folder."""

    def train(name, packing="best-fit", processes=1, codes=(0,), **how):
        rows = TRAINING["per_device_train_batch_size"] // processes
        recipe = write_recipe(
            name,
            data={"packing": packing},
            training={**TRAINING, "per_device_train_batch_size": rows},
            run={"output_dir": str(tmp_path / name)},
        )
        assert run_kit(["train", recipe], processes, **how) == list(codes) * processes
        return tmp_path / name

    return train


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_on_best_fit_rows_is_resumed_to_the_same_bits(train):
    whole = train("whole")
    train("killed", fault=Fault(STEP, 4), codes=(-9,))
    resumed = train("killed")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name])
    [row] = json.loads((whole / "ledger.json").read_text())
    [as_chain] = json.loads((train("chain", packing=True) / "ledger.json").read_text())
    assert (row["read"], row["trained"]) == (as_chain["read"], as_chain["trained"])
    assert row["cut"] < as_chain["cut"]
    assert row["padding"] <= 0.01 * (row["trained"] + row["padding"])


def test_two_processes_share_best_fit_rows_as_one_reads_them(train):
    one, two = train("one"), train("two", processes=2)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=2e-4)


def test_a_run_through_a_kernel_without_a_mask_comes_to_the_same(train, tmp_path):
    """From the trial to the saved model, whose logits are compared with SDPA, as it is loaded by everybody else."""
    masked, unmasked = train("masked"), train("unmasked", change=put_stand_in, output=tmp_path / "output")
    assert "attention: flash_attention_2 for packed rows, without a mask; sdpa for all else" in (
        tmp_path / "output"
    ).read_text().replace("\n", " ")
    for name, tensor in weights(masked).items():
        assert torch.allclose(tensor, weights(unmasked)[name], atol=2e-4)
    config = json.loads((unmasked / "model" / "config.json").read_text())
    assert config == json.loads((masked / "model" / "config.json").read_text())
