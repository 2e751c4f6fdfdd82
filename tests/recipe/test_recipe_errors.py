"""Every mistake in a recipe is told with file, line, key, what was found, what is expected and the nearest name."""

import pytest

from kit.errors import UserError
from kit.recipe.loading import load_recipe

HEAD = "task: causal-lm\nmodel: {name_or_path: gpt2}\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # unknown keys
        ("trainig: {}\n", ["r.yaml:5: trainig: unknown key", "did you mean `training`?"]),
        ("learning_rate: 1\n", ["r.yaml:5: learning_rate: unknown key", "`learning_rate` belongs under `training`"]),
        ("block_size: 8\n", ["`block_size` belongs under `data`"]),
        ("output_dir: x\n", ["`output_dir` belongs under `run`"]),
        ("learnin_rate: 8\n", ["did you mean `training.learning_rate`?"]),
        ("lr: 8\n", ["did you mean `training.learning_rate`?"]),
        ("path: x\n", ["belongs under `data.train` or under `data.validation`"]),
        ("zzz: 8\n", ["r.yaml:5: zzz: unknown key; valid: adapter, data, evaluation, freezing, model"]),
        ("run: {resum: x}\n", ["run.resum: unknown key", "did you mean `resume`?"]),
        ("run: {model: x}\n", ["run.model: unknown key", "`model` belongs at the top level"]),
        ("run: {learning_rate: 1}\n", ["`learning_rate` belongs under `training`"]),
        ("evaluation:\n  sets:\n    a: {paht: x}\n", ["r.yaml:7: evaluation.sets.a.paht", "did you mean `path`?"]),
        # wrong types, and what YAML made of unquoted text
        (
            "tracking: {wandb: {project: no}}\n",
            [
                "r.yaml:5: tracking.wandb.project: found `no`, which YAML reads as the boolean false",
                'expected text; write "no" in quotes',
            ],
        ),
        ("tracking: {wandb: {project: on}}\n", ["`on`, which YAML reads as the boolean true", '"on" in quotes']),
        ("tracking: {wandb: {project: 1.10}}\n", ["`1.10`, which YAML reads as the number 1.1", '"1.10" in quotes']),
        ("tracking: {wandb: {project: 12}}\n", ["found the number 12", '"12" in quotes']),
        ("run: {resume: null}\n", ["`null`, which YAML reads as null", '"null" in quotes']),
        ("run: {resume: ~}\n", ["`~`, which YAML reads as null"]),
        ("run:\n", ["r.yaml:5: run: found nothing (null)", "remove the key"]),
        ("evaluation: {prompts: [ok, no]}\n", ["evaluation.prompts.1: found `no`"]),
        ("evaluation: {prompts: hello}\n", ["expected a list; write `[hello]`"]),
        ("evaluation: {generation: {seed: '5'}}\n", ['found the text "5"', "an integer; remove the quotes"]),
        ("evaluation: {generation: {seed: 010}}\n", ['"010"', "an integer; write it without the leading 0"]),
        ("evaluation: {generation: {seed: 1e3}}\n", ["`1e3`, which YAML reads as the number 1000.0", "write 1000"]),
        ("evaluation: {generation: {seed: true}}\n", ["found the boolean true; expected an integer"]),
        ("evaluation: {generation: {do_sample: 1}}\n", ["found the number 1; expected true or false"]),
        (
            "evaluation: {generation: [seed]}\n",
            ["found a list; expected a mapping", "`max_new_tokens`", "remove the `-`"],
        ),
        ("evaluation: {sets: {a: x.txt}}\n", ["evaluation.sets.a", "write `path: x.txt`"]),
        ("training: [a]\n", ["training: found a list; expected a mapping"]),
        # ranges
        ("evaluation: {generation: {max_new_tokens: 0}}\n", ["found the number 0; expected a number of at least 1"]),
        ("evaluation: {generation: {temperature: 0}}\n", ["found the number 0", "a number greater than 0"]),
        ("evaluation: {generation: {temperature: .inf}}\n", ["`.inf`", "a finite number"]),
        ("evaluation: {generation: {temperature: .nan}}\n", ["`.nan`", "a finite number"]),
        ("evaluation: {prompts: ['']}\n", ["evaluation.prompts.0", "at least 1 character"]),
        ("evaluation: {sets: {1a: {path: x}}}\n", ["evaluation.sets.1a: the name `1a` does not fit the pattern"]),
        # choices
        (
            "tracking: {wandb: {mode: offlin}}\n",
            ['found the text "offlin"', "`online`, `offline`", "did you mean `offline`?"],
        ),
        ("tracking: {wandb: {mode: off}}\n", ["`off`, which YAML reads as the boolean false", '"off" in quotes']),
        # contradictions
        ("evaluation: {sets: {a: {split: validation}}}\n", ["evaluation.sets.a", "`data.validation` is missing"]),
        ("evaluation: {sets: {a: {split: train, path: x}}}\n", ["evaluation.sets.a: `split` names documents"]),
        (
            "evaluation: {sets: {a: {}}}\n",
            ["evaluation.sets.a: a source has exactly one of `path`, `dataset` and `builtin`"],
        ),
    ],
)
def test_mistakes_in_sections(message, text, parts):
    found = message(text)
    assert "Value error" not in found
    assert "\n" not in found, "one mistake is one line"
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("{train: {path: x}}", ["r.yaml:3: data.train: found a mapping; expected a list", "`- path: …`"]),
        ("{train: x.txt}", ["data.train", "expected a list", "write `- path: x.txt`"]),
        ("{train: [x.txt]}", ["data.train.0", "expected a mapping", "write `path: x.txt`"]),
        ("{train: []}", ["data.train: at least one entry is needed"]),
        ("{train: [{path: 1}]}", ["data.train.0.path: found the number 1; expected text"]),
        ("{train: [{path: x, weight: 2}]}", ["data.train.0.weight: found the number 2", "less than 1"]),
        (
            "{train: [{path: x, builtin: docstrings}]}",
            ["data.train.0: a source has exactly one of `path`, `dataset` and `builtin`"],
        ),
        ("{train: [{path: x}], validation: 0.1}", ["data.validation: found the number 0.1", "write `fraction: 0.1`"]),
        ("{train: [{path: x}], validation: []}", ["data.validation: at least one entry is needed"]),
        ("{train: [{path: x}], validation: {fracton: 0.1, fraction: 0.1}}", ["data.validation.fracton", "`fraction`?"]),
        ("{train: [{path: x}], validation: {mapping: 1, fraction: 0.1}}", ["data.validation.mapping: unknown key"]),
        ("{train: [{path: x}], validation: {fraction: 1.5}}", ["data.validation.fraction: found the number 1.5"]),
        (
            "{train: [{path: x}], validation: {seed: 1}}",
            ["data.validation.fraction: required, but missing; expected a number"],
        ),
        (
            "{train: [{path: x}], validation: [{weight: 1, path: x}]}",
            ["data.validation.0.weight", "belongs under `data.train`"],
        ),
        ("{block_size: 64}", ["r.yaml:3: data.train: required, but missing; expected a list"]),
    ],
)
def test_mistakes_in_data(message, data, parts):
    found = message(f"{HEAD}data: {data}\n", whole=True)
    assert "\n" not in found, "one mistake is one line"
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("gpt2", ["r.yaml:2: model: found the text", "write `name_or_path: gpt2`"]),
        ("{}", ["r.yaml:2: model: a model has either `name_or_path` or `from_config`"]),
        ("{name_or_path: gpt2, tokenizer: 3}", ["model.tokenizer: found the number 3; expected text", '"3" in quotes']),
        ("{name_or_path: gpt2, dtype: float16}", ["model.dtype", "did you mean `bfloat16`?"]),
        ("{name_or_path: gpt2, revision: 5e5}", ["model.revision: found `5e5`, which YAML reads as the number"]),
        ("{name_or_path: gpt2, trust_remote_code: true}", ["model: `trust_remote_code: true` demands a `revision`"]),
    ],
)
def test_mistakes_in_model(message, model, parts):
    found = message(f"task: causal-lm\nmodel: {model}\ndata: {{train: [{{path: x}}]}}\n", whole=True)
    for part in parts:
        assert part in found


def test_a_date_is_text(write):
    path = write("run: {resume: 2024-01-01}\n")
    assert load_recipe(path).run.resume == "2024-01-01"


def test_all_mistakes_come_in_one_message_in_the_order_of_lines(message):
    lines = message("training: {learning_rat: 1}\ndata2: 1\nrun: {resume: 1}\n", ["task=causal-ml"]).splitlines()
    assert lines[0] == "r.yaml: 4 problems"
    assert [line.strip().split(": ")[:2] for line in lines[1:]] == [
        ["r.yaml:5", "training.learning_rat"],
        ["r.yaml:6", "data2"],
        ["r.yaml:7", "run.resume"],
        ["command line", "task=causal-ml"],
    ]


def test_missing_sections_are_all_named(message):
    found = message("task: causal-lm\n", whole=True)
    assert "r.yaml:1: model: required" in found
    assert "r.yaml:1: data: required" in found


def test_a_mistake_behind_an_alias_is_told_once_per_key(write):
    path = write(f"{HEAD}data: {{train: &t [{{pth: x}}], validation: *t}}\n", whole=True)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert str(error.value).count("data.train.0.pth") == 1
