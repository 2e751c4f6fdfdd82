"""What trains in each phase moves and nothing else does, bit for bit; resumed, accumulated, and on two processes."""

import copy
import multiprocessing
import os
import socket
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from kit.errors import UserError
from kit.model.new_rows import train_new_rows
from kit.training.callbacks.unfreezing import Unfreezing, check_gradients, frozen_modules, set_trainable
from kit.training.parameter_groups import (
    Phase,
    make_groups,
    phase_at,
    require_all_phases,
    with_rewarmup,
)
from tests.material import make_model

KINDS = ["gpt2", "llama"]
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "llama": {"attention_dropout": 0.2},
}
STEPS = 6


class PlannedTrainer(Trainer):
    """What the kit's trainer does with a plan, in the data's order."""

    def __init__(self, *args, phases, **kwargs):
        """Follow `phases`."""
        self.phases = phases
        super().__init__(*args, **kwargs)
        self.unfreezing = Unfreezing(phases)
        self.add_callback(self.unfreezing)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            require_all_phases(model, self.phases)
            groups = make_groups(model, set(self.get_decay_parameter_names(model)), self.args, self.phases)
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_cls(groups, **kwargs)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = with_rewarmup(super().create_scheduler(num_training_steps, optimizer), self.phases)
        return self.lr_scheduler

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class Recorder(TrainerCallback):
    """Keeps the weights before the first step and after each."""

    def __init__(self):
        """Begin with nothing."""
        self.states = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.states.append(copies(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append(copies(model))


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def build(kind, dropout=True):
    tied = {} if kind == "gpt2" else {"tie_word_embeddings": False}
    return make_model(kind, **tied, **(DROPOUT[kind] if dropout else {}))


def names_of(model, *parts):
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in parts))


def phases_of(model, warmup=0):
    """Head; the last block without the head; all. Tied, the head is the embedding."""
    head = names_of(model, "ln_f", "wte", "lm_head", "model.norm")
    return [Phase(0, head), Phase(2, names_of(model, ".1."), warmup), Phase(4, names_of(model, ""), warmup)]


def data():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 320, (48, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(model, folder, phases=None, **values):
    defaults = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "bf16": False, "use_cpu": True,
        "ddp_find_unused_parameters": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, **{**defaults, **values})
    phases = phases or phases_of(model)
    recorder = Recorder()
    trainer = PlannedTrainer(model, args, train_dataset=data(), phases=phases, callbacks=[recorder])
    return trainer, recorder


def assert_moved_as_planned(states, phases, first=0):
    for step, (before, after) in enumerate(pairwise(states), start=first):
        trainable = phases[phase_at(phases, step)].trainable
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == trainable, f"step {step}: {sorted(moved ^ trainable)}"


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# ---- what moves


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_phase_moves_what_it_trains(kind, checkpointing, tmp_path):
    """With momentum and weight decay, which would go on moving the head in the second phase."""
    model = build(kind)
    options = {"use_reentrant": False}
    trainer, recorder = make_trainer(
        model, tmp_path, activation_checkpointing=checkpointing, activation_checkpointing_kwargs=options
    )
    trainer.train()
    assert len(recorder.states) == STEPS + 1
    assert_moved_as_planned(recorder.states, trainer.phases)
    assert len(trainer.optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("values", [{"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "adamw_torch_fused"}])
def test_other_optimizers(values, tmp_path):
    trainer, recorder = make_trainer(build("gpt2"), tmp_path, **values)
    trainer.train()
    assert_moved_as_planned(recorder.states, trainer.phases)


def test_what_is_in_no_phase_never_moves(tmp_path):
    model = build("llama")
    trainer, recorder = make_trainer(model, tmp_path, phases=phases_of(model)[:2])
    trainer.train()
    assert_moved_as_planned(recorder.states, trainer.phases)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {
        id(p) for name, p in model.named_parameters() if name in trainer.phases[0].trainable or ".1." in name
    }


def test_frozen_parameters_get_no_optimizer_state_before_their_phase(tmp_path):
    model = build("llama")
    trainer, _ = make_trainer(model, tmp_path, max_steps=2)
    trainer.train()
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in trainer.optimizer.state} == trainer.phases[0].trainable


def test_new_rows_are_a_phase_of_their_own(tmp_path):
    model = build("llama")
    train_new_rows(model, range(300, 320))
    rows = names_of(model, "new_rows")
    assert len(rows) == 2
    phases = [Phase(0, rows), Phase(3, rows | names_of(model, ".1."))]
    trainer, recorder = make_trainer(model, tmp_path, phases=phases)
    trainer.train()
    for before, after in pairwise(recorder.states):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):  # whose memory the rows are a part of
            assert torch.equal(before.pop(name)[:300], after[name][:300])
    recorder.states[-1] = {name: recorder.states[-1][name] for name in recorder.states[0]}
    assert_moved_as_planned(recorder.states, phases)


def test_accumulation_equals_a_large_batch(tmp_path):
    states = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer, recorder = make_trainer(
            build("gpt2", dropout=False).double(), tmp_path, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, optim="sgd", optim_args="momentum=0.9", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        assert_moved_as_planned(recorder.states, trainer.phases)
        states.append(recorder.states[-1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6)


def test_compiled(tmp_path):
    """The compiler assumes what requires grad and what drops out, and compiles anew for each phase."""
    model = build("llama")
    trainer, recorder = make_trainer(model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert_moved_as_planned(recorder.states, trainer.phases)


# ---- resuming


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_in_each_phase(kind, tmp_path):
    """In the middle of a phase and between two, with dropout, accumulation and the warmup of phases."""
    values = {
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
    }
    model = build(kind)
    trainer, whole = make_trainer(model, tmp_path, phases_of(model, warmup=2), **values)
    trainer.train()
    rates = trainer.lr_scheduler.get_last_lr()
    for step in range(1, STEPS):
        trainer, recorder = make_trainer(build(kind), tmp_path, trainer.phases, **{**values, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert len(recorder.states) == STEPS - step + 1
        for found, expected in zip(recorder.states, whole.states[step:], strict=True):
            assert_equal(found, expected)
        assert trainer.lr_scheduler.get_last_lr() == rates


def test_rewarmup_reaches_the_optimizer(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    model = build("llama")
    trainer, _ = make_trainer(model, tmp_path, phases_of(model, warmup=2), learning_rate=0.01)
    trainer.add_callback(Rates())
    trainer.train()
    factors = {0: [1] * 6, 1: [0, 0, 0.5, 1, 1, 1], 2: [0, 0, 0, 0, 0.5, 1]}
    phases = [group["first_phase"] for group in trainer.optimizer.param_groups]
    assert seen == [[0.01 * factors[phase][step] for phase in phases] for step in range(STEPS)]


# ---- dropout


def test_frozen_modules_of_gpt2():
    model = build("gpt2")

    def without_dropout(*parts):
        set_trainable(model, names_of(model, *parts))
        frozen = set(frozen_modules(model))
        return {name for name, module in model.named_modules() if module in frozen and isinstance(module, nn.Dropout)}

    everywhere = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert len(everywhere) == 7
    assert without_dropout("") == set()
    assert without_dropout("ln_f") == everywhere
    assert without_dropout("wte") == without_dropout("wpe") == everywhere - {"transformer.drop"}
    assert without_dropout(".1.") == {name for name in everywhere if ".1." not in name}
    assert without_dropout(".1.mlp") == {name for name in everywhere if ".1.mlp" not in name}
    assert without_dropout("bias") == {"transformer.drop"}


def in_second_phase(kind, folder, **values):
    """Return a trainer that stands at the second phase, its model in training mode as Trainer puts it."""
    trainer, _ = make_trainer(build(kind), folder, **values)
    state = SimpleNamespace(global_step=3)
    trainer.unfreezing.on_train_begin(trainer.args, state, None, model=trainer.model)
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_prefix_is_deterministic_and_the_rest_is_not(kind, tmp_path):
    model = in_second_phase(kind, tmp_path).model
    ids = torch.arange(24).reshape(2, 12)
    one, other = (model(input_ids=ids, output_hidden_states=True, use_cache=False) for _ in range(2))
    assert torch.equal(one.hidden_states[1], other.hidden_states[1])
    assert not torch.equal(one.logits, other.logits)
    assert torch.equal(one.hidden_states[1], model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[1])
    assert not any(module.training for module in model.modules())


def test_dropout_while_training(tmp_path):
    """The modes that the forward passes of Trainer's own loop see, phase by phase."""
    model = build("gpt2")
    trainer, _ = make_trainer(model, tmp_path)
    watched = {"drop": model.transformer.drop, "0": model.transformer.h[0].mlp.dropout}
    watched["1"] = model.transformer.h[1].attn.resid_dropout
    seen = {name: [] for name in watched}
    for name, module in watched.items():
        module.register_forward_hook(lambda module, *_, name=name: seen[name].append(module.training))
    trainer.train()
    assert seen == {
        "drop": [True] * 2 + [False] * 2 + [True] * 2,
        "0": [False] * 4 + [True] * 2,
        "1": [False] * 2 + [True] * 4,
    }
    assert "train" not in vars(model)
    assert all(module.training for module in model.train().modules())


def test_way_back_after_an_interruption(tmp_path):
    trainer = in_second_phase("gpt2", tmp_path)
    assert not all(module.training for module in trainer.model.modules())
    trainer.unfreezing.close()
    trainer.unfreezing.close()
    assert all(module.training for module in trainer.model.train().modules())


def test_copy_of_the_model_has_modes_of_its_own(tmp_path):
    model = in_second_phase("gpt2", tmp_path).model.eval()
    twin = copy.deepcopy(model).train()
    assert twin.training
    assert not model.training
    assert not twin.transformer.h[0].mlp.dropout.training


def test_frozen_blocks_above_what_trains_are_still_checkpointed(tmp_path):
    """Without dropout in them: embeddings alone train, and what is computed in the blocks is computed twice."""
    model = build("gpt2")
    trainer, recorder = make_trainer(
        model, tmp_path, [Phase(0, names_of(model, "wte"))], max_steps=1, activation_checkpointing=True
    )
    calls = []
    model.transformer.h[0].attn.resid_dropout.register_forward_hook(lambda m, *_: calls.append(m.training))
    trainer.train()
    assert calls == [False, False]
    assert_moved_as_planned(recorder.states, trainer.phases)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_backward_below_what_trains(checkpointing, tmp_path):
    model = build("llama")
    trainer, _ = make_trainer(model, tmp_path, activation_checkpointing=checkpointing)
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    trainer.train()
    assert seen == [False] * 4 + [True] * 2


# ---- proof of gradients


def test_a_dead_adapter_is_told(capsys):
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a.A", "a.B", "b.A", "b.B")}
    for name, parameter in parameters.items():
        parameter.grad = torch.ones(2) if name == "a.B" else torch.zeros(2)
    check_gradients(parameters, 1, {"a": {"a.A", "a.B"}, "b": {"b.A", "b.B"}})
    assert "the gradient of 2 tensors that should train is zero: b.A, b.B" in " ".join(capsys.readouterr().out.split())


def test_checkpointing_that_stops_gradients(tmp_path):
    """Reentrant, a block whose input needs no gradient computes none for its own weights."""

    class TakeGradientFromInputs(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.disable_input_require_grads()

    model = build("llama")
    phases = [Phase(0, names_of(model, ".1.", "lm_head"))]
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    trainer, recorder = make_trainer(model, tmp_path, phases, **options)
    trainer.add_callback(TakeGradientFromInputs())
    with pytest.raises(UserError, match=r"step 1, 9 of 10 tensors .*layers\.1\..* and 4 more.*use_reentrant"):
        trainer.train()
    assert len(recorder.states) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tensor_without_gradient_in_a_later_phase(accumulation, tmp_path):
    model = build("llama")
    model.lonely = nn.Parameter(torch.ones(3))
    phases = [Phase(0, names_of(model, ".1.")), Phase(2, names_of(model, ".1.", "lonely"))]
    trainer, recorder = make_trainer(model, tmp_path, phases, gradient_accumulation_steps=accumulation)
    with pytest.raises(UserError, match="step 3, 1 of 10 tensors that should train got no gradient: lonely"):
        trainer.train()
    assert len(recorder.states) == 3


def test_gradient_of_a_single_micro_batch_counts(tmp_path):
    """A part that only some micro-batches use; the check comes after all of them."""
    model = build("llama")
    model.lonely = nn.Parameter(torch.ones(1))
    calls = []

    def add(module, args, output):
        calls.append(1)
        return output + module.lonely.sum() if len(calls) % 2 else output

    model.model.norm.lonely = model.lonely
    model.model.norm.register_forward_hook(add)
    phases = [Phase(0, names_of(model, ".1.", "lonely"))]
    trainer, recorder = make_trainer(model, tmp_path, phases, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert len(recorder.states) == 3


def test_zeros_are_warned_of_but_in_new_rows(capsys):
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a.weight", "b.weight", "wte.new_rows")}
    for parameter in parameters.values():
        parameter.grad = torch.zeros(2)
    parameters["a.weight"].grad[1] = 1
    check_gradients(parameters, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "in step 1, the gradient of 1 tensors that should train is zero: b.weight" in said


def test_phase_of_unknown_names(tmp_path):
    trainer, _ = make_trainer(build("gpt2"), tmp_path)
    with pytest.raises(RuntimeError, match="no parameters of GPT2LMHeadModel: nothing"):
        Unfreezing([Phase(0, frozenset({"nothing"}))]).on_train_begin(
            trainer.args, SimpleNamespace(global_step=0), None, model=trainer.model
        )


# ---- several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes, one after another, have trained and resumed all that is asked of them."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_one_of_two, args=(rank, port, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


def _sgd(kind):
    """Without dropout, whose masks differ between the processes, and in double precision."""
    values = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
    return build(kind, dropout=False).double(), values


def _one_of_two(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    folder, found = Path(folder), {}
    for kind in KINDS:
        model, values = _sgd(kind)
        trainer, recorder = make_trainer(model, folder, per_device_train_batch_size=1, **values)
        trainer.train()
        found[kind] = recorder.states
        # With dropout, AdamW, warmup and checkpointing: killed and resumed.
        values = {"save_strategy": "steps", "save_steps": 1, "activation_checkpointing": True}
        phases = phases_of(model, warmup=2)
        trainer, recorder = make_trainer(build(kind), folder / kind, phases, **values)
        trainer.train()
        found[kind, "whole"] = recorder.states
        for step in (1, 3, 5):
            values["save_strategy"] = "no"
            trainer, recorder = make_trainer(build(kind), folder / kind, phases, **values)
            trainer.train(resume_from_checkpoint=str(folder / kind / f"checkpoint-{step}"))
            found[kind, step] = recorder.states
    found["errors"] = []
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    for wrong in ({"ddp_find_unused_parameters": False}, reentrant):
        trainer, _ = make_trainer(build("llama"), folder, **wrong)
        with pytest.raises(UserError) as error:
            trainer.train()
        found["errors"].append(str(error.value))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, two_processes, tmp_path):
    model, values = _sgd(kind)
    trainer, recorder = make_trainer(model, tmp_path, per_device_train_batch_size=2, **values)
    trainer.train()
    found = [torch.load(two_processes / f"{rank}.pt")[kind] for rank in range(2)]
    for of_both in zip(recorder.states, *found, strict=True):
        assert_equal(of_both[1], of_both[2])
        for name, tensor in of_both[0].items():
            torch.testing.assert_close(of_both[1][name], tensor, rtol=0, atol=1e-6)
    assert_moved_as_planned(found[0], trainer.phases)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume(kind, two_processes):
    found = [torch.load(two_processes / f"{rank}.pt") for rank in range(2)]
    whole = found[0][kind, "whole"]
    assert_moved_as_planned(whole, phases_of(build(kind)))
    for step in (1, 3, 5):
        for of_rank in found:
            for state, expected in zip(of_rank[kind, step], whole[step:], strict=True):
                assert_equal(state, expected)


def test_what_two_processes_cannot_do(two_processes):
    unused, reentrant = torch.load(two_processes / "0.pt")["errors"]
    assert "ddp_find_unused_parameters: found False; expected true" in unused
    assert "use_reentrant: expected false" in reentrant
