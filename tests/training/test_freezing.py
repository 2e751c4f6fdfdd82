"""The plan of a recipe's freezing: what trains when, at which rate; how it is shown; that the rest did not move."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from kit.errors import UserError
from kit.model.freezing import count_parameters
from kit.model.parts import transformer_blocks
from kit.recipe.freezing import FreezingSection
from kit.training.freezing import check_frozen, fingerprint_frozen, make_plan, plan_as_rows, print_plan
from kit.training.parameter_groups import parameter_settings
from kit.training.plan import StepPlan
from tests.material import make_model
from tests.model.models import MODELS

NEW = range(310, 317)
LAST = {"epoch": 1, "trainable": "all"}
ARGS = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1)


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def plan_of(model, new_ids=(), steps=10, steps_per_epoch=4, **values):
    plan = StepPlan(rows=8, rows_per_step=2, steps_per_epoch=steps_per_epoch, steps=steps, args=None)
    return make_plan(model, FreezingSection(**values), list(new_ids), plan)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def every(model):
    return {name for name, _ in model.named_parameters()}


def block_names(model, numbers):
    inside = {id(p) for number in numbers for p in transformer_blocks(model)[number].parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def matrices(model):
    weights = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def test_without_a_section_all_trains():
    model = make_model()
    assert make_plan(model, None, [], None) is None
    assert trained(model) == every(model)


def test_new_tokens(build):
    model = build()
    plan = plan_of(model, NEW, trainable={"new_tokens": True})
    names = trained(model)
    assert names == set(plan.phases[0].trainable)
    assert {name.rpartition(".")[2] for name in names} <= {"new_rows", "new_bias"}
    assert sum("new_rows" in name for name in names) == len(matrices(model))


def test_blocks_and_new_tokens(build):
    model = build()
    plan_of(model, NEW, trainable={"new_tokens": True, "last_blocks": 1})
    assert {name for name in trained(model) if "new_" not in name} == block_names(model, [-1])
    ids = torch.arange(300, 318)[None]
    model(input_ids=ids).logits.square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_frozen_is_the_rest(build):
    model = build()
    plan_of(model, frozen={"embeddings": True, "first_blocks": 1})
    names = trained(model)
    assert not names & block_names(model, [0])
    assert names >= block_names(model, [1])
    assert not {name for name in names if model.get_parameter(name) is model.get_input_embeddings().weight}


def test_frozen_embeddings_with_new_rows():
    """Tied, the head goes with the embeddings; all else trains."""
    model = make_model()
    plan_of(model, NEW, frozen={"embeddings": True}, trainable={"new_tokens": True})
    assert trained(model) == every(model) - {"transformer.wte.weight"}


def test_a_head_of_its_own_has_to_be_frozen_too():
    model = make_model("llama", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head.weight alone, and other parts train it whole"):
        plan_of(model, NEW, frozen={"embeddings": True}, trainable={"new_tokens": True})


def test_a_pattern_and_new_rows_of_one_matrix():
    with pytest.raises(UserError, match=r"transformer.wte.weight alone, and other parts train it whole"):
        plan_of(make_model(), NEW, trainable={"new_tokens": True, "patterns": [r"transformer\.wte\.weight"]})


def test_phases_add_to_each_other():
    model = make_model("llama", tie_word_embeddings=False)
    schedule = [
        {"trainable": {"head": True}},
        {"epoch": 1, "trainable": {"last_blocks": 1}, "warmup_steps": 3},
        {"epoch": 1.5, "trainable": "all"},
    ]
    plan = plan_of(model, schedule=schedule)
    assert [phase.start for phase in plan.phases] == [0, 4, 6]
    assert plan.phases[0].trainable == {"lm_head.weight"}
    assert plan.phases[1].trainable == {"lm_head.weight"} | block_names(model, [-1])
    assert plan.phases[1].warmup_steps == 3
    assert plan.phases[2].trainable == trained(model) == every(model)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"step": 10}, r"schedule.1.step: found 10; the run ends after 10"),
        ({"epoch": 3}, r"schedule.1.epoch: found 3, which is step 12; the run ends after 10"),
        ({"fraction": 0.99}, r"schedule.1.fraction: found 0.99, which is step 10"),
    ],
)
def test_phases_after_the_end(start, message):
    schedule = [{"trainable": {"final_norm": True}}, {**start, "trainable": {"last_blocks": 1}}]
    with pytest.raises(UserError, match=message):
        plan_of(make_model(), schedule=schedule)


def test_phases_that_add_nothing_or_begin_together():
    first = {"trainable": {"last_blocks": 2}}
    with pytest.raises(UserError, match=r"schedule.1.trainable: all of it trains already"):
        plan_of(make_model(), schedule=[first, {"step": 2, "trainable": {"last_blocks": 1}}])
    later = [{"fraction": 0.11, "trainable": {"final_norm": True}}, {"fraction": 0.12, "trainable": "all"}]
    with pytest.raises(UserError, match=r"schedule.2.fraction: .* where the phase before begins"):
        plan_of(make_model(), schedule=[first, *later])


def test_groups_and_layer_decay():
    model = make_model()
    groups = [{"parts": {"embeddings": True}, "learning_rate": 5e-5}]
    plan = plan_of(model, layer_decay=0.5, groups=groups)
    rates = {row["part"]: row["learning_rate"] for row in plan_as_rows(model, plan, ARGS)}
    assert rates == {
        "embeddings": 5e-5, "position embeddings": 1e-3 * 0.5**3, "block 0": 1e-3 * 0.25, "block 1": 1e-3 * 0.5,
        "final norm": 1e-3,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"groups.0.parts: nothing of it trains"):
        plan_of(model, trainable={"last_blocks": 1}, groups=groups)


@pytest.mark.parametrize("part", ["head", "embeddings"])
def test_tied_parts_are_told(part, capsys):
    for tied in (True, False):
        plan_of(make_model("llama", tie_word_embeddings=tied), frozen={part: True})
        assert (f"freezing.frozen: `{part}` is" in capsys.readouterr().out) == tied
    plan_of(make_model("gpt2"), frozen={"head": True, "embeddings": True})
    assert "one matrix" not in capsys.readouterr().out


def test_what_is_shown(capsys):
    model = make_model("gpt2", n_layer=4)
    plan = plan_of(model, NEW, trainable={"new_tokens": True, "last_blocks": 1, "biases": True})
    rows = plan_as_rows(model, plan, ARGS)
    assert sum(row["parameters"] for row in rows) == count_parameters(model)[0]
    assert sum(row["parameters"] for row in rows if row["learning_rate"]) == count_parameters(model)[1]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert {row["phase"] for row in rows} == {None, 1}
    assert {"new tokens", "blocks 0–2", "blocks 0–3", "embeddings"} <= {row["part"] for row in rows}
    print_plan(model, plan, ARGS)
    out = capsys.readouterr().out
    assert "frozen" in out
    assert "parameters train" in out


def test_proof_that_frozen_tensors_stayed(build):
    model = build()
    plan = plan_of(model, NEW, trainable={"new_tokens": True, "last_blocks": 1})
    before = fingerprint_frozen(model, plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained(model):
                parameter.add_(1)
    assert check_frozen(model, plan, before) == len(before)
    with torch.no_grad():
        model.get_input_embeddings().weight[309] += 1e-6
    with pytest.raises(RuntimeError, match="1 frozen tensors have changed"):
        check_frozen(model, plan, before)


@pytest.mark.parametrize(
    "values",
    [
        {"frozen": {"head": True}},  # tied: the embeddings
        {"frozen": {"patterns": [".*wte.*"]}},
        {"trainable": {"patterns": ["transformer[.]h[.].*"]}},
    ],
)
def test_new_tokens_that_would_never_learn(values):
    with pytest.raises(UserError, match=r"transformer.wte.weight trains in no phase.*new_tokens: true"):
        plan_of(make_model(), NEW, **values)


def test_rows_of_new_tokens_are_as_deep_as_their_matrix():
    model = make_model("llama", tie_word_embeddings=False)
    plan = plan_of(model, NEW, trainable={"new_tokens": True}, layer_decay=0.5)
    settings = parameter_settings(model, set(), ARGS, plan.phases, plan.rules, plan.layer_decay, plan.depth_of)
    rates = {name: how.learning_rate for name, how in settings.items()}
    assert rates == {"model.embed_tokens.new_rows": 1e-3 * 0.5**3, "lm_head.new_rows": 1e-3}


def test_a_share_of_the_steps_is_exact():
    schedule = [{"trainable": {"final_norm": True}}, {"fraction": 0.55, "trainable": "all"}]
    assert plan_of(make_model(), steps=100, schedule=schedule).phases[1].start == 55


def test_groups_of_one_tied_matrix():
    groups = [{"parts": {"head": True}, "learning_rate": 1e-2}, {"parts": {"embeddings": True}, "learning_rate": 1e-5}]
    with pytest.raises(UserError, match=r"groups.1: the same parameters as freezing.groups.0"):
        plan_of(make_model(), groups=groups)
    plan_of(make_model("llama", tie_word_embeddings=False), groups=groups)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": []}, "says nothing"),
        (
            {"schedule": [{"trainable": {"new_tokens": True}}, {"epoch": 1, "trainable": "all"}]},
            "leave out `new_tokens`",
        ),
    ],
)
def test_sections_that_say_nothing_or_two_things(values, message):
    with pytest.raises(ValidationError, match=message):
        FreezingSection(**values)


def test_new_tokens_need_a_head_of_their_own_to_learn_too():
    untied = make_model("llama", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lm_head.weight trains in no phase"):
        plan_of(untied, NEW, trainable={"embeddings": True})
    plan_of(untied, NEW, trainable={"embeddings": True, "head": True})
