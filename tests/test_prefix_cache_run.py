"""Runs with a frozen-prefix cache: the bits of a run without one, whoever filled it and whatever happened to it."""

import itertools
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from kit.check import check
from kit.errors import UserError
from kit.run import train
from kit.training import prefix_cache, prefix_store
from tests.classifiers import labeled_rows, save_base, write_rows
from tests.classifiers import write_recipe as write_classifier
from tests.harness import Fault, run_kit
from tests.material import ARCHITECTURES, documents

THREE = {
    "gpt2": {"n_layer": 3}, "llama": {"num_hidden_layers": 3}, "gpt_neox": {"num_hidden_layers": 3}, "mixtral": {},
}  # fmt: skip
BLOCKS = {"gpt2": GPT2Block, "llama": LlamaDecoderLayer, "gpt_neox": GPTNeoXLayer}
TRAINING = {
    "max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-2, "eval_strategy": "epoch", "save_strategy": "no",
    "per_device_train_batch_size": 4, "bf16": False,
}  # fmt: skip
STEPS = 8  # of an epoch


@pytest.fixture
def recipe(write_recipe, tiny_models, tmp_path):
    """A function that writes a recipe of three epochs in which the last of three blocks trains."""
    corpus = tmp_path / "small.txt"
    corpus.write_text("\n\n\n".join(documents(30, seed=3, longest=25)))

    def write(name, architecture="gpt2", training=None, freezing=None, data=None, config=None, **sections):
        return write_recipe(
            name,
            model={"name_or_path": str(tiny_models(architecture, **THREE[architecture], **(config or {})))},
            data={"train": [{"path": str(corpus), "separator": "\n\n\n"}], **(data or {})},
            training={**TRAINING, **(training or {})},
            freezing={"trainable": {"last_blocks": 1}, **(freezing or {})},
            run={"output_dir": str(tmp_path / name)},
            **sections,
        )

    return write


@pytest.fixture
def passes(monkeypatch):
    """A list with the number of rows of each pass through the first block of a GPT-2."""
    found, forward = [], GPT2Block.forward

    def counted(self, hidden_states, *args, **kwargs):
        if self.attn.layer_idx == 0:
            found.append((len(hidden_states), self.training or torch.is_grad_enabled()))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(GPT2Block, "forward", counted)
    return found


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same_bits(*folders):
    first, *others = (weights(folder) for folder in folders)
    return all(first.keys() == o.keys() and all(torch.equal(first[n], o[n]) for n in first) for o in others)


def figures(folder):
    sets = json.loads((folder / "scorecard.json").read_text())["sets"]
    return {name: {when: of[when] for when in ("before", "after")} for name, of in sets.items()}


def rows_of(folder):
    """Return the packed rows of an epoch."""
    return -(-json.loads((folder / "ledger.json").read_text())[0]["trained"] // 32)


def losses(folder):
    return [e["loss"] for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in e]


def stores(tmp_path):
    return sorted((tmp_path / "store" / "prefix").glob("*")) if (tmp_path / "store" / "prefix").exists() else []


def logs(tmp_path):
    return sorted((tmp_path / "store" / "prefix").glob("*/*.log"))


# ---- The same run


@pytest.mark.parametrize(
    ("architecture", "data"),
    [("gpt2", {}), ("llama", {}), ("gpt_neox", {}), ("gpt2", {"packing": False})],
    ids=["gpt2", "llama", "gpt_neox", "gpt2-unpacked"],
)
def test_the_same_bits_as_without_when_it_is_filled_and_when_it_is_there(recipe, tmp_path, architecture, data):
    for name, cache in (("off", "off"), ("filled", "auto"), ("found", "on")):
        # Adam would make steps of the learning rate from rounding where the gradient is zero, as for keys' biases.
        training = {"optim": "sgd"} if data else {}
        train(str(recipe(name, architecture, training, {"cache": cache}, data)), [])
    assert len(stores(tmp_path)) == len(logs(tmp_path)) == 1
    without, filled, found = (tmp_path / name for name in ("off", "filled", "found"))
    # Rows of different lengths are padded in other batches to other lengths, and so to other sums of floats.
    if data:
        for folder in (filled, found):
            ours, theirs = weights(without), weights(folder)
            assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
        assert same_bits(filled, found)
    else:
        assert same_bits(without, filled, found)
        assert figures(without) == figures(filled) == figures(found)
        assert losses(without) == losses(filled) == losses(found)


def test_later_epochs_and_evaluations_do_not_run_the_first_blocks(recipe, tmp_path, passes, capsys):
    train(str(recipe("run")), [])
    told = capsys.readouterr().out
    assert "nothing trains below block 2" in told
    rows = rows_of(tmp_path / "run")
    assert sum(number for number, training in passes if training) == rows, "one epoch of three"
    measured = [number for number, training in passes if not training]
    assert max(measured) == 8
    assert measured.count(8) == 2, "before training, and in the first of three evaluations"
    del passes[:]
    train(str(recipe("again")), [])
    assert "of which are there" in capsys.readouterr().out
    # What is left are trials of the model, and the proof that what was saved is what was trained.
    assert not [number for number, training in passes if training or number > 2]


def test_the_share_of_the_peak_is_told_of_steps_that_go_through_the_whole_model(recipe, tmp_path):
    train(str(recipe("run", training={"logging_steps": 4}, tracking={"peak_tflops": 1})), [])
    entries = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert ["mfu" in entry for entry in entries if "loss" in entry] == [True, True, False, False, False, False]


def test_the_cache_leaves_the_order_of_dropout_alone(recipe, tmp_path):
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    for cache in ("off", "auto"):
        train(str(recipe(cache, config=dropout, freezing={"cache": cache})), [])
    assert len(stores(tmp_path)) == 1
    assert same_bits(tmp_path / "off", tmp_path / "auto")


@pytest.mark.parametrize(
    "training",
    [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=lambda training: next(iter(training)),
)
def test_in_other_manners_of_training(recipe, tmp_path, training):
    for cache in ("off", "auto"):
        train(str(recipe(cache, training=training, freezing={"cache": cache})), [])
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "auto")
    assert len(stores(tmp_path)) == 1
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-3 if "bf16" in training else 0) for n in ours)


@pytest.fixture
def classifier(tmp_path):
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))

    def write(name, architecture="bert", **freezing):
        base = tmp_path / architecture
        if not base.exists():
            save_base(base, architecture, **({"n_layer": 3} if architecture == "gpt2" else {"num_hidden_layers": 3}))
        return write_classifier(
            tmp_path / f"{name}.yaml", base, rows,
            training={"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"},
            freezing={"trainable": {"last_blocks": 1, "head": True}, **freezing},
        )  # fmt: skip

    return write


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_classifier_is_the_same_but_for_rounding(classifier, tmp_path, architecture):
    for name, cache in (("off", "off"), ("filled", "auto"), ("found", "on")):
        train(str(classifier(name, architecture, cache=cache)), [])
    assert len(stores(tmp_path)) == 1
    assert same_bits(tmp_path / "filled", tmp_path / "found")
    # Padded to another length in another batch, a row's sums of floats are other ones.
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "filled")
    assert all(torch.allclose(ours[n], theirs[n], atol=2e-6) for n in ours)


def test_a_model_with_experts_says_no_share_that_nobody_knows(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "mixtral", ARCHITECTURES["llama"])
    config = {"num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2}
    for cache in ("off", "auto"):
        path = recipe(cache, "mixtral", {"num_train_epochs": 2}, {"cache": cache}, config=config)
        train(str(path), [])
    assert "of a step's arithmetic" not in told_of(capsys)
    assert same_bits(tmp_path / "off", tmp_path / "auto")
    assert len(stores(tmp_path)) == 1


def test_an_evaluation_may_have_another_precision_than_training(recipe, tmp_path, capsys, monkeypatch):
    forward = GPT2Block.forward

    def rounding(self, hidden_states, *args, **kwargs):
        out = forward(self, hidden_states, *args, **kwargs)
        return out.bfloat16() if torch.is_autocast_enabled("cpu") else out

    monkeypatch.setattr(GPT2Block, "forward", rounding)
    for cache in ("off", "auto"):
        train(str(recipe(cache, training={"bf16": True, "num_train_epochs": 2}, freezing={"cache": cache})), [])
    assert "nothing trains below block 2" in told_of(capsys)
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "auto")
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-3) for n in ours)
    measured = [figures(tmp_path / cache)["domain"]["before"] for cache in ("off", "auto")]
    assert measured[0] == measured[1]
    assert "damaged" not in capsys.readouterr().out


# ---- Processes, kills, phases


def test_two_processes_share_it(recipe, tmp_path):
    batch = {"per_device_train_batch_size": 2, "use_cpu": True}
    for cache in ("off", "auto"):
        assert run_kit(["train", recipe(cache, training=batch, freezing={"cache": cache})], processes=2) == [0, 0]
    assert len(stores(tmp_path)) == 1
    assert len(logs(tmp_path)) == 2
    # Each epoch deals the rows out anew: what one process has written the other one has read.
    written = sum(log.stat().st_size for log in logs(tmp_path))
    assert written < (rows_of(tmp_path / "auto") * 32 + 600) * (32 * 4 + 8)
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "auto")
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


@pytest.mark.parametrize(("epoch", "stop"), [(0, signal.SIGKILL), (2, signal.SIGTERM)], ids=["first", "third"])
def test_killed_in_an_epoch_and_resumed_it_is_the_uninterrupted_run(recipe, tmp_path, epoch, stop):
    training = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    fault = Fault("kit.training.trainer:KitTrainer.training_step", call=epoch * STEPS + 5, signal=stop)
    stopped = recipe("stopped", training=training)
    assert run_kit(["train", stopped], fault=fault) == [-9 if stop == signal.SIGKILL else 143]
    assert len(logs(tmp_path)) == 1
    assert run_kit(["train", stopped]) == [0]
    shutil.rmtree(tmp_path / "store" / "prefix")
    train(str(recipe("whole", training=training)), [])
    assert same_bits(tmp_path / "stopped", tmp_path / "whole")
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert rows_of(tmp_path / "whole") in range(4 * STEPS - 3, 4 * STEPS + 1)


def test_a_cache_ends_with_its_phase_and_a_shorter_one_begins(recipe, tmp_path, capsys, passes):
    schedule = [
        {"trainable": {"last_blocks": 1}},
        {"epoch": 2, "trainable": {"last_blocks": 2}},
        {"epoch": 4, "trainable": "all"},
    ]
    training = {"num_train_epochs": 5}
    for cache in ("off", "auto"):
        path = recipe(cache, training=training)
        text = path.read_text().replace("trainable:\n    last_blocks: 1", f"cache: '{cache}'\n  schedule: SCHEDULE")
        path.write_text(text.replace("SCHEDULE", json.dumps(schedule)))
        capsys.readouterr()
        del passes[:]
        train(str(path), [])
    told = capsys.readouterr().out
    assert "below block 2" in told
    assert "below block 1" in told
    assert "ends with the phase before" in told
    assert len(stores(tmp_path)) == 2
    assert same_bits(tmp_path / "off", tmp_path / "auto")
    rows = rows_of(tmp_path / "auto")
    # Epochs 1, 3 and 5: filled, filled with one block less, and all of it trains.
    assert 3 * rows <= sum(number for number, training in passes if training) <= 3 * rows + 12


def test_two_runs_at_once_fill_one_store(recipe, tmp_path):
    import threading

    train(str(recipe("off", freezing={"cache": "off"})), [])
    paths = [recipe(name) for name in ("one", "two")]
    codes = {}
    threads = [threading.Thread(target=lambda p=p: codes.update({p: run_kit(["train", p])})) for p in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(codes.values()) == [[0], [0]]
    assert len(stores(tmp_path)) == 1
    assert same_bits(tmp_path / "off", tmp_path / "one", tmp_path / "two")


# ---- What happens to files


@pytest.mark.parametrize("damage", ["a row", "truncated", "longer", "empty"])
def test_a_damaged_store_heals(recipe, tmp_path, capsys, damage, passes):
    train(str(recipe("filled")), [])
    [log] = logs(tmp_path)
    content = bytearray(log.read_bytes())
    if damage == "a row":
        content[5000] ^= 1
    half = content[: len(content) // 2]
    log.write_bytes({"a row": content, "truncated": half, "longer": content + bytes(999), "empty": b""}[damage])
    capsys.readouterr()
    del passes[:]
    train(str(recipe("healed")), [])
    assert ("rows on the disk are damaged" in capsys.readouterr().out) == (damage in ("a row", "longer"))
    assert same_bits(tmp_path / "filled", tmp_path / "healed")
    computed = sum(number for number, training in passes if training)
    assert computed <= (16 if damage in ("a row", "longer") else rows_of(tmp_path / "healed") + 8)


def test_a_full_disk_ends_the_writing_and_not_the_run(recipe, tmp_path, capsys, monkeypatch):
    train(str(recipe("off", freezing={"cache": "off"})), [])
    write, left = prefix_store.os.pwritev, itertools.count()

    def full(*args):
        if next(left) >= 10:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(prefix_store.os, "pwritev", full)
    train(str(recipe("full")), [])
    told = capsys.readouterr().out
    assert told.count("no more rows are kept") == 1
    assert "No space left" in told
    assert same_bits(tmp_path / "off", tmp_path / "full")


# ---- Off, with a reason


def told_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if "frozen-prefix cache" in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"freezing": {"trainable": {"last_blocks": 3}}}, "something trains in the first block"),
        ({"freezing": {"trainable": {"last_blocks": 1, "embeddings": True}}}, "trains"),
        ({"freezing": {"trainable": {"head": True}}}, "one matrix"),
        ({"freezing": {"cache_gib": 1e-5}}, "`freezing.cache_gib` allows"),
        ({"training": {"num_train_epochs": 1, "eval_strategy": "no"}}, "no row is read twice"),
        ({"freezing": {"trainable": {"new_tokens": True, "last_blocks": 1}},
          "vocabulary": {"tokens": [{"content": "gradient"}, {"content": "zzyzx"}]}}, "rows of new tokens"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_or_does_not_pay_one_line_says_why(recipe, tmp_path, capsys, changes, reason):
    train(str(recipe("run", **{"training": {"num_train_epochs": 2}, **changes})), [])
    line = told_of(capsys)
    assert "off, since" in line
    assert reason in line
    assert not stores(tmp_path)
    if "no row" in reason:  # with `on` it is filled for later runs, although nothing is gained yet
        train(str(recipe("on", **{**changes, "freezing": {"cache": "on"}})), [])
        assert len(stores(tmp_path)) == 1
        return
    changes = {**changes, "freezing": {**changes["freezing"], "cache": "on"}}
    with pytest.raises(UserError, match=r"freezing\.cache: found `on`"):
        train(str(recipe("on", **{"training": {"num_train_epochs": 2}, **changes})), [])


@pytest.mark.parametrize("free", [10**4, 10**5], ids=["for nothing", "for the evaluation sets"])
def test_at_most_half_of_a_disk_is_taken(recipe, tmp_path, capsys, monkeypatch, free):
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda path: (10**9, 10**9 - free, free))
    monkeypatch.setattr("kit.run.check_room", lambda *_: "")
    train(str(recipe("run")), [])
    line = told_of(capsys)
    assert "training takes" in line if free > 10**4 else "off, since" in line
    assert "at most half" in line
    assert sum(log.stat().st_size for log in logs(tmp_path)) < free / 2


def test_with_on_training_rows_that_do_not_fit_are_an_error_even_if_evaluation_does(recipe, tmp_path, monkeypatch):
    probed = recipe("run", freezing={"cache": "on", "cache_gib": 8e-5})
    with pytest.raises(UserError, match=r"freezing\.cache: found `on`, but training takes .*cache_gib` allows"):
        train(str(probed), [])
    assert not stores(tmp_path)
    train(str(recipe("auto", freezing={"cache_gib": 8e-5})), [])
    assert len(stores(tmp_path)) == 1, "for the evaluation sets"


def test_what_is_measured_may_reach_its_limit_without_a_loss_for_training(
    recipe, tmp_path, passes, capsys, monkeypatch
):
    write = prefix_store.PrefixStore.write

    def limited(self, digest, payload, reserved=0):
        # The first evaluation is before the end of the first epoch, so that some of the room is still kept.
        if reserved:
            raise OSError("more would be stored")
        write(self, digest, payload, reserved)

    monkeypatch.setattr(prefix_store.PrefixStore, "write", limited)
    train(str(recipe("run", training={"eval_strategy": "steps", "eval_steps": 3})), [])
    assert capsys.readouterr().out.count("no more rows are kept of evaluation") == 1
    assert sum(number for number, training in passes if training) == rows_of(tmp_path / "run"), "one epoch of three"


def test_a_store_that_cannot_be_used_ends_no_run(recipe, tmp_path, capsys, monkeypatch):
    train(str(recipe("filled")), [])
    capsys.readouterr()

    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prefix_cache.Path, "touch", refused)
    train(str(recipe("run")), [])
    line = told_of(capsys)
    assert "off, since" in line
    assert "Permission denied" in line
    assert same_bits(tmp_path / "filled", tmp_path / "run")


def test_another_number_of_threads_or_other_data_are_another_cache_another_rate_is_not(recipe, tmp_path, monkeypatch):
    training = {"num_train_epochs": 2}
    train(str(recipe("one", training=training)), [])
    train(str(recipe("rate", training={**training, "learning_rate": 1e-3})), [])
    assert len(stores(tmp_path)) == 1
    train(str(recipe("data", training=training, data={"validation": {"fraction": 0.2}})), [])
    assert len(stores(tmp_path)) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    train(str(recipe("threads", training=training)), [])
    assert len(stores(tmp_path)) == 3


def test_an_architecture_that_needs_its_first_blocks_goes_on_without(recipe, tmp_path, capsys, monkeypatch):
    forward = GPT2Block.forward

    def carrying(self, hidden_states, *args, **kwargs):
        out = forward(self, hidden_states, *args, **kwargs)
        shift = _NOTE.get("first", 0) if self.attn.layer_idx == 2 else 0
        if self.attn.layer_idx == 0:
            _NOTE["first"] = out.detach().mean()
        return out + shift

    monkeypatch.setattr(GPT2Block, "forward", carrying)
    train(str(recipe("off", freezing={"cache": "off"})), [])
    capsys.readouterr()
    monkeypatch.setitem(_NOTE, "first", 0)
    train(str(recipe("auto")), [])
    assert "GPT2LMHeadModel" in told_of(capsys)
    assert not stores(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        train(str(recipe("on", freezing={"cache": "on"})), [])


_NOTE = {}


def test_off_says_and_stores_nothing_and_so_does_a_run_without_freezing(recipe, tmp_path, capsys, write_recipe):
    train(str(recipe("run", freezing={"cache": "off"})), [])
    train(str(write_recipe(run={"output_dir": str(tmp_path / "plain")})), [])
    assert "frozen-prefix" not in capsys.readouterr().out
    assert not stores(tmp_path)


def test_the_cache_is_no_part_of_what_identifies_a_run(recipe, tmp_path, capsys):
    train(str(recipe("run", training={"num_train_epochs": 1})), [])
    capsys.readouterr()
    train(str(recipe("run", training={"num_train_epochs": 1}, freezing={"cache": "off", "cache_gib": 3})), [])
    assert "nothing to do" in capsys.readouterr().out


def test_what_the_probe_of_a_check_computes_the_run_finds(recipe, tmp_path):
    train(str(recipe("off", freezing={"cache": "off"})), [])
    check(str(recipe("run")), [], probe=True)
    train(str(recipe("run")), [])
    assert len(stores(tmp_path)) == 1
    assert same_bits(tmp_path / "off", tmp_path / "run")


def test_other_weights_below_are_another_cache(recipe, tmp_path, tiny_models):
    train(str(recipe("one")), [])
    other = shutil.copytree(tiny_models("gpt2", **THREE["gpt2"]), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.0.ln_1.bias"] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for cache in ("off", "auto"):
        changed = recipe(cache, freezing={"cache": cache})
        train(str(changed), [f"model.name_or_path={other}"])
    assert len(stores(tmp_path)) == 2
    assert same_bits(tmp_path / "off", tmp_path / "auto")
    assert not same_bits(tmp_path / "one", tmp_path / "auto")
    train(str(recipe("seed", training={"seed": 7})), [])
    assert len(stores(tmp_path)) == 3, "rows of another order have other neighbours"
