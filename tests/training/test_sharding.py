"""Runs with parameters in shards (FSDP2), on two processes without a GPU: all is as in one process without shards."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from kit.errors import UserError
from kit.model import shards as in_shards
from kit.model.new_rows import put_back, set_apart, take_out, train_new_rows
from kit.recipe.loading import load_recipe
from kit.run import train
from kit.tasks import causal_lm
from kit.training.arguments import make_training_arguments
from kit.training.checkpoints import choose_checkpoint, complete_checkpoint
from kit.training.sharding import check_sharding
from tests.classifiers import labeled_rows, save_base, write_rows
from tests.classifiers import write_recipe as write_classifier
from tests.harness import Fault, _context, run_kit
from tests.history import read_history
from tests.material import make_model
from tests.training.sharding_on_cpu import fsdp2_on_cpu

VOCABULARY = {"special_tokens": ["<|user|>"], "tokens": ["embedding", "scheduler", "Größe"]}
ALONE = {"trainable": {"new_tokens": True, "last_blocks": 1}}
SCHEDULE = {
    "schedule": [
        {"trainable": {"final_norm": True}},
        {"step": 2, "trainable": {"last_blocks": 1}, "warmup_steps": 2},
        {"step": 4, "trainable": "all"},
    ]
}
LORA = {"type": "lora", "r": 4}
TRAINING = {
    "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "weight_decay": 0.1,
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "gradient_accumulation_steps": 2,
    "bf16": False,
}  # fmt: skip
PROMPTS = {"prompts": ["the kit", "tensor"], "generation": {"max_new_tokens": 5, "do_sample": True}}
# Sums of float32 in another order, which Adam's division by the gradient's size makes larger in the first steps.
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture
def both(write_recipe, tiny_models, tmp_path):
    """A function that runs a recipe on one process, and on two with shards; it returns both run directories."""

    def run(architecture="gpt2", config=None, training=None, **sections):
        for name, processes in (("whole", 1), ("shards", 2)):
            path = write_recipe(
                name,
                model={"name_or_path": str(tiny_models(architecture, **(config or {})))},
                training=TRAINING | {"per_device_train_batch_size": 4 // processes} | (training or {}),
                evaluation=PROMPTS,
                run={"output_dir": str(tmp_path / name)},
                **sections,
            )
            if processes == 1:
                train(str(path), [])
            else:
                assert launch(path) == [0, 0]
        return tmp_path / "whole", tmp_path / "shards"

    return run


def launch(path, fault=None):
    return run_kit(["train", path], 2, fault, change=fsdp2_on_cpu)


def read(path):
    return json.loads(path.read_text())


def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_alike(whole, shards):
    """Curves, figures and weights are the same to rounding; samples are the same."""
    ours, theirs = (read_history(folder) for folder in (whole, shards))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    for name in ("model", "checkpoints/checkpoint-2"):
        one, other = weights(whole / name), weights(shards / name)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.allclose(one[key], other[key], **CLOSE), (name, key, (one[key] - other[key]).abs().max())
    assert read(whole / "samples.json") == read(shards / "samples.json")
    assert read(shards / "manifest.json")["reloaded_logits_differ_by"] == 0.0


@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_run_in_shards_equals_one_without(both, architecture):
    whole, shards = both(architecture)
    assert_alike(whole, shards)
    AutoModelForCausalLM.from_pretrained(shards / "model")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_new_rows_alone_train_in_shards(both, tiny_models, architecture):
    whole, shards = both(architecture, vocabulary=VOCABULARY, freezing=ALONE)
    assert_alike(whole, shards)
    base, trained = weights(tiny_models(architecture)), weights(shards / "model")
    matrices = ["transformer.wte.weight"] if architecture == "gpt2" else ["model.embed_tokens.weight", "lm_head.weight"]
    for name in matrices:
        old = len(base[name])
        assert torch.equal(base[name], trained[name][:old])
        first = weights(shards / "checkpoints/checkpoint-2")[name][old:]
        assert not torch.equal(first, weights(shards / "checkpoints/checkpoint-4")[name][old:])
    assert read(shards / "vocabulary.json").keys() == read(whole / "vocabulary.json").keys()


def test_phases_follow_one_another_in_shards(both, tiny_models):
    whole, shards = both(freezing=SCHEDULE, training={"save_steps": 1, "eval_steps": 1})
    assert_alike(whole, shards)
    before = weights(tiny_models())
    for step in range(1, 7):
        after = weights(shards / f"checkpoints/checkpoint-{step}")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        norm, block = "transformer.ln_f.", "transformer.h.1."
        allowed = (norm,) if step <= 2 else (norm, block) if step <= 4 else ("",)
        assert moved == {name for name in before if name.startswith(allowed)}, step
        before = after


@pytest.mark.slow
def test_an_adapter_with_new_tokens_trains_in_shards(both, tiny_models):
    whole, shards = both(vocabulary=VOCABULARY, freezing={"trainable": {"new_tokens": True}}, adapter=LORA)
    assert_alike(whole, shards)
    assert {p.name for p in (shards / "model").glob("*.safetensors")} == {
        "adapter_model.safetensors", "new_rows.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_a_classifier_trains_in_shards(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    rows = write_rows(tmp_path / "rows.csv", labeled_rows(60))
    training = {"max_steps": 4, "learning_rate": 1e-2}
    freezing = {"trainable": {"last_blocks": 1, "head": True}}
    evaluation = {"temperature_scaling": True}
    for name in ("whole", "shards"):
        sections = {"training": training, "freezing": freezing, "evaluation": evaluation}
        training["per_device_train_batch_size"] = 4 if name == "whole" else 2
        path = write_classifier(tmp_path / f"{name}.yaml", base, rows, **sections)
        if name == "whole":
            train(str(path), [])
        else:
            assert launch(path) == [0, 0]
    ours, theirs = (read(tmp_path / name / "scorecard.json") for name in ("whole", "shards"))
    assert ours["sets"].keys() == theirs["sets"].keys()
    one, other = weights(tmp_path / "whole/model"), weights(tmp_path / "shards/model")
    for key in one:
        assert torch.allclose(one[key], other[key], **CLOSE), key


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5])
def test_a_run_in_shards_that_was_killed_goes_on_bit_for_bit(write_recipe, tmp_path, step):
    sections = {"vocabulary": VOCABULARY, "freezing": {"schedule": [{"trainable": {"new_tokens": True}}]}}
    sections["freezing"]["schedule"].append({"step": 3, "trainable": {"last_blocks": 1}})
    for name in ("straight", "killed"):
        path = write_recipe(name, training=TRAINING, run={"output_dir": str(tmp_path / name)}, **sections)
        if name == "killed":
            target = "kit.training.trainer:KitTrainer.training_step"
            assert -signal.SIGKILL in launch(path, Fault(target, 2 * step, signal.SIGKILL))
        assert launch(path) == [0, 0]
    ours, theirs = (weights(tmp_path / name / "model") for name in ("straight", "killed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (read_history(tmp_path / name) for name in ("straight", "killed"))
    assert ours == theirs


# ---- Without the commands


def two_shards(target, *args):
    """Call a function of this module with rank and arguments on two processes that know of each other."""
    children = [_context.Process(target=_joined, args=(target, rank, *args)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(240)
    return [child.exitcode for child in children]


def _joined(target, rank, folder, *args):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    target(rank, folder, *args)


def extended(tied):
    """A model of which the last rows are new and train alone, as does a block."""
    model = make_model("llama", vocab_size=331, tie_word_embeddings=tied)
    model.requires_grad_(False)
    train_new_rows(model, range(326, 331))
    model.model.layers[1].requires_grad_(True)
    return model


def train_a_little(model, ids):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def rows_in_shards(rank, folder, tied):
    ids = torch.arange(331)[torch.randint(331, (4, 60), generator=torch.Generator().manual_seed(0))]
    expected = extended(tied)
    start = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    train_a_little(expected, ids)
    expected.save_pretrained(folder)  # which transformers does on the first process alone

    model = extended(tied)
    set_apart(model)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard([model.model.embed_tokens, model.lm_head] if tied else model.model.embed_tokens)
    fully_shard(model)
    train_a_little(model, ids[2 * rank : 2 * rank + 2])
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    put_back(model)
    found = in_shards.gather(model.state_dict(keep_vars=True))
    assert bool(found) == (rank == 0)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-3, atol=1e-5)
        if "embed" in name or "lm_head" in name:
            assert torch.equal(tensor[:326], start[name][:326])
            assert not torch.equal(tensor[326:], start[name][326:])

    # What is read from files takes the rows along, and every tensor to the bit.
    dist.barrier()
    in_shards.load(model, folder)
    take_out(model)
    in_shards.write_rows(model.model.embed_tokens.weight, torch.arange(326, 331), torch.zeros(5, 32))
    put_back(model)
    for name, tensor in in_shards.gather(model.state_dict(keep_vars=True)).items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_are_apart_learn_what_rows_in_their_matrix_learn(tmp_path, tied):
    assert two_shards(rows_in_shards, tmp_path, tied) == [0, 0]


@pytest.fixture
def asks(monkeypatch):
    """A function that checks a recipe under FSDP, or under what else the environment says."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def ask(four_bits=False, dtype="float32", plugin=None, **training):
        section = SimpleNamespace(load_in_4bit=four_bits, dtype=dtype)
        recipe = SimpleNamespace(model=section, freezing=object(), adapter=None)
        with monkeypatch.context() as patched:  # what announces a launcher would make it look for the others
            patched.delenv("LOCAL_RANK", raising=False)
            args = TrainingArguments(use_cpu=True, **training)
        monkeypatch.setattr(args, "torch_compile", training.get("torch_compile", False))
        if plugin:
            args.deepspeed_plugin = plugin
        check_sharding(recipe, args)

    return ask


def test_what_does_not_go_with_shards_is_refused_by_name(asks, monkeypatch):
    asks()
    for arguments, key in [
        ({"four_bits": True}, "model.load_in_4bit: not with FSDP"),
        ({"save_only_model": True}, "training.save_only_model: not with FSDP"),
    ]:
        with pytest.raises(UserError, match=key):
            asks(**arguments)
    with monkeypatch.context() as patched:  # as GaLore and LOMO do, which are packages of their own
        patched.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.AdamW, {"params": []}))
        with pytest.raises(UserError, match=r"training.optim: not with FSDP"):
            asks()
    for name, value in [
        ("FSDP_VERSION", "1"), ("FSDP_ACTIVATION_CHECKPOINTING", "true"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
    ]:  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(UserError, match=f"{name.lower()}.*: not with FSDP"):
                asks()
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="FSDP is ignored in a process that no launcher started"):
        asks()


def test_what_does_not_go_with_deepspeed_is_refused_by_name(asks, monkeypatch):
    # Without it: what `TrainingArguments` would make of the launch file is given instead.
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr("kit.training.sharding.sharding_of", lambda values: "DeepSpeed")

    def ask(changes=None, stage=3, **more):
        of_zero = {"stage": stage, "offload_optimizer": {"device": more.pop("offload", "none")}}
        asks(plugin=SimpleNamespace(deepspeed_config={"zero_optimization": of_zero, **(changes or {})}), **more)

    ask()
    ask(stage=2)
    for arguments, key in [
        ({"stage": 1}, "zero_stage: not with DeepSpeed: expected 2 or 3"),
        ({"offload": "cpu"}, "offload: not with DeepSpeed"),
        ({"dtype": "bfloat16"}, "model.dtype: not with DeepSpeed"),
        ({"fp16": True}, "training.fp16: not with DeepSpeed"),
        ({"changes": {"optimizer": {"type": "Adam"}}}, "optimizer: not with DeepSpeed"),
        ({"changes": {"scheduler": {"type": "WarmupLR"}}}, "scheduler: not with DeepSpeed"),
        ({"four_bits": True}, "model.load_in_4bit: not with DeepSpeed"),
    ]:
        with pytest.raises(UserError, match=key):
            ask(**arguments)


def test_a_checkpoint_in_shards_is_for_as_many_processes_and_for_this_sharding(write_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(run={"resume_with": ["world_size"]}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("kit.training.arguments.check_not_ignored", lambda values: None)
    with pytest.raises(UserError, match=r"run.resume_with: `world_size`: not with FSDP"):
        make_training_arguments(recipe, causal_lm, tmp_path)

    (tmp_path / "checkpoint-1").mkdir()
    complete_checkpoint(tmp_path / "checkpoint-1", 1, 2, {"recipe": {}, "sharding": "ZeRO-2"})
    chosen, _ = choose_checkpoint("auto", tmp_path, {"recipe": {}, "sharding": "ZeRO-2"})
    assert chosen == tmp_path / "checkpoint-1"
    for other in (None, "FSDP", "ZeRO-3"):
        with pytest.raises(UserError, match="was written with another sharding"):
            choose_checkpoint("auto", tmp_path, {"recipe": {}, "sharding": other})
