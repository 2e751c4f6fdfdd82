"""What can be wrong with text: files, their formats and encodings, datasets, how much of it there is."""

import gzip
import json
import os

from kit.data import readers
from tests.material import documents
from tests.troubleshooting.lab import case

FILES, FORMATS, AMOUNT, DATASETS = "Files", "Formats and encodings", "Amount of text, and evaluation sets", "Datasets"


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = documents(60, seed=2)
ROWS = [{"text": text} for text in TEXTS]

# ---- files


@case(FILES, "a path that does not exist", "`corpus.text`", "no such file", "`corpus.txt`", "/home/you/corpus.text")
def missing_path(lab):
    return lab.source("corpus.text")


@case(FILES, "a pattern that matches nothing", "`corpus/*.txt`", "matches no file", "/home/you/corpus/*.txt")
def empty_pattern(lab):
    return lab.source("corpus/*.txt")


@case(FILES, "a folder where files are expected", "`corpus`", "is a folder", "`corpus/*.txt`")
def folder_as_path(lab):
    lab.write("corpus/a.txt", "text")
    return lab.source("corpus")


@case(FILES, "an empty file", "`empty.txt`", "no document", "empty: 1")
def empty_file(lab):
    return lab.source("empty.txt", "")


@case(
    FILES, "no document left after filtering", "`corpus.jsonl`", "empty: 2", "shorter than min_characters: 3",
    "unusable text: 1",
)  # fmt: skip
def nothing_left(lab):
    rows = [{"text": ""}, {"text": " \n"}, {"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": None}]
    return lab.source("corpus.jsonl", jsonl(rows), min_characters=100, on_bad_text="skip")


@case(FILES, "a file that changes while it is read", "`corpus.txt`", "changed while it was read")
def changing_file(lab):
    read_lines = readers.read_lines

    def reading(path, encoding):
        for number, line in enumerate(read_lines(path, encoding)):
            if number == 50:
                with open(path, "a") as file:
                    file.write("\none more line")
            yield line

    lab.monkeypatch.setattr(readers, "read_lines", reading)
    return lab.recipe()


@case(FILES, "text that has changed since the run ended", "run: is finished", "have changed", "run.resume=never")
def changed_since(lab):
    assert lab.kit(*lab.recipe())[0] == 0
    with open("corpus.txt", "a") as file:
        file.write("\none more line")
    return ["train", "recipe.yaml"]


# ---- formats and encodings


@case(FORMATS, "JSONL with a line that is not JSON", "corpus.jsonl:17:", "not JSON", "character", "one object a line")
def malformed_jsonl(lab):
    lines = jsonl(ROWS).splitlines()
    lines[16] = '{"text": "a quote " inside"}'
    return lab.source("corpus.jsonl", "\n".join(lines))


@case(FORMATS, "a JSON array instead of JSONL", "corpus.json:1:", "found list", "one object a line")
def json_array(lab):
    return lab.source("corpus.json", json.dumps(ROWS))


@case(
    FORMATS, "a column that does not exist", "corpus.jsonl:1:", "no column `abstact`", "`abstract`", "`title`", "`year`"
)
def missing_column(lab):
    rows = [{"title": "t", "abstract": text, "year": 2020} for text in TEXTS]
    return lab.source("corpus.jsonl", jsonl(rows), text_column="abstact")


@case(FORMATS, "several columns that could be the text", "which column", "`text_column`", "`title`", "`abstract`")
def which_column(lab):
    return lab.source("corpus.jsonl", jsonl([{"title": "t", "abstract": text} for text in TEXTS]))


@case(
    FORMATS, "a row whose text is null", "corpus.jsonl:3:", "column `text` holds null", "expected text", "on_bad_text"
)
def null_text(lab):
    return lab.source("corpus.jsonl", jsonl([*ROWS[:2], {"text": None}, *ROWS[2:]]))


@case(FORMATS, "a row whose text is no text", "corpus.jsonl:3:", "column `text` holds a list", "expected text")
def list_text(lab):
    return lab.source("corpus.jsonl", jsonl([*ROWS[:2], {"text": ["a", "b"]}, *ROWS[2:]]))


@case(FORMATS, "bytes that are not UTF-8", "corpus.txt:3:", "byte 0xe9", "`encoding: latin-1`")
def invalid_utf8(lab):
    return lab.source("corpus.txt", b"one\ntwo\ncaf\xe9\n", sample_by="line")


@case(FORMATS, "UTF-16 text", "corpus.txt", "UTF-16", "`encoding: utf-16`")
def utf16(lab):
    return lab.source("corpus.txt", "\n".join(TEXTS).encode("utf-16"), sample_by="line")


@case(FORMATS, "NUL characters", "corpus.txt:2:", "NUL", "`on_bad_text: skip`")
def nul(lab):
    return lab.source("corpus.txt", "one\ntwo\0\nthree\n", sample_by="line")


@case(FORMATS, "a line of 100 MB", "corpus.txt:1:", "more than 50,000,000 characters", "`sample_by`")
def endless_line(lab):
    with open("corpus.txt", "wb") as file:
        for _ in range(25):
            file.write(b"a b " * 1_000_000)
    return lab.source("corpus.txt", sample_by="line")


@case(
    FORMATS, "CSV with a quote that does not end", "corpus.csv:", "quoted field that does not end", "`quoting: false`"
)
def csv_quoting(lab):
    return lab.source("corpus.csv", 'id,text\n1,plain\n2,"opened and never closed\n3,plain\n')


@case(FORMATS, "CSV with another delimiter", "corpus.csv:1:", "`id;text`", "`delimiter` ';'")
def csv_delimiter(lab):
    return lab.source("corpus.csv", "id;text\n" + "".join(f"{i};{text}\n" for i, text in enumerate(TEXTS)))


@case(FORMATS, "CSV with a field too many", "corpus.csv:3:", "3 fields where 2 are expected", "`id`, `text`")
def csv_fields(lab):
    return lab.source("corpus.csv", "id,text\n1,plain\n2,a comma, unquoted\n3,plain\n")


@case(FORMATS, "a compressed file that is cut off", "corpus.txt.gz", "damaged")
def cut_off_gzip(lab):
    return lab.source("corpus.txt.gz", gzip.compress(os.urandom(3000).hex().encode())[:1000], sample_by="line")


@case(FORMATS, "a compressed file without its suffix", "corpus.txt", "gzip data", "`….gz`")
def gzip_as_text(lab):
    return lab.source("corpus.txt", gzip.compress("\n".join(TEXTS).encode()), sample_by="line")


@case(FORMATS, "a Parquet file that is none", "corpus.parquet", "damaged or not what its name says")
def not_parquet(lab):
    return lab.source("corpus.parquet", "text\nplain\n")


@case(FORMATS, "a key that the format does not know", "`corpus.jsonl`", "`sample_by`", "is jsonl")
def key_of_another_format(lab):
    return lab.source("corpus.jsonl", jsonl(ROWS), sample_by="line")


# ---- how much there is


@case(AMOUNT, "a single document, of which a fraction is to be held out", "`corpus.txt`", "one document", "`sample_by`")
def one_document(lab):
    return lab.source("corpus.txt", "\n".join(TEXTS))


@case(AMOUNT, "fewer rows than one global batch", "rows of an epoch", "4 × 256", "gradient_accumulation_steps")
def too_few_rows(lab):
    return lab.recipe(training={"gradient_accumulation_steps": 256})


@case(AMOUNT, "an evaluation set without a document", "`domain` is empty", "`validation` of 3 documents", "`separator`")
def empty_evaluation_set(lab):
    lab.source("corpus.txt", "one\ntwo\nthree\n")
    data = {"train": [{"path": "corpus.txt", "sample_by": "line"}], "validation": {"fraction": 0.01}}
    return lab.recipe(data=data)


@case(AMOUNT, "an evaluation set that is the training text", "`corpus.txt`", "all of its 120", "`domain`", "fraction")
def evaluation_is_training(lab):
    sets = {"sets": {"domain": {"path": "corpus.txt", "sample_by": "line"}}}
    return lab.recipe(data={"validation": None}, evaluation=sets)


@case(AMOUNT, "a validation split that is not made", "recipe.yaml:19", "sets.domain:", "`data.validation` is missing")
def no_validation(lab):
    return lab.recipe(data={"validation": None}, evaluation={"sets": {"domain": {"split": "validation"}}})


@case(AMOUNT, "a prompt longer than the model", "64")
def long_prompt(lab):
    return lab.recipe(evaluation={"prompts": ["the kit reads a corpus " * 30]})


@case(AMOUNT, "more of the text dropped than `data.max_dropped` allows", "`corpus.txt`", "data.max_dropped")
def too_much_dropped(lab):
    lab.write("measured.txt", "\n".join(documents(120, seed=1)[::5]))
    sets = {"sets": {"domain": {"path": "measured.txt", "sample_by": "line"}}}
    return lab.recipe(data={"validation": None}, evaluation=sets)


@case(AMOUNT, "weights that do not add up", "recipe.yaml:", "add up to 1.2", "expected")
def weights(lab):
    lab.write("general.txt", "text")
    train = [{"path": "corpus.txt", "weight": 0.7}, {"path": "general.txt", "weight": 0.5}]
    return lab.recipe(data={"train": train})


# ---- datasets


def dataset(lab, **keys):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n  - {{split: train, path: {config}/train.jsonl}}\n"
        f"  - {{split: test, path: {config}/test.jsonl}}\n"
        for config in ("abstracts", "articles")
    )
    lab.write("medical/README.md", card + "---\n")
    for config in ("abstracts", "articles"):
        for split in ("train", "test"):
            lab.write(f"medical/{config}/{split}.jsonl", jsonl(ROWS))
    return lab.recipe(data={"train": [{"dataset": "./medical", **keys}]})


@case(DATASETS, "a dataset folder that does not exist", "`./medcal`", "no such folder", "/home/you/medcal", "`medical`")
def missing_dataset(lab):
    dataset(lab)
    return lab.recipe(data={"train": [{"dataset": "./medcal"}]})


@case(DATASETS, "a configuration that does not exist", "no config `abstract`", "abstracts, articles", "did you mean")
def missing_config(lab):
    return dataset(lab, config="abstract")


@case(DATASETS, "several configurations, and none named", "`config`", "'abstracts', 'articles'")
def no_config(lab):
    return dataset(lab)


@case(DATASETS, "a split that does not exist", "no split `validation`", "available: train, test")
def missing_split(lab):
    return dataset(lab, config="abstracts", split="validation")


@case(DATASETS, "a dataset of the Hub, offline", "`some-team/abstracts`", "no folder here", "HF_HUB_OFFLINE is set")
def dataset_offline(lab):
    return lab.recipe(data={"train": [{"dataset": "some-team/abstracts"}]})
