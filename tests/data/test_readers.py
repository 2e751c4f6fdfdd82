"""Files of every kind come out whole and verbatim, or with an error that says where the fault is."""

import bz2
import gzip
import json
import lzma
import random
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.data import readers
from kit.data.sources import read_documents
from kit.recipe.data import Source
from tests.data.reading import left_out, read, refusal, texts


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


# ---- Text ----


def test_a_whole_file_is_a_document_kept_verbatim_inside(write):
    text = "def f():\n\treturn  1   \n\n\n    # indented\n  end"
    assert read(write("\n\n" + text + "\n")) == [text]


def test_each_line_is_a_document(write):
    documents = read(write("  one\ntwo \t\n\n\tthree\n"), sample_by="line")
    assert texts(documents) == ["  one", "two \t", "\tthree"]


def test_lines_end_at_line_breaks_only(write):
    """`str.splitlines` would cut at these characters too, which occur inside lines of real corpora."""
    line = "a\x0bb\x0cc\x1cd\x85e\u2028f"
    assert read(write(line + "\nnext"), sample_by="line") == [line, "next"]


def test_paragraphs_are_separated_by_lines_of_blanks(write):
    text = "  first\n    indented  \nlast line\n\nsecond\n \t \n\n\nthird\n"
    assert read(write(text), sample_by="paragraph") == ["  first\n    indented  \nlast line", "second", "third"]


def test_a_separator_is_literal(write):
    assert read(write("a.b.*c.*d"), separator=".*") == ["a.b", "c", "d"]


def test_documents_joined_give_the_text_back(corpus_file):
    text = corpus_file.read_text(encoding="utf-8")
    documents = read(corpus_file, separator="\n\n\n")
    assert len(documents) == 150
    assert "\n\n\n".join(documents) == text


def test_every_character_of_a_text_is_in_some_document(write):
    rng = random.Random(3)
    text = "".join(rng.choice("abcäß \t\n\n\n") for _ in range(3000))
    path = write(text)
    for settings in ({}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "ab"}):
        expected = text.replace("ab", "") if "separator" in settings else text
        joined = "".join(texts(read(path, **settings)))
        assert re.sub(r"\s", "", joined) == re.sub(r"\s", "", expected)


@pytest.mark.parametrize("settings", [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "##"}])
def test_an_empty_file_holds_no_text(write, settings):
    assert texts(read(write(""), **settings)) == []


def test_windows_line_breaks_and_byte_order_mark_do_not_reach_the_text(write):
    path = write(b"\xef\xbb\xbffirst\r\nline two\r\n\r\n\r\nsecond\r\n")
    assert read(path) == ["first\nline two\n\n\nsecond"]
    assert read(path, sample_by="paragraph") == ["first\nline two", "second"]
    assert texts(read(path, sample_by="line")) == ["first", "line two", "second"]


@pytest.mark.parametrize("separator", ["\n\n\n", "\r\n\r\n\r\n"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_a_separator_of_line_breaks_matches_whichever_the_file_has(write, separator, line_break):
    text = line_break.join(["first", "line two", "", "", "second"])
    assert read(write(text), separator=separator) == ["first\nline two", "second"]


@pytest.mark.parametrize("separator", ["---", "-a-", "aba", "\n\n\n", "-\n", "a", " ", "\n-", "- \n"])
def test_pieces_do_not_depend_on_how_much_is_read_at_once(write, monkeypatch, separator):
    """A separator that a read cuts through must neither be missed nor found twice."""
    rng = random.Random(separator)
    for case in range(30):
        text = "".join(rng.choice("aab--\n\n ") for _ in range(rng.randint(1, 60)))
        path = write(text, f"{case}.txt")
        expected = [piece.strip("\n") for piece in text.split(separator)]
        for characters in (1, 2, 3, 4, 5, 7, 11, 64):
            monkeypatch.setattr(readers, "_READ_CHARACTERS", characters)
            documents = read(path, separator=separator)
            assert texts(documents) == [piece for piece in expected if piece.strip()], (text, characters)
            assert len(left_out(documents)) == sum(not piece.strip() for piece in expected), (text, characters)


def test_paragraphs_do_not_depend_on_how_much_is_read_at_once(write, monkeypatch):
    """A blank line of spaces that a read cuts through would begin the next paragraph."""
    rng = random.Random(0)
    for case in range(40):
        text = "a" + "".join(rng.choice("ab\n\n\n \t") for _ in range(rng.randint(1, 60))) + "b"
        path = write(text, f"{case}.txt")
        groups = [[]]
        for line in text.split("\n"):
            if line.strip():
                groups[-1].append(line)
            else:
                groups.append([])
        expected = ["\n".join(lines) for lines in groups if lines]
        for characters in (1, 2, 3, 4, 5, 7, 11, 64):
            monkeypatch.setattr(readers, "_READ_CHARACTERS", characters)
            assert read(path, sample_by="paragraph") == expected, (text, characters)


@pytest.mark.parametrize("characters", [1, 3, 64])
@pytest.mark.parametrize("settings", [{"separator": "---"}, {"sample_by": "paragraph"}, {"sample_by": "line"}])
def test_the_place_of_a_document_is_the_line_on_which_its_text_begins(write, monkeypatch, settings, characters):
    monkeypatch.setattr(readers, "_READ_CHARACTERS", characters)
    joint = {"separator": "\n---\n", "line": "\n", "paragraph": "\n\n\n"}[settings.get("sample_by", "separator")]
    path = write(joint.join(["good", "good", "b\0d", "good"]))
    lines = path.read_text().split("\n")
    number = lines.index("b\0d") + 1
    assert refusal(path, **settings).startswith(f"{path}:{number}: the text holds a NUL character")


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("whole.txt", "x" * 51, {}),
        ("line.txt", "x\n" + "y" * 51, {"sample_by": "line"}),
        ("paragraph.txt", "x\n\n" + "y\n" * 51, {"sample_by": "paragraph"}),
        ("separator.txt", "x##" + "y\n" * 51, {"separator": "##"}),
        ("rows.jsonl", json.dumps({"text": "x" * 60}), {}),
        ("rows.csv", f"text\n{'x' * 60}\n", {}),
    ],
)
def test_a_document_that_no_tokenizer_could_take_is_refused(write, monkeypatch, name, content, settings):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 50)
    monkeypatch.setattr(readers, "_READ_CHARACTERS", 16)
    assert "more than 50 characters" in refusal(write(content, name), **settings)
    fits = {"whole.txt": "x" * 50, "rows.jsonl": '{"text": "x"}', "rows.csv": "text\nx\n"}.get(name, content[:40])
    assert texts(read(write(fits, name), **settings))


def test_a_long_text_in_a_row_of_parquet_is_refused_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 50)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["good", "x" * 51]}), path)
    assert refusal(path).startswith(f"{path}, row 2: the text has more than 50 characters")
    assert read(path, on_bad_text="skip")[0] == "good"
    assert left_out(read(path, max_characters=40)) == [("longer than max_characters", f"{path}, row 2")]


# ---- JSONL ----


def test_jsonl_is_known_by_its_suffix_and_keeps_text_verbatim(write):
    documents = ["  one\n\ntwo\n", "naïve \u2028 Größe", "x"]
    content = "\n\n".join(json.dumps({"text": t, "label": 1}, ensure_ascii=False) for t in documents)
    for name in ("rows.jsonl", "rows.ndjson", "rows.json"):
        assert read(write(content, name)) == documents
    assert read(write(content, "rows.data"), format="jsonl") == documents
    assert read(write(content, "rows.data")) == [content]


def test_jsonl_may_begin_with_a_byte_order_mark(write):
    content = '{"text": "Größe"}\n{"text": "x"}\n'
    assert read(write(content.encode("utf-8-sig"), "rows.jsonl")) == ["Größe", "x"]
    assert read(write(content.encode("utf-8-sig"), "rows.jsonl"), encoding="U8") == ["Größe", "x"]
    assert read(write(content.encode("utf-16"), "rows.jsonl"), encoding="utf-16") == ["Größe", "x"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut', ["not JSON", "one object a line"]),
        ('["text"]', ["found list", "one object a line"]),
        ('"text"', ["found str", "expected an object"]),
        ('{"text": 1' + "0" * 5000 + "}", ["cannot be read as JSON"]),
        ('{"text": ' + "[" * 200_000, ["cannot be read as JSON"]),
    ],
)
def test_a_bad_jsonl_line_is_named(write, line, expected):
    path = write('{"text": "good"}\n\n' + line + "\n", "rows.jsonl")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert all(part in message for part in expected), message


# ---- CSV and TSV ----


def test_csv_fields_may_be_quoted(write):
    path = write('id,text,label\r\n1,"a, ""b""\r\n\r\nc",x\r\n\r\n2, d ,y\r\n', "rows.csv")
    assert read(path) == ['a, "b"\r\n\r\nc', " d "]
    assert read(path, template="{id}{label}") == ["1x", "2y"]


def test_tsv_fields_are_verbatim(write):
    path = write('label\ttext\nham\t"quoted" start, and a "\nspam\tdon\'t\n', "rows.tsv")
    assert read(path, text_column="text") == ['"quoted" start, and a "', "don't"]
    assert read(path, text_column="text", quoting=False) == read(path, text_column="text")
    quoted = write('label\ttext\nham\t"a\tb"\n', "quoted.tab")
    assert read(quoted, quoting=True) == ["a\tb"]


def test_a_file_without_header_is_given_its_columns(write):
    path = write('ham\tone\ttwo "\nspam\tthree\n', "rows.tsv")
    columns = {"column_names": ["label", "body"], "text_column": "body"}
    assert read(path, **columns) == ['one\ttwo "', "three"], "the last column takes the rest of the line"
    comma = write('ham,"a, b"\nspam,c\n', "rows.csv")
    assert read(comma, **columns) == ["a, b", "c"]


def test_another_delimiter(write):
    assert read(write('n;text\n1;"a;b"\n2;c, d\n', "rows.csv"), delimiter=";") == ["a;b", "c, d"]
    assert read(write("n|text\n1|a\n", "rows.txt"), format="csv", delimiter="|") == ["a"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_wrong_delimiter_is_noticed_in_the_header(write, delimiter):
    path = write(delimiter.join(["id", "text"]) + "\n" + delimiter.join(["1", "a"]) + "\n", "rows.csv")
    message = refusal(path)
    assert message.startswith(f"{path}:1: ")
    assert f"is the `delimiter` {delimiter!r}?" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_row_of_another_width_is_shown(write, name):
    delimiter = "," if name == "rows.csv" else "\t"
    rows = [["id", "text"], ["1", "a"], [], ["2", "b", "Hello " * 50]]
    path = write("\n".join(map(delimiter.join, rows)), name)
    message = refusal(path)
    assert message.startswith(f"{path}:4: 3 fields where 2 are expected (`id`, `text`)")
    assert f"`2{delimiter}b{delimiter}Hello Hello" in message
    assert len(message) < 400


def test_the_place_of_a_row_counts_the_lines_in_quoted_fields(write):
    path = write('id,text\n1,"a\nb\nc"\n2,d,e\n', "rows.csv")
    assert refusal(path).startswith(f"{path}:5: 3 fields")


@pytest.mark.parametrize("content", ['id,text\n1,a\n2,"b\n3,c\n', 'id,text\n1,a\n2,"b"c\n3,d\n'])
def test_a_quote_that_does_not_end_is_named_where_it_begins(write, content):
    path = write(content, "rows.csv")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert '`2,"b' in message
    assert "`quoting: false`" in message
    assert len(read(path, quoting=False)) >= 2


def test_a_header_with_a_column_twice_is_refused(write):
    message = refusal(write("text,text\na,b\n", "rows.csv"))
    assert "`text` more than once" in message
    assert "column_names" in message


def test_csv_without_rows_holds_no_text(write):
    for content in ("", "id,text\n", "\n\n"):
        assert read(write(content, "rows.csv")) == []
        assert read(write(content.replace(",", "\t"), "rows.tsv")) == []


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "corpus.txt", "rows.jsonl"])
def test_every_encoding_in_every_format(write, encoding, name):
    line = {"csv": "text\nGröße é\n", "tsv": "text\nGröße é\n", "txt": "Größe é\n"}.get(name.split(".")[1])
    path = write((line or '{"text": "Größe é"}\n').encode(encoding), name)
    assert read(path, encoding=encoding) == ["Größe é"]
    if encoding == "utf-8-sig":
        assert read(path) == ["Größe é"]
    else:
        assert "encoding: " in refusal(path)


# ---- Encoding ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "##"}, {"format": "jsonl"}],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bytes_that_are_not_utf8_are_named_by_line(write, settings, suffix):
    good = '{"text": "Größe"}\n'
    content = (good * 3).encode() + '{"text": "Größe"}\n'.encode("latin-1") + (good * 3).encode()
    path = write(gzip.compress(content) if suffix else content, f"corpus.txt{suffix}")
    message = refusal(path, **settings)
    assert message.startswith(f"{path}:4: byte 0xf6 is not UTF-8")
    assert "`encoding: latin-1`" in message


def test_a_character_that_the_file_ends_in_is_found_too(write):
    assert ":2: byte 0xc3 is not UTF-8" in refusal(write("one\ntwo ö".encode()[:-1]))
    message = refusal(write("one two".encode("utf-16")[:-1]), encoding="utf-16")
    assert "is not utf-16 (truncated data)" in message


def test_a_byte_that_another_encoding_lacks_is_told(write):
    assert "is not ascii (ordinal not in range(128))" in refusal(write("Größe"), encoding="ascii")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (gzip.compress(b"text" * 100, mtime=0), "gzip data; name it"),
        (bz2.compress(b"text" * 100), "bzip2 data; name it"),
        (lzma.compress(b"text" * 100), "xz data; name it"),
        (zstd(b"text" * 100), "zstd data; name it"),
        (b"PK\x03\x04\xff\xff", "extract its text first"),
        (b"%PDF-1.7\n\xff\xff", "a PDF"),
        ("text".encode("utf-16"), "`encoding: utf-16`"),
        ("text".encode("utf-32"), "`encoding: utf-32`"),
        (b"PAR1\xff\xff", "`format: parquet`"),
        ((300).to_bytes(8, "little") + b'{"weight": \xff', "safetensors"),
    ],
)
def test_a_file_that_is_no_text_is_told_by_its_first_bytes(write, content, found):
    if b"\xff" not in content and b"\xfe" not in content:
        content += b"\xff"
    path = write(content)
    message = refusal(path)
    assert message.startswith(f"{path}: looks like "), message
    assert found in message


# ---- Parquet ----


def parquet(tmp_path, columns, name="rows.parquet", **options):
    pq.write_table(pa.table(columns), tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_parquet_in_several_row_groups(tmp_path, kind, compression):
    documents = [f"document {n % 7} ö" for n in range(25)]
    columns = {"id": list(range(25)), "body": pa.array(documents).cast(kind), "meta": [{"text": "no"}] * 25}
    path = parquet(tmp_path, columns, row_group_size=4, compression=compression)
    assert pq.ParquetFile(path).num_row_groups == 7
    assert read(path) == documents, "`body` is the only column of text"
    assert read(path, template="{id}: {body}") == [f"{n}: {text}" for n, text in enumerate(documents)]
    assert "column `meta` holds an object" in refusal(path, text_column="meta")


def test_a_column_of_parquet_may_have_a_dot_in_its_name(tmp_path):
    path = parquet(tmp_path, {"meta.text": ["a"], "meta": [{"text": "no"}], "other": ["b"]})
    assert read(path, text_column="meta.text") == ["a"]


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    """An image beside a caption may be a thousand times as large."""
    path = parquet(tmp_path, {"text": ["a"], "image": [b"x" * 100_000]}, compression="none")
    with open(path, "r+b") as file:  # the header of the image's page is destroyed
        file.seek(file.read().index(b"x" * 1000) - 16)
        file.write(b"\xff" * 10)
    assert read(path) == ["a"]
    assert "damaged" in refusal(path, text_column="image")


def test_missing_columns_of_parquet_are_told_with_those_there_are(tmp_path):
    path = parquet(tmp_path, {"body": ["a"], "title": ["b"]})
    assert "columns: `body`, `title`" in refusal(path)
    message = refusal(path, text_column="bdy")
    assert message == f"{path}: no column `bdy` (`text_column`); columns: `body`, `title`; did you mean `body`?"


def test_what_is_no_parquet_file_is_refused(write, tmp_path):
    path = write("no Parquet", "rows.parquet")
    assert refusal(path).startswith(f"{path}: damaged or not what its name says: ")
    assert refusal(write("", "empty.parquet"))
    whole = parquet(tmp_path, {"text": ["a" * 100] * 50}).read_bytes()
    for cut in (4, len(whole) // 2, len(whole) - 1):
        path = write(whole[:cut], "cut.parquet")
        assert refusal(path).startswith(f"{path}: damaged or not what its name says: ")


def test_bytes_in_parquet_that_are_not_utf8_are_told_by_row(tmp_path):
    broken = pa.array([b"good", b"b\xffd"], type=pa.binary()).view(pa.string())
    path = parquet(tmp_path, {"text": broken})
    assert refusal(path).startswith(f"{path}, rows 1 to 2: a column of text holds bytes that are not UTF-8")


# ---- Compressed files ----

CONTENT = {
    "txt": ("one\n\ntwo ö\n", {"sample_by": "paragraph"}),
    "jsonl": ('{"text": "one"}\n{"text": "two ö"}\n', {}),
    "csv": ("id,text\n1,one\n2,two ö\n", {}),
    "tsv": ("id\ttext\n1\tone\n2\ttwo ö\n", {}),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", CONTENT)
def test_compressed_files_are_read_as_they_are(write, compression, format):
    content, settings = CONTENT[format]
    path = write(COMPRESS[compression](content.encode()), f"corpus.{format}.{compression.upper()}")
    assert read(path, **settings) == ["one", "two ö"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_files_of_several_members_are_read_to_their_end(write, compression):
    """Some readers stop behind the first member: most of a corpus would be lost and nobody told."""
    members = [COMPRESS[compression](f"document {n}\n".encode() * 1000) for n in range(5)]
    documents = read(write(b"".join(members), f"corpus.txt.{compression}"), sample_by="line")
    assert documents == [f"document {n}" for n in range(5) for _ in range(1000)]


@pytest.mark.parametrize("share", [0.3, 0.9, 1])
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_compressed_file_that_was_cut_is_refused(write, compression, share):
    rng = random.Random(0)
    whole = COMPRESS[compression]("\n".join(str(rng.random()) for _ in range(20_000)).encode())
    path = write(whole[: int(len(whole) * share) - 3], f"corpus.txt.{compression}")
    for settings in ({}, {"sample_by": "line"}, {"separator": "0.5"}):
        assert refusal(path, **settings).startswith(f"{path}: damaged or not what its name says: ")


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_name_that_lies_is_noticed(write, compression):
    path = write("plain text, " * 10, f"corpus.txt.{compression}")
    assert refusal(path).startswith(f"{path}: damaged or not what its name says: ")
    swapped = write(COMPRESS[compression](b"plain text " * 10), "corpus.txt")
    assert "looks like" in refusal(swapped)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])  # pyarrow's zstd writes no checksum
def test_a_flipped_bit_of_a_compressed_file_never_goes_unnoticed(write, compression):
    text = "\n".join(str(random.Random(1).random()) for _ in range(2000))
    whole = COMPRESS[compression](text.encode())
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    refusal(write(bytes(content), f"corpus.txt.{compression}"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lines.txt", {"sample_by": "line"}),
        ("paragraphs.txt", {"sample_by": "paragraph"}),
        ("pieces.txt", {"separator": "##"}),
        ("rows.jsonl", {}),
        ("rows.csv", {}),
    ],
)
def test_a_file_is_never_held_whole(write, name, settings):
    text = "word " * 400
    line = {"paragraphs.txt": text + "\n\n", "pieces.txt": text + "##", "rows.jsonl": json.dumps({"text": text}) + "\n"}
    content = ("text\n" * (name == "rows.csv") + line.get(name, text + "\n") * 6_000).encode()
    assert len(content) > 12_000_000
    path = write(gzip.compress(content, 1), name + ".gz")
    documents = read_documents(Source(path=str(path), **settings))
    tracemalloc.start()
    number = sum(isinstance(document, str) for document in documents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 6_000
    assert peak < 8_000_000


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.txt", "text"), ("a", "text"), ("a.md.gz", "text"), ("a.JSONL", "jsonl"), ("a.json.zst", "jsonl"),
        ("a.v2.csv.bz2", "csv"), ("a.tab", "tsv"), ("a.tsv.xz", "tsv"), ("a.parquet", "parquet"), ("gz", "text"),
    ],
)  # fmt: skip
def test_the_format_is_what_the_name_says(tmp_path, name, format):
    assert readers.format_of(tmp_path / name) == format


@pytest.mark.skipif("os.geteuid() == 0", reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(write):
    path = write("x")
    path.chmod(0)
    assert refusal(path) == f"{path}: Permission denied"
