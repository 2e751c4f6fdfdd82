"""One process that throws, is killed or makes a mistake ends the others within seconds, and the truth is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from kit.training.run_directory import read_status
from tests.failing_kit import fail
from tests.harness import run_kit

ROOT = Path(__file__).parents[2]
# Far beyond what a test waits: a process that the launcher has to end by force is one too many.
GRACE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}
LIMIT_S = 150
STEPS = {"max_steps": 5000, "logging_steps": 1, "save_steps": 5000, "per_device_train_batch_size": 2}


@pytest.fixture(autouse=True)
def _no_process_left(tmp_path):
    """A run that a failed test leaves behind would go on for hours; its recipe's path tells it from all others."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or []):
            process.kill()


def start(recipe, name="cpu_2proc", module="tests.failing_kit", output=None, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **GRACE, **environment}
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", ROOT / f"accelerate_configs/{name}.yaml", "-m", module, "train", recipe]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=output, stderr=output, start_new_session=True
    )


@pytest.fixture
def launch(write_recipe, tmp_path):
    """A function that runs two processes with a fault, and returns what they printed and the run's manifest."""

    def run(fault, **environment):
        recipe, log = write_recipe(training=STEPS), tmp_path / "out.txt"
        with open(log, "w") as file:
            process = start(recipe, output=file, KIT_FAULT=fault, **environment)
            assert process.wait(LIMIT_S) != 0, log.read_text()
        return log.read_text(), json.loads((tmp_path / "run/manifest.json").read_text())

    return run


def tracebacks(out):
    """Count them, the launcher's own apart."""
    return out.count("Traceback (most recent call last)") - 1


@pytest.mark.parametrize(
    ("place", "hangs"),
    [
        ("training", {}),
        pytest.param("before", {}, marks=pytest.mark.slow),
        pytest.param("training", {"KIT_HANGS": "1"}, marks=pytest.mark.slow),
    ],
)
def test_killed_process_ends_the_main_one(launch, tmp_path, place, hangs):
    out, manifest = launch(f"kill 1 {place}", **hangs)
    assert "error: process 1 of 2 died without a word" in out
    assert tracebacks(out) == 0
    assert read_status(tmp_path / "run") == "killed"
    assert manifest["message"].startswith("process 1 of 2 died")


@pytest.mark.parametrize("hangs", [{}, pytest.param({"KIT_HANGS": "1"}, marks=pytest.mark.slow)])
def test_killed_main_process_ends_the_other_one(launch, tmp_path, hangs):
    out, _ = launch("kill 0 training", **hangs)
    assert out.count("process 1 ends, since process 0 of 2 died without a word") == 1
    assert tracebacks(out) == 0
    assert read_status(tmp_path / "run") == "killed"


@pytest.mark.parametrize(
    ("kind", "rank", "place", "error"),
    [
        ("throw", 1, "training", "ValueError: a fault\nof two lines"),
        pytest.param("collective", 0, "before", "RuntimeError: a fault like torch's", marks=pytest.mark.slow),
        pytest.param("collective", 1, "training", "RuntimeError: a fault like torch's", marks=pytest.mark.slow),
    ],
)
def test_traceback_of_the_process_that_threw_comes_first_and_alone(launch, kind, rank, place, error):
    out, manifest = launch(f"{kind} {rank} {place}")
    assert tracebacks(out) == 1
    told = re.search(rf"^process {rank}:\nTraceback.*?^{error}$", out, re.MULTILINE | re.DOTALL)
    assert told
    if rank == 0:
        assert out.index("process 1 ends, since process 0 of 2 raised") > told.start()
    assert (manifest["status"], manifest["message"]) == ("failed", f"process {rank} of 2 raised {error}")


@pytest.mark.parametrize("hangs", [{}, pytest.param({"KIT_HANGS": "1"}, marks=pytest.mark.slow)])
def test_mistake_that_one_process_finds_is_told_once(launch, hangs):
    out, manifest = launch("mistake 1 training", **hangs)
    message = "data.train.0: no such thing\n  but there is another"
    assert out.count(f"error: {message}\n") == 1
    assert tracebacks(out) == 0
    assert (manifest["status"], manifest["message"]) == ("user-error", message)


# ---- without a launcher, which takes less time


def run_two(write_recipe, tmp_path, fault):
    recipe = write_recipe(training=STEPS)
    return run_kit(["train", recipe], 2, change=partial(fail, fault), output=tmp_path / "out.txt", timeout=LIMIT_S)


@pytest.mark.parametrize("kind", ["segfault", "exit"])
def test_crash_and_sudden_end_are_deaths(write_recipe, tmp_path, kind):
    codes = run_two(write_recipe, tmp_path, f"{kind} 1 training")
    assert codes == [1, 0 if kind == "exit" else -signal.SIGSEGV]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["message"].startswith("process 1 of 2 died")


@pytest.mark.parametrize("kind", ["throw", "mistake"])
def test_fault_of_both_is_told_once(write_recipe, tmp_path, kind):
    code = {"throw": 1, "mistake": 2}[kind]
    assert run_two(write_recipe, tmp_path, f"{kind} 0,1 before") == [code, code]
    out = (tmp_path / "out.txt").read_text()
    assert out.count("Traceback") == (kind == "throw")
    assert out.count("error: ") == (kind == "mistake")


def _pause_in_haste(rank):
    from kit.training import peers

    peers._GRACE_S, peers._PATIENCE_S = 0.5, dict.fromkeys(peers._PATIENCE_S, 1.0)
    fail(f"pause {rank} training")


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_is_stopped_or_busy_is_waited_for(write_recipe, tmp_path, rank):
    """It may be paused, wait for a slow disk, or measure for an hour; here for longer than anything is waited for."""
    recipe = write_recipe(training={"max_steps": 3})
    assert run_kit(["train", recipe], 2, change=partial(_pause_in_haste, rank), timeout=LIMIT_S) == [0, 0]
    assert read_status(tmp_path / "run") == "done"


# ---- preemption


def wait_for_step(process, metrics):
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"loss"' in metrics.read_text():
            return
        time.sleep(0.1)
    pytest.fail("no step was trained")


def wait_for_end(folder):
    deadline = time.monotonic() + LIMIT_S
    while read_status(folder) == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    return read_status(folder)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("cpu", signal.SIGTERM),  # of which that launcher dies
        ("cpu_2proc", signal.SIGTERM),
        pytest.param("cpu_2proc", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_launcher_that_ends_preempts_the_run(write_recipe, tmp_path, name, number):
    recipe = write_recipe(training=STEPS)
    with open(tmp_path / "out.txt", "w") as output:
        process = start(recipe, name, "kit", output)
        wait_for_step(process, tmp_path / "run/metrics.jsonl")
        process.send_signal(number)
        process.wait(LIMIT_S)
    assert wait_for_end(tmp_path / "run") == "preempted"
    assert len(list((tmp_path / "run/checkpoints").glob("checkpoint-*/complete.json"))) == 1
    out = (tmp_path / "out.txt").read_text()
    assert "ends, since" not in out


def test_daemon_outlives_who_started_it(write_recipe, tmp_path):
    """`nohup kit train … &` and a logout."""
    recipe = write_recipe(training=STEPS | {"max_steps": 200, "logging_steps": 1})
    command = f"OMP_NUM_THREADS=1 nohup {sys.executable} -m kit train {recipe} >/dev/null 2>&1 &"
    subprocess.run(["sh", "-c", command], cwd=ROOT, check=True)
    deadline = time.monotonic() + LIMIT_S
    while read_status(tmp_path / "run") in ("missing", "running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert read_status(tmp_path / "run") == "done"
