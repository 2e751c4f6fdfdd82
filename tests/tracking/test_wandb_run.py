"""One W&B run with the whole history, no secret and no text of the corpus in it; never the end of a training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from kit.errors import UserError
from kit.recipe.loading import load_recipe
from kit.recipe.tracking import WandbSection
from kit.run import train
from kit.tracking import wandb_run
from kit.tracking.wandb_run import DEFAULT_PROJECT, WandbTracker, tracked
from kit.training.preemption import Preempted
from tests.harness import Fault, run_kit
from tests.history import computed
from tests.material import documents
from tests.offline_wandb import _records, read_runs

ROOT = Path(__file__).parents[2]
TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2,
}  # fmt: skip
HISTORY = [{"step": 1, "loss": 2.5, "epoch": 0.5}, {"step": 1, "eval_domain_bits_per_byte": 1.5, "epoch": 0.5}]
CARD = {"sets": {"domain": {"before": {"bits_per_byte": 2.0}, "after": {"bits_per_byte": 1.5}}}}


@pytest.fixture(autouse=True)
def _no_names_from_outside(monkeypatch):
    for name in ("PROJECT", "ENTITY", "NAME", "TAGS", "RUN_GROUP", "JOB_TYPE", "NOTES", "RUN_ID", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


@pytest.fixture
def go(write_recipe, tmp_path):
    """A function that trains with a `tracking.wandb` section and returns the run directory and the recipe's path."""

    def run(**section):
        recipe = write_recipe(training=TRAINING, tracking={"wandb": section})
        train(str(recipe), [])
        return tmp_path / "run", recipe

    return run


@pytest.fixture
def track(write_recipe, tmp_path):
    """A function that sends a history and a scorecard as a training does, and returns what W&B's files then hold."""

    def run(ends_with=None, history=HISTORY, **section):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        recipe = load_recipe(write_recipe(tracking={"wandb": section}))
        with tracked(recipe, folder) as tracker:
            tracker.send(history)
            if ends_with:
                raise ends_with
            tracker.summarise(CARD)
        return next(iter(read_runs(tmp_path).values()), None)

    return run


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def named(entries):
    """Return entries of `metrics.jsonl` under the names that they have in W&B."""
    for entry in entries:
        step = entry.pop("step")
        names = {k: f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}" for k in entry}
        yield {**{names[key]: value for key, value in entry.items()}, "train/global_step": step}


def test_run_holds_config_history_and_scorecard(go, capsys):
    folder, recipe = go(tags=["a", "b"], group="some-group")
    runs = read_runs(folder)
    assert len(runs) == 1
    [(run_id, run)] = runs.items()
    assert run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert (run.parts, run.exit_codes, run.preempted) == (1, [0], False)
    config = load_recipe(recipe).model_dump(mode="json")
    config["tracking"]["wandb"]["name"] = "recipe"  # the recipe's file
    assert run.config == config
    assert run.facts.display_name == "recipe"
    entries = history(folder)
    assert len(entries) == 4 + 2 + 1  # steps, evaluations, the summary
    assert run.history == list(named(entries))
    card = json.loads((folder / "scorecard.json").read_text())
    assert run.summary == {
        f"scorecard/{name}/{when}/{figure}": value
        for name, scores in card["sets"].items()
        for when, figures in scores.items()
        for figure, value in figures.items()
    }
    [part] = (folder / "wandb").glob("offline-run-*")
    assert capsys.readouterr().out.count(f"wandb sync {part}") == 1


def test_every_figure_is_drawn_over_training_steps(track, tmp_path):
    from wandb.proto import wandb_internal_pb2

    track()
    axes = {}
    for data in _records(next(tmp_path.rglob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    assert axes["*"] == "train/global_step"


SECTION = {
    "project": "my-project", "entity": "my-team", "name": "my-name", "group": "my-group", "job_type": "my-job",
    "tags": ["t1"], "notes": "my notes",
}  # fmt: skip


def facts_of(run):
    facts = run.facts
    names = (facts.project, facts.entity, facts.display_name, facts.run_group, facts.job_type)
    return *names, list(facts.tags), facts.notes


def test_names_of_the_recipe(track):
    assert facts_of(track(**SECTION)) == tuple(SECTION.values())


def test_names_that_nobody_gives(track):
    assert facts_of(track()) == (DEFAULT_PROJECT, "", "run", "", "", [], "")


def test_environment_wins_over_the_recipe(track, tmp_path, monkeypatch):
    wandb.teardown()  # it reads its variables once for each process
    names = {"PROJECT": "p", "ENTITY": "e", "NAME": "n", "RUN_GROUP": "g", "JOB_TYPE": "j", "TAGS": "a,b", "NOTES": "o"}
    (tmp_path / "elsewhere").mkdir()
    for name, value in {**names, "RUN_ID": "abc123", "DIR": str(tmp_path / "elsewhere")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert facts_of(track(**SECTION)) == ("p", "e", "n", "g", "j", ["a", "b"], "o")
    [part] = (tmp_path / "elsewhere/wandb").glob("offline-run-*-abc123")
    assert not (tmp_path / "run/wandb").exists()
    # Of a part elsewhere it is known as well whether it was cut off.
    identity = json.loads((tmp_path / "run/wandb.json").read_text())
    (tmp_path / "run/wandb.json").write_text(json.dumps({**identity, "closed": 0, "parts": []}))
    time.sleep(1)  # a part is named after the second that it began in
    again = track(**SECTION)
    assert (again.parts, len(again.history)) == (1, 2)
    assert not part.exists()
    monkeypatch.undo()
    wandb.teardown()


def test_disabled_leaves_no_trace(go, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    folder, _ = go(mode="disabled")
    assert (folder / "scorecard.json").is_file()
    assert not list(folder.rglob("*wandb*"))
    assert "W&B" not in capsys.readouterr().out


def test_disabled_by_the_environment(track, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(mode="offline") is None
    assert not list(tmp_path.rglob("*wandb*"))


def test_without_a_section_nothing_is_tracked(write_recipe, tmp_path):
    with tracked(load_recipe(write_recipe()), tmp_path) as tracker:
        assert tracker is None
    assert not list(tmp_path.rglob("*wandb*"))


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 2), (Preempted(), 143), (KeyboardInterrupt(), 130), (SystemExit(143), 143), (ValueError(), 1)],
    ids=lambda value: type(value).__name__,
)
def test_exit_code_and_preemption(track, tmp_path, error, code):
    with pytest.raises(type(error)):
        track(ends_with=error)
    [run] = read_runs(tmp_path).values()
    assert run.exit_codes == [code]
    assert run.preempted == (code == 143)
    assert len(run.history) == 2


def fail(*args, **kwargs):
    raise ConnectionError("the server\nis on fire")


def hang(*args, **kwargs):
    time.sleep(30)


CALLS = [(wandb, "init"), (wandb.Run, "define_metric"), (wandb.Run, "log"), (wandb.Run, "finish")]


@pytest.mark.parametrize("breaks", [fail, hang])
@pytest.mark.parametrize("target", CALLS, ids=lambda t: t[1])
def test_a_failure_is_a_warning_and_so_is_a_call_that_never_returns(track, monkeypatch, capsys, target, breaks):
    for name in ("_INIT_S", "_CALL_S", "_FINISH_S"):
        monkeypatch.setattr(wandb_run, name, 2)
    monkeypatch.setattr(*target, breaks)
    track()
    out = capsys.readouterr().out
    why = "ConnectionError: the server is on fire" if breaks is fail else "TimeoutError: no answer within"
    assert out.count(f"warning: W&B: {why}") == 1
    assert "training goes on without it" in out
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.parametrize("what", ["make_tables", "log_artifacts"])
def test_what_cannot_be_sent_beside_the_history_costs_nothing_else(track, monkeypatch, capsys, what):
    monkeypatch.setattr(wandb_run, what, fail)
    run = track(log_model=True)
    assert (len(run.history), run.exit_codes, run.summary) == (2, [0], {
        "scorecard/domain/before/bits_per_byte": 2.0, "scorecard/domain/after/bits_per_byte": 1.5
    })  # fmt: skip
    assert "could not be sent" in capsys.readouterr().out


def test_a_failure_does_not_end_a_training(go, monkeypatch, capsys):
    monkeypatch.setattr(wandb.Run, "log", fail)
    folder, _ = go()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    assert len(history(folder)) == 7
    assert capsys.readouterr().out.count("on fire") == 1
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


def test_one_run_for_two_processes_and_two_attempts_with_nothing_twice(write_recipe, tmp_path):
    """The first attempt is preempted between its evaluations; the second one goes on in the same run."""
    training = {**TRAINING, "per_device_train_batch_size": 2}
    recipe = write_recipe(training=training, tracking={"wandb": {"mode": "offline"}})
    step = Fault("kit.training.trainer:KitTrainer.training_step", 3, signal.SIGTERM, rank=1)
    output = tmp_path / "output.txt"
    assert 143 in run_kit(["train", recipe], 2, step)
    time.sleep(1)  # a part is named after the second that it began in
    assert run_kit(["train", recipe], 2, output=output) == [0, 0]
    runs = read_runs(tmp_path / "run")
    assert len(runs) == 1
    [run] = runs.values()
    assert (run.parts, run.exit_codes, run.preempted) == (2, [143, 0], True)
    assert run.history == list(named(history(tmp_path / "run")))
    assert len(run.history) == 7
    whole = tmp_path / "whole"
    recipe = write_recipe("other", training=training, run={"output_dir": str(whole)})
    assert run_kit(["train", recipe], 2) == [0, 0]
    assert [computed(entry) for entry in run.history] == [computed(entry) for entry in named(history(whole))]
    parts = sorted(map(str, (tmp_path / "run/wandb").glob("offline-run-*")))
    assert f"wandb sync {' '.join(parts)}" in output.read_text()


def _dies_at_the_end():
    from kit import run
    from kit.tracking import wandb_run

    original = run.finish

    def finish(*args, **kwargs):
        if os.environ["RANK"] == "1":
            os._exit(3)
        for _ in range(100):
            time.sleep(0.1)
        return original(*args, **kwargs)

    def slow(self, exit_code=None, of=wandb_run.WandbTracker.finish):
        time.sleep(1)
        of(self, exit_code)

    run.finish, wandb_run.WandbTracker.finish = finish, slow


def test_death_of_another_process_is_no_preemption_and_cuts_nothing_off(write_recipe, tmp_path):
    recipe = write_recipe(
        training={**TRAINING, "per_device_train_batch_size": 2}, tracking={"wandb": {"mode": "offline"}}
    )
    output = tmp_path / "output.txt"
    assert run_kit(["train", recipe], 2, change=_dies_at_the_end, output=output) == [1, 3]
    [run] = read_runs(tmp_path / "run").values()
    assert (run.exit_codes, run.preempted) == ([1], False)
    assert "wandb sync " in output.read_text()


def _signalled_while_it_closes():
    finish = wandb.Run.finish

    def slow(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        finish(self, *args, **kwargs)

    wandb.Run.finish = slow


def test_second_signal_does_not_cut_off_the_end_of_a_preempted_run(write_recipe, tmp_path):
    """A launcher and the other processes send one more."""
    recipe = write_recipe(training=TRAINING, tracking={"wandb": {"mode": "offline"}})
    step = Fault("kit.training.trainer:KitTrainer.training_step", 3, signal.SIGTERM)
    output = tmp_path / "output.txt"
    assert run_kit(["train", recipe], 1, step, change=_signalled_while_it_closes, output=output) == [143]
    assert "wandb sync " in output.read_text()
    assert len(json.loads((tmp_path / "run/wandb.json").read_text())["parts"]) == 1


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
        tracking={"wandb": {"tags": ["t"], "log_data": True}},
    )
    environment = {**os.environ, **secrets, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "kit", "train", str(recipe)]
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    files += [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    [run] = read_runs(tmp_path / "run").values()
    assert list(run.artifacts) == ["recipe-data"]
    assert "samples" not in run.tables
    written = {str(path): path.read_bytes() for path in files}
    written |= {"stdout": result.stdout, "stderr": result.stderr}
    for name, secret in secrets.items():
        assert [place for place, content in written.items() if secret.encode() in content] == [], name
    for place, content in written.items():
        assert b"Quartermaine" not in content, place
    assert b"W&B run" in result.stdout
