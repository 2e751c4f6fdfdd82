"""The real launcher: two processes on the CPU give what one gives, and one that believes it is alone is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUMS = {"bits_per_byte": 1e-6, "nats_per_token": 1e-6, "token_accuracy": 1e-3}


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def scorecard(folder):
    return json.loads((folder / "scorecard.json").read_text())["sets"]["domain"]


def test_two_processes_give_what_one_gives(write_recipe, tmp_path):
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    recipe = write_recipe("two", training=training, run={"output_dir": str(tmp_path / "two")})
    result = launch("--config_file", ROOT / "accelerate_configs/cpu_2proc.yaml", "-m", "kit", "train", recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "two/manifest.json").read_text())["topology"]["processes"] == 2
    assert result.stdout.count("Scorecard") == 1  # rank 0 alone prints
    from kit import run

    one = write_recipe(
        "one", training={**training, "per_device_train_batch_size": 4}, run={"output_dir": str(tmp_path / "one")}
    )
    run.train(str(one), [])
    for when in ("before", "after"):
        for figure, tolerance in SUMS.items():
            assert (
                abs(scorecard(tmp_path / "two")[when][figure] - scorecard(tmp_path / "one")[when][figure]) < tolerance
            )
    history = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    for two, alone in zip(*history, strict=True):
        for key in ("loss", "grad_norm"):
            assert two.get(key, 0) == pytest.approx(alone.get(key, 0), rel=1e-5)


def test_user_error_of_the_main_process_ends_every_process_without_a_traceback(write_recipe, tmp_path):
    recipe = write_recipe(data={"train": [{"path": str(tmp_path / "missing.txt")}]})
    from tests.harness import run_kit

    assert run_kit(["train", recipe], processes=2) == [2, 2]


def test_announced_processes_that_do_not_exist_are_refused(write_recipe, tmp_path):
    """With `--cpu --num_processes 2` accelerate starts one process, which would train alone on half the batch."""
    result = launch("--cpu", "--num_processes", 2, "-m", "kit", "train", write_recipe())
    assert result.returncode != 0
    assert "announces 2 processes, accelerate has 1" in result.stderr
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["status"] == "user-error"
