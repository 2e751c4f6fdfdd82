"""A run goes on from the newest checkpoint that is whole and its own, and says what it leaves behind."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from kit.errors import UserError
from kit.run import train
from kit.training.checkpoints import (
    checkpoints_newest_first,
    choose_checkpoint,
    complete_checkpoint,
    discard_after,
)
from tests.history import read_history

SETTINGS = {"world_size": 1, "training.learning_rate": 0.1, "model.dtype": "a"}
FINGERPRINTS = {"recipe": SETTINGS, "data": "d1"}


@pytest.fixture
def make(tmp_path):
    """A function that writes a checkpoint of a step, with or without its marker."""

    def checkpoint(step, complete=True, world_size=1, **fingerprints):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(200)))
        (folder / "optimizer.pt").write_bytes(b"state" * step)
        if complete:
            complete_checkpoint(folder, step, world_size, {**FINGERPRINTS, **fingerprints})
        return folder

    return checkpoint


def choose(folder, resume="auto", data="d1", **settings):
    path, differences = choose_checkpoint(resume, folder, {"recipe": {**SETTINGS, **settings}, "data": data})
    assert differences == []
    return path


def flip_a_byte(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(199)))


def lose_a_file(folder):
    (folder / "optimizer.pt").unlink()


def break_the_marker(folder):
    text = (folder / "complete.json").read_text()
    (folder / "complete.json").write_text(text[: len(text) // 2])


# ---- the choice


def test_newest_by_number_not_by_name(make, tmp_path):
    for step in (9, 100, 20):
        make(step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200.tmp").mkdir()
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == [
        "checkpoint-100", "checkpoint-20", "checkpoint-9",
    ]  # fmt: skip
    assert choose(tmp_path).name == "checkpoint-100"


def test_incomplete_one_is_passed_over(make, tmp_path):
    make(10)
    make(20, complete=False)
    assert choose(tmp_path).name == "checkpoint-10"
    assert choose(tmp_path, "must").name == "checkpoint-10"


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lose_a_file, break_the_marker])
def test_damaged_one_is_passed_over_aloud(make, tmp_path, damage, capsys):
    make(10)
    damage(make(20))
    assert choose(tmp_path).name == "checkpoint-10"
    assert "checkpoint-20 is damaged" in capsys.readouterr().out


def test_nothing_to_choose(make, tmp_path):
    assert choose(tmp_path) is None
    assert choose(tmp_path / "not there") is None
    make(10, complete=False)
    assert choose(tmp_path) is None
    with pytest.raises(UserError, match=rf"run\.resume: `must` .*{tmp_path} holds none"):
        choose(tmp_path, "must")


def test_never(make, tmp_path):
    make(10)
    assert choose(tmp_path, "never") is None


def test_by_path(make, tmp_path):
    make(20)
    assert choose(tmp_path, str(make(10))).name == "checkpoint-10"


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file, break_the_marker])
def test_by_path_nothing_else_will_do(make, tmp_path, damage):
    make(10)
    folder = make(20)
    damage(folder)
    with pytest.raises(UserError, match="is no complete checkpoint"):
        choose(tmp_path, str(folder))


def test_by_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        choose(tmp_path, "checkpoint-7")
    assert "`checkpoint-7`: no such folder" in str(error.value)
    assert str(tmp_path / "checkpoint-7") in str(error.value)


@pytest.mark.parametrize("by", ["auto", "must", "path"])
@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"world_size": 2}, ["world_size: 1 -> 2", "`run.resume_with: [world_size]`", "run.resume=never"]),
        (
            {"training.learning_rate": 0.2},
            ["another recipe", "training.learning_rate: 0.1 -> 0.2", "run.resume=never", "run.output_dir="],
        ),
        ({"data": "d2"}, ["other data", "run.resume=never"]),
    ],
)
def test_of_another_run(make, tmp_path, by, now, words):
    """An older checkpoint of the same run would not do either: it is the folder that belongs to something else."""
    make(5)
    newest = make(10)
    with pytest.raises(UserError) as error:
        choose(tmp_path, str(newest) if by == "path" else by, **now)
    assert all(word in str(error.value) for word in words), error.value


SCHEDULE = {"training.lr_scheduler_type": "reduce_lr_on_plateau"}


@pytest.mark.parametrize(
    ("settings", "names", "named", "refused"),
    [
        ({}, [], [], []),
        ({"world_size": 2}, ["world_size"], ["world_size: 1 -> 2"], []),
        ({"training.learning_rate": 0.2}, ["world_size"], [], ["training.learning_rate"]),
        ({"run.early_stopping.patience": 1}, ["run.early_stopping"], ["run.early_stopping.patience: unset -> 1"], []),
        ({"run.early_stopping.patience": 1}, ["run.early"], [], ["run.early_stopping.patience"]),
        ({"model.dtype": "b", "world_size": 2}, ["world_size"], [], ['model.dtype: "a" -> "b" (it says what the']),
        ({"run.global_batch_size": 8}, ["run.global_batch_size"], [], ["run.global_batch_size: unset -> 8 (a step"]),
        (SCHEDULE, ["training.lr_scheduler_type"], [], ["follows the loss (`reduce_lr_on_plateau`)"]),
    ],
    ids=str,
)
def test_differences_that_are_named_and_others(make, tmp_path, settings, names, named, refused):
    now = {"recipe": {**SETTINGS, **settings}, "data": "d1"}
    path = make(5)
    if refused:
        with pytest.raises(UserError) as error:
            choose_checkpoint("auto", tmp_path, now, names)
        assert all(words in str(error.value) for words in refused), error.value
    else:
        chosen, found = choose_checkpoint("auto", tmp_path, now, names)
        assert chosen == path
        assert len(found) == len(named)
        assert all(line.startswith(words) for line, words in zip(found, named, strict=True))


def test_a_name_of_what_does_not_differ_is_told(make, tmp_path, capsys):
    make(5)
    now = {"recipe": {**SETTINGS, "world_size": 2}, "data": "d1"}
    choose_checkpoint("auto", tmp_path, now, ["training.learning_rate", "world_size"])
    output = capsys.readouterr().out
    assert "differs as `run.resume_with` allows:\n  world_size: 1 -> 2\n" in output
    assert output.endswith("checkpoint-5 in training.learning_rate\n")


# ---- what is left behind


def test_what_lies_beyond_is_discarded_aloud(make, tmp_path, capsys):
    make(5)
    kept = make(10)
    make(15)
    make(20, complete=False)
    discard_after(kept, tmp_path)
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == ["checkpoint-10", "checkpoint-5"]
    lines = capsys.readouterr().out.splitlines()
    assert "checkpoint-20: incomplete" in lines[0]
    assert "checkpoint-15: beyond the checkpoint resumed from" in lines[1]


def test_fresh_start_discards_them_all(make, tmp_path):
    make(5, complete=False)
    (tmp_path / "notes.txt").write_text("mine")
    discard_after(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---- in a run


@pytest.fixture
def stopped(write_recipe, tmp_path):
    """A run of six steps, saved at each, as it would be if it had been killed before its end; and its recipe."""
    steps = {"max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "save_steps": 1, "logging_steps": 1}
    recipe = str(write_recipe(training=steps))
    train(recipe, [])
    run = tmp_path / "run"
    finished = {"scorecard": (run / "scorecard.json").read_bytes(), "history": read_history(run)}
    finished["model"] = load_file(run / "model/model.safetensors")
    (run / "scorecard.json").unlink()
    shutil.rmtree(run / "model")
    return recipe, run, finished


def assert_finished_alike(run, finished):
    assert (run / "scorecard.json").read_bytes() == finished["scorecard"]
    assert read_history(run) == finished["history"]
    weights = load_file(run / "model/model.safetensors")
    assert all(weights[name].equal(tensor) for name, tensor in finished["model"].items())


def test_damaged_newest_checkpoint(stopped, capsys):
    recipe, run, finished = stopped
    flip_a_byte(run / "checkpoints/checkpoint-6")
    lose_a_file(run / "checkpoints/checkpoint-5")
    train(recipe, ["run.resume=must"])
    output = capsys.readouterr().out
    assert "checkpoint-6 is damaged" in output
    assert "resuming from" in output
    assert "checkpoint-4" in output.partition("resuming from")[2].splitlines()[0]
    assert_finished_alike(run, finished)


def test_resume_from_a_path(stopped, capsys):
    recipe, run, finished = stopped
    train(recipe, [f"run.resume={run / 'checkpoints/checkpoint-2'}"])
    assert f"resuming from {run / 'checkpoints/checkpoint-2'}" in capsys.readouterr().out
    assert_finished_alike(run, finished)


def test_resume_from_a_checkpoint_elsewhere(stopped, tmp_path):
    recipe, run, finished = stopped
    shutil.copytree(run / "checkpoints/checkpoint-3", tmp_path / "elsewhere/checkpoint-3")
    source = tmp_path / "elsewhere/checkpoint-3"
    train(recipe, [f"run.resume={source}", f"run.output_dir={tmp_path / 'other'}"])
    assert_finished_alike(tmp_path / "other", finished)
    assert (source / "complete.json").is_file()


def test_must_without_a_checkpoint(write_recipe, tmp_path):
    with pytest.raises(UserError, match=r"run\.resume: `must`"):
        train(str(write_recipe()), ["run.resume=must"])
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "user-error"


def test_corpus_changed_in_place(write_recipe, corpus_file, tmp_path):
    corpus = tmp_path / "own.txt"
    shutil.copy(corpus_file, corpus)
    recipe = str(write_recipe(data={"train": [{"path": str(corpus), "separator": "\n\n\n"}]}))
    train(recipe, [])
    (tmp_path / "run/scorecard.json").unlink()
    corpus.write_text(corpus.read_text() + "\n\n\none more document")
    with pytest.raises(UserError, match="written with other data"):
        train(recipe, [])
