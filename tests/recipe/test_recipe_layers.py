"""`extends` and overrides: what is inherited, what is replaced, and what cannot be."""

import pytest

from kit.errors import UserError
from kit.recipe.loading import load_recipe


def test_mappings_are_merged_and_the_rest_is_replaced(write):
    write("training: {learning_rate: 1e-5, warmup_steps: 10}\nevaluation: {prompts: [a, b]}\n", "base/base.yaml")
    write("extends: base.yaml\ntraining: {learning_rate: 2e-5}\n", "base/middle.yaml", whole=True)
    recipe = load_recipe(
        write(
            "extends: base/middle.yaml\ndata: {train: [{path: b.txt}], block_size: 64}\nevaluation: {prompts: [c]}\n"
            "training: {warmup_steps: null}\n",
            whole=True,
        )
    )
    assert recipe.training == {"learning_rate": 2e-5}
    assert recipe.evaluation.prompts == ("c",)
    assert [source.path for source in recipe.data.train] == ["b.txt"]
    assert recipe.data.block_size == 64
    assert recipe.model.name_or_path == "gpt2"


def test_null_drops_an_inherited_alternative(write):
    write("evaluation: {sets: {a: {path: x, text_column: body}}}\n", "base.yaml")
    fresh = "{name_or_path: null, from_config: {model_type: gpt2}, tokenizer: gpt2}"
    sets = "{a: {path: null, text_column: null, split: train}}"
    recipe = load_recipe(write(f"extends: base.yaml\nmodel: {fresh}\nevaluation: {{sets: {sets}}}\n", whole=True))
    assert recipe.model.name_or_path is None
    assert recipe.evaluation.sets["a"].split == "train"


def test_null_drops_what_is_inherited_where_it_is_no_value_itself(write):
    write("evaluation: {sets: {a: {path: x}, b: {path: y}}}\nrun: {resume: must}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nevaluation: {sets: {a: null}}\nrun: {resume: null}\n", whole=True))
    assert list(recipe.evaluation.sets) == ["b"]
    assert recipe.run.resume == "auto"


def test_null_stays_where_it_is_a_value(write):
    model, data = "{name_or_path: g, config: {x: 1}}", "{train: [{path: a}]}"
    write(f"task: causal-lm\nmodel: {model}\ndata: {data}\n", "base.yaml", whole=True)
    recipe = load_recipe(write("extends: base.yaml\nmodel: {config: {x: null}}\n", whole=True))
    assert recipe.model.config == {"x": None}


def test_null_cannot_drop_what_is_needed(message, write):
    write(name="base.yaml")
    found = message("extends: base.yaml\ndata: {train: null}\n", whole=True)
    assert found.startswith("r.yaml:2: data.train: required, but missing")


def test_an_inherited_contradiction_names_both_places_and_the_way_out(write):
    write(name="base.yaml")
    child = write("extends: base.yaml\nmodel:\n  from_config: {model_type: gpt2}\n", whole=True)
    with pytest.raises(UserError) as error:
        load_recipe(child)
    for part in (
        "r.yaml:2: model: ",
        "`name_or_path` at base.yaml:2",
        "`from_config` at r.yaml:3",
        "`name_or_path: null`",
    ):
        assert part in str(error.value)


def test_mistakes_are_located_in_the_file_that_makes_them(write):
    write("training: {learning_rat: 1}\nrun: {resum: x}\n", "base.yaml")
    child = write("extends: base.yaml\nrun: {resume: 3}\n", whole=True)
    with pytest.raises(UserError) as error:
        load_recipe(child)
    for part in ("base.yaml:5: training.learning_rat", "base.yaml:6: run.resum", "r.yaml:2: run.resume"):
        assert part in str(error.value)


def test_a_replaced_mistake_is_none(write):
    write("evaluation: {prompts: [1, 2]}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nevaluation: {prompts: [a]}\n", whole=True))
    assert recipe.evaluation.prompts == ("a",)


def test_a_cycle_is_printed_as_a_chain(write):
    write("extends: b.yaml\n", "a.yaml", whole=True)
    write("extends: sub/c.yaml\n", "b.yaml", whole=True)
    write("extends: ../b.yaml\n", "sub/c.yaml", whole=True)
    with pytest.raises(UserError) as error:
        load_recipe("a.yaml")
    expected = "sub/c.yaml:1: extends: the files extend each other: b.yaml -> sub/c.yaml -> sub/../b.yaml"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("extends", "parts"),
    [
        ("bas.yaml", ["r.yaml:1: extends: no such file: ", "/bas.yaml"]),
        ("[a.yaml, b.yaml]", ["r.yaml:1: extends: found a list", "the path of one file", "may extend a third"]),
        ("", ["r.yaml:1: extends: found nothing"]),
        ("3", ["r.yaml:1: extends: found the number 3"]),
        ("r.yaml", ["r.yaml -> r.yaml"]),
        (".", ["no such file"]),
    ],
)
def test_what_cannot_be_extended(message, extends, parts):
    found = message(f"extends: {extends}\n", whole=True)
    for part in parts:
        assert part in found


def test_overrides_are_yaml_and_win(write):
    overrides = [
        "training.learning_rate=1e-4",
        "data.train.0.path=b.txt",
        "evaluation.prompts=[x, 'a: b']",
        "tracking.wandb={project: p}",
        "run.early_stopping.patience=5",
        "run.output_dir=a=b",
        "model.revision=",
    ]
    recipe = load_recipe(write("training: {learning_rate: 1e-5}\n"), overrides)
    assert recipe.training == {"learning_rate": 1e-4}
    assert recipe.data.train[0].path == "b.txt"
    assert recipe.evaluation.prompts == ("x", "a: b")
    assert recipe.tracking.wandb.project == "p"
    assert recipe.run.early_stopping.patience == 5
    assert recipe.run.output_dir == "a=b"
    assert recipe.model.revision is None


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rate", ["expected section.key=value"]),
        ("=3", ["expected section.key=value"]),
        ("training.=3", ["expected section.key=value"]),
        (".a=3", ["expected section.key=value"]),
        ("task.x=1", ["`task` is not a section", '"causal-lm"']),
        ("data.train.0.path.x=1", ["`data.train.0.path` is not a section"]),
        ("data.train.1.path=x", ["`data.train` has numbers 0 to 0, found `1`"]),
        ("data.train.first.path=x", ["`data.train` is a list", "`first`"]),
        ("data.validation.0.path=x", ["no list `data.validation`", "entry 0"]),
        ("training.learning_rate=[", ["not valid YAML"]),
        ("training.learning_rate=fast", ['training.learning_rate: found the text "fast"; expected a number']),
        ("training.learning_rat=1", ["did you mean `learning_rate`?"]),
        ("trainin.learning_rate=1", ["trainin: unknown key", "did you mean `training`?"]),
        ("run.resume=no", ["`no`, which YAML reads as the boolean false", '"no" in quotes']),
        ("run.resume=#1", ["comment", "quotes"]),
        ("run.resume=!!python/none x", ["not allowed"]),
        ("extends=b.yaml", ["read from files only"]),
        ("data.block_size=", ["data.block_size: found nothing (null); expected an integer"]),
    ],
)
def test_mistakes_in_overrides_name_the_command_line(message, override, parts):
    found = message(overrides=[override])
    assert found.startswith(f"command line: {override.strip()}")
    for part in parts:
        assert part in found


def test_overrides_apply_in_their_order(write):
    path = write()
    assert load_recipe(path, ["data.block_size=64", "data.block_size=128"]).data.block_size == 128
    recipe = load_recipe(path, ["evaluation.sets={a: {path: x}}", "evaluation.sets.a.path=y"])
    assert recipe.evaluation.sets["a"].path == "y"
