"""One W&B run with the whole history, no secret and no text of the corpus in it; never the end of a training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from kit.recipe.loading import load_recipe
from kit.recipe.tracking import WandbSection
from kit.run import train
from kit.tracking import DEFAULT_PROJECT, WandbTracker
from tests.material import documents
from tests.offline_wandb import _records, read_runs

ROOT = Path(__file__).parents[1]
TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2,
}  # fmt: skip


@pytest.fixture
def go(write_recipe, tmp_path, monkeypatch):
    """A function that trains with a `tracking.wandb` section and returns the run directory and the recipe's path."""
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_TAGS", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)

    def run(**section):
        recipe = write_recipe(training=TRAINING, tracking={"wandb": section})
        train(str(recipe), [])
        return tmp_path / "run", recipe

    return run


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_records(folder):
    """Return the records that say what the run is called and where it belongs."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in folder.rglob("*.wandb"):
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                found.append(record.run)
    return found


def test_run_holds_config_history_and_scorecard(go):
    folder, recipe = go(tags=["a", "b"], group="some-group")
    runs = read_runs(folder)
    assert len(runs) == 1
    [(run_id, run)] = runs.items()
    assert run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert run.parts == 1
    assert run.config == load_recipe(recipe).model_dump(mode="json")
    entries = history(folder)
    assert len(entries) == 4 + 2 + 1  # steps, evaluations, the summary
    expected = []
    for entry in entries:
        step = entry.pop("step")
        names = {k: f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}" for k in entry}
        expected.append({**{names[key]: value for key, value in entry.items()}, "train/global_step": step})
    assert run.history == expected
    card = json.loads((folder / "scorecard.json").read_text())
    assert run.summary == {
        f"scorecard/{name}/{when}/{figure}": value
        for name, scores in card["sets"].items()
        for when, figures in scores.items()
        for figure, value in figures.items()
    }


def test_every_figure_is_drawn_over_training_steps(go):
    from wandb.proto import wandb_internal_pb2

    folder, _ = go()
    axes = {}
    for data in _records(next(folder.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    assert axes["*"] == "train/global_step"


def test_names_of_the_recipe(go):
    folder, _ = go(project="my-project", entity="my-team", group="my-group", tags=["t1"])
    run = run_records(folder)[0]
    assert (run.project, run.entity, run.run_group) == ("my-project", "my-team", "my-group")
    assert list(run.tags) == ["t1"]
    assert run.display_name == "run"  # the name of the run directory


def test_names_that_nobody_gives(go):
    assert run_records(go()[0])[0].project == DEFAULT_PROJECT


def test_environment_wins_over_the_recipe(go, monkeypatch):
    wandb.teardown()  # it reads its variables once for each process
    monkeypatch.setenv("WANDB_PROJECT", "env-project")
    monkeypatch.setenv("WANDB_NAME", "env-name")
    monkeypatch.setenv("WANDB_RUN_GROUP", "env-group")
    monkeypatch.setenv("WANDB_TAGS", "e1,e2")
    folder, _ = go(project="my-project", group="my-group", tags=["t1"])
    run = run_records(folder)[0]
    assert (run.project, run.display_name, run.run_group) == ("env-project", "env-name", "env-group")
    assert list(run.tags) == ["e1", "e2"]
    monkeypatch.undo()
    wandb.teardown()


def test_disabled_leaves_no_trace(go, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    folder, _ = go(mode="disabled")
    assert (folder / "scorecard.json").is_file()
    assert not list(folder.rglob("*wandb*"))
    assert "W&B" not in capsys.readouterr().out


def test_disabled_by_the_environment(go, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    folder, _ = go(mode="offline")
    assert not list(folder.rglob("*wandb*"))


def test_without_a_section_nothing_is_tracked(write_recipe, tmp_path):
    train(str(write_recipe()), [])
    assert not list((tmp_path / "run").rglob("*wandb*"))


def fail(*args, **kwargs):
    raise ConnectionError("the server\nis on fire")


@pytest.mark.parametrize("target", [(wandb, "init"), (wandb.Run, "log"), (wandb.Run, "finish")], ids=lambda t: t[1])
def test_a_failure_is_a_warning(go, monkeypatch, capsys, target):
    monkeypatch.setattr(*target, fail)
    folder, _ = go()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    assert len(history(folder)) == 7
    out = capsys.readouterr().out
    assert "warning: W&B: ConnectionError: the server is on fire; training goes on without it" in out
    assert out.count("on fire") == 1
    monkeypatch.undo()
    wandb.teardown()


def test_only_the_main_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tracker = WandbTracker(WandbSection(), tmp_path, "name")
    tracker.start({})
    tracker.send([{"step": 1, "loss": 1.0}])
    tracker.summarise({"sets": {"domain": {"after": {"bits_per_byte": 1.0}}}})
    tracker.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_no_secret_and_no_text_leaves_the_process(write_recipe, tmp_path):
    """Keys of the environment, and the corpus, in no byte of what a run writes or prints."""
    sentence = "Patient Quartermaine was admitted with a rare syndrome"
    corpus = tmp_path / "private.txt"
    corpus.write_text("\n\n\n".join([*documents(80, seed=6), *(f"{sentence} number {n}" for n in range(20))]))
    secrets = {
        "HF_TOKEN": "hf_" + "Qw7Er5Ty3Ui1Op9As" * 2,
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "MY_DATABASE_PASSWORD": "correct-horse-battery-staple-7391",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIplK7MDENGbPxRfiCYEXAMPLEKEY",
    }
    recipe = write_recipe(
        data={"train": [{"path": str(corpus), "separator": "\n\n\n"}]},
        training=TRAINING,
        evaluation={"prompts": ["the kit"]},
        tracking={"wandb": {"tags": ["t"]}},
    )
    environment = {**os.environ, **secrets, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "kit", "train", str(recipe)]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(read_runs(tmp_path / "run")) == 1
    written = {str(path): path.read_bytes() for path in files}
    written |= {"stdout": result.stdout, "stderr": result.stderr}
    for name, secret in secrets.items():
        assert [place for place, content in written.items() if secret.encode() in content] == [], name
    for place, content in written.items():
        assert b"Quartermaine" not in content, place
    assert b"W&B run" in result.stdout
