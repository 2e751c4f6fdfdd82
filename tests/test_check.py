"""`kit check` shows what training then does, finds what it would refuse, and leaves nothing behind."""

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from kit import run
from kit.check import check
from kit.data.corpus import EvaluationDocuments
from kit.errors import UserError
from kit.tasks import causal_lm_examples
from kit.training.run_directory import RunDirectory
from kit.training.trainer import KitTrainer
from tests.harness import Fault, run_kit
from tests.history import read_history
from tests.material import documents

EVALUATED = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
SET = {"sets": {"domain": {"split": "validation"}}}


def files_below(folder):
    """Every file with size and time, the token stores' apart: those are what a check may leave."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if "store" not in path.relative_to(folder).parts
    }


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def plan_shown(out):
    """Return what the plan says: tokens per step, steps per epoch, steps, evaluations, checkpoints."""
    numbers = [
        re.search(r"= ([\d,]+) tokens per optimizer step; [\d,]+ rows = ([\d,]+) steps per epoch", out),
        re.search(r"([\d,]+) steps = [\d.]+ epochs", out),
        re.search(r"([\d,]+) evaluations and ([\d,]+) checkpoints", out),
    ]
    return [int(n.replace(",", "")) for match in numbers for n in match.groups()]


# ---- what it shows


def test_shows_documents_ledger_model_and_plan(write_recipe, corpus_file, tmp_path, capsys):
    check(str(write_recipe(training={"gradient_accumulation_steps": 2, "max_steps": 30})), [])
    out = capsys.readouterr().out
    # Its first training document, token by token, from the context token to EOS.
    shown = out[out.index("with `│` between tokens") :].splitlines()[1].strip()
    context, *pieces, end = shown.split("│")
    assert context == end == "<eos>"
    text = "".join(pieces)
    beginning = text.split(" … ")[0]
    assert len(pieces) > 3
    assert any(document.startswith(beginning) for document in corpus_file.read_text().split("\n\n\n"))
    assert "Token ledger" in out
    assert re.search(r"GPT2LMHeadModel: [\d,]+ parameters, [\d,]+ train \(100\.0%\); tied embeddings", out)
    assert "4 × 2 rows × 32 tokens = 256 tokens per optimizer step" in out
    assert plan_shown(out)[2] == 30
    assert "activations" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["Größe naïve 中文字 ☃ the kit", "\tif x:\n\t\treturn 'é'"])
def test_pieces_of_a_document_joined_are_the_document(tiny_models, text):
    """Decoded one by one, parts of a character would show as replacement characters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models())
    ids = tokenizer(text)["input_ids"]
    pieces = causal_lm_examples._pieces(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_end_of_text_inside_of_the_text_is_warned_of(write_recipe, tmp_path, capsys):
    corpus = tmp_path / "own.txt"
    corpus.write_text("\n\n\n".join([*documents(80, seed=4), "one <eos> two <eos> three"]))
    check(str(write_recipe(data={"train": [{"path": str(corpus), "separator": "\n\n\n"}], "validation": None})), [])
    assert "the text holds <eos> 2 times" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [1, 2])
def test_another_form_than_that_of_the_chat_is_warned_of_once(write_recipe, tmp_path, processes):
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("\n".join(json.dumps({"q": text, "a": text[::-1]}) for text in documents(80, seed=4)))
    source = {"path": str(corpus), "template": "<|user|> {q} <|assistant|> {a}"}
    recipe = write_recipe(
        data={"train": [source]},
        training={"per_device_train_batch_size": 2},
        vocabulary={
            "special_tokens": ["<|user|>", "<|assistant|>"],
            "roles": {"user": "<|user|>", "assistant": "<|assistant|>"},
        },
    )
    chat = "<|user|>{q}<|assistant|>{a}"
    for template, warnings in ((source["template"], 1), (chat, 0)):
        output = tmp_path / f"{warnings}.txt"
        args = ["check", recipe, f'data.train.0.template="{template}"']
        assert run_kit(args, processes=processes, output=output) == [0] * processes
        out = output.read_text()
        said = f"the template writes '{source['template']}', the chat template '{chat}'"
        assert (out.count(said), out.count("the template writes")) == (warnings, warnings)


def test_set_with_an_empty_part_is_shown(write_recipe, tmp_path, capsys):
    """Of two validation files `max_documents` may leave none of one."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(documents(6, seed=ord(name), longest=9)))
    files = [{"path": str(tmp_path / f"{name}.txt"), "sample_by": "line"} for name in "ab"]
    sets = {"sets": {"domain": {"split": "validation", "max_documents": 1}}}
    check(str(write_recipe(data={"validation": files}, evaluation=sets)), [])
    assert "evaluation set `domain`): 1 documents" in capsys.readouterr().out


class Boundaries(TrainerCallback):
    """Counts what a training really does."""

    def on_train_begin(self, *args, **kwargs):
        self.done = {"steps": 0, "evaluations": 0}

    def on_step_end(self, args, state, control, **kwargs):
        self.done["steps"] += 1
        self.done["most"] = state.max_steps

    def on_evaluate(self, *args, **kwargs):
        self.done["evaluations"] += 1


PLANS = [
    {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
    {"num_train_epochs": 0.4, "max_steps": None},
    {"num_train_epochs": 1.5, "max_steps": None, "eval_strategy": "epoch", "save_strategy": "epoch",
     "per_device_train_batch_size": 32, "gradient_accumulation_steps": 2},
    {"num_train_epochs": 2, "max_steps": None, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 3,
     "eval_strategy": "steps", "eval_steps": 0.3, "save_strategy": "no"},
    {"max_steps": 5, "per_device_train_batch_size": 64, "eval_strategy": "epoch", "eval_delay": 1, "save_steps": 2,
     "save_total_limit": None},
]  # fmt: skip


@pytest.mark.parametrize("training", PLANS, ids=lambda plan: ",".join(f"{k}={v}" for k, v in plan.items())[:60])
def test_plan_is_what_training_does(write_recipe, tmp_path, monkeypatch, capsys, training):
    recipe = str(write_recipe(training=training, evaluation=SET))
    check(recipe, [])
    tokens, _, steps, evaluations, checkpoints = plan_shown(capsys.readouterr().out)
    boundaries, saved, rows = Boundaries(), [], []
    init, save, step = KitTrainer.__init__, KitTrainer._save_checkpoint, KitTrainer.training_step

    def initialise(self, *args, callbacks, **kwargs):
        init(self, *args, callbacks=[*callbacks, boundaries], **kwargs)

    monkeypatch.setattr(KitTrainer, "__init__", initialise)
    monkeypatch.setattr(KitTrainer, "_save_checkpoint", lambda self, *a: saved.append(1) or save(self, *a))
    monkeypatch.setattr(
        KitTrainer,
        "training_step",
        lambda self, model, batch, *a: (
            rows.append((self.state.global_step, batch["input_ids"].numel())) or step(self, model, batch, *a)
        ),
    )
    run.train(recipe, [])
    assert boundaries.done == {"steps": steps, "evaluations": evaluations, "most": steps}
    assert len(saved) == checkpoints
    assert sum(size for at, size in rows if at == 0) == tokens


def test_two_processes_show_and_do_the_same(write_recipe, tmp_path):
    recipe = write_recipe(training={"num_train_epochs": 0.5, "max_steps": None, "gradient_accumulation_steps": 2})
    assert run_kit(["check", recipe], processes=2, output=tmp_path / "out.txt") == [0, 0]
    out = (tmp_path / "out.txt").read_text()
    tokens, _, steps, _, _ = plan_shown(out)
    assert tokens == 4 * 2 * 2 * 32
    assert out.count("nothing found that would stop it") == 1
    assert not (tmp_path / "run").exists()
    assert run_kit(["train", recipe], processes=2) == [0, 0]
    state = json.loads(sorted((tmp_path / "run/checkpoints").glob("*/trainer_state.json"))[-1].read_text())
    assert (state["global_step"], state["max_steps"]) == (steps, steps)


# ---- what it leaves


@pytest.mark.parametrize("options", [[], ["--probe"]])
def test_nothing_is_left_and_training_is_the_same_afterwards(write_recipe, tmp_path, options):
    """To the last bit: neither the model nor the order of rows nor the random numbers of a run know of it."""
    changes = {
        "training": EVALUATED,
        "data": {"store_dir": str(tmp_path / "one/store")},
        "run": {"output_dir": str(tmp_path / "one/run")},
    }
    recipe = write_recipe(**changes)
    before = files_below(tmp_path)
    assert run_kit(["check", recipe, *options]) == [0]
    left = files_below(tmp_path)
    left.pop("one", None)
    before.pop("one", None)
    assert left == before
    assert not list(tmp_path.rglob(".probe-*"))
    assert run_kit(["train", recipe]) == [0]
    other = [f"run.output_dir={tmp_path / 'two/run'}", f"data.store_dir={tmp_path / 'two/store'}"]
    assert run_kit(["train", recipe, *other]) == [0]
    assert read_history(tmp_path / "one/run") == read_history(tmp_path / "two/run")
    for name in ("model/model.safetensors", "scorecard.json", "ledger.json"):
        assert (tmp_path / "one/run" / name).read_bytes() == (tmp_path / "two/run" / name).read_bytes(), name


def test_dry_run_is_a_check(write_recipe, tmp_path, monkeypatch, capsys):
    import sys

    from kit import cli

    monkeypatch.setattr(sys, "argv", ["kit", "train", str(write_recipe()), "--dry-run", "training.max_steps=3"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert plan_shown(out)[2] == 3
    assert "kit train" in out.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_finished_run_stays_as_it_is(write_recipe, tmp_path, capsys):
    recipe = str(write_recipe(training=EVALUATED))
    run.train(recipe, [])
    before = files_below(tmp_path)
    capsys.readouterr()
    check(recipe, [], probe=True)
    assert "holds a run: done: nothing is left to do" in capsys.readouterr().out
    check(recipe, ["run.resume=never", "training.learning_rate=0.5"], probe=True)
    assert files_below(tmp_path) == before


def test_works_beside_a_run_that_holds_the_folder(write_recipe, tmp_path, capsys):
    recipe = str(write_recipe(training=EVALUATED))
    held = RunDirectory(tmp_path / "run")
    held.lock()
    held.start("task: causal-lm\n")
    try:
        before = files_below(tmp_path)
        check(recipe, [], probe=True)
        assert "holds a run: running" in capsys.readouterr().out
        assert files_below(tmp_path) == before
        with pytest.raises(UserError, match="another run is using this folder"):
            run.train(recipe, [])
    finally:
        held.unlock()


@pytest.mark.parametrize(
    "target", ["kit.training.trainer:KitTrainer.training_step", "kit.training.trainer:KitTrainer._save_checkpoint"]
)
def test_failing_probe_leaves_nothing(write_recipe, tmp_path, monkeypatch, target):
    recipe = write_recipe()
    monkeypatch.setattr(KitTrainer, target.rpartition(".")[2], lambda *args, **kwargs: 1 / 0)
    before = files_below(tmp_path)
    with pytest.raises(ZeroDivisionError):
        check(str(recipe), [], probe=True)
    assert not list(tmp_path.rglob(".probe-*"))
    assert files_below(tmp_path) == before


def _fail_in_the_second_step():
    original = KitTrainer.training_step

    def step(self, *args):
        if self.state.global_step == 1 and os.environ["RANK"] == "1":
            raise ZeroDivisionError
        return original(self, *args)

    KitTrainer.training_step = step


def test_probe_that_fails_on_one_of_two_processes_ends_and_leaves_nothing(write_recipe, tmp_path):
    recipe = write_recipe(training={"per_device_train_batch_size": 2})
    assert run_kit(["check", recipe, "--probe"], processes=2, change=_fail_in_the_second_step) == [1, 1]
    assert not list(tmp_path.rglob(".probe-*"))
    assert not (tmp_path / "run").exists()


def test_probe_that_is_ended_from_outside_leaves_nothing(write_recipe, tmp_path):
    fault = Fault("kit.training.trainer:KitTrainer.training_step", 2, signal=15)
    assert run_kit(["check", write_recipe(), "--probe"], fault=fault) == [143]
    assert not list(tmp_path.rglob(".probe-*"))
    assert not (tmp_path / "run").exists()


# ---- the probe


@pytest.fixture(autouse=True)
def _quick_products(monkeypatch):
    """What the matrix products of a probe cost does not belong to a test."""
    monkeypatch.setattr("kit.training.timings._SIZES", (8,))


PROBES = {
    "early stopping": {"training": EVALUATED, "run": {"early_stopping": {"patience": 1}}},
    "best model": {"training": {**EVALUATED, "load_best_model_at_end": True}},
    "save strategy best": {
        "training": {
            **EVALUATED,
            "save_strategy": "best",
            "save_steps": None,
            "metric_for_best_model": "domain_perplexity",
        }
    },
    "warm-up": {"training": {"max_steps": 30, "warmup_steps": 20, "lr_scheduler_type": "cosine"}},
    "stable, then decay": {
        "training": {
            "max_steps": 30,
            "warmup_steps": 3,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 10},
        }
    },
    "plateau": {"training": {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"}},
    "one step": {"training": {"max_steps": 1}},
    "whole epochs": {"training": {"max_steps": None, "num_train_epochs": 2, "eval_strategy": "epoch"}},
    "nothing saved": {"training": {"save_strategy": "no", "eval_strategy": "no"}},
    "nothing measured": {"data": {"validation": None}},
    "resume never": {"run": {"resume": "never"}},
    "W&B": {"tracking": {"wandb": {"mode": "offline"}}},
    "single rows": {"data": {"packing": False}},
    "checkpointing": {"training": {"activation_checkpointing": True}},
    "DDP settings": {"training": {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1}},
    "bf16": {"training": {"bf16": True}},
}


@pytest.mark.parametrize("name", PROBES)
def test_probe_of(write_recipe, tmp_path, capsys, monkeypatch, name):
    measured = []
    first = EvaluationDocuments.first
    monkeypatch.setattr(EvaluationDocuments, "first", lambda self, n: measured.append(n) or first(self, n))
    check(str(write_recipe(**PROBES[name])), [], probe=True)
    out = capsys.readouterr().out
    steps = 1 if name == "one step" else 2
    assert f"probe: {steps} steps (" in out
    assert "gives the same logits" in out
    assert "nothing found that would stop it" in out
    assert bool(measured) == (name != "nothing measured")
    assert not list(tmp_path.rglob(".probe-*"))
    assert not list(tmp_path.rglob("wandb*"))
    assert not (tmp_path / "run").exists()


def test_probe_shows_what_was_taken_and_what_compiling_brings(write_recipe, capsys):
    recipe = str(write_recipe(training={"torch_compile_backend": "eager", "torch_compile": False, "max_steps": 50}))
    check(recipe, [], probe=True, compiles=True)
    out = capsys.readouterr().out
    table = out[out.index("What was taken, and the times behind it") :]
    for shown in ("fp32 (recipe)", "GFLOP/s", "adamw_torch_fused: ", "adamw_torch: ", "sdpa", "compiled: ", "pay"):
        assert shown in table


FUSED = {
    "all": {},
    "frozen blocks": {"freezing": {"trainable": {"last_blocks": 1}}},
    "a rate for each layer": {"freezing": {"layer_decay": 0.5}},
    "new rows": {"vocabulary": {"special_tokens": ["<|new|>"]}, "freezing": {"trainable": {"new_tokens": True}}},
}


@pytest.mark.parametrize(("optim", "fused"), [(None, True), ("adamw_torch_fused", True), ("adamw_torch", False)])
@pytest.mark.parametrize("name", FUSED)
def test_optimizer_is_fused_whatever_trains(write_recipe, monkeypatch, name, optim, fused):
    """Groups that are made with a plan pass through other code than those that Trainer makes."""
    found = []
    step = KitTrainer.training_step

    def spy(self, *args):
        found.extend(group["fused"] for group in self.optimizer.param_groups)
        return step(self, *args)

    monkeypatch.setattr(KitTrainer, "training_step", spy)
    training = {"optim": optim} if optim else {}
    check(str(write_recipe(training=training, **FUSED[name])), [], probe=True)
    assert len(found) > 1
    assert {bool(value) for value in found} == {fused}


def test_probe_under_two_processes(write_recipe, tmp_path):
    recipe = write_recipe(training={**EVALUATED, "load_best_model_at_end": True, "per_device_train_batch_size": 2})
    assert run_kit(["check", recipe, "--probe"], processes=2, output=tmp_path / "out.txt") == [0, 0]
    assert (tmp_path / "out.txt").read_text().count("gives the same logits") == 1
    assert not list(tmp_path.rglob(".probe-*"))
    assert not (tmp_path / "run").exists()


def test_probe_of_a_run_that_resumes(write_recipe, tmp_path, capsys):
    recipe = str(write_recipe(training=EVALUATED))
    run.train(recipe, [])
    (tmp_path / "run/scorecard.json").unlink()
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    for resume, found in (("must", checkpoint.with_name("checkpoint-4")), (str(checkpoint), checkpoint)):
        before = files_below(tmp_path)
        capsys.readouterr()
        check(recipe, [f"run.resume={resume}"], probe=True)
        assert f"goes on from {found}" in capsys.readouterr().out
        assert files_below(tmp_path) == before


def test_probe_takes_the_steps_of_the_run(write_recipe, tmp_path, monkeypatch):
    """A training of two steps would have another schedule, and say nothing about the run's."""
    rates = []
    recipe = str(write_recipe(training={"max_steps": 8, "warmup_steps": 6}))
    step = KitTrainer.training_step
    monkeypatch.setattr(
        KitTrainer,
        "training_step",
        lambda self, *args: rates.append(self.optimizer.param_groups[0]["lr"]) or step(self, *args),
    )
    check(recipe, [], probe=True)
    probed = rates.copy()
    rates.clear()
    run.train(recipe, [])
    assert len(probed) == 2
    assert probed == rates[:2]


# ---- what it refuses


def refusals(recipe, overrides):
    """Return what the check and the training say of a recipe."""
    said = []
    for command in (check, run.train):
        with pytest.raises(UserError) as refused:
            command(recipe, overrides)
        said.append(str(refused.value))
    return said


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rat=1",
        "model.name_or_path=no/such/model",
        "data.train.0.path=no/such/file.txt",
        "data.block_size=4096",
        "training.optim=lomo",
        "training.load_best_model_at_end=true",
        "training.metric_for_best_model=domain_f1",
        "training.per_device_train_batch_size=100000",
        "run.resume=must",
        "run.resume=no/such/checkpoint",
        "evaluation.prompts=[the kit the kit the kit the kit the kit the kit the kit the kit the kit the kit the kit "
        "the kit the kit the kit the kit the kit the kit the kit the kit the kit the kit the kit the kit]",
        "data.max_dropped=0",
    ],
)
def test_refuses_what_training_refuses(write_recipe, corpus_file, tmp_path, override):
    if override == "data.max_dropped=0":
        twice = [{"path": str(corpus_file), "separator": "\n\n\n"}] * 2
        recipe = write_recipe(data={"train": twice})
    else:
        recipe = write_recipe(evaluation=SET)
    checked, trained = refusals(str(recipe), [override])
    assert checked == trained


def test_refuses_the_folder_that_training_refuses(write_recipe, corpus_file, tmp_path):
    recipe = str(write_recipe(training=EVALUATED))
    run.train(recipe, [])
    before = files_below(tmp_path)
    checked, trained = refusals(recipe, ["training.learning_rate=0.5"])
    assert "holds a run of another recipe" in checked
    assert checked == trained
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    checked, trained = refusals(recipe, [f"run.output_dir={foreign}"])
    assert "is no run directory (it holds thesis.txt)" in checked
    assert checked == trained
    checked, trained = refusals(recipe, [f"run.output_dir={foreign / 'thesis.txt' / 'run'}"])
    assert "cannot be written" in checked
    for path in [path for path in before if path.startswith("run/")]:
        assert files_below(tmp_path)[path] == before[path]


def test_refuses_a_finished_run_whose_data_have_changed(write_recipe, tmp_path):
    source = tmp_path / "own.txt"
    source.write_text("\n".join(documents(60, seed=4)))
    recipe = str(write_recipe(data={"train": [{"path": str(source), "sample_by": "line"}]}))
    run.train(recipe, [])
    source.write_text("\n".join(documents(61, seed=4)))
    checked, trained = refusals(recipe, [])
    assert "data or base model have changed" in checked
    assert checked == trained


@pytest.mark.parametrize("read_only", ["run", "."])
def test_refuses_a_folder_that_cannot_be_written(write_recipe, tmp_path, monkeypatch, read_only):
    """Neither the folder nor the one beside it, where the lock lies; made up, since root may write everywhere."""
    (tmp_path / "run").mkdir()
    closed = (tmp_path / read_only).resolve()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    with pytest.raises(UserError, match=f"cannot be written: {closed} is read-only"):
        check(str(write_recipe()), [])


def test_too_few_rows_are_refused_before_the_model_is_loaded(write_recipe, tmp_path, monkeypatch):
    from kit.tasks import causal_lm

    monkeypatch.setattr(causal_lm, "load_model", lambda *args: 1 / 0)
    with pytest.raises(UserError, match=r"the \d+ rows of an epoch do not fill one global batch of 4,096 \(4 × 1024\)"):
        check(str(write_recipe(training={"gradient_accumulation_steps": 1024})), [])
