"""`kit predict`: every row of a file with its label, as transformers' pipeline and the run's own figures have it."""

import csv
import gzip
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoTokenizer, pipeline

from kit import cli, run
from kit.data import readers
from kit.errors import UserError
from kit.model.adapter import add_adapter
from kit.model.adapter_files import Adapter, base_facts
from kit.model.classifier import load_classifier
from kit.model.saving import save_model
from kit.model.sequence_encoding import prepare_for_pipeline
from kit.predict import predict
from kit.recipe.adapter import AdapterSection
from kit.recipe.models import ModelSection
from tests.evaluation.rows import classifier
from tests.material import WORDS, documents, make_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("ham", "spam", "no")
ADDED = ["predicted_label", *(f"probability_{name}" for name in NAMES)]
TEXTS = [*documents(30, seed=3), 'a "quote", and\r\na line', "tab\there", "x" * 300]


def save_classifier(folder, architecture="gpt2", multi=False, dtype=torch.float32, **settings):
    """Save a tiny classifier as a run does: with its labels and how it reads texts."""
    tokenizer, kind = make_tokenizer(), "multi" if multi else "single"
    model = classifier(architecture, pad_token_id=0, bos_token_id=0, eos_token_id=0).to(dtype)
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    model.config.problem_type = f"{kind}_label_classification"
    model.config.kit_classifier = {"max_length": 24, "truncation": "head", **settings}
    limits = [model.config.kit_classifier[key] for key in ("max_length", "truncation")]
    prepare_for_pipeline(tokenizer, *limits, model.config)
    save_model(model, tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    settings = {"thresholds": {"ham": 0.3, "spam": 0.6, "no": 0.45}}
    return save_classifier(tmp_path_factory.mktemp("multi") / "model", multi=True, **settings)


@pytest.fixture
def rows_of(tmp_path):
    """A function that predicts a file and returns the rows that it wrote."""

    def rows(model, file, suffix=".csv", **options):
        output = tmp_path / f"predictions{suffix}"
        predict(model, str(file), output=str(output), overwrite=True, **options)
        assert sorted(p.name for p in tmp_path.glob(".predictions*")) == []
        return read(output)

    return rows


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t", strict=True))


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def table(tmp_path):
    """Rows with an identifier, a text of any kind, and a number."""
    return write_csv(tmp_path / "in.csv", [{"id": n, "text": text, "n": n / 3} for n, text in enumerate(TEXTS)])


def likely(row):
    return [float(row[name]) for name in ADDED[1:]]


def refusal(model, file, **options):
    with pytest.raises(UserError) as error:
        predict(str(model), str(file), **options)
    return str(error.value)


# ---- what is predicted


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_it_is_what_the_pipeline_says(architecture, multi, truncation, table, rows_of, tmp_path):
    model = save_classifier(tmp_path / "model", architecture, multi, truncation=truncation)
    found = rows_of(model, table)
    expected = pipeline("text-classification", model, top_k=None)(TEXTS, truncation=True)
    for row, scores in zip(found, expected, strict=True):
        scores = {each["label"]: each["score"] for each in scores}
        assert likely(row) == pytest.approx([scores[name] for name in NAMES], abs=2e-6)
        best = "|".join(n for n in NAMES if scores[n] >= 0.5) if multi else max(scores, key=scores.get)
        assert row["predicted_label"] == best
    assert len({row["predicted_label"] for row in found}) > 1


def test_thresholds_that_were_tuned_count(several, table, rows_of, tmp_path):
    found = rows_of(several, table)
    for row in found:
        chosen = [n for n, p, least in zip(NAMES, likely(row), (0.3, 0.6, 0.45), strict=True) if p >= least]
        assert row["predicted_label"] == "|".join(chosen)
    at_half = ["|".join(n for n, p in zip(NAMES, likely(row), strict=True) if p >= 0.5) for row in found]
    assert at_half != [row["predicted_label"] for row in found]
    lists = rows_of(several, table, ".jsonl")
    assert ["|".join(row["predicted_label"]) for row in lists] == [row["predicted_label"] for row in found]
    assert all(isinstance(row["predicted_label"], list) for row in lists)


def test_neither_batch_size_nor_order_counts(folder, table, rows_of, tmp_path):
    found = {row["id"]: row for row in rows_of(folder, table)}
    shuffled = read(table)
    np.random.default_rng(0).shuffle(shuffled)
    other = write_csv(tmp_path / "shuffled.csv", shuffled)
    for size in (1, 2, 7):
        rows = rows_of(folder, other, batch_size=size)
        assert [row["id"] for row in rows] == [row["id"] for row in shuffled]
        for row in rows:
            assert row["predicted_label"] == found[row["id"]]["predicted_label"]
            assert likely(row) == pytest.approx(likely(found[row["id"]]), abs=2e-6)


def test_an_adapter_and_a_half_precision_model(table, rows_of, tiny_models, tmp_path):
    section = ModelSection(name_or_path=str(tiny_models("gpt2")))
    tokenizer = AutoTokenizer.from_pretrained(section.name_or_path)
    model, _ = load_classifier(section, tokenizer, NAMES, False, seed=0)
    model.config.kit_classifier = {"max_length": 24, "truncation": "tail"}
    facts = base_facts(model, section)
    adapter = Adapter(add_adapter(model, AdapterSection(type="lora", r=4)), facts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_model(model, tokenizer, tmp_path / "adapter", adapter)
    found = rows_of(str(tmp_path / "adapter"), table)
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][-24:]])
        with torch.no_grad():
            want = model.eval()(input_ids=ids).logits.softmax(-1)[0].tolist()
        assert likely(row) == pytest.approx(want, abs=2e-6)
    half = save_classifier(tmp_path / "half", dtype=torch.bfloat16)
    [expected] = pipeline("text-classification", half, top_k=None)(TEXTS[:1], truncation=True)
    scores = {each["label"]: each["score"] for each in expected}
    assert likely(rows_of(half, table)[0]) == pytest.approx([scores[n] for n in NAMES], abs=5e-3)


def test_columns_templates_and_pairs_are_read_as_in_training(rows_of, tmp_path):
    rows = [{"title": f"t {n}", "body": text, "year": n} for n, text in enumerate(documents(6, seed=5, longest=9))]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    templated = save_classifier(tmp_path / "a", "bert", template="{title}: {body} {year}")

    def expect(found, inputs, model=templated):
        expected = pipeline("text-classification", model, top_k=None)(inputs, truncation=True)
        for row, scores in zip(found, expected, strict=True):
            scores = {each["label"]: each["score"] for each in scores}
            assert likely(row) == pytest.approx([scores[name] for name in NAMES], abs=2e-6)

    expect(rows_of(templated, file), ["{title}: {body} {year}".format(**row) for row in rows])
    expect(rows_of(templated, file, text_column="body"), [row["body"] for row in rows])
    paired = save_classifier(tmp_path / "b", "bert", text_column="title", text_pair_column="body", max_length=60)
    expect(rows_of(paired, file), [{"text": row["title"], "text_pair": row["body"]} for row in rows], paired)
    message = refusal(paired, write_jsonl(tmp_path / "c.jsonl", [{"title": "a", "bodi": "b"}]))
    assert "no column `body` (`--text-pair-column`)" in message
    assert "did you mean `bodi`" in message
    (tmp_path / "lines.txt").write_text("a\n")
    assert "says nothing about lines.txt, which is text" in refusal(paired, tmp_path / "lines.txt")


def test_the_text_column_is_found(folder, rows_of, tmp_path, capsys):
    file = write_csv(tmp_path / "a.csv", [{"label": "ham", "sms": "the kit"}, {"label": "spam", "sms": "a loss"}])
    assert [row["sms"] for row in rows_of(folder, file)] == ["the kit", "a loss"]
    assert "the text is column `sms`" in capsys.readouterr().out
    file = write_csv(tmp_path / "b.csv", [{"sms": "the kit", "body": "b"}])
    assert "columns: `sms`, `body`" in refusal(folder, file)
    assert "did you mean `sms`" in refusal(folder, file, text_column="smss")
    named = save_classifier(tmp_path / "named", text_column="body")
    assert likely(rows_of(named, file)[0]) == likely(rows_of(folder, file, text_column="body")[0])


# ---- what is kept


FORMATS = {
    "csv": lambda p, rows: write_csv(p.with_suffix(".csv"), rows),
    "semicolons": lambda p, rows: write_csv(p.with_suffix(".csv"), rows, delimiter=";"),
    "tsv": lambda p, rows: write_csv(p.with_suffix(".tsv"), rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "jsonl": lambda p, rows: write_jsonl(p.with_suffix(".jsonl"), rows),
    "parquet": lambda p, rows: (
        (pq.write_table(pa.Table.from_pylist(rows), p.with_suffix(".parquet")),) and p.with_suffix(".parquet")
    ),
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("format", FORMATS)
def test_columns_come_back_unchanged(format, suffix, folder, rows_of, tmp_path):
    rows = [{"id": str(n), "text": text, "why": f"{n};,\t"} for n, text in enumerate(TEXTS)]
    found = rows_of(folder, FORMATS[format](tmp_path / "in", rows), suffix)
    assert list(found[0]) == ["id", "text", "why", *ADDED]
    assert [{key: row[key] for key in ("id", "text", "why")} for row in found] == rows
    assert all(abs(sum(likely(row)) - 1) < 1e-5 for row in found)


def test_nested_values_and_columns_that_begin_late(folder, rows_of, tmp_path):
    rows = [{"text": "a"}] * 150 + [{"text": "b", "tags": ["ä", 1], "deep": {"x": None}, "yes": True}]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    found = rows_of(folder, file)
    assert list(found[0]) == ["text", "tags", "deep", "yes", *ADDED]
    assert [found[-1][key] for key in ("tags", "deep", "yes")] == ['["ä", 1]', '{"x": null}', "true"]
    assert found[0]["tags"] == ""
    assert [{key: row[key] for key in row if key not in ADDED} for row in rows_of(folder, file, ".jsonl")] == rows


def test_lines_and_compressed_files(folder, rows_of, tmp_path):
    lines = ["the kit", "", "a loss, and a batch", "  "]
    (tmp_path / "in.txt.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    found = rows_of(folder, tmp_path / "in.txt.gz")
    assert [row["text"] for row in found] == lines
    assert [bool(row["predicted_label"]) for row in found] == [True, False, True, False]


def test_rows_without_a_text_stay_and_are_counted(folder, several, rows_of, tmp_path, capsys):
    texts = ["a", None, "", " \n", 5, "nul \0", "half \ud800", ["list"], "b"]
    file = write_jsonl(tmp_path / "in.jsonl", [{"n": n, "text": text} for n, text in enumerate(texts)])
    found = rows_of(folder, file, ".jsonl", text_column="text")
    out = " ".join(capsys.readouterr().out.split())
    assert f"7 rows have no text that can be read, the first at {file}:2" in out
    assert "9 rows: " in out
    assert [row["text"] for row in found] == texts
    assert [row["predicted_label"] is None for row in found] == [False, *[True] * 7, False]
    assert all(row[name] is None for row in found[1:8] for name in ADDED)
    assert likely(found[8]) == likely(rows_of(folder, write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}]), ".jsonl")[0])
    assert [row["predicted_label"] for row in rows_of(several, file, ".jsonl")][1] is None
    assert rows_of(folder, file)[1]["predicted_label"] == ""


def test_all_rows_without_a_text(folder, rows_of, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n \n")
    found = rows_of(folder, tmp_path / "in.txt")
    assert [list(row.values()) for row in found] == [["", "", "", "", ""], [" ", "", "", "", ""]]
    assert "begins with a label" not in capsys.readouterr().out


def test_cut_texts_are_counted(folder, table, rows_of, capsys):
    rows_of(folder, table)
    tokenizer = make_tokenizer()
    cut = sum(len(tokenizer(text)["input_ids"]) > 24 for text in TEXTS)
    assert 0 < cut < len(TEXTS)
    out = " ".join(capsys.readouterr().out.split())
    assert f"{cut} texts have more than 24 tokens: of these the beginning was read" in out


def test_no_more_rows_are_held_than_a_chunk(folder, tmp_path, monkeypatch):
    class Line(str):
        """Text that can be watched."""

    alive, most = set(), []

    def lines(path, encoding):
        for number in range(total):
            line = Line(f"the kit {number}")
            alive.add(number)
            weakref.finalize(line, alive.discard, number)
            most.append(len(alive))
            yield f"{path}:{number + 1}", line

    monkeypatch.setattr(readers, "read_lines", lines)
    (tmp_path / "in.txt").write_text("any\n")
    peaks = []
    for total in (300, 900):
        most.clear()
        predict(folder, str(tmp_path / "in.txt"), output=str(tmp_path / f"{total}.csv"), batch_size=4)
        peaks.append(max(most))
        assert len(read(tmp_path / f"{total}.csv")) == total
    assert peaks[0] == peaks[1] <= 100 + 2 * 64


# ---- what is refused


def test_models_that_cannot_predict(tiny_models, table, tmp_path):
    assert "is no classifier" in refusal(tiny_models(), table)
    assert "`kit generate`" in refusal(tiny_models(), table)
    assert "no/such" in refusal("no/such/model/here", table)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("task: sequence-classification\n")
    assert "the run has no model/ yet" in refusal(tmp_path / "run", table)


def test_a_classifier_whose_head_is_lost(table, tmp_path):
    from safetensors.torch import load_file, save_file

    model = Path(save_classifier(tmp_path / "model"))
    tensors = {k: v for k, v in load_file(model / "model.safetensors").items() if k != "score.weight"}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "without its head: score.weight" in refusal(model, table, output=str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("name", ADDED)
def test_a_column_of_that_name(name, folder, tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}] * 120 + [{"text": "a", name: 1}])
    assert f"there is a column `{name}` already" in refusal(folder, file, output=str(tmp_path / "out.jsonl"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_files_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "in.csv").write_text("text\na\n")
    for name, content in {"a.txt": "", "b.csv": "", "c.csv": "text\n", "d.jsonl": "\n"}.items():
        (tmp_path / name).write_text(content)
        assert "there is no row" in refusal(folder, tmp_path / name)
    assert "no such file; did you mean `in.csv`" in refusal(folder, tmp_path / "im.csv")
    assert "is a folder" in refusal(folder, tmp_path)
    (tmp_path / "e.txt").write_text('{"text": "a"}\n')
    assert "looks like JSON lines" in refusal(folder, tmp_path / "e.txt")
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"text\n')
    assert "f.jsonl:2: not JSON" in refusal(folder, tmp_path / "f.jsonl")
    assert "--encoding: no such encoding" in refusal(folder, tmp_path / "in.csv", encoding="utf-9")
    assert "--delimiter: " in refusal(folder, tmp_path / "in.csv", delimiter="ab")
    (tmp_path / "g.csv").write_bytes("text\nÜber\n".encode("cp1252"))
    assert "`--encoding latin-1`" in refusal(folder, tmp_path / "g.csv")
    assert "--format: " in refusal(folder, tmp_path / "in.csv", format="cvs")
    assert "--column-names: a name occurs twice" in refusal(folder, tmp_path / "in.csv", column_names=["a", "a"])
    assert "says nothing about a.txt" in refusal(folder, tmp_path / "a.txt", delimiter=";")


def test_outputs_that_cannot_be_written(folder, table, tmp_path):
    before = table.read_bytes()
    assert "expected .csv, .tsv, .jsonl" in refusal(folder, table, output="out.parquet")
    assert "would be in does not exist" in refusal(folder, table, output=str(tmp_path / "no/out.csv"))
    assert "is the file that is read" in refusal(folder, table, output=str(table), overwrite=True)
    (tmp_path / "link.csv").symlink_to(table)
    assert "is the file that is read" in refusal(folder, table, output=str(tmp_path / "link.csv"), overwrite=True)
    (tmp_path / "d.csv").mkdir()
    assert "is a folder" in refusal(folder, table, output=str(tmp_path / "d.csv"), overwrite=True)
    (tmp_path / "old.csv").write_text("old")
    assert "--overwrite replaces it" in refusal(folder, table, output=str(tmp_path / "old.csv"))
    assert (tmp_path / "old.csv").read_text() == "old"
    assert table.read_bytes() == before
    predict(folder, str(table), output=str(tmp_path / "old.csv"), overwrite=True)
    assert len(read(tmp_path / "old.csv")) == len(TEXTS)


def test_what_is_not_whole_is_not_there(folder, tmp_path):
    lines = "".join(f"{n},the kit\n" for n in range(300))
    (tmp_path / "in.csv").write_text(f"id,text\n{lines}7,8,9\n")
    (tmp_path / "out.csv").write_text("old")
    message = refusal(folder, tmp_path / "in.csv", output=str(tmp_path / "out.csv"), overwrite=True, batch_size=2)
    assert "in.csv:302: 3 fields" in message
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_lines_that_begin_with_labels_are_told(folder, rows_of, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("ham\tthe kit\nspam\ta loss\n")
    rows_of(folder, tmp_path / "in.txt")
    assert "each text begins with a label" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "in.txt").write_text("ham\tthe kit\nthe loss\n")
    rows_of(folder, tmp_path / "in.txt")
    assert "begins with a label" not in capsys.readouterr().out


# ---- pipes, runs, real data


def kit(*arguments, stdin=b"", **options):
    command = [sys.executable, "-m", "kit", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120, **options)


def test_standard_input_and_output(folder, table, rows_of):
    done = kit("predict", folder, "-", "--format", "csv", stdin=table.read_bytes())
    assert done.returncode == 0, done.stderr
    expected = rows_of(folder, table)
    assert list(csv.DictReader(done.stdout.decode().splitlines(keepends=True))) == expected
    assert b"rows: " in done.stderr
    message = kit("predict", folder, "-", "--format", "jsonl", stdin=b'{"text": 1}\n{"text')
    assert message.returncode == 2
    assert b"standard input:2: not JSON" in message.stderr
    assert message.stdout == b""


def test_a_reader_that_has_seen_enough(folder, tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"the kit {n}\n" for n in range(3000)))
    command = f"{sys.executable} -m kit predict {folder} {tmp_path / 'in.txt'} --batch-size 8 | head -n 2"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 2
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr
    closed = subprocess.run(["bash", "-c", f"{command.split(' |')[0].replace(str(tmp_path / 'in.txt'), '-')} <&-"],
                            capture_output=True, check=False, timeout=120)  # fmt: skip
    assert closed.returncode == 2
    assert b"there is no row" in closed.stderr
    assert b"Traceback" not in closed.stderr


def test_the_command(folder, table, tmp_path, monkeypatch, capfd):
    begin = ["kit", "predict", folder, "-o", str(tmp_path / "out.tsv")]
    monkeypatch.setattr(sys, "argv", [*begin, str(table), "--text-column", "text"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert f"predictions: {tmp_path / 'out.tsv'}" in capfd.readouterr().out
    assert [row["text"] for row in read(tmp_path / "out.tsv")] == TEXTS
    file = tmp_path / "plain.tsv"
    file.write_text("ham;the kit\nno;a loss; a batch\n")
    options = ["--format", "csv", "--delimiter", ";", "--column-names", "label,text", "--no-quoting", "--overwrite"]
    monkeypatch.setattr(sys, "argv", [*begin, str(file), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert [row["text"] for row in read(tmp_path / "out.tsv")] == ["the kit", "a loss; a batch"]


def test_a_run_gives_the_figures_of_kit_evaluate(tiny_models, rows_of, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"label": NAMES[n % 3], "sms": " ".join(rng.choice(WORDS[n % 3 :: 3], 1 + n % 40))} for n in range(150)]
    files = [write_csv(tmp_path / f"{name}.csv", part) for name, part in (("train", rows[:90]), ("test", rows[90:]))]
    recipe = {
        "task": "sequence-classification",
        "model": {"name_or_path": str(tiny_models())},
        "data": {
            "train": [{"path": str(files[0]), "text_column": "sms"}], "test": [{"path": str(files[1])}],
            "split": {"test": 0}, "max_length": 20, "truncation": "head+tail", "store_dir": str(tmp_path / "store"),
        },
        "training": {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "bf16": False},
        "evaluation": {"baselines": [], "bootstrap_resamples": 100},
        "run": {"output_dir": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run.train(str(tmp_path / "recipe.yaml"), [])
    run.evaluate(str(tmp_path / "run"), [], None, str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())["sets"]["test"]
    found = rows_of(str(tmp_path / "run"), files[1])
    assert [row["sms"] for row in found] == [row["sms"] for row in rows[90:]]
    right = np.mean([row["label"] == row["predicted_label"] for row in found])
    assert right == pytest.approx(figures["accuracy"], abs=1e-12)
    assert right > 1 / 3
    nll = -np.mean([np.log(float(row[f"probability_{row['label']}"])) for row in found])
    assert nll == pytest.approx(figures["nll"], abs=1e-5)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")
def test_the_sms_collection(folder, rows_of, capsys):
    file = DATA / "sms_spam" / "SMSSpamCollection"
    found = rows_of(folder, file, format="tsv", column_names=["label", "text"])
    assert 'fields are separated by tabs, `"` is a part of the text' in " ".join(capsys.readouterr().out.split())
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [f"{row['label']}\t{row['text']}" for row in found] == lines
    assert list(found[0]) == ["label", "text", *ADDED]
    assert all(abs(sum(likely(row)) - 1) < 1e-5 for row in found)
