"""How many processes a launcher announced is found out, and a process that wrongly believes it is alone is stopped."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kit.errors import UserError
from kit.training.topology import announced_processes, check_topology, describe, from_main_process

ROOT = Path(__file__).parents[2]
ASK = "from kit.training.topology import announced_processes; print(*announced_processes(), sep='|')"
# A launcher that does what accelerate does with `--cpu`: start one process and say nothing in the environment.
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASK!r}], check=True)"


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """A function that starts a launcher of a name and says what a child of it would find out.

    The launcher is a real process; that it is the parent is made up, which saves the child's imports.
    """
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []

    def start(name, *arguments):
        script = tmp_path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("print(flush=True)\ninput()")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, str(script), *arguments], **pipes))
        started[-1].stdout.readline()  # for a moment after it was started a process has no command line yet
        monkeypatch.setattr(psutil.Process, "parent", lambda _: psutil.Process(started[-1].pid))
        return announced_processes()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_child_of_a_launcher(tmp_path):
    script = tmp_path / "bin/accelerate"
    script.parent.mkdir()
    script.write_text(LAUNCHER)
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "launch", "--cpu", "--num_processes", "2", "train.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "2|--num_processes of accelerate launch\n"


def test_world_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert announced_processes() == (6, "WORLD_SIZE")


def test_plain_start(launch):
    assert launch("run.py", "launch", "--num_processes", "2") == (1, "a plain start")


OPTIONS = [["--num_processes", "2"], ["--num_processes=2"], ["--num-processes", "2"], ["--num-processes=2"]]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_command_line_of_accelerate(launch, options):
    """Accelerate takes hyphens as well as underscores."""
    found = launch("bin/accelerate", "launch", "--cpu", *options, "-m", "kit", "train", "recipe.yaml")
    assert found == (2, "--num_processes of accelerate launch")


def test_accelerate_launch_in_one_word(launch):
    assert launch("bin/accelerate-launch", "--num_processes", "3", "train.py")[0] == 3


@pytest.mark.parametrize(("text", "expected"), [("num_processes: 4\n", 4), ("distributed_type: 'NO'\n", 1)])
@pytest.mark.parametrize("option", ["--config_file", "--config-file"])
def test_configuration_file_of_accelerate(launch, tmp_path, option, text, expected):
    file = tmp_path / "two.yaml"
    file.write_text(text)
    assert launch("bin/accelerate", "launch", option, str(file), "train.py") == (expected, str(file))


def test_accelerate_alone_announces_one(launch):
    assert launch("bin/accelerate", "launch", "train.py") == (1, "accelerate launch")


class Arguments:
    """What `check_topology` reads of the training arguments of one process on a CPU."""

    world_size = 1
    n_gpu = 0


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE announces 2 processes, accelerate has 1"):
        check_topology(Arguments())
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_topology(Arguments())


def test_one_process_with_several_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    arguments = Arguments()
    arguments.n_gpu = 2
    with pytest.raises(UserError, match="one process sees 2 GPUs"):
        check_topology(arguments)


def test_description_of_a_single_process(tmp_path):
    import torch
    from transformers import TrainingArguments

    found = describe(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    expected = {
        "processes": 1, "device": "cpu", "threads_per_process": torch.get_num_threads(), "distributed_type": "NO",
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "global_batch_size": 8,
    }  # fmt: skip
    assert found.items() >= expected.items()


def test_alone_everybody_is_the_main_process():
    assert from_main_process(lambda: {"a": 1}) == {"a": 1}
