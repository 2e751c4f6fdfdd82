"""What the recipe's `training` section promises happens: loss, schedule, stopping, the best model, resumption."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.files import read_json
from kit.run import train
from kit.training.checkpoints import complete_checkpoint
from tests.history import read_history
from tests.material import documents

TRAINING = {
    "max_steps": 6, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 3e-3, "logging_steps": 1,
    "save_strategy": "no",
}  # fmt: skip


@pytest.fixture
def run(write_recipe, tmp_path):
    """A function that trains with changes to TRAINING and returns the run directory."""
    count = 0

    def go(model=None, data=None, early_stopping=None, **training):
        nonlocal count
        count += 1
        folder = tmp_path / f"run-{count}"
        sections = {name: value for name, value in {"model": model, "data": data}.items() if value}
        section = {"output_dir": str(folder)} | ({"early_stopping": early_stopping} if early_stopping else {})
        train(str(write_recipe(training={**TRAINING, **training}, run=section, **sections)), [])
        return folder

    return go


def history(folder, key="loss"):
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in e]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- loss


@pytest.fixture
def twelve(tmp_path):
    """A corpus of twelve ragged documents, uncut and in rows of their own: one step takes them all."""
    texts = documents(12, seed=5, longest=20)
    path = tmp_path / "twelve.txt"
    path.write_text("\n\n\n".join(texts))
    return texts, {
        "train": [{"path": str(path), "separator": "\n\n\n"}],
        "validation": None,
        "block_size": 400,
        "packing": False,
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (3, 4)])
def test_logged_loss_is_the_mean_over_the_global_batch(run, twelve, tiny_models, smoothing, batch, accumulation):
    """A mean of micro-batch means would weigh the tokens of short documents more."""
    texts, data = twelve
    source = tiny_models(n_positions=512)
    model = {"name_or_path": str(source)}
    folder = run(
        model=model,
        data=data,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
    )
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    loss = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            total += loss(base(ids[None, :-1]).logits[0].double(), ids[1:]).item()
        count += len(ids) - 1
    [entry] = history(folder)
    assert entry["loss"] == pytest.approx(total / count, rel=1e-5)


def test_loss_logged_over_several_steps_is_their_mean(run):
    each = [entry["loss"] for entry in history(run())]
    in_pairs = [entry["loss"] for entry in history(run(logging_steps=2))]
    assert in_pairs == pytest.approx([(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)], rel=1e-5)


# ---- settings that must not change a number, and those that must


def test_activation_checkpointing_changes_nothing(run):
    dropout = {"config": {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}}
    for model in ({}, dropout):
        off, on = weights(run(model=model)), weights(run(model=model, activation_checkpointing=True))
        assert off.keys() == on.keys()
        for name in off:
            torch.testing.assert_close(on[name], off[name], rtol=0, atol=1e-6)


def test_activation_checkpointing_is_on(run, monkeypatch):
    from kit.training.trainer import KitTrainer

    seen = []
    original = KitTrainer.training_step

    def spy(self, model, *args, **kwargs):
        seen.append(model.is_gradient_checkpointing)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(KitTrainer, "training_step", spy)
    run(max_steps=1)
    run(max_steps=1, activation_checkpointing=True)
    assert seen == [False, True]


def test_worker_processes_change_nothing(run):
    none, two = run(), run(dataloader_num_workers=2)
    assert_equal_weights(weights(none), weights(two))
    assert read_history(none) == read_history(two)


def test_the_seed_shuffles_the_rows(run):
    same, other = run(), run(data_seed=7)
    assert history(same)[0]["loss"] != history(other)[0]["loss"]


SCHEDULES = {
    "linear": lambda step: 1 - (step - 2) / 4 if step >= 2 else step / 2,
    "cosine": lambda step: (1 + math.cos(math.pi * (step - 2) / 4)) / 2 if step >= 2 else step / 2,
    "constant_with_warmup": lambda step: min(1, step / 2),
    "constant": lambda step: 1.0,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedule(run, name):
    folder = run(lr_scheduler_type=name, warmup_steps=2)
    rates = [entry["learning_rate"] for entry in history(folder)]
    # What a step logs is the rate of the step: step 1 of two warm-up steps has rate 0.
    assert rates == pytest.approx([3e-3 * SCHEDULES[name](step) for step in range(6)])


def test_learning_rate_reaches_the_optimizer(run, tiny_models):
    """Plain SGD without momentum: twice the rate, twice the step; the bias of a constant rate of 0 stays."""
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1, "max_grad_norm": 0.0}
    start = load_file(tiny_models() / "model.safetensors")
    once, twice = (weights(run(learning_rate=rate, **settings)) for rate in (0.1, 0.2))
    name = "transformer.wte.weight"
    assert not torch.equal(once[name], start[name])
    torch.testing.assert_close(twice[name] - start[name], 2 * (once[name] - start[name]), rtol=1e-3, atol=1e-6)
    assert_equal_weights(weights(run(learning_rate=0.0, **settings)), start)


# ---- early stopping and the best model


@pytest.fixture
def overfit(run, tmp_path):
    """A run that learns a few documents by heart, so that the evaluation set gets worse after a while."""
    path = tmp_path / "few.txt"
    path.write_text("\n\n\n".join(documents(8, seed=2)))
    other = tmp_path / "other.txt"
    other.write_text("\n\n\n".join(f"{text[::-1]}" for text in documents(8, seed=4)))
    data = {
        "train": [{"path": str(path), "separator": "\n\n\n"}],
        "validation": [{"path": str(other), "separator": "\n\n\n"}],
    }
    settings = {"max_steps": 60, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2}
    return lambda **more: run(data=data, **{**settings, **more})


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "best"}])
def test_best_model_is_the_one_that_is_saved_and_scored(overfit, saving):
    folder = overfit(early_stopping={"patience": 3}, **BEST | saving)
    evaluations = history(folder, "eval_domain_bits_per_byte")
    figures = [entry["eval_domain_bits_per_byte"] for entry in evaluations]
    best = figures.index(min(figures))
    assert len(figures) == best + 1 + 3  # three evaluations without improvement, then the end
    assert evaluations[-1]["step"] < 60
    after = read_json(folder / "scorecard.json")["sets"]["domain"]["after"]
    for name in ("bits_per_byte", "nats_per_token", "perplexity", "token_accuracy", "eos_nats"):
        assert after[name] == evaluations[best][f"eval_domain_{name}"]
    kept = folder / f"checkpoints/checkpoint-{evaluations[best]['step']}"
    assert_equal_weights(weights(folder), load_file(kept / "model.safetensors"))


def test_without_it_the_last_model_is_scored(overfit):
    folder = overfit(early_stopping={"patience": 3}, save_strategy="no")
    last = history(folder, "eval_domain_bits_per_byte")[-1]
    after = read_json(folder / "scorecard.json")["sets"]["domain"]["after"]
    assert after["bits_per_byte"] == last["eval_domain_bits_per_byte"]


def test_best_by_accuracy_is_the_highest(overfit):
    metric = "domain_token_accuracy"
    folder = overfit(max_steps=12, metric_for_best_model=metric, **BEST)
    figures = [entry[f"eval_{metric}"] for entry in history(folder, f"eval_{metric}")]
    assert len(set(figures)) > 1
    assert read_json(folder / "scorecard.json")["sets"]["domain"]["after"]["token_accuracy"] == max(figures)


def test_threshold_of_early_stopping(overfit):
    """An improvement smaller than the threshold is none."""
    folder = overfit(early_stopping={"patience": 1, "threshold": 100.0}, save_strategy="no")
    assert [entry["step"] for entry in history(folder, "eval_domain_bits_per_byte")] == [2, 4]


# ---- checkpoints


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.weight"), "missing ['transformer.h.1.attn.c_attn"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "unexpected ['extra']"),
    ],
)
def test_checkpoint_of_another_model_is_refused(write_recipe, tmp_path, change, words):
    """Trainer loads non-strictly: a tensor that is missing keeps the base model's values, with a line in the log."""
    recipe = str(write_recipe())
    train(recipe, [])
    (tmp_path / "run/scorecard.json").unlink()
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    marker = read_json(checkpoint / "complete.json")
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    complete_checkpoint(checkpoint, 2, 1, {name: marker[name] for name in ("recipe", "data", "model")})
    with pytest.raises(RuntimeError) as error:
        train(recipe, [])
    assert words in str(error.value)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_resumed_heads_are_tied_as_they_were(write_recipe, tmp_path, tiny_models, architecture, tied):
    model = {"name_or_path": str(tiny_models(architecture, tie_word_embeddings=tied))}
    recipe = str(write_recipe(model=model, training={**TRAINING, "save_strategy": "steps", "save_steps": 3}))
    train(recipe, [])
    run = tmp_path / "run"
    expected = weights(run)
    (run / "scorecard.json").unlink()
    train(recipe, [f"run.resume={run / 'checkpoints/checkpoint-3'}"])
    assert_equal_weights(weights(run), expected)
    assert ("lm_head.weight" in expected) is not tied


# ---- rows of new tokens that train alone


def test_new_rows_are_not_decayed(tmp_path):
    """They are values of embeddings: decay would shrink those that seldom occur to zero."""
    from transformers import TrainingArguments

    from kit.model.new_rows import train_new_rows
    from kit.tasks import causal_lm
    from kit.training.preemption import Preemption
    from kit.training.trainer import KitTrainer
    from tests.model.models import MODELS

    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.5, learning_rate=0.1, report_to=[])
    for name in ("gpt2", "llama", "bert"):
        model = MODELS[name]()
        train_new_rows(model, range(310, 317))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        kinds = {"preemption": Preemption(), "fingerprints": {}, "task": causal_lm, "measure": dict, "batches": list}
        kinds["name_rows"] = None
        optimizer = KitTrainer(model=model, args=args, **kinds).create_optimizer()
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        rows = {id(p) for p in (embedding.new_rows, head.new_rows, getattr(head, "new_bias", None)) if p is not None}
        assert {decay[row] for row in rows} == {0.0}
        assert not {id(embedding.weight), id(head.weight)} & decay.keys()
        assert any(value == 0.5 for value in decay.values())
        before = embedding.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(embedding.weight, before)


# ---- checkpoints by time


ALWAYS = 1e-9  # minutes


@pytest.fixture
def timed(write_recipe, tmp_path):
    """A function that runs TRAINING with a validation set, a dropout and `save_minutes`."""

    def go(name, minutes, overrides=(), **training):
        section = {"output_dir": str(tmp_path / name), "save_minutes": minutes}
        recipe = write_recipe(
            model={"config": {"resid_pdrop": 0.1}}, training={**TRAINING, "logging_steps": 4, **training}, run=section
        )
        train(str(recipe), list(overrides))
        return tmp_path / name

    return go


def saved(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("checkpoint-*"))


def test_time_based_checkpoint_is_saved_kept_until_the_next_and_changes_nothing(timed):
    plain, often = timed("plain", None), timed("often", ALWAYS)
    assert (saved(plain), saved(often)) == ([], [6])
    assert_equal_weights(weights(plain), weights(often))
    assert [e["loss"] for e in history(plain)] == [e["loss"] for e in history(often)]
    assert saved(timed("seldom", 1e6)) == []


def test_run_goes_on_from_a_time_based_checkpoint(timed, monkeypatch):
    from kit.training.trainer import KitTrainer

    expected = timed("whole", None)
    original = KitTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(KitTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        timed("cut", ALWAYS)
    monkeypatch.setattr(KitTrainer, "training_step", original)
    # How often is no matter of what the run is.
    folder = timed("cut", None, ["run.resume=must"])
    assert_equal_weights(weights(folder), weights(expected))
    assert [e["loss"] for e in history(folder)] == [e["loss"] for e in history(expected)]


@pytest.mark.parametrize("by", ["steps", "epoch"])
def test_time_based_checkpoints_neither_count_nor_become_the_best(timed, by, monkeypatch):
    from kit.training import checkpointing

    settings = {"max_steps": 20, "learning_rate": 3e-2, "load_best_model_at_end": True, "save_total_limit": 2}
    settings |= {"eval_strategy": by, "save_strategy": by, "eval_steps": 2, "save_steps": 4}
    plain = timed("plain", None, **settings)
    seen, original = [], checkpointing.discard_timed
    monkeypatch.setattr(checkpointing, "discard_timed", lambda *a, newest: (seen.append(newest), original(*a, newest)))
    often = timed("often", ALWAYS, **settings)
    steps = [int(path.name.rpartition("-")[2]) for path in seen]
    assert len(steps) == len(set(steps)) > 9
    evaluated = {entry["step"] for entry in history(often, "eval_domain_bits_per_byte")}
    regular = {step for step in steps if step in evaluated}
    assert regular == (set(range(4, 21, 4)) if by == "steps" else evaluated)
    assert_equal_weights(weights(plain), weights(often))
    assert saved(plain) == [step for step in saved(often) if step in regular]
    one, other = (read_json(f / "checkpoints/checkpoint-20/trainer_state.json") for f in (plain, often))
    assert one["best_global_step"] == other["best_global_step"]
    best = [
        state["best_model_checkpoint"] and state["best_model_checkpoint"].rpartition("/")[2] for state in (one, other)
    ]
    assert best[0] == best[1]
