"""DDP looks for parameters without a gradient only where there are some."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from kit.model.chunked_loss import give_losses
from kit.tasks import causal_lm
from kit.training import unused
from tests.harness import run_kit
from tests.material import ARCHITECTURES, documents, make_model

BATCH = {"input_ids": torch.ones(2, 80, dtype=torch.long), "shift_labels": torch.ones(2, 80, dtype=torch.long)}
MIXTRAL = {
    "num_local_experts": 4, "num_experts_per_tok": 1, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")


def find_unused(model, args, task, batch):
    give_losses(model)
    return unused.find_unused(model, args, task, batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_a_plain_model_is_used(args, architecture):
    model = make_model(architecture, max_position_embeddings=128) if architecture != "gpt2" else make_model()
    assert find_unused(model, args, causal_lm, BATCH) == {}


def test_what_the_loss_does_not_depend_on_is_found(args):
    model = make_model()
    model.beside = torch.nn.Linear(2, 2)
    model.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    assert list(find_unused(model, args, causal_lm, BATCH)) == ["beside.weight", "beside.bias"]


def test_the_probe_leaves_no_trace(args):
    model = make_model(resid_pdrop=0.5).eval()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    state, random_state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    find_unused(model, args, causal_lm, BATCH)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"transformer.wte.weight"}
    assert torch.equal(model.transformer.wte.weight.grad, torch.ones_like(model.transformer.wte.weight))


def test_experts_in_one_tensor_are_always_used(args):
    """Where each is a module, `experts.0.…`, a batch may leave one out that the probe has met."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **ARCHITECTURES["llama"], **MIXTRAL))
    assert find_unused(model, args, causal_lm, BATCH) == {}
    model.experts = torch.nn.ModuleList([model.lm_head, torch.nn.Linear(2, 2)])
    model.lm_head = torch.nn.Identity()
    model.get_output_embeddings = lambda: None
    found = find_unused(model, args, causal_lm, BATCH)
    assert found["experts.0.weight"] == "where no token is sent to it"


def add_unused():
    """Let each model have a parameter that nothing uses."""
    from kit.tasks import causal_lm as task

    load = task.load_model

    def load_with_unused(*args, **kwargs):
        model = load(*args, **kwargs)
        model.beside = torch.nn.Parameter(torch.ones(2))
        return model

    task.load_model = load_with_unused


@pytest.fixture
def launch(tmp_path, tiny_models):
    """A function that runs a recipe on two processes, and returns exit codes and output."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(documents(60, seed=3)))

    def launch(change=None, freezing=None, **training):
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(tiny_models())},
            "data": {
                "train": [{"path": str(corpus), "sample_by": "line"}],
                "block_size": 64,
                "store_dir": str(tmp_path / "store"),
            },
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "bf16": False, **training},
            "run": {"output_dir": str(tmp_path / "run"), "resume": "never"},
            **({"freezing": freezing} if freezing else {}),
        }
        path, output = tmp_path / "recipe.yaml", tmp_path / "log"
        path.write_text(yaml.safe_dump(recipe))
        output.write_text("")
        codes = run_kit(["check", path, "--probe"], 2, change=change, output=output)
        return codes, output.read_text()

    return launch


SEARCHES = "DDP looks for parameters without a gradient in each step"
SCHEDULE = {"schedule": [{"trainable": {"last_blocks": 1}}, {"trainable": "all", "step": 2}]}


def test_a_plain_model_is_not_searched(launch):
    codes, output = launch()
    assert (codes, SEARCHES in output) == ([0, 0], False)


def test_phases_are_searched(launch):
    codes, output = launch(freezing=SCHEDULE)
    assert codes == [0, 0]
    assert f"{SEARCHES}: 16 trainable parameter(s) get no gradient: transformer.h.0." in output


def test_false_is_refused_where_the_search_is_needed(launch):
    codes, output = launch(freezing=SCHEDULE, ddp_find_unused_parameters=False)
    assert codes == [2, 2]
    assert "training.ddp_find_unused_parameters: found False; expected true, or nothing" in output


def test_a_parameter_that_nothing_uses_does_not_end_the_run(launch):
    codes, output = launch(change=add_unused, logging_steps=1)
    assert f"{SEARCHES}: 1 trainable parameter(s) get no gradient: beside (in a probed step)" in output
    assert codes == [0, 0], output
