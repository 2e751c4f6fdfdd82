"""`task: sequence-classification`: what goes together, what does not, and what is meant where nothing is written."""

import pytest
import yaml

from kit.errors import UserError
from kit.recipe.classification import BASELINES, Balance, ClassificationRecipe
from kit.recipe.loading import dump_recipe, load_recipe
from kit.recipe.models import CausalLmRecipe

HEAD = "task: sequence-classification\nmodel: {name_or_path: gpt2}\n"
MINIMAL = HEAD + "data:\n  train: [{path: a.csv}]\n"


@pytest.fixture
def refusal(write):
    """Return the message that a recipe is refused with; `text` follows the task and the model."""

    def refused(text, head=HEAD):
        with pytest.raises(UserError) as error:
            load_recipe(write(head + text, whole=True))
        return str(error.value)

    return refused


def source(keys):
    return f"data:\n  train: [{{{keys}}}]\n"


def data(lines):
    return f"data:\n  train: [{{path: a.csv}}]\n  {lines}\n"


# ---- sources


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("path: a.csv, label: spam, label_column: y", "`label` and `label_column` contradict each other"),
        ("path: a.csv, label: spam, label_columns: [y]", "`label` and `label_columns` contradict each other"),
        ("path: a.csv, label: spam, label_separator: ';'", "`label` and `label_separator` contradict each other"),
        ("path: a.csv, label_columns: [y], label_column: y", "`label_columns` and `label_column` contradict"),
        ("path: a.csv, label_columns: [y], label_separator: ';'", "`label_columns` and `label_separator` contradict"),
        ("path: a.csv, text_column: x, template: '{x}'", "`text_column` and `template` contradict each other"),
        ("builtin: python-reference", "`builtin: python-reference` has no labels: give `label`"),
        ("builtin: docstrings, packages: [peft], label_column: y", "`label_column` does not go with `builtin`"),
        ("builtin: docstrings, packages: [peft], group_column: y", "`group_column` does not go with `builtin`"),
        ("builtin: docstrings, packages: [peft], on_bad_label: skip", "`on_bad_label` does not go with `builtin`"),
        ("builtin: docstrings", "`docstrings` needs at least one package"),
        ("path: a.csv, dataset: imdb", "a source has exactly one of `path`, `dataset` and `builtin`"),
        ("dataset: imdb, delimiter: ';'", "`delimiter` does not go with `dataset`"),
        ("path: a.csv, min_characters: 9, max_characters: 3", "`max_characters` is less than `min_characters`"),
    ],
)  # fmt: skip
def test_keys_of_a_source_that_contradict_each_other(refusal, keys, says):
    message = refusal(source(keys))
    assert message.startswith("r.yaml:4: data.train.0: ")
    assert says in message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("path: a.csv, label: no", 'data.train.0.label: found `no`, which YAML reads as the boolean false'),
        ("path: a.csv, label: no", '; write "no" in quotes'),
        ("path: a.csv, label: 1", 'data.train.0.label: found the number 1; expected text; write "1" in quotes'),
        ("path: a.csv, label: ''", 'data.train.0.label: found the text ""; expected text of at least 1 character'),
        ("path: a.csv, label_separator: ''", 'data.train.0.label_separator: found the text ""; expected text of at'),
        ("path: a.csv, label_columns: y", 'label_columns: found the text "y"; expected a list; write `[y]`'),
        ("path: a.csv, on_bad_label: drop", "expected one of `error`, `skip`"),
        ("path: a.csv, lable_column: y", "data.train.0.lable_column: unknown key; did you mean `label_column`?"),
        ("path: a.csv, labels: y", "data.train.0.labels: unknown key; did you mean `label`?"),
        ("path: a.csv, sample_by: line", "data.train.0.sample_by: unknown key"),
        ("path: a.csv, weight: 0.5", "data.train.0.weight: unknown key"),
    ],
)  # fmt: skip
def test_values_and_names_of_a_source(refusal, keys, says):
    message = refusal(source(keys))
    assert message.startswith("r.yaml:4: ")
    assert says in message


# ---- data


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("split: {validation: 0.6, test: 0.4}", "5: data.split: `validation` and `test` add up to 1; nothing would"),
        ("split: {validation: 1}", "5: data.split.validation: found the number 1; expected a number less than 1"),
        ("split: {test: -0.1}", "5: data.split.test: found the number -0.1; expected a number of at least 0"),
        ("split: {tset: 0.1}", "5: data.split.tset: unknown key; did you mean `test`?"),
        ("split: 0.1", "5: data.split: found the number 0.1; expected a mapping with the keys `validation`, `test`"),
        ("test: [{path: b.csv}]\n  split: {test: 0.2}", "data: `test` names sources of its own: leave out"),
        ("validation: [{path: b.csv}]\n  split: {validation: 0.2}", "leave out `split.validation`"),
        ("test: []", "5: data.test: at least one entry is needed"),
        ("balance: oversampel", '5: data.balance: found the text "oversampel"; expected one of `undersample`,'),
        ("balance: oversampel", "did you mean `oversample`?"),
        ("balance: {rows: all}", "5: data.balance.method: required, but missing"),
        ("balance: {method: oversample, rows: all}", "5: data.balance: `rows: all` goes with `undersample`, not with"),
        ("balance: {method: class-weights, rows: all}", "`rows: all` goes with `undersample`"),
        ("balance: {method: undersample, weights: {a: 1}}", "5: data.balance: `weights` goes with `class-weights`"),
        ("balance: {method: class-weights, seed: 3}", "5: data.balance: `seed` says nothing about `class-weights`"),
        ("balance: {method: class-weights, weights: {a: 0}}", "data.balance.weights.a: found the number 0; expected a"),
        ("balance: {method: class-weights, weights: {no: 1}}", "a key is text, but YAML reads `no` as a boolean"),
        ("balance: {method: undersample, rows: all}\n  test: [{path: b.csv}]", "`balance.rows: all` goes with one set"),
        ("augment: {copies: 2}", "5: data.augment: `characters` or `words` says how much noise"),
        ("augment: {characters: 2}", "5: data.augment.characters: found the number 2; expected a number of at most 1"),
        ("max_tokens_per_batch: 8", "data: `max_tokens_per_batch` goes with `group_by_length: true`"),
        ("max_length: 1", "5: data.max_length: found the number 1; expected a number of at least 2"),
        ("truncation: middle", '5: data.truncation: found the text "middle"; expected one of `head`, `tail`,'),
        ("label_names: {0: bad}", '5: a key is text, but YAML reads `0` as a number; write "0" in quotes'),
        ("label_names: {a: yes}", '5: data.label_names.a: found `yes`, which YAML reads as the boolean true'),
        ("labels: {}", "5: data.labels: unknown key; did you mean `label_names`?"),
    ],
)  # fmt: skip
def test_data_that_contradicts_itself(refusal, lines, says):
    message = refusal(data(lines))
    assert message.startswith("r.yaml:")
    assert says in message


def test_sources_of_a_part_go_with_a_share_of_0(write):
    recipe = load_recipe(write(HEAD + data("test: [{path: b.csv}]\n  split: {test: 0, seed: 3}"), whole=True))
    assert (recipe.data.split.validation, recipe.data.test[0].path) == (0.1, "b.csv")


# ---- evaluation, and what does not go with the task


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("evaluation: {zero_shot: {prompt: 'Is this spam?'}}", "5: evaluation.zero_shot: `prompt` needs `{text}` once"),
        ("evaluation: {zero_shot: {prompt: '{text} {text}'}}", "`prompt` needs `{text}` once"),
        ("evaluation: {zero_shot: {words: {ham: no}}}", "5: evaluation.zero_shot.words.ham: found `no`"),
        ("evaluation: {baselines: [majority, tfidf]}", '5: evaluation.baselines.1: found the text "tfidf"; expected'),
        ("evaluation: {baselines: [majority, tfidf_logre]}", "did you mean `tfidf_logreg`?"),
        ("evaluation: {bootstrap_resamples: 5}", "5: evaluation.bootstrap_resamples: found the number 5; expected"),
        ("evaluation: {sets: {test: {path: b.csv}}}", "`sets.test`: that name is taken by the set of every run"),
        ("evaluation: {sets: {train: {path: b.csv}}}", "`sets.train`: that name is taken"),
        ("evaluation: {sets: {1a: {path: b.csv}}}", "evaluation.sets.1a: the name `1a` does not fit the pattern"),
        ("evaluation: {temperature_scalling: true}", "unknown key; did you mean `temperature_scaling`?"),
        ("vocabulary: {tokens: [kinase]}", "5: vocabulary: does not go with `task: sequence-classification`"),
    ],
)  # fmt: skip
def test_what_an_evaluation_cannot_be(refusal, lines, says):
    message = refusal(source("path: a.csv") + lines + "\n")
    assert message.startswith("r.yaml:5: ")
    assert says in message


def test_a_tokenizer_is_not_trained_on_labelled_rows(refusal):
    head = "task: sequence-classification\nmodel: {from_config: {model_type: gpt2}, tokenizer: {vocab_size: 300}}\n"
    message = refusal(source("path: a.csv"), head)
    assert message.startswith("r.yaml:2: model.tokenizer: ")
    assert "`causal-lm` recipe" in message


def test_keys_of_another_task_are_told_from_misspelt_ones(refusal, write):
    assert "data.block_size: unknown key" in refusal(data("block_size: 8"))
    assert "data.packing: unknown key" in refusal(data("packing: true"))
    assert "evaluation.prompts: unknown key" in refusal(source("path: a.csv") + "evaluation: {prompts: [a]}\n")
    causal = HEAD.replace("sequence-classification", "causal-lm")
    for key, value in {"balance": "oversample", "max_length": "8", "label_names": "{}"}.items():
        assert f"data.{key}: unknown key" in refusal(data(f"{key}: {value}"), causal)
    message = refusal(source("path: a.csv") + "evaluation: {baselines: []}\n", causal)
    assert "r.yaml:5: evaluation.baselines: unknown key" in message


def test_a_task_that_there_is_not(refusal):
    message = refusal(source("path: a.csv"), "task: text-classification\nmodel: {name_or_path: gpt2}\n")
    assert message == (
        'r.yaml:1: task: found the text "text-classification"; expected one of `causal-lm`, `sequence-classification`; '
        "did you mean `sequence-classification`?"
    )


# ---- what is meant


def test_defaults(write):
    recipe = load_recipe(write(MINIMAL, whole=True))
    assert type(recipe) is ClassificationRecipe
    of_data, of_evaluation = recipe.data, recipe.evaluation
    split = {"validation": 0.1, "test": 0.2, "seed": 0, "stratify": True}
    assert of_data.split.model_dump() == split
    assert (of_data.balance, of_data.balancing, of_data.augment, of_data.max_length) == (None, None, None, None)
    assert (of_data.truncation, of_data.exact_duplicates, of_data.group_by_length) == ("head", "keep", False)
    assert (of_evaluation.baselines, of_evaluation.train_sample, of_evaluation.mistakes) == (BASELINES, 500, 50)
    assert of_evaluation.bootstrap_resamples == 1000
    assert not of_evaluation.temperature_scaling
    assert of_data.train[0].on_bad_label == "error"


@pytest.mark.parametrize("method", ["undersample", "oversample", "class-weights"])
def test_balance_as_text_is_a_mapping_with_the_method_alone(write, method):
    as_text = load_recipe(write(HEAD + data(f"balance: {method}"), whole=True)).data
    as_mapping = load_recipe(write(HEAD + data(f"balance: {{method: {method}}}"), whole=True)).data
    assert as_text.balancing == as_mapping.balancing == Balance(method=method)
    assert as_text.balance == method


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  balance: undersample\n",
        "  balance: {method: class-weights, weights: {ham: 1, 'no': 2.5}}\n",
        "  balance: {method: undersample, rows: all, seed: 123}\n",
        "  test: [{path: b.jsonl, label_separator: '|', group_column: patient}]\n  split: {test: 0}\n",
        "  validation: [{path: b.csv, label: 'no'}]\n  split: {validation: 0}\n",
        "  label_names: {'0': negative, '1': positive}\n",
        "  augment: {words: 0.1}\n  group_by_length: true\n  max_tokens_per_batch: 99\n",
        "evaluation: {baselines: []}\n",
        "evaluation: {baselines: [majority], zero_shot: {words: {'no': 'yes'}}, examples: [hello]}\n",
        "freezing: {trainable: {last_blocks: 1, head: true}}\ntraining: {learning_rate: 1e-4}\n",
    ],
)
def test_a_recipe_that_is_written_and_read_is_the_same(write, text):
    recipe = load_recipe(write(MINIMAL + text, whole=True))
    written = dump_recipe(recipe)
    again = load_recipe(write(written, "again.yaml", whole=True))
    assert again == recipe
    assert dump_recipe(again) == written


def test_no_baselines_are_written_as_none(write):
    recipe = load_recipe(write(MINIMAL + "evaluation: {baselines: []}\n", whole=True))
    assert recipe.evaluation.baselines == ()
    assert yaml.safe_load(dump_recipe(recipe))["evaluation"]["baselines"] == []


def test_a_recipe_extends_another(write):
    write(
        MINIMAL + "  balance: {method: undersample, rows: all, seed: 1}\n  split: {seed: 5}\n", "base.yaml", whole=True
    )
    text = "extends: base.yaml\ndata: {split: {test: 0.3}, balance: {method: class-weights, rows: null, seed: null}}\n"
    recipe = load_recipe(write(text, whole=True))
    assert (recipe.data.split.test, recipe.data.split.seed) == (0.3, 5)
    assert recipe.data.balancing == Balance(method="class-weights")
    assert load_recipe(write("extends: base.yaml\ndata: {balance: null}\n", whole=True)).data.balance is None
    assert load_recipe("base.yaml", ["data.balance=oversample"]).data.balance == "oversample"


def test_what_is_inherited_and_contradicts_is_told_with_both_places(write, refusal):
    write(MINIMAL + "  balance: {method: undersample, rows: all}\n", "base.yaml", whole=True)
    message = refusal("extends: base.yaml\ndata: {balance: {method: oversample}}\n", head="")
    assert "`rows: all` goes with `undersample`, not with `oversample`" in message
    assert "`method` at r.yaml:2, `rows` at base.yaml:5; to drop a key that is inherited" in message


def test_a_classifier_extends_no_recipe_of_another_task(write, refusal):
    write("training: {learning_rate: 1e-4}\n", "base.yaml")
    assert type(load_recipe("base.yaml")) is CausalLmRecipe
    write("data: {block_size: 8}\n", "blocks.yaml", whole=True)
    message = refusal("extends: blocks.yaml\n" + MINIMAL, head="")
    assert message.startswith("blocks.yaml:1: data.block_size: unknown key")


@pytest.mark.parametrize("part", ["validation", "test"])
def test_sources_of_a_part_are_written_with_a_share_of_0(write, part):
    recipe = load_recipe(write(HEAD + data(f"{part}: [{{path: b.csv}}]"), whole=True))
    assert getattr(recipe.data.split, part) == 0
    assert load_recipe(write(dump_recipe(recipe), "again.yaml", whole=True)) == recipe


def test_a_key_of_another_task_is_said_to_be_one(refusal):
    assert "data.block_size: unknown key here, one of `task: causal-lm`; did you mean `max_length`?" in refusal(
        data("block_size: 8")
    )
    assert "data.packing: unknown key here, one of `task: causal-lm`; valid: " in refusal(data("packing: true"))
    assert "did you mean `data.max_length`?" in refusal(data("max_seq_length: 8"))
    causal = HEAD.replace("sequence-classification", "causal-lm")
    said = "unknown key here, one of `task: sequence-classification`"
    assert f"data.max_length: {said}; did you mean `block_size`?" in refusal(data("max_length: 8"), causal)
    assert f"data.balance: {said}" in refusal(data("balance: oversample"), causal)
    assert f"data.train.0.label_column: {said}" in refusal(source("path: a.csv, label_column: y"), causal)
    assert f"evaluation.baselines: {said}" in refusal(source("path: a.csv") + "evaluation: {baselines: []}\n", causal)
