"""What can be wrong with labelled rows, and with the recipe and the model of a classifier."""

import json

from kit.tasks import sequence_classification
from tests.classifiers import save_base
from tests.material import documents
from tests.troubleshooting.lab import case

FILES, LABELS, PARTS, RECIPE, MODEL = (
    f"Classification: {what}"
    for what in ("columns of a file", "labels", "parts and balance", "the recipe", "model and freezing")
)
TEXTS = documents(60, seed=3, longest=12)


def rows(*labels, texts=TEXTS):
    """Return rows with the labels in turn."""
    return [{"label": labels[number % len(labels)], "text": text} for number, text in enumerate(texts)]


ROWS = rows("ham", "spam")


def csv(content, delimiter=",", header=True):
    lines = [delimiter.join(content[0]), *(delimiter.join(row.values()) for row in content)]
    return "\n".join(lines if header else lines[1:]) + "\n"


def jsonl(content):
    return "".join(json.dumps(row) + "\n" for row in content)


def classifier(lab, path="rows.jsonl", content=None, loads=False, data=None, **sections):
    """Write rows and the recipe of a classifier of them; its model is not to be loaded, unless `loads`."""
    lab.write(path, jsonl(ROWS) if content is None else content)
    if not loads:
        lab.monkeypatch.setattr(sequence_classification, "load_classifier", None)
    source = {"path": path, **sections.pop("source", {})}
    data = {"train": [source], "validation": None, "block_size": None, **(data or {})}
    return lab.recipe(task="sequence-classification", data=data, **sections)


def inserted(number, **row):
    """Return the rows with another one as that number."""
    return jsonl([*ROWS[: number - 1], row, *ROWS[number - 1 :]])


# ---- columns of a file


@case(FILES, "no header", "rows.csv", "which column holds the label?", "the first rows, split at ','", "`column_names`")
def no_header(lab):
    return classifier(lab, "rows.csv", csv(ROWS, header=False))


@case(FILES, "another delimiter than the file has", "the first rows, split at ','", "separated by semicolons")
def wrong_delimiter(lab):
    return classifier(lab, "rows.csv", csv(ROWS, ";"), source={"delimiter": ","})


@case(FILES, "commas in texts that nothing quotes", "rows.csv:2: 3 fields where 2 are expected", "the first rows")
def unquoted_commas(lab):
    return classifier(lab, "rows.csv", csv(rows("ham", "spam", texts=[f"{text}, indeed" for text in TEXTS])))


@case(FILES, "JSON lines that are called CSV", "rows.csv", "these look like JSON lines: set `format: jsonl`")
def json_lines_as_csv(lab):
    return classifier(lab, "rows.csv", jsonl(ROWS))


@case(FILES, "a column twice", "rows.csv:1: the header holds `text` more than once", "`column_names`")
def column_twice(lab):
    return classifier(lab, "rows.csv", "label,text,text\nham,a,b\n")


@case(FILES, "a workbook", "rows.xlsx:1: holds NUL", "expected lines of a label and a text")
def workbook(lab):
    return classifier(lab, "rows.xlsx", b"PK\x03\x04" + bytes(100))


@case(FILES, "lines without a label", "rows.txt:2: no space in `hello`", "expected a label, a space and a text")
def lines_without_label(lab):
    return classifier(lab, "rows.txt", "ham see you\nhello\n")


@case(FILES, "a text column that is not there", "no column `txt` (`text_column`)", "did you mean `text`?")
def no_text_column(lab):
    return classifier(lab, source={"text_column": "txt"})


@case(FILES, "a label column that is not there", "no column `lable` (`label_column`)", "did you mean `label`?")
def no_label_column(lab):
    return classifier(lab, source={"label_column": "lable"})


@case(FILES, "the label as a part of the text", "column `label` is the label", "it cannot be a part of the text")
def label_in_text(lab):
    return classifier(lab, source={"template": "{label}: {text}"})


@case(FILES, "numbers where text is expected", "rows.jsonl:1: column `text` holds int; expected text")
def numbers_as_text(lab):
    return classifier(lab, content=jsonl(rows("ham", "spam", texts=range(20))))


@case(FILES, "texts that are all empty", "no usable row in `rows.jsonl` (empty: 20)")
def all_empty(lab):
    return classifier(lab, content=jsonl(rows("ham", "spam", texts=[""] * 20)))


# ---- labels


@case(LABELS, "a row without label", "rows.jsonl:7: no label: column `label` is missing", "`on_bad_label: skip`")
def missing_label(lab):
    return classifier(lab, content=inserted(7, text="who knows"))


@case(LABELS, "an empty label", "rows.jsonl:7: no label: column `label` is empty", "`on_bad_label: skip`")
def empty_label(lab):
    return classifier(lab, content=inserted(7, text="who knows", label=" "))


@case(LABELS, "one class", "all of the 60 rows have the label `ham`", "needs rows of at least two")
def one_class(lab):
    return classifier(lab, content=jsonl(rows("ham")))


@case(LABELS, "a label that no training row has", "test.jsonl:1: label `Spam`", "1 row of test", "did you mean `spam`?")
def unseen_label(lab):
    lab.write("test.jsonl", jsonl([{"label": "Spam", "text": "win"}, {"label": "ham", "text": "hello"}]))
    return classifier(lab, data={"test": [{"path": "test.jsonl"}]})


@case(LABELS, "a number that the test has as `1.0`", "test.csv:2: label `1.0`", "did you mean `1`?")
def float_in_test(lab):
    lab.write("test.csv", "label,text\n1.0,win\n")
    return classifier(lab, "rows.csv", csv(rows("0", "1")), data={"test": [{"path": "test.csv"}]})


@case(LABELS, "floats as labels", "rows.jsonl:1: column `label` holds 0.0", "expected text or an integer", "Int64")
def float_labels(lab):
    return classifier(lab, content=jsonl(rows(0.0, 1.0)))


@case(LABELS, "floats beside text", "rows.jsonl:7", "holds 1.5", "float against string labels: rows.jsonl:1")
def floats_beside_text(lab):
    return classifier(lab, content=inserted(7, text="who knows", label=1.5))


@case(LABELS, "numbers beside text", "rows.jsonl:7: column `label` holds numbers, and at rows.jsonl:1 text")
def numbers_beside_text(lab):
    return classifier(lab, content=inserted(7, text="who knows", label=1))


@case(LABELS, "a label `no` that became a boolean", "rows.jsonl:7", "holds booleans, and at rows.jsonl:1 text")
def no_became_false(lab):
    return classifier(lab, content=inserted(7, text="who knows", label=False))


@case(
    LABELS, "one label beside lists of them", "rows.jsonl:7: column `label` holds a list, and at rows.jsonl:1 a single"
)
def list_beside_one(lab):
    return classifier(lab, content=inserted(7, text="who knows", label=["ham", "spam"]))


@case(
    LABELS, "columns of labels that hold more than 0 and 1", "column `a` (`label_columns`) holds `2`; expected 0 or 1"
)
def no_flag(lab):
    return classifier(lab, "rows.csv", "text,a,b\nhello,0,1\nyou,2,1\n", source={"label_columns": ["a", "b"]})


@case(LABELS, "a name for a label that is not there", "data.label_names: no training row", "did you mean `spam`?")
def name_of_no_label(lab):
    return classifier(lab, data={"label_names": {"spma": "unwanted"}})


@case(LABELS, "one name for all labels", "data.label_names: makes one class of all 2 labels", "needs two")
def one_name(lab):
    return classifier(lab, data={"label_names": {"ham": "mail", "spam": "mail"}})


@case(
    LABELS,
    "classes that are all too small",
    "data.min_rows_per_label: found 40, which 0 of 2 labels reach",
    "`ham: 30`",
)
def all_too_small(lab):
    return classifier(lab, data={"min_rows_per_label": 40})


# ---- parts and balance


@case(PARTS, "fewer rows than parts", "data.split.validation: 0.1 of 3 rows", "each class has one that trains")
def three_rows(lab):
    return classifier(lab, content=jsonl(ROWS[:3]))


@case(PARTS, "one group that holds all rows", "data.split.validation", "groups stay together", "without a row")
def one_group(lab):
    content = jsonl([{**row, "patient": "Ada"} for row in ROWS])
    return classifier(lab, content=content, source={"group_column": "patient"})


@case(PARTS, "training rows that are all in the test", "none of 60 rows is left (also in test: 60)", "other rows than")
def same_rows(lab):
    return classifier(lab, data={"test": [{"path": "rows.jsonl"}]})


@case(PARTS, "a part with two origins", "recipe.yaml:", "data: `test` names sources", "leave out `split.test`")
def two_origins(lab):
    return classifier(lab, data={"test": [{"path": "rows.jsonl"}], "split": {"test": 0.2}})


@case(PARTS, "parts that take everything", "data.split: `validation` and `test` add up to 1", "nothing would train")
def parts_take_all(lab):
    return classifier(lab, data={"split": {"validation": 0.5, "test": 0.5}})


@case(PARTS, "weight of a class that is not there", "data.balance.weights: no class `spma`", "did you mean `spam`?")
def weight_of_no_class(lab):
    return classifier(lab, data={"balance": {"method": "class-weights", "weights": {"ham": 1, "spma": 2}}})


@case(PARTS, "weights of some classes", "data.balance.weights: no weight for class `ham`", "expected one for each")
def some_weights(lab):
    return classifier(lab, data={"balance": {"method": "class-weights", "weights": {"spam": 2}}})


@case(PARTS, "as many rows of each label where rows have several", "`undersample` needs exactly one label a row")
def undersampled_multi(lab):
    content = jsonl([{**row, "label": [row["label"]]} for row in ROWS])
    return classifier(lab, content=content, data={"balance": "undersample"})


@case(PARTS, "evaluations without anything to evaluate", "training.eval_strategy needs something to evaluate")
def nothing_to_evaluate(lab):
    return classifier(
        lab, data={"split": {"validation": 0}}, evaluation={"train_sample": 0}, training={"eval_strategy": "epoch"}
    )


# ---- the recipe


@case(RECIPE, "a source's label `no`, as YAML reads it", "label: found `no`", "the boolean false", '"no" in quotes')
def yaml_label_no(lab):
    command = classifier(lab, source={"label": "LABEL"})
    return replace_in_recipe(lab, command, "LABEL", "no")


@case(RECIPE, "a key `no`, as YAML reads it", "recipe.yaml:", "a key is text", "`no` as a boolean", '"no" in quotes')
def yaml_key_no(lab):
    command = classifier(lab, evaluation={"zero_shot": {"words": {"LABEL": "never"}}})
    return replace_in_recipe(lab, command, "LABEL", "no")


def replace_in_recipe(lab, command, old, new):
    """Write into the recipe what no YAML writer would; return the command."""
    lab.write("recipe.yaml", lab.folder.joinpath("recipe.yaml").read_text().replace(old, new))
    return command


@case(RECIPE, "a prompt without room for the text", "evaluation.zero_shot: `prompt` needs `{text}` once")
def prompt_without_text(lab):
    return classifier(lab, evaluation={"zero_shot": {"prompt": "Is this spam?"}})


@case(RECIPE, "words for a label that is not there", "evaluation.zero_shot.words: `spma` is no label")
def words_for_no_label(lab):
    return classifier(lab, evaluation={"zero_shot": {"words": {"spma": "yes"}}})


@case(
    RECIPE, "the same words for two labels", "evaluation.zero_shot.words: `ham` and `spam` have the same words, 'yes'"
)
def same_words(lab):
    return classifier(lab, evaluation={"zero_shot": {"words": {"spam": "yes", "ham": "yes"}}})


@case(RECIPE, "a question that is too long", "evaluation.zero_shot.prompt: found 201 tokens", "there is room for")
def long_question(lab):
    return classifier(lab, evaluation={"zero_shot": {"prompt": "?" * 200 + " {text}"}})


@case(RECIPE, "a metric that nothing gives", "training.metric_for_best_model", "did you mean `validation_f1_macro`?")
def no_such_metric(lab):
    return classifier(lab, training={"eval_strategy": "epoch", "metric_for_best_model": "validation_f1_marco"})


@case(RECIPE, "new words for a classifier", "vocabulary: does not go with `task: sequence-classification`")
def vocabulary_of_a_classifier(lab):
    return classifier(lab, vocabulary={"tokens": ["kinase"]})


@case(RECIPE, "words from the rows of a classifier", "found `task: sequence-classification`; expected `causal-lm`")
def mined_from_rows(lab):
    classifier(lab)
    return ["vocabulary", "mine", "recipe.yaml", "-o", "words.txt"]


# ---- model and freezing


@case(
    MODEL, "a number of labels that the data has not", "model.config.num_labels: found 3; expected 2", "`ham`, `spam`"
)
def wrong_num_labels(lab):
    return classifier(lab, loads=True, model={"config": {"num_labels": 3}})


@case(MODEL, "longer texts than the model reads", "data.max_length: found 100; expected at most 64, the positions")
def too_long(lab):
    return classifier(lab, data={"max_length": 100})


@case(MODEL, "no room beside the special tokens", "data.max_length: found 2", "special tokens")
def only_special_tokens(lab):
    save_base(lab.folder / "encoder", "bert")
    return classifier(lab, data={"max_length": 2}, model={"name_or_path": "./encoder"})


@case(
    MODEL, "a model that no classifier can be made of", "of type `clip_vision_model`, which has no sequence classifier"
)
def no_classifier(lab):
    lab.write("images/config.json", json.dumps({"model_type": "clip_vision_model"}))
    return classifier(lab, model={"name_or_path": "./images"})


@case(MODEL, "an adapter in the place of a model", "model.name_or_path: `./adapter` holds a PEFT adapter, not a model")
def adapter_of_a_classifier(lab):
    lab.write("adapter/adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "./model"}))
    return classifier(lab, model={"name_or_path": "./adapter"})


@case(MODEL, "a new head that does not train", "score.weight begins at random", "`head: true`", "freezing.trainable")
def head_not_trained(lab):
    return classifier(lab, loads=True, freezing={"trainable": {"last_blocks": 1}})


@case(MODEL, "a new head that is frozen", "score.weight begins at random", "leave it out of `freezing.frozen`")
def head_frozen(lab):
    return classifier(lab, loads=True, freezing={"frozen": {"head": True}})


@case(
    MODEL, "a new head that trains in no phase", "begins at random", "`head: true` to `freezing.schedule.0.trainable`"
)
def head_in_no_phase(lab):
    later = {"step": 1, "trainable": {"final_norm": True}}
    return classifier(lab, loads=True, freezing={"schedule": [{"trainable": {"last_blocks": 1}}, later]})


@case(MODEL, "a classifier to continue a prompt", "run/model")
def classifier_generates(lab):
    lab.kit(*classifier(lab, loads=True, evaluation={"baselines": []}))
    return ["generate", "run", "--prompt", "hello"]
