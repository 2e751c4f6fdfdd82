"""From a row to a text: the column that is meant, a template, and rows without usable text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.data import columns
from kit.data.columns import LeftOut
from tests.data.reading import left_out, read, refusal, texts


@pytest.fixture(params=["jsonl", "parquet"])
def write_rows(request, tmp_path):
    """A function that writes rows as JSONL or as Parquet; where a row is, is `place(number)`."""

    def write_rows(rows):
        path = tmp_path / f"rows.{request.param}"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    write_rows.place = lambda path, number: f"{path}:{number}" if request.param == "jsonl" else f"{path}, row {number}"
    return write_rows


def write_jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- The column that is meant ----


def test_the_column_is_the_one_that_is_named(write_rows):
    assert read(write_rows([{"text": "no", "body": "yes"}]), text_column="body") == ["yes"]


def test_a_column_text_is_found_among_others(write_rows):
    assert read(write_rows([{"title": "no", "text": "yes"}])) == ["yes"]


def test_the_only_column_of_text_is_found_and_told(write_rows, capsys):
    columns.tell_once.cache_clear()
    path = write_rows([{"id": 1, "body": "yes", "tags": ["a"]}])
    assert read(path) == read(path) == ["yes"]
    assert capsys.readouterr().out.count("the text is column `body`, the only one that holds any") == 1


def test_several_columns_of_text_are_listed(write_rows):
    message = refusal(write_rows([{"id": 1, "title": "a", "body": "b"}]))
    assert "Name it with `text_column`, or several in a `template`; columns: `id`, `title`, `body`" in message


def test_a_column_that_is_null_in_the_first_row_may_be_the_text(tmp_path):
    """Were it passed over, `label` would silently become the corpus."""
    path = write_jsonl(tmp_path, {"body": None, "label": "x"}, {"body": "the text", "label": "y"})
    assert "columns: `body`, `label`" in refusal(path)


def test_no_column_of_text(write_rows):
    assert "which column holds the text?" in refusal(write_rows([{"id": 1, "n": 2.5}]))


def test_a_csv_without_header_gets_a_hint(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("ham,hello\nspam,buy\n")
    message = refusal(path)
    assert "columns: `ham`, `hello`" in message
    assert "`column_names`" in message


def test_a_missing_column_is_told_with_the_nearest(write_rows):
    path = write_rows([{"texts": "x", "label": "y"}])
    message = refusal(path, text_column="text")
    assert "no column `text` (`text_column`); columns: `texts`, `label`; did you mean `texts`?" in message
    assert "no column `body` (`template`)" in refusal(path, template="{body}")
    assert "did you mean" not in refusal(path, text_column="zzz")


def test_each_file_of_a_pattern_is_looked_at(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.csv").write_text("id,text\n1,b\n")
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    assert read(tmp_path / "*") == ["a", "b", "c"]
    (tmp_path / "d.jsonl").write_text('{"body": "d"}\n')
    assert "d.jsonl:1: no column `text`" in refusal(tmp_path / "*", text_column="text")


# ---- Templates ----


def test_a_template_joins_columns_verbatim(write_rows):
    rows = [{"title": "T {x}", "body": "a\nb", "n": 3, "share": 0.5}]
    assert read(write_rows(rows), template="# {title}\n\n{body}") == ["# T {x}\n\na\nb"]
    assert read(write_rows(rows), template="{{{n}}} {share} {{title}}") == ["{3} 0.5 {title}"]
    assert read(write_rows(rows), template="{body}{body}") == ["a\nba\nb"]


@pytest.mark.parametrize(
    ("value", "found"), [(None, "null"), (["a"], "a list"), ({"a": 1}, "an object"), (True, "bool")]
)
def test_a_template_takes_text_and_numbers_alone(write_rows, value, found):
    path = write_rows([{"title": "a", "x": value}])
    message = refusal(path, template="{title} {x}")
    assert message.startswith(f"{write_rows.place(path, 1)}: column `x` holds {found}; expected text")
    assert left_out(read(path, template="{title} {x}", on_bad_text="skip")) == [
        ("unusable text", write_rows.place(path, 1))
    ]


def test_names_in_a_template_are_names_and_reach_into_nothing(write_rows):
    path = write_rows([{"a.b": "dotted", "a": "whole", "0": "zero", "x y": "blank"}])
    assert read(path, template="{a.b} {0} {x y}") == ["dotted zero blank"]
    assert "no column `a.__class__`" in refusal(path, template="{a.__class__}")
    assert "no column `a[0]`" in refusal(path, template="{a[0]}")


def test_an_unknown_column_of_a_template_is_told(write_rows):
    path = write_rows([{"title": "a", "body": "b"}])
    assert "no column `titel` (`template`); columns: `title`, `body`; did you mean `title`?" in refusal(
        path, template="{titel} {body}"
    )


# ---- Rows without usable text ----


BAD = [
    ({"text": None, "id": "x"}, "column `text` holds null"),
    ({"text": 3, "id": "x"}, "column `text` holds int"),
    ({"text": True, "id": "x"}, "column `text` holds bool"),
    ({"text": ["a"], "id": "x"}, "column `text` holds a list"),
    ({"id": "x"}, "column `text` is missing"),
    ({"text": "a\0b", "id": "x"}, "the text holds a NUL character"),
    ({"text": "a\ud800b", "id": "x"}, "the text holds \\ud800, half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "found"), BAD)
def test_a_row_without_usable_text_is_refused_or_left_out(tmp_path, row, found):
    path = write_jsonl(tmp_path, {"text": "good", "id": "x"}, row, {"text": "also good", "id": "x"})
    message = refusal(path)
    assert message.startswith(f"{path}:2: {found}")
    assert "`on_bad_text: skip`" in message
    assert read(path, on_bad_text="skip") == ["good", LeftOut("unusable text", f"{path}:2"), "also good"]


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read(path) == ["\U0001f600"]


def test_nulls_of_parquet_are_rows_without_text(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    assert refusal(path).startswith(f"{path}, row 2: column `text` holds null")
    assert texts(read(path, on_bad_text="skip")) == ["a", "b"]


def test_broken_lines_are_no_bad_text(tmp_path):
    """`on_bad_text` is about texts: a line that is not JSON may be a file that was cut."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b')
    assert "not JSON" in refusal(path, on_bad_text="skip")


def test_nul_in_plain_text_can_be_skipped_too(write):
    path = write("a\nb\0\nc\n")
    assert refusal(path, sample_by="line").startswith(f"{path}:2: the text holds a NUL character")
    assert texts(read(path, sample_by="line", on_bad_text="skip")) == ["a", "c"]
