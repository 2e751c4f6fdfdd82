"""A run directory belongs to one run at a time, and its manifest says what became of it."""

import json
import multiprocessing
import os
import signal
import subprocess

import pytest

from kit.errors import UserError
from kit.run import train
from kit.training.run_directory import RunDirectory, RunDirectoryInUse, exit_code, git_state, read_status
from tests.harness import Fault, run_kit

_spawn = multiprocessing.get_context("forkserver")


def _hold(path, pipe):
    directory = RunDirectory(path)
    directory.lock()
    directory.start("recipe: 1\n")
    pipe.send("held")
    pipe.poll(60)
    directory.unlock()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory `run`, and the pipe that lets it go by anything sent."""
    # No event: setting one waits for its sleepers, of which a test kills one.
    pipe, other_end = _spawn.Pipe()
    process = _spawn.Process(target=_hold, args=(tmp_path / "run", other_end))
    process.start()
    other_end.close()
    assert pipe.poll(60)
    yield process, pipe
    process.kill()
    process.join()


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


# ---- the lock


def test_second_run_in_the_same_folder(holder, tmp_path):
    process, pipe = holder
    with pytest.raises(RunDirectoryInUse, match=r"another run is using this folder.*run\.output_dir="):
        RunDirectory(tmp_path / "run").lock()
    assert read_status(tmp_path / "run") == "running"
    pipe.send("let go")
    process.join(60)
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.unlock()


def test_the_loser_leaves_everything_as_it_is(holder, tmp_path, write_recipe):
    before = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(RunDirectoryInUse):
        train(str(write_recipe()), [])
    with pytest.raises(RunDirectoryInUse):
        train(str(write_recipe()), ["run.resume=never"])
    assert (tmp_path / "run/manifest.json").read_bytes() == before
    assert not list(tmp_path.glob("run.*"))


def test_a_kill_releases_the_folder(holder, tmp_path):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert read_status(tmp_path / "run") == "killed"
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.unlock()


def test_the_same_folder_by_another_name(holder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for name in ("../run/", tmp_path / "link", "."):
        with pytest.raises(RunDirectoryInUse):
            RunDirectory(name).lock()


def test_the_working_directory_can_be_a_run(tmp_path, monkeypatch):
    """`.` has no name to put the lock's beside."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    directory = RunDirectory(".")
    directory.lock()
    directory.start("recipe: 1\n")
    directory.end("done")
    directory.unlock()
    assert read_status(".") == "done"


def test_unlocking_twice_is_no_error(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.unlock()
    directory.unlock()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run\.output_dir: .*cannot be written"):
        RunDirectory(tmp_path / "run").lock()


def test_other_processes_of_a_run_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.start("recipe: 1\n")
    directory.note(data="key")
    directory.end("done")
    directory.move_aside()
    directory.unlock()
    assert list(tmp_path.iterdir()) == []


# ---- earlier runs


def test_earlier_runs_are_kept_under_numbers(tmp_path):
    for text in ("first", "second", "third"):
        directory = RunDirectory(tmp_path / "run")
        directory.lock()
        directory.move_aside()
        directory.start("task: causal-lm")
        (directory.path / "scorecard.json").write_text(text)
        directory.unlock()
    found = {path.parent.name: path.read_text() for path in tmp_path.glob("run*/scorecard.json")}
    assert found == {"run.1": "first", "run.2": "second", "run": "third"}


def test_an_empty_folder_is_not_moved(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.move_aside()
    directory.unlock()
    assert not (tmp_path / "run.1").exists()


def test_never_resumes_but_keeps_the_old_run(write_recipe, tmp_path):
    recipe = str(write_recipe())
    train(recipe, [])
    first = (tmp_path / "run/scorecard.json").read_bytes()
    train(recipe, ["run.resume=never", "training.max_steps=1"])
    assert (tmp_path / "run.1/scorecard.json").read_bytes() == first
    assert (tmp_path / "run.1/model/model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-1"]
    assert manifest(tmp_path / "run")["attempts"] == 1


# ---- the manifest


def test_manifest_of_a_run(write_recipe, tmp_path):
    import torch
    import transformers

    train(str(write_recipe()), [])
    found = manifest(tmp_path / "run")
    assert found["status"] == "done"
    assert found["attempts"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["topology"]["processes"] == 1
    assert found["topology"]["device"] == "cpu"
    assert found["precision"] == "fp32 (recipe)"
    assert found["parameters"] == 320 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64
    assert found["reloaded_logits_differ_by"] == 0.0
    assert len(found["data"]) == len(found["model"]) == 32
    assert found["started"] <= found["ended"]
    assert set(found["git"] or {"commit", "dirty"}) == {"commit", "dirty"}


def test_a_resumed_run_counts_its_attempts(write_recipe, tmp_path):
    recipe = write_recipe()
    fault = Fault("kit.training.trainer:KitTrainer.training_step", 2, signal.SIGTERM)
    assert run_kit(["train", recipe], fault=fault) == [143]
    first = manifest(tmp_path / "run")
    assert (first["status"], first["attempts"]) == ("preempted", 1)
    train(str(recipe), [])
    second = manifest(tmp_path / "run")
    assert (second["status"], second["attempts"], second["started"]) == ("done", 2, first["started"])


def test_status_of_a_run_that_is_killed_and_goes_on(write_recipe, tmp_path):
    recipe = write_recipe()
    assert read_status(tmp_path / "run") == "missing"
    fault = Fault("kit.training.trainer:KitTrainer.training_step", 2, signal.SIGKILL)
    assert run_kit(["train", recipe], fault=fault) == [-9]
    assert read_status(tmp_path / "run") == "killed"
    train(str(recipe), [])
    assert read_status(tmp_path / "run") == "done"


def test_status_after_a_mistake_of_the_user(write_recipe, tmp_path):
    with pytest.raises(UserError) as error:
        train(str(write_recipe(data={"block_size": 65})), [])
    assert read_status(tmp_path / "run") == "user-error"
    assert manifest(tmp_path / "run")["message"] == str(error.value)
    train(str(write_recipe()), [])
    assert read_status(tmp_path / "run") == "done"
    assert "message" not in manifest(tmp_path / "run")


def _fail():
    from kit.training.trainer import KitTrainer

    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("a fault of ours")

    KitTrainer.compute_loss = broken


def test_status_after_a_fault_of_ours(write_recipe, tmp_path):
    assert run_kit(["train", write_recipe()], change=_fail) == [1]
    assert read_status(tmp_path / "run") == "failed"
    assert manifest(tmp_path / "run")["message"] == "ZeroDivisionError: a fault of ours"


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_status_of_a_broken_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert read_status(tmp_path) == "missing"


@pytest.mark.parametrize(
    ("status", "code"),
    [("done", 0), ("user-error", 2), ("preempted", 143), ("failed", 1), ("killed", 1), ("running", 1), ("missing", 1)],
)
def test_exit_code_of_a_status(status, code):
    assert exit_code(status) == code


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state()["dirty"] is True


def test_manifest_adds_up_the_seconds_of_all_attempts_by_stage(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kit.training.run_directory.time.monotonic", lambda: now[0])
    for expected in ({"training": 5.0, "evaluation": 3.0}, {"training": 10.0, "evaluation": 6.0}):
        directory = RunDirectory(tmp_path / "run")
        directory.start("recipe: 1\n")
        with directory.timed("training"):
            now[0] += 4
            with directory.timed("evaluation"):
                now[0] += 3
            now[0] += 1
        now[0] += 100  # of no stage
        directory.note(step=4)
        manifest = json.loads((tmp_path / "run/manifest.json").read_text())
        assert manifest["seconds"] == expected
    directory = RunDirectory(tmp_path / "run")
    directory.start("recipe: 1\n")
    assert directory.read_manifest()["seconds"] == expected
    assert directory.read_manifest()["step"] == 4


def test_manifest_repeats_the_launch_without_its_secrets(tmp_path, monkeypatch):
    class Launcher:
        def cmdline(self):
            return [
                "/usr/bin/python3", "/usr/bin/accelerate", "launch", "--config_file", "a b.yaml", "--hub_token",
                "hunter2", "-m", "kit", "train", "r.yaml", "x.password=tr0ub4dor", "s3cret-value-1",
                "model.eos_token=<eos>",
            ]  # fmt: skip

    monkeypatch.setattr("kit.training.run_directory.launcher", Launcher)
    monkeypatch.setenv("MY_API_KEY", "s3cret-value-1")
    directory = RunDirectory(tmp_path / "run")
    directory.start("recipe: 1\n")
    assert directory.read_manifest()["command"] == (
        "accelerate launch --config_file 'a b.yaml' --hub_token '***' -m kit train r.yaml 'x.password=***' '***' "
        "'model.eos_token=<eos>'"
    )
