"""Labelled rows: the text and the labels of each, whatever the format, and the place of everything that is wrong."""

import codecs
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.data import columns
from kit.data.builtin import read_corpus
from kit.data.columns import LeftOut
from kit.data.labeled_rows import LabeledRow, read_labeled_rows
from kit.data.sources import NOT_CHOSEN, source_fingerprint
from kit.errors import UserError
from kit.recipe.classification import LabeledSource

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")


def read_source(**settings):
    return list(read_labeled_rows(LabeledSource(**settings)))


def read(path, **settings):
    return read_source(path=str(path), **settings)


def pairs(rows):
    """Return text and labels of the rows that are read."""
    return [(row.text, *row.labels) for row in rows if isinstance(row, LabeledRow)]


def left_out(rows):
    return [(row.cause, row.where.rpartition(":")[2]) for row in rows if isinstance(row, LeftOut)]


def refusal(path, **settings):
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return str(caught.value)


@pytest.fixture
def write_jsonl(write):
    """A function that writes rows as JSONL."""
    return lambda *rows: write("".join(json.dumps(row) + "\n" for row in rows), "rows.jsonl")


@pytest.fixture
def write_labels(write_jsonl):
    """A function that writes a row for each label, with the texts `t1`, `t2`, …."""
    return lambda *labels: write_jsonl(*({"text": f"t{n}", "label": label} for n, label in enumerate(labels, 1)))


ROWS = [("hello, you", "ham"), ('buy "now"', "spam"), ("two\nlines", "ham"), ("naïve 日本", "no")]


@pytest.fixture(params=["csv", "csv ;", "tsv", "jsonl", "parquet", "dataset"])
def made(request, tmp_path):
    """The settings of a source that holds `ROWS`, in each kind of place."""
    path = tmp_path / f"rows.{request.param.split()[0]}"
    table = pa.table(
        {"id": range(len(ROWS)), "text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    )
    if request.param == "parquet":
        pq.write_table(table, path)
    elif request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif request.param == "dataset":
        datasets.Dataset(table).save_to_disk(str(path))
        return {"dataset": str(path)}
    else:
        delimiter = {"csv": ",", "csv ;": ";", "tsv": "\t"}[request.param]
        table.to_pandas().to_csv(path, sep=delimiter, index=False)
    return {"path": str(path)}


# ---- Every kind of place ----


def test_rows_are_the_same_in_every_format(made):
    rows = read_source(**made)
    assert pairs(rows) == ROWS
    assert {(row.multi, row.pair, row.group) for row in rows} == {(False, None, None)}


def test_group_and_template_in_every_format(made):
    rows = read_source(**made, template="<{text}>", group_column="id")
    assert [row.text for row in rows] == [f"<{text}>" for text, _ in ROWS]
    assert [row.group for row in rows] == ["0", "1", "2", "3"]


def test_a_label_of_the_whole_source_in_every_format(made):
    assert pairs(read_source(**made, label="x")) == [(text, "x") for text, _ in ROWS]


def test_most_rows_are_chosen_and_the_others_counted(made):
    rows = read_source(**made, max_documents=2)
    assert len(pairs(rows)) == 2
    assert set(pairs(rows)) < set(ROWS)
    assert Counter(row.cause for row in rows if isinstance(row, LeftOut)) == (
        {} if "dataset" in made else {NOT_CHOSEN: 2}
    )


def test_rows_with_one_text_and_two_labels_are_two_when_some_are_chosen(write):
    path = write("text,label\na,x\na,y\na,x\n", "rows.csv")
    assert pairs(read(path, max_documents=2)) == [("a", "x"), ("a", "y")]


def test_places_of_rows(write):
    rows = read(write('text,label\n"a\nb",x\nc,y\n', "rows.csv"))
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "4"]


def test_filters_of_text_are_those_of_documents(write_jsonl):
    texts = ["", " \n", "ab", "abc", "abcdef"]
    path = write_jsonl(*({"text": text, "label": "x"} for text in texts))
    rows = read(path, min_characters=3, max_characters=5)
    assert pairs(rows) == [("abc", "x")]
    assert [cause for cause, _ in left_out(rows)] == [
        "empty", "empty", "shorter than min_characters", "longer than max_characters",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [None, 3, "a\0b", "a\ud800"])
@pytest.mark.parametrize("column", ["text", "second"])
def test_unusable_texts_and_second_texts_are_refused_or_left_out(write_jsonl, bad, column):
    good = {"text": "a", "second": "b", "label": "x"}
    path = write_jsonl(good, {**good, column: bad})
    assert refusal(path, text_pair_column="second").startswith(f"{path}:2: ")
    rows = read(path, text_pair_column="second", on_bad_text="skip")
    assert rows == [LabeledRow(f"{path}:1", "a", ("x",), pair="b"), LeftOut("unusable text", f"{path}:2")]


# ---- Text files ----


def test_lines_of_a_label_and_a_text(write, capsys):
    columns.tell_once.cache_clear()
    assert pairs(read(write("ham\tgo there\r\n\r\nspam\tbuy\t1\r\n", "tab"))) == [
        ("go there", "ham"),
        ("buy\t1", "spam"),
    ]
    assert "lines of a label and a text, with a tab between them" in capsys.readouterr().out
    assert pairs(read(write("0 Who  is it ?\n1 What ?\n", "space.txt"))) == [("Who  is it ?", "0"), ("What ?", "1")]
    assert "with a space between them" in capsys.readouterr().out


def test_lines_of_several_labels(write):
    rows = read(write("a,b\tx\n\ty\n"), label_separator=",")
    assert [(row.text, row.labels, row.multi) for row in rows] == [("x", ("a", "b"), True), ("y", (), True)]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("0 a\n1\n", ":2: no space in `1`"),
        ("0\ta b\n" * 100 + "1 c\n", ":101: no tab in `1 c`"),
        ("0\ta b\n1 c\n", "1 of the first 2 lines hold a tab"),
        ("\ta\n", ":1: no label: column `label` is empty"),
        ('{"text": "a", "label": 0}\n', "looks like JSON lines"),
        ("label\ttext\nham\ta\n", ":1: `label\ttext` is a header"),
    ],
)
def test_lines_that_are_something_else_are_refused(write, content, found):
    assert found in refusal(write(content))


def test_a_text_file_of_one_label(write):
    path = write("go there\n\n0 what\n")
    assert pairs(read(path, label="x")) == [("go there", "x"), ("0 what", "x")]
    assert left_out(read(path, label="x")) == [("empty", "2")]


def test_keys_of_columns_say_nothing_about_lines(write):
    assert "`label_column` says nothing about corpus.txt, which is text" in refusal(write("a b"), label_column="x")


# ---- Built-in ----


def test_docstrings_are_labelled_with_their_package():
    rows = [row for row in read_source(builtin="docstrings", packages=["packaging", "filelock"]) if row is not LeftOut]
    expected = [(text, p) for p in ("packaging", "filelock") for text in read_corpus("docstrings", (p,))]
    assert pairs(rows) == [pair for pair in expected if isinstance(pair[0], str)]
    assert {row.labels for row in rows if isinstance(row, LabeledRow)} == {("packaging",), ("filelock",)}
    assert {row.labels for row in read_source(builtin="docstrings", packages=["filelock"], label="x")} == {("x",)}


# ---- Columns ----


def test_the_label_is_the_column_that_is_named(write_jsonl):
    path = write_jsonl({"text": "t", "label": "no", "kind": "yes"})
    assert pairs(read(path, label_column="kind")) == [("t", "yes")]
    assert pairs(read(path)) == [("t", "no")]
    assert pairs(read(write_jsonl({"text": "t", "labels": "yes"}))) == [("t", "yes")]


def test_the_text_is_the_only_one_beside_label_pair_and_group(write_jsonl, capsys):
    columns.tell_once.cache_clear()
    path = write_jsonl({"premise": "p", "text": "h", "label": "x", "doc": "d", "n": 1})
    (row,) = read(path, text_pair_column="text", group_column="doc")
    assert row == LabeledRow(f"{path}:1", "p", ("x",), pair="h", group="d")
    assert "the text is column `premise`, the only one that holds any beside `label`, `text`, `doc`" in (
        capsys.readouterr().out
    )


def test_a_text_is_not_guessed_among_several(write_jsonl):
    message = refusal(write_jsonl({"a": "x", "b": "y", "label": "z"}))
    assert "which column holds the text? Name it with `text_column`" in message
    assert "columns: `a`, `b`, `label`" in message


def test_a_label_that_is_not_there_is_told_with_the_columns(write_jsonl):
    path = write_jsonl({"text": "a", "Label": "x", "n": 1})
    message = refusal(path)
    assert message.startswith(f"{path}:1: which column holds the label?")
    assert message.endswith("columns: `text`, `Label`, `n`; did you mean `Label`?")
    assert "no column `lable` (`label_column`)" in refusal(path, label_column="lable")
    assert "no column `b` (`label_columns`)" in refusal(path, label_columns=["n", "b"])
    assert "no column `b` (`group_column`)" in refusal(path, label_column="n", group_column="b")
    assert "no column `b` (`text_pair_column`)" in refusal(path, label_column="n", text_pair_column="b")


def test_a_label_that_is_part_of_the_text_is_refused(write_jsonl):
    path = write_jsonl({"text": "a", "label": "x"})
    assert "column `label` is the label; it cannot be a part of the text" in refusal(path, template="{label}: {text}")
    assert "column `label` is the label" in refusal(path, text_column="label")


def test_data_without_header_is_told_with_its_first_rows(write):
    message = refusal(write("ham,hello\nspam,buy\n", "rows.csv"))
    assert "columns: `ham`, `hello`" in message
    assert "`ham` | `hello`; `spam` | `buy`; where the first row is no header, name the columns" in message
    assert pairs(read(write("ham,hello\nspam,buy\n", "rows.csv"), column_names=["label", "text"])) == [
        ("hello", "ham"), ("buy", "spam"),
    ]  # fmt: skip


def test_labels_in_columns_of_two_names_are_refused(write, tmp_path):
    write("text,label\na,x\n", "a.csv")
    write("text,labels\na,x\n", "b.csv")
    message = refusal(tmp_path / "*.csv")
    assert "b.csv: the label would be column `labels`, in the files before `label`" in message


@pytest.mark.parametrize("missing", [None, "", " ", float("nan")])
def test_a_missing_group_is_refused(write_jsonl, missing):
    path = write_jsonl({"text": "a", "label": "x", "g": 0}, {"text": "a", "label": "x", "g": missing})
    assert refusal(path, group_column="g").startswith(f"{path}:2: column `g` (`group_column`) is empty")
    path = write_jsonl({"text": "a", "label": "x", "g": 0}, {"text": "a", "label": "x"})
    assert ":2: column `g`" in refusal(path, group_column="g")


# ---- Values ----


@pytest.mark.parametrize("name", ["no", "null", "NA", "None", "nan", "1e5", "true", "0", "-", "1.0", "日本 x"])
@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
def test_a_label_is_the_text_that_is_written(write, format, name):
    row = {"text": "t", "label": name}
    delimiter = {"csv": ",", "tsv": "\t"}.get(format)
    content = json.dumps(row) if delimiter is None else "\n".join([delimiter.join(row), delimiter.join(row.values())])
    assert pairs(read(write(content, f"rows.{format}"))) == [("t", name)]


def test_numbers_and_booleans_become_text(write_labels):
    assert [row.labels for row in read(write_labels(3, 0, -2, 10**20))] == [("3",), ("0",), ("-2",), ("1" + "0" * 20,)]
    assert [row.labels for row in read(write_labels(True, False))] == [("true",), ("false",)]


def test_white_space_around_labels_is_removed_and_counted_once(write_labels, capsys):
    columns.tell_once.cache_clear()
    path = write_labels(" ham", "ham", "spam\n")
    assert [row.labels for row in read(path, max_documents=9)] == [("ham",), ("ham",), ("spam",)]
    assert capsys.readouterr().out.count("white space around 2 labels was removed") == 1
    read(write_labels("ham"))
    assert "white space" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["x", None], "2: no label: column `label` holds null"),
        (["x", ""], "2: no label: column `label` is empty"),
        (["x", " \t"], "2: no label: column `label` is empty"),
        ([["x"], ["y", None]], "2: no label: column `label` holds a list with a label that is null or empty"),
    ],
)
def test_a_missing_label_is_refused_or_skipped(write_labels, labels, found):
    path = write_labels(*labels)
    message = refusal(path)
    assert found in message
    assert "`on_bad_label: skip`" in message
    rows = read(path, on_bad_label="skip")
    assert pairs(rows) == [("t1", "x")]
    assert rows[1] == LeftOut("no label", f"{path}:2")


def test_a_label_that_is_not_even_there_is_missing(write_jsonl):
    path = write_jsonl({"text": "a", "label": "x"}, {"text": "b"})
    assert ":2: no label: column `label` is missing" in refusal(path)
    assert left_out(read(path, on_bad_label="skip")) == [("no label", "2")]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (
            [1, 2.0],
            "2: column `label` holds 2.0, a floating-point number; expected text or an integer; integers become",
        ),
        ([0.13], "1: column `label` holds 0.13, a floating-point number; expected text or an integer"),
        (
            ["x", 1.0],
            "2: column `label` holds 1.0, a floating-point number; expected text or an integer; float against",
        ),
        (["x", 1], "2: column `label` holds numbers, and at {path}:1 text"),
        ([1, 2, "x"], "3: column `label` holds text, and at {path}:1 numbers"),
        ([True, 1], "2: column `label` holds numbers, and at {path}:1 booleans"),
        ([["x"], "x"], "2: column `label` holds a single label, and at {path}:1 a list"),
        (["x", ["x"]], "2: column `label` holds a list, and at {path}:1 a single label"),
        ([{"a": 1}], "1: column `label` holds an object; expected text or an integer"),
        ([[["x"]]], "1: column `label` holds a list; expected text or an integer"),
        ([["x", 1]], "1: column `label` holds numbers, and at {path}:1 text"),
        (["a\0b"], "1: column `label` holds a label with \\x00 in it"),
        (["a\ud800"], "1: column `label` holds a label with \\ud800 in it"),
    ],
)
def test_what_is_no_label_is_refused_even_where_missing_ones_are_skipped(write_labels, labels, found):
    path = write_labels(*labels)
    message = refusal(path, on_bad_label="skip")
    assert message.startswith(f"{path}:{found.format(path=path)}")


def test_what_a_table_calls_missing_is_missing(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([float("nan"), None], pa.float64())}), path)
    assert [row.cause for row in read(path, on_bad_label="skip")] == ["no label", "no label"]


def test_categories_of_parquet_are_their_names(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array(["x", "y"]).dictionary_encode()}), path)
    assert pairs(read(path)) == [("a", "x"), ("b", "y")]


# ---- Any number of labels ----


def test_a_list_holds_any_number_of_labels(write_labels):
    rows = read(write_labels(["b", "a", "b"], [], [" a"]))
    assert [(row.labels, row.multi) for row in rows] == [(("b", "a"), True), ((), True), (("a",), True)]


def test_a_separator_divides_labels(write):
    rows = read(write("text,label\nx,a|b\ny,\nz, c |a|a|\n", "rows.csv"), label_separator="|")
    assert [(row.labels, row.multi) for row in rows] == [(("a", "b"), True), ((), True), (("c", "a"), True)]


def test_a_list_where_a_separator_is_given_is_refused(write_labels):
    assert "holds a list, where `label_separator` expects text" in refusal(write_labels(["a"]), label_separator="|")
    assert ":1: no label" in refusal(write_labels(None), label_separator="|")


def test_columns_of_zero_and_one(write, write_jsonl):
    rows = read(write("a,b,text\n1,0,x\n0, 0,y\n1,1,z\n", "rows.csv"), label_columns=["b", "a"])
    assert [(row.text, row.labels, row.multi) for row in rows] == [
        ("x", ("a",), True),
        ("y", (), True),
        ("z", ("b", "a"), True),
    ]
    path = write_jsonl({"text": "x", "a": True, "b": 0}, {"text": "y", "a": "1", "b": False})
    assert [row.labels for row in read(path, label_columns=["a", "b"])] == [("a",), ("a",)]


@pytest.mark.parametrize("value", [2, -1, 0.5, 1.0, "yes", "10", [1]])
def test_anything_but_zero_and_one_is_refused(write_jsonl, value):
    path = write_jsonl({"text": "x", "a": 1, "b": value})
    message = refusal(path, label_columns=["a", "b"], on_bad_label="skip")
    assert message.startswith(f"{path}:1: column `b` (`label_columns`) holds ")
    assert message.endswith("expected 0 or 1")


@pytest.mark.parametrize("value", [None, "", " "])
def test_a_missing_flag_is_a_missing_label(write_jsonl, value):
    path = write_jsonl({"text": "x", "a": 1, "b": value})
    assert "no label: column `b`" in refusal(path, label_columns=["a", "b"])
    assert left_out(read(path, label_columns=["a", "b"], on_bad_label="skip")) == [("no label", "1")]


# ---- Classes of a dataset ----


def test_integers_of_a_dataset_become_the_names_of_their_class(tmp_path):
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "single"))
    settings = {"dataset": str(tmp_path / "single")}
    with pytest.raises(UserError, match="row 3: no label"):
        read_source(**settings)
    assert pairs(read_source(**settings, on_bad_label="skip")) == [("a", "pos"), ("b", "neg")]

    features["label"] = datasets.Sequence(names)
    rows = {"text": ["a", "b"], "label": [[1, 0], []]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "multi"))
    found = read_source(dataset=str(tmp_path / "multi"))
    assert [(row.labels, row.multi) for row in found] == [(("pos", "neg"), True), ((), True)]


# ---- Files as they come ----


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n"])
def test_a_file_without_rows_has_none(write, content):
    assert read(write(content, "rows.csv")) == []
    assert read(write("", "rows.jsonl")) == read(write("")) == []


def test_a_file_of_empty_texts_has_only_rows_that_are_left_out(write):
    assert left_out(read(write("text,label\n,x\n  ,y\n", "rows.csv"))) == [("empty", "2"), ("empty", "3")]


def test_a_byte_order_mark_and_windows_line_breaks(write):
    content = codecs.BOM_UTF8 + b'label,text\r\nham,a\r\nspam,"b\r\nc"\r\n'
    assert pairs(read(write(content, "rows.csv"))) == [("a", "ham"), ("b\r\nc", "spam")]
    assert pairs(read(write(codecs.BOM_UTF8 + b"ham\ta\r\nspam\tb\r\n"))) == [("a", "ham"), ("b", "spam")]
    utf16 = "label\ttext\nham\té\n".encode("utf-16")
    assert pairs(read(write(utf16, "rows.tsv"), encoding="utf-16")) == [("é", "ham")]


def test_a_csv_of_one_column(write):
    for text in ("you", "you, there", "you; there"):
        path = write(f"text\nhello\n{text}\n", "rows.csv")
        assert pairs(read(path, label="x")) == [("hello", "x"), (text, "x")]
    path = write("text\nhello\nyou\n", "rows.csv")
    message = refusal(path)
    assert "which column holds the label?" in message
    assert "the first rows, split at ',': `text`; `hello`; `you`" in message


def test_ragged_rows_are_told_with_their_line_wherever_they_are(write):
    early = write("text,label\na,x\nb,y,z\n", "rows.csv")
    late = write("text,label\n" + "a,x\n" * 300 + "b,y,z\n", "late.csv")
    assert ":3: 3 fields where 2 are expected (`text`, `label`)" in refusal(early)
    assert ":302: 3 fields where 2 are expected (`text`, `label`)" in refusal(late)


def test_names_that_occur_twice_in_the_header_are_refused(write):
    assert "the header holds `label` more than once" in refusal(write("text,label,label\na,x,y\n", "rows.csv"))


def test_lines_that_are_no_json_are_refused(write):
    assert ":2: not JSON" in refusal(write('{"text": "a", "label": 0}\nb\n', "rows.jsonl"))


# ---- The key of what is read ----


def test_the_fingerprint_follows_what_makes_the_rows_and_not_the_place(write):
    content = "text,label,labels,b,g\na,x,1,1,1\n"
    base = {"path": str(write(content, "one.csv"))}

    def key(**settings):
        return source_fingerprint(LabeledSource(**{**base, **settings}))

    assert key(path=str(write(content, "two.csv"))) == key()
    settings = [
        {}, {"label_column": "labels"}, {"label_columns": ["b"]}, {"label_separator": "|"}, {"label": "x"},
        {"text_pair_column": "b"}, {"group_column": "g"}, {"on_bad_label": "skip"}, {"on_bad_text": "skip"},
        {"text_column": "b"}, {"delimiter": ","}, {"quoting": True}, {"max_documents": 1}, {"min_characters": 2},
        {"path": str(write(content + "b,y,1,1,1\n", "three.csv"))},
    ]  # fmt: skip
    assert len({key(**some) for some in settings}) == len(settings)


# ---- Real data ----

SMS = str(DATA / "sms_spam" / "SMSSpamCollection")
NAMED = {"column_names": ["label", "text"]}


@needs_data
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"format": "text"},
        {"format": "tsv", **NAMED},
        {"format": "csv", **NAMED},
        {"format": "tsv", **NAMED, "delimiter": "\t"},
        {"format": "tsv", **NAMED, "quoting": False},
        {"format": "csv", **NAMED, "delimiter": "\t", "quoting": False},
        {"format": "tsv", "column_names": ["kind", "message"], "label_column": "kind", "text_column": "message"},
    ],
    ids=str,
)
def test_sms_in_every_spelling(settings):
    expected = [tuple(line.split("\t", 1)[::-1]) for line in Path(SMS).read_text(encoding="utf-8").split("\n")[:-1]]
    assert sum(text.startswith('"') for text, _ in expected) > 5, "no trap: nothing is tested"
    rows = read(SMS, **settings)
    assert pairs(rows) == expected
    assert len(rows) == 5574
    assert Counter(row.labels for row in rows) == {("ham",): 4827, ("spam",): 747}


@needs_data
def test_sms_without_names_is_shown():
    message = refusal(SMS, format="csv")
    assert "`ham` | `Go until jurong point" in message
    assert "`column_names`" in message
    assert "`quoting: false`" in refusal(SMS, format="csv", **NAMED, quoting=True)


@needs_data
@pytest.mark.parametrize(("part", "number"), [("train", 5452), ("test", 500)])
@pytest.mark.parametrize("settings", [{}, {"format": "tsv", "delimiter": " ", **NAMED}], ids=str)
def test_trec(part, number, settings):
    path = DATA / "trec" / f"TREC.{part}.all"
    expected = [line.split(" ", 1)[::-1] for line in path.read_text(encoding="latin-1").split("\n") if line]
    rows = read(path, encoding="latin-1", **settings)
    assert pairs(rows) == [(text, label) for text, label in expected]
    assert len(rows) == number
    assert {row.labels for row in rows} == {(str(n),) for n in range(6)}


@needs_data
def test_trec_in_a_wrong_encoding_or_delimiter():
    path = DATA / "trec" / "TREC.train.all"
    assert "is not UTF-8; say which encoding it is, for example with `encoding: latin-1`" in refusal(path)
    message = refusal(path, encoding="latin-1", format="tsv", **NAMED)
    assert message.startswith(f"{path}:1: 1 fields where 2 are expected (`label`, `text`)")
    assert "the first rows, split at '\\t': `0 How did serfdom develop" in message


@needs_data
def test_scicite():
    path = DATA / "sci_cite" / "train.txt"
    rows = read(path, format="jsonl")
    assert len(rows) == 7320
    assert {row.labels for row in rows} == {("background",), ("method",), ("result",)}
    assert "set `format: jsonl`" in refusal(path)


@needs_data
def test_pubmedqa_sections_have_their_abstract_as_group():
    path = DATA / "pubmedqa" / "sections.jsonl"
    expected = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows = read(path, group_column="pmid")
    assert [(row.text, row.labels, row.group) for row in rows] == [
        (row["text"], (row["label"],), str(row["pmid"])) for row in expected
    ]
    assert len({row.group for row in rows}) == 1000


def test_a_tab_that_begins_late_in_label_text_lines_is_refused(tmp_path):
    path = tmp_path / "late.txt"
    path.write_text("".join(f"ham text {n}\n" for n in range(120)) + "spam\tlate tab text\n")
    assert refusal(path).startswith(f"{path}:121: a tab in `spam\tlate tab text`, where lines before have a space")
    path.write_text("ham text\nspam text with a\ttab\n" * 80)
    assert "tab" in refusal(path)  # of the first lines only half hold one
