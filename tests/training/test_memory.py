"""The memory estimate counts what autograd keeps; running out of memory ends a run with a message that helps."""

import json
import os
import re

import pytest
import torch
from transformers import TrainingArguments

from kit import run, stages
from kit.check import check
from kit.errors import UserError
from kit.model.activations import fuse_activations
from kit.model.chunked_loss import give_losses
from kit.model.new_rows import train_new_rows
from kit.recipe.loading import load_recipe
from kit.tasks import causal_lm
from kit.training.memory import estimate_memory
from tests import material
from tests.harness import run_kit

BLOCK_SIZE, BATCH = 64, 3


def packed_batch():
    """Two documents in every row, the first of another length in each."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(BLOCK_SIZE - n)]) for n in (10, 20, 33)])
    ids, labels = torch.randint(320, (2, BATCH, BLOCK_SIZE), generator=generator)
    return {"input_ids": ids, "shift_labels": labels, "position_ids": positions}


def make_model(*args, **config):
    model = material.make_model(*args, **config)
    give_losses(model)
    fuse_activations(model)
    return model


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": BATCH, "bf16": False}
    return TrainingArguments(**{**values, **changes})


def really_kept(model, args, batch):
    """Return the bytes of distinct storages that a forward pass keeps, weights and inputs apart."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    if args.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), hooks:
        loss = causal_lm.loss_sum(model, batch, args)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    size = sum(nbytes for pointer, nbytes in kept.items() if pointer not in own)
    loss.backward()
    return size


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("setting", ["plain", "bf16", "checkpointing", "bf16 and checkpointing"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_activations_are_those_of_a_real_forward(tmp_path, architecture, setting, packing):
    args = arguments(tmp_path, bf16="bf16" in setting, gradient_checkpointing="checkpointing" in setting)
    for attention in ("eager", "sdpa"):
        model = make_model(architecture, attn_implementation=attention)
        batch = packed_batch()
        if not packing:
            del batch["position_ids"]
        estimated = estimate_memory(model, args, causal_lm, batch)["activations"]
        assert estimated == pytest.approx(really_kept(model, args, batch), rel=0.05), attention


def test_activations_of_weights_in_bfloat16_with_dropout(tmp_path):
    model = make_model("gpt2", resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1).to(torch.bfloat16)
    args, batch = arguments(tmp_path), packed_batch()
    parts = estimate_memory(model, args, causal_lm, batch)
    assert parts["activations"] == pytest.approx(really_kept(model, args, batch), rel=0.05)
    assert parts["weights"] == 2 * model.num_parameters()


def test_weights_gradients_and_optimizer(tmp_path):
    model = make_model()
    for parameter in model.transformer.wte.parameters():
        parameter.requires_grad_(False)
    total, frozen = model.num_parameters(), model.transformer.wte.weight.numel()
    batch = packed_batch()
    for optim, values in (("adamw_torch", 2), ("sgd", 0), ("adamw_bnb_8bit", 0.5)):
        parts = estimate_memory(model, arguments(tmp_path, optim=optim), causal_lm, batch)
        assert parts["weights"] == 4 * total
        assert parts["gradients"] == 4 * (total - frozen)
        assert parts[f"optimizer ({optim})"] == 4 * values * (total - frozen)
    twice = {name: tensor.repeat(2, 1) for name, tensor in batch.items()}
    larger = estimate_memory(model, arguments(tmp_path), causal_lm, twice)
    assert larger["activations"] / parts["activations"] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_rows_that_train_alone(tmp_path, tie_word_embeddings, bf16):
    """They are parts of matrices, which count once; the head's rows need its input for the backward pass."""
    model = make_model("llama", tie_word_embeddings=tie_word_embeddings)
    total = model.num_parameters()
    model.requires_grad_(False)
    train_new_rows(model, range(300, 310))
    args, batch = arguments(tmp_path, bf16=bf16), packed_batch()
    parts = estimate_memory(model, args, causal_lm, batch)
    assert parts["weights"] == 4 * total
    assert parts["gradients"] == 4 * 10 * 32 * (1 if tie_word_embeddings else 2)
    assert parts["activations"] == pytest.approx(really_kept(model, args, batch), rel=0.05)


def test_estimate_touches_neither_random_numbers_nor_model(tmp_path):
    model = make_model(resid_pdrop=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, training, state = model.config.to_dict(), model.training, torch.get_rng_state()
    estimate_memory(model, arguments(tmp_path), causal_lm, packed_batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.to_dict(), model.training) == (config, training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_architecture_whose_steps_depend_on_the_data(write_recipe, monkeypatch, capsys):
    """A mixture of experts may ask tokens where to go, and tensors without data cannot answer."""
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    def routed(self, input_ids=None, **kwargs):
        assert input_ids.sum().item() >= 0
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", routed)
    check(str(write_recipe()), [])
    out = capsys.readouterr().out
    assert re.search(r"activations\s*│\s*unknown", out)
    assert "keeps for the backward pass cannot be counted" in out
    assert "nothing found that would stop it" in out


def test_too_much_memory_is_warned_of(write_recipe, monkeypatch, capsys):
    from kit import check as module

    monkeypatch.setattr(module, "_available_memory", lambda *args: 1000)
    check(str(write_recipe()), [])
    assert "lower `training.per_device_train_batch_size`" in capsys.readouterr().out


# ---- out of memory

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes")


def out_of_memory_at(place, error, rank=0):
    """Make one process run out of memory at a place of a run."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    calls = 0

    def fail_in(original, at):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return original(*args, **kwargs)

        return wrapper

    if place == "step 2":
        causal_lm.loss_sum = fail_in(causal_lm.loss_sum, 2)
    elif place == "measure before":
        stages.Run.measure = fail_in(stages.Run.measure, 1)
    else:
        causal_lm.load_model = fail_in(causal_lm.load_model, 1)


def suggestions(message):
    """Return the overrides that a message names, a list for each of its lines."""
    lines = message.splitlines()[1:]
    return [found for line in lines if (found := re.findall(r"(?:training|data)\.\w+=\S+", line))]


def global_batch(recipe, processes=1):
    training = recipe.training
    return training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1) * processes


@pytest.fixture
def patched(monkeypatch):
    """A function that breaks the kit as `out_of_memory_at` does, until the test ends."""

    def breaks(place, error):
        for owner, name in ((causal_lm, "loss_sum"), (causal_lm, "load_model"), (stages.Run, "measure")):
            monkeypatch.setattr(owner, name, getattr(owner, name))
        out_of_memory_at(place, error)

    return breaks


@pytest.mark.parametrize("place", ["step 2", "measure before", "load"])
@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["CUDA", "CPU", "Python"])
def test_message_names_keys_and_an_equal_global_batch(write_recipe, tmp_path, patched, place, error):
    path = write_recipe(training={"max_steps": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 3})
    patched(place, error)
    with pytest.raises(UserError) as raised:
        run.train(str(path), [])
    message = str(raised.value)
    assert "out of memory, with 6 rows of 32 tokens at a time" in message.splitlines()[0]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "user-error"
    recipe = load_recipe(path)
    smaller, *others = suggestions(message)
    changed = load_recipe(path, smaller)
    assert changed.training["per_device_train_batch_size"] < recipe.training["per_device_train_batch_size"]
    assert global_batch(changed) == global_batch(recipe) == 18
    for override in others:
        load_recipe(path, override)


@pytest.mark.parametrize("batch", [2, 3, 5, 6, 7, 8, 9, 12])
def test_suggested_global_batch_is_equal(write_recipe, patched, batch):
    path = write_recipe(training={"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2})
    patched("load", CPU)
    for command in (run.train, check, run.prepare):
        patched("load", CPU)
        with pytest.raises(UserError) as raised:
            command(str(path), [])
        assert global_batch(load_recipe(path, suggestions(str(raised.value))[0])) == 2 * batch


def test_single_row_suggests_nothing_that_is_set_already(write_recipe, patched):
    training = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_checkpointing": True}
    path = write_recipe(training=training, data={"block_size": 8})
    patched("step 2", CPU)
    with pytest.raises(UserError, match="out of memory") as raised:
        run.train(str(path), [])
    assert suggestions(str(raised.value)) == []


def test_other_errors_stay_what_they_are(write_recipe, patched):
    patched("step 2", RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run.train(str(write_recipe()), [])


def _step_on_rank_0():
    out_of_memory_at("step 2", CPU, 0)


def _step_on_rank_1():
    out_of_memory_at("step 2", CPU, 1)


def _before_on_rank_0():
    out_of_memory_at("measure before", CUDA, 0)


def _before_on_rank_1():
    out_of_memory_at("measure before", CUDA, 1)


def _load_on_rank_1():
    out_of_memory_at("load", CPU, 1)


def _step_on_both():
    out_of_memory_at("step 2", CPU, int(os.environ["RANK"]))


ON_TWO = [_step_on_rank_0, _step_on_rank_1, _before_on_rank_0, _before_on_rank_1, _load_on_rank_1, _step_on_both]


@pytest.mark.parametrize("change", ON_TWO, ids=lambda change: change.__name__)
def test_one_of_two_processes_runs_out_of_memory(write_recipe, tmp_path, change):
    """The other one stands in a collective operation then, and may go down with the store of the process group."""
    path = write_recipe(training={"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    assert run_kit(["train", path], 2, change=change, timeout=120, output=tmp_path / "out.txt") == [2, 2]
    err = (tmp_path / "out.txt").read_text()
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    [message] = re.findall(r"error: (process \d of 2 is out of memory(?:.*\n)(?:  .*\n)+)", err)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["status"], manifest["message"]) == ("user-error", message.rstrip("\n"))
    overrides = suggestions(message)[0]
    assert global_batch(load_recipe(path, overrides), 2) == global_batch(load_recipe(path), 2)
    # Nothing was saved yet, so that the run goes on under its name with what was suggested.
    assert run_kit(["train", path, *overrides], processes=2) == [0, 0]
