"""Exact rates, few groups in one order, and the warmup of each phase."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from kit.errors import UserError
from kit.recipe.models import CausalLmRecipe
from kit.tasks import causal_lm
from kit.training.arguments import make_training_arguments
from kit.training.freezing import make_plan
from kit.training.parameter_groups import (
    FIRST_PHASE,
    GroupRule,
    Phase,
    check_phases,
    check_takes_groups,
    group_lambdas,
    make_groups,
    parameter_settings,
    phase_at,
    require_all_phases,
    sets_change,
    warmup_factor,
    with_rewarmup,
)
from kit.training.plan import StepPlan
from kit.training.trainer import KitTrainer
from tests.material import make_model

LATER = {"trainable": "all", "warmup_steps": 2}
HEAD = frozenset({"lm_head.weight", "model.norm.weight"})


@pytest.fixture
def model():
    return make_model("llama", tie_word_embeddings=False)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=0.01, weight_decay=0.1, report_to=[])


def names_of(model, part=""):
    return frozenset(name for name, _ in model.named_parameters() if part in name)


def decay_names(model):
    return {name for name in names_of(model) if "norm" not in name}


def depths(model):
    """Head and final norm 0, the blocks of the two 1 and 2 from above, embeddings 3."""
    found = {name: 2 - int(name.split(".")[2]) for name in names_of(model, ".layers.")}
    return {**found, **dict.fromkeys(HEAD, 0), "model.embed_tokens.weight": 3}


def whole(model):
    return [Phase(0, names_of(model))]


def thirds(model, warmup=0):
    return [Phase(0, HEAD), Phase(4, HEAD | names_of(model, ".layers.1."), warmup), Phase(8, names_of(model), warmup)]


# ---- phases


def test_phase_at(model):
    assert [phase_at(thirds(model), step) for step in (0, 3, 4, 7, 8, 99)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 5, 3]])
def test_phases_out_of_order(starts):
    with pytest.raises(RuntimeError, match="expected 0, then each later"):
        check_phases([Phase(start, HEAD) for start in starts])


def test_phase_that_trains_nothing():
    with pytest.raises(RuntimeError, match="trains no parameter"):
        check_phases([Phase(0, HEAD), Phase(1, frozenset())])


def test_what_ddp_has_to_know(model):
    require_all_phases(model, thirds(model)[:2])
    wanted = HEAD | names_of(model, ".layers.1.")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert sets_change(thirds(model))
    assert not sets_change(whole(model))
    assert not sets_change([Phase(0, HEAD), Phase(3, HEAD, 2)])


# ---- settings and groups


def test_rates_of_layer_decay_are_exact(model, args):
    settings = parameter_settings(model, decay_names(model), args, whole(model), (), 0.75, depths(model))
    rates = {name: s.learning_rate for name, s in settings.items()}
    assert list(rates) == [name for name, _ in model.named_parameters()]
    assert {rates[name] for name in HEAD} == {0.01}
    assert {rates[name] for name in names_of(model, ".layers.1.")} == {0.01 * 0.75}
    assert {rates[name] for name in names_of(model, ".layers.0.")} == {0.01 * 0.75**2}
    assert rates["model.embed_tokens.weight"] == 0.01 * 0.75**3


def test_layer_decay_gives_a_group_for_each_rate_and_decay(model, args):
    groups = make_groups(model, decay_names(model), args, whole(model), (), 0.5, depths(model))
    found = [(g["lr"], g["weight_decay"]) for g in groups]
    assert found == [(0.01, 0.1), (0.01, 0), (0.005, 0.1), (0.005, 0), (0.0025, 0.1), (0.0025, 0), (0.00125, 0.1)]


def test_groups_are_trainers_where_there_is_one_phase(model, args):
    trainer = Trainer(model=model, args=args)
    expected = trainer.create_optimizer().param_groups
    groups = make_groups(model, set(trainer.get_decay_parameter_names(model)), args, whole(model))
    assert len(groups) == len(expected)
    for group, theirs in zip(groups, expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in theirs["params"]]
        assert (group["lr"], group["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])


def test_all_that_ever_trains_is_in_one_group_even_if_frozen_now(model, args):
    model.requires_grad_(False)
    groups = make_groups(model, decay_names(model), args, thirds(model))
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}
    assert [group[FIRST_PHASE] for group in groups] == [0, 0, 1, 1, 2, 2]
    assert sum(len(g["params"]) for g in make_groups(model, set(), args, thirds(model)[:1])) == len(HEAD)


def test_order_does_not_depend_on_that_of_sets_and_rules(model, args):
    def made(reverse):
        order = sorted(names_of(model), reverse=reverse)
        first = sorted(sorted(order)[:5], reverse=reverse)
        phases = [Phase(0, frozenset(first)), Phase(1, frozenset(order))]
        rules = [GroupRule(frozenset({name}), weight_decay=0.3) for name in sorted(HEAD, reverse=reverse)]
        groups = make_groups(model, decay_names(model), args, phases, rules, 0.9, depths(model))
        return [(g["lr"], g["weight_decay"], [id(p) for p in g["params"]]) for g in groups]

    assert made(reverse=False) == made(reverse=True)


def test_tied_matrix_is_there_once(args):
    model = make_model("gpt2")
    [names] = [names_of(model)]
    assert "lm_head.weight" not in names
    groups = make_groups(model, names, args, whole(model))
    assert sum(len(g["params"]) for g in groups) == len(names)


def test_later_rules_win(model, args):
    block, attention = names_of(model, ".layers.1."), names_of(model, ".layers.1.self_attn")
    rules = [GroupRule(block, 0.002, 0.5), GroupRule(attention, learning_rate=0.003)]
    settings = parameter_settings(model, decay_names(model), args, whole(model), rules)
    assert {(settings[n].learning_rate, settings[n].weight_decay) for n in attention} == {(0.003, 0.5)}
    assert {(settings[n].learning_rate, settings[n].weight_decay) for n in block - attention} == {
        (0.002, 0.5), (0.002, 0.0),
    }  # fmt: skip
    reversed_ = parameter_settings(model, decay_names(model), args, whole(model), rules[::-1])
    assert {reversed_[n].learning_rate for n in block} == {0.002}


def test_rate_of_a_rule_is_taken_as_written(model, args):
    rules = [GroupRule(frozenset({"model.embed_tokens.weight"}), learning_rate=0.0005)]
    settings = parameter_settings(model, set(), args, whole(model), rules, 0.5, depths(model))
    assert settings["model.embed_tokens.weight"].learning_rate == 0.0005
    assert {settings[name].learning_rate for name in names_of(model, ".layers.0.")} == {0.0025}


def test_decay_of_a_rule_spares_norms_unless_it_is_for_them(model, args):
    norms = names_of(model, "norm")
    for rule in (GroupRule(names_of(model), weight_decay=0.4), GroupRule(norms, weight_decay=0.4)):
        settings = parameter_settings(model, decay_names(model), args, whole(model), [rule])
        expected = {0.4} if rule.names == norms else {0.0}
        assert {settings[name].weight_decay for name in norms} == expected


def test_rate_of_zero_is_a_rate(model, args):
    rule = GroupRule(HEAD, learning_rate=0.0, weight_decay=0.0)
    settings = parameter_settings(model, decay_names(model), args, whole(model), [rule])
    assert {(settings[n].learning_rate, settings[n].weight_decay) for n in HEAD} == {(0.0, 0.0)}


def test_names_that_are_none(model, args):
    with pytest.raises(RuntimeError, match=r"no parameters of LlamaForCausalLM: model\.nom"):
        make_groups(model, set(), args, [Phase(0, frozenset({"model.nom"}))])
    with pytest.raises(RuntimeError, match="no parameters"):
        make_groups(model, set(), args, whole(model), [GroupRule(frozenset({"x"}), 0.1)])
    with pytest.raises(RuntimeError, match=r"no depth of lm_head\.weight"):
        make_groups(model, set(), args, [Phase(0, HEAD)], (), 0.5, {"model.norm.weight": 0})


# ---- optimizer


def make_optimizer(groups, args):
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    check_takes_groups(optimizer_cls, kwargs)
    return optimizer_cls(groups, **kwargs)


def test_an_optimizer_of_groups(model, args):
    optimizer = make_optimizer(make_groups(model, decay_names(model), args, thirds(model)), args)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01] * 6
    assert [g[FIRST_PHASE] for g in optimizer.param_groups] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_optimizers_that_choose_by_themselves(key):
    with pytest.raises(UserError, match=r"training\.optim: AdamW .*adamw_torch"):
        check_takes_groups(torch.optim.AdamW, {"lr": 0.1, key: None})


def test_eight_bits_leave_embeddings_in_32(tmp_path):
    """What Trainer does for bitsandbytes it does for a plan's groups too; the check of the matrix is Trainer's own."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.optim import GlobalOptimManager

    recipe = CausalLmRecipe(
        task="causal-lm",
        model={"name_or_path": "x"},
        data={"train": [{"path": "x"}]},
        freezing={"trainable": {"embeddings": True, "last_blocks": 1}},
    )
    model = make_model("gpt2")
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_bnb_8bit", report_to=[])
    steps = StepPlan(rows=8, rows_per_step=2, steps_per_epoch=4, steps=4, args=args)
    plan = make_plan(model, recipe.freezing, [], steps)
    trainer = KitTrainer(
        model=model,
        args=args,
        task=causal_lm,
        batches=None,
        measure=None,
        preemption=None,
        fingerprints={},
        plan=plan,
        name_rows=None,
    )
    optimizer = trainer.create_optimizer()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    kept = GlobalOptimManager.get_instance().module_weight_config_triple
    assert any(module is model.transformer.wte and config == {"optim_bits": 32} for module, _, config in kept)


@pytest.mark.parametrize(
    ("plan", "training", "message"),
    [
        ({"adapter": {"type": "lora"}}, {}, r"training\.optim: .*no `adapter`"),
        (
            {"freezing": {"schedule": [{"trainable": {"head": True}}, {"step": 2, **LATER}]}},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
            r"training\.lr_scheduler_type: found ReduceLROnPlateau",
        ),
    ],
)
def test_what_cannot_follow_a_plan_is_told_before_training(plan, training, message, tmp_path, monkeypatch):
    # A factory, as transformers has for optimizers that divide the parameters by their shape.
    monkeypatch.setattr("kit.training.parameter_groups.is_optimizer_factory", lambda cls: not training)
    sections = {"model": {"name_or_path": "x"}, "data": {"train": [{"path": "x"}], "validation": {"fraction": 0.5}}}
    recipe = CausalLmRecipe(task="causal-lm", **sections, **plan, training=training)
    with pytest.raises(UserError, match=message):
        make_training_arguments(recipe, causal_lm, tmp_path)


# ---- schedule


def test_warmup_factor():
    phase = Phase(10, HEAD, 4)
    assert [warmup_factor(phase, step) for step in (0, 9, 10, 11, 12, 13, 14, 99)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup_factor(Phase(10, HEAD), 0) == 1


def test_group_lambdas(model):
    phases = thirds(model, warmup=2)
    groups = [{FIRST_PHASE: 2}, {FIRST_PHASE: 0}, {FIRST_PHASE: 1}]
    last, first, second = group_lambdas(groups, [lambda step: 1 - step / 10] * 3, phases)
    assert [first(step) for step in range(10)] == [1 - step / 10 for step in range(10)]
    assert [second(step) for step in (3, 4, 5, 6)] == [0, 0.6 * 0.5, 0.5, 0.4]
    assert [last(step) for step in (7, 8, 9)] == [0, (1 - 8 / 10) * 0.5, 1 - 9 / 10]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "constant_with_warmup"])
def test_rates_over_a_run(kind, model, args):
    """Those of Trainer's schedule times the factor, also where the schedule goes on from a checkpoint."""
    args.lr_scheduler_type, args.warmup_steps = kind, 3
    phases = thirds(model, warmup=3)

    def build(wrapped):
        trainer = Trainer(model=model, args=args)
        groups = make_groups(model, decay_names(model), args, phases, (), 0.5, depths(model))
        trainer.optimizer = make_optimizer(groups, args)
        scheduler = trainer.create_scheduler(12)
        return trainer.optimizer, with_rewarmup(scheduler, phases) if wrapped else scheduler

    (plain, plain_schedule), (optimizer, schedule) = build(wrapped=False), build(wrapped=True)
    for step in range(12):
        factors = [warmup_factor(phases[g[FIRST_PHASE]], step) for g in optimizer.param_groups]
        expected = [g["lr"] * factor for g, factor in zip(plain.param_groups, factors, strict=True)]
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected, rel=1e-12, abs=0)
        if step == 6:
            state, rates = schedule.state_dict(), optimizer.state_dict()
            optimizer, schedule = build(wrapped=True)
            optimizer.load_state_dict(rates)
            schedule.load_state_dict(state)
        for each in (plain, plain_schedule, optimizer, schedule):
            each.step()


def test_no_warmup_leaves_the_schedule(model, args):
    trainer = Trainer(model=model, args=args)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    assert with_rewarmup(scheduler, thirds(model)) is scheduler


def test_schedule_that_follows_the_loss(model):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UserError, match=r"training\.lr_scheduler_type: found ReduceLROnPlateau"):
        with_rewarmup(scheduler, thirds(model, warmup=2))
