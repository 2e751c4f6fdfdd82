"""The trackers of `report_to`: they get what is logged, once, in the run directory; a failing one ends nothing."""

import json
import sys
import types
from pathlib import Path

import pytest
from transformers.integrations import integration_utils

from kit.run import train
from kit.tracking.reporters import settle_reporters
from tests.harness import run_kit

TRAINING = {
    "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "logging_steps": 1, "report_to": "tensorboard",
    "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip


def write_scalars_as_lines():
    """Put a writer in the place of TensorBoard's, which need not be installed."""

    class SummaryWriter:
        def __init__(self, log_dir):
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self.path = Path(log_dir) / "scalars"

        def _line(self, *entry):
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")

        def add_scalar(self, name, value, step):
            self._line(name, value, step)

        def add_text(self, name, text, step=None):
            self._line(name, text, step)

        def flush(self):
            pass

        close = flush

    for name in ("tensorboardX", "torch.utils.tensorboard"):
        sys.modules[name] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    integration_utils.is_tensorboard_available = lambda: True


def test_tensorboard_gets_each_figure_once_from_two_processes(write_recipe, tmp_path):
    recipe = write_recipe(training=TRAINING)
    assert run_kit(["train", recipe], 2, change=write_scalars_as_lines) == [0, 0]
    [file] = tmp_path.rglob("scalars")
    assert file.parent == tmp_path / "run/tensorboard"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    history = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [[entry["loss"], entry["step"]] for entry in history if "loss" in entry]
    assert len(losses) == 2
    assert [[value, step] for name, value, step in lines if name == "train/loss"] == losses
    evaluated = [entry["eval_domain_bits_per_byte"] for entry in history if "eval_domain_bits_per_byte" in entry]
    assert [value for name, value, _ in lines if name == "eval/domain_bits_per_byte"] == evaluated


def fail(*args, **kwargs):
    raise ConnectionError("no server")


def test_a_tracker_that_fails_is_told_once_and_not_asked_again(monkeypatch, capsys, tmp_path):
    calls = []

    class Writes(integration_utils.MLflowCallback):
        def __init__(self):
            pass

        def on_train_begin(self, *args, **kwargs):
            calls.append("begin")
            fail()

        def on_log(self, *args, **kwargs):
            calls.append("log")

        def __del__(self):
            pass

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Writes)
    tracker = Writes()
    settle_reporters([tracker], tmp_path)
    tracker.on_train_begin(None, None, None)
    tracker.on_log(None, None, None)
    assert calls == ["begin"]
    out = capsys.readouterr().out
    assert out.count("Writes: ConnectionError: no server; training goes on without it") == 1


@pytest.mark.parametrize("name", ["tensorboard", "clearml"])
def test_a_missing_package_is_named(write_recipe, monkeypatch, name):
    from kit.errors import UserError

    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    with pytest.raises(UserError, match=rf"training\.report_to: .*{name}"):
        train(str(write_recipe(training={**TRAINING, "report_to": name})), [])
