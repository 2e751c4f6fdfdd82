"""`kit train` from recipe to scorecard: what it writes, what it repeats, what it refuses."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit import run
from kit.errors import UserError
from kit.recipe.loading import load_recipe
from kit.tasks import causal_lm
from tests.harness import run_kit
from tests.history import read_history
from tests.material import documents

EVALUATED = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 1}


def read(path):
    return json.loads(Path(path).read_text())


@pytest.fixture
def general_file(tmp_path):
    path = tmp_path / "general.txt"
    path.write_text("\n".join(documents(8, seed=9, longest=20)))
    return path


def test_run_directory_holds_everything(write_recipe, general_file, tmp_path):
    recipe = write_recipe(
        training=EVALUATED,
        evaluation={
            "sets": {"domain": {"split": "validation"}, "general": {"path": str(general_file), "sample_by": "line"}},
            "prompts": ["the kit", "tensor"],
            "generation": {"max_new_tokens": 4},
        },
    )
    run.train(str(recipe), [])
    folder = tmp_path / "run"
    names = {"recipe.yaml", "manifest.json", "checkpoints", "model", "metrics.jsonl", "scorecard.json", "ledger.json"}
    assert names | {"samples.json"} == {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert all((path / "complete.json").is_file() for path in (folder / "checkpoints").iterdir())
    manifest = read(folder / "manifest.json")
    assert manifest["status"] == "done"
    assert manifest["topology"]["processes"] == 1
    assert manifest["reloaded_logits_differ_by"] == 0.0
    scorecard = read(folder / "scorecard.json")
    assert list(scorecard["sets"]) == ["domain", "general"]
    for scores in scorecard["sets"].values():
        for figure in ("bits_per_byte", "nats_per_token", "token_accuracy"):
            assert scores["delta"][figure] == scores["after"][figure] - scores["before"][figure]
        assert scores["before"]["bytes"] == scores["after"]["bytes"]
    assert [sample["prompt"] for sample in read(folder / "samples.json")] == ["the kit", "tensor"]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    last = [entry for entry in history if "eval_domain_bits_per_byte" in entry][-1]
    assert last["eval_domain_bits_per_byte"] == scorecard["sets"]["domain"]["after"]["bits_per_byte"]


def test_scorecard_does_not_depend_on_batch_size_or_evaluations_on_the_way(write_recipe, tmp_path):
    scores = []
    for name, changes in (
        ("a", {"per_device_eval_batch_size": 1}),
        ("b", {"per_device_eval_batch_size": 16}),
        ("c", {**EVALUATED, "max_steps": 2, "eval_steps": 1}),
    ):
        run.train(str(write_recipe(name, training=changes, run={"output_dir": str(tmp_path / name)})), [])
        scores.append(read(tmp_path / name / "scorecard.json")["sets"]["domain"])
    for other in scores[1:]:
        for when in ("before", "after"):
            assert abs(other[when]["bits_per_byte"] - scores[0][when]["bits_per_byte"]) < 1e-6


def test_model_loads_with_from_pretrained_alone_and_gives_the_same_figures(write_recipe, tmp_path):
    recipe = write_recipe(training={"max_steps": 3})
    run.train(str(recipe), [])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.use_cache is True
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run/model")) <= model.config.vocab_size
    run.evaluate(str(tmp_path / "run"), [], None, str(tmp_path / "again.json"))
    after = read(tmp_path / "run/scorecard.json")["sets"]["domain"]["after"]
    assert read(tmp_path / "again.json")["sets"]["domain"] == after


def test_the_loss_falls(write_recipe, tmp_path):
    run.train(str(write_recipe(training={"max_steps": 40, "learning_rate": 1e-2})), [])
    domain = read(tmp_path / "run/scorecard.json")["sets"]["domain"]
    assert domain["after"]["bits_per_byte"] < 0.8 * domain["before"]["bits_per_byte"]


def test_resolved_recipe_repeats_the_run(write_recipe, tmp_path):
    run.train(str(write_recipe()), ["training.max_steps=3", "training.seed=7"])
    resolved = tmp_path / "run/recipe.yaml"
    assert load_recipe(resolved).training["max_steps"] == 3
    assert load_recipe(resolved).run.output_dir == str(tmp_path / "run")
    run.train(str(resolved), [f"run.output_dir={tmp_path / 'again'}"])
    assert read(tmp_path / "again/scorecard.json") == read(tmp_path / "run/scorecard.json")
    assert read_history(tmp_path / "again") == read_history(tmp_path / "run")
    weights = "model/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "txt.gz"])
def test_a_run_on_any_format_can_be_measured_and_repeated_from_its_folder(write_recipe, tmp_path, suffix):
    """The recipe that it keeps names every default; none of them may contradict the format."""
    texts = documents(60, seed=4)
    path = tmp_path / f"corpus.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif suffix == "txt.gz":
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
    else:
        path.write_text("text\n" + "\n".join(texts) + "\n")
    source = {"path": str(path), **({"sample_by": "line"} if suffix == "txt.gz" else {})}
    recipe = write_recipe(data={"train": [source], "validation": {"fraction": 0.2}})
    run.train(str(recipe), [])
    run.evaluate(str(tmp_path / "run"), [], None, str(tmp_path / "figures.json"))
    figures = read(tmp_path / "figures.json")["sets"]["domain"]["bits_per_byte"]
    assert figures == read(tmp_path / "run/scorecard.json")["sets"]["domain"]["after"]["bits_per_byte"]
    run.train(str(tmp_path / "run/recipe.yaml"), [f"run.output_dir={tmp_path / 'again'}"])
    assert read(tmp_path / "again/scorecard.json") == read(tmp_path / "run/scorecard.json")


def _other_text_on_rank_1():
    """What a file that grows between one process and the next comes to."""
    import os

    from kit.data import corpus

    original = corpus.read_documents
    if os.environ["RANK"] == "1":
        corpus.source_fingerprint = lambda source: "another"
        corpus.read_documents = lambda source: [*original(source), "one document more"]


def test_processes_with_different_data_are_refused(write_recipe, tmp_path):
    output = tmp_path / "output"
    recipe = write_recipe()
    assert run_kit(["train", recipe], processes=2, change=_other_text_on_rank_1, output=output) == [2, 2]
    assert output.read_text().count("the processes do not have the same data: process 1 has another") == 1


def test_finished_run_is_not_run_again(write_recipe, tmp_path, capsys):
    recipe = str(write_recipe())
    run.train(recipe, [])
    changed = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    run.train(recipe, [])
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == changed


def test_another_recipe_is_refused_and_the_old_run_stays(write_recipe, tmp_path):
    recipe = str(write_recipe())
    run.train(recipe, [])
    before = read(tmp_path / "run/scorecard.json")
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 -> 0\.002"):
        run.train(recipe, ["training.learning_rate=0.002"])
    # The manifest tells of the run that is there, not of the attempt to put another in its place.
    assert read(tmp_path / "run/manifest.json")["status"] == "done"
    assert read(tmp_path / "run/scorecard.json") == before


def test_a_folder_that_is_no_run_is_left_alone(write_recipe, tmp_path):
    for name, resume in (("thesis.txt", "never"), ("recipe.yaml", "auto")):
        folder = tmp_path / resume
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="is no run directory"):
            run.train(str(write_recipe()), [f"run.output_dir={folder}", f"run.resume={resume}"])
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"


def test_changed_data_or_model_under_a_finished_run_is_noticed(write_recipe, tmp_path):
    corpus = tmp_path / "parts"
    corpus.mkdir()
    (corpus / "a.txt").write_text("\n\n\n".join(documents(40, seed=4)))
    data = {"train": [{"path": str(corpus / "*.txt"), "separator": "\n\n\n"}]}
    recipe = str(write_recipe(data=data))
    run.train(recipe, [])
    (corpus / "b.txt").write_text("\n\n\n".join(documents(10, seed=8)))
    with pytest.raises(UserError, match="data or base model have changed"):
        run.train(recipe, [])


def test_run_that_begins_again_is_not_taken_for_finished(write_recipe, tmp_path, monkeypatch):
    recipe = str(write_recipe(training=EVALUATED))
    run.train(recipe, [])
    from_two = f"run.resume={tmp_path / 'run/checkpoints/checkpoint-2'}"
    monkeypatch.setattr(run, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train(recipe, [from_two])
    assert not (tmp_path / "run/scorecard.json").exists()


def test_prepare_leaves_another_recipes_run_alone(write_recipe, tmp_path):
    recipe = str(write_recipe())
    run.train(recipe, [])
    ledger = (tmp_path / "run/ledger.json").read_text()
    with pytest.raises(UserError, match=r"data\.block_size: 32 -> 16"):
        run.prepare(recipe, ["data.block_size=16"])
    assert (tmp_path / "run/ledger.json").read_text() == ledger


def test_diverged_training_ends_with_one_message(write_recipe, tmp_path):
    changes = ["training.learning_rate=1e30", "training.max_grad_norm=0", "training.logging_steps=1"]
    with pytest.raises(UserError, match=r"step \d: the (loss|gradient) is no number"):
        run.train(str(write_recipe(training={"max_steps": 6})), changes)
    assert not (tmp_path / "run/model").exists()
    assert read(tmp_path / "run/manifest.json")["status"] == "user-error"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.lr_scheduler_kwargs={foo: 1}", "training.lr_scheduler_type: TypeError"),
        ("training.optim=lomo", "training.optim: ImportError"),
        ("training.report_to=[comet_ml]", "training.report_to: RuntimeError"),
        ("training.fsdp=full_shard", "FSDP and DeepSpeed are ignored on CPUs|fsdp"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_long(write_recipe, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        run.train(str(write_recipe()), [change])
    assert not (tmp_path / "store").exists()


def test_resume_never_keeps_the_old_run_aside(write_recipe, tmp_path):
    recipe = str(write_recipe())
    run.train(recipe, [])
    before = read(tmp_path / "run/scorecard.json")
    run.train(recipe, ["run.resume=never", "training.learning_rate=0.01"])
    assert read(tmp_path / "run.1/scorecard.json") == before
    assert read(tmp_path / "run/scorecard.json") != before


def test_resume_must_needs_a_checkpoint(write_recipe):
    with pytest.raises(UserError, match="`must` needs a complete checkpoint"):
        run.train(str(write_recipe()), ["run.resume=must"])


def test_resume_from_a_path_goes_on_from_that_checkpoint(write_recipe, tmp_path):
    recipe = str(write_recipe(training=EVALUATED))
    run.train(recipe, [])
    from_two = tmp_path / "run/checkpoints/checkpoint-2"
    run.train(recipe, [f"run.resume={from_two}", f"run.output_dir={tmp_path / 'second'}"])
    assert read(tmp_path / "second/scorecard.json") == read(tmp_path / "run/scorecard.json")
    assert not (tmp_path / "second/checkpoints/checkpoint-2").exists()


def test_changed_data_is_not_resumed(write_recipe, tmp_path):
    source = tmp_path / "own.txt"
    source.write_text("\n".join(documents(40, seed=4)))
    data = {"train": [{"path": str(source), "sample_by": "line"}]}
    recipe = str(write_recipe(data=data, training=EVALUATED))
    run.train(recipe, [])
    (tmp_path / "run/scorecard.json").unlink()
    source.write_text("\n".join(documents(41, seed=4)))
    with pytest.raises(UserError, match="other data"):
        run.train(recipe, [])


def test_prepared_run_tokenises_and_measures_nothing_again(write_recipe, tmp_path, monkeypatch):
    recipe = str(write_recipe())
    run.prepare(recipe, [])
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    measured = []
    original = causal_lm.evaluate
    monkeypatch.setattr(causal_lm, "evaluate", lambda *args: measured.append(args) or original(*args))
    run.train(recipe, [])
    assert len(measured) == 1  # after
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()} == stored


def test_text_that_is_measured_is_not_trained_on(write_recipe, corpus_file, tmp_path):
    leaked = corpus_file.read_text().split("\n\n\n")[3]
    (tmp_path / "leak.txt").write_text(leaked)
    sets = {"sets": {"domain": {"split": "validation"}, "leaked": {"path": str(tmp_path / "leak.txt")}}}
    recipe = str(write_recipe(evaluation=sets))
    run.train(recipe, ["data.max_dropped=0.2"])
    [row] = read(tmp_path / "run/ledger.json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert row["dropped"] == {"also in evaluation": len(tokenizer(leaked)["input_ids"]) + 1}
    assert row["read"] == row["trained"] + row["context"] + sum(row["dropped"].values())


def test_dropping_more_than_allowed_is_refused(write_recipe, corpus_file, tmp_path):
    half = corpus_file.read_text().split("\n\n\n")[::2]
    (tmp_path / "half.txt").write_text("\n\n\n".join(half))
    sets = {"sets": {"domain": {"path": str(tmp_path / "half.txt"), "separator": "\n\n\n"}}}
    with pytest.raises(UserError, match=r"would not be trained on \(also in evaluation: [\d,]+\); at most 1\.0%"):
        run.train(str(write_recipe(evaluation=sets, data={"validation": None})), [])


@pytest.mark.parametrize("packing", [True, False])
def test_no_validation_at_all_still_trains(write_recipe, packing, tmp_path):
    run.train(str(write_recipe(data={"validation": None, "packing": packing})), [])
    assert read(tmp_path / "run/scorecard.json")["sets"] == {}


def test_activation_checkpointing_changes_nothing(write_recipe, tmp_path):
    results = []
    for name, on in (("off", False), ("on", True)):
        training = {"max_steps": 3, "activation_checkpointing": on}
        run.train(str(write_recipe(name, training=training, run={"output_dir": str(tmp_path / name)})), [])
        results.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict())
    for key, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][key], atol=1e-6), key
