"""Documents come out of files whole, verbatim and in order, or with an error that says where the fault is."""

import json
import random
import re

import pytest

import kit.data.sources
from kit.data.sources import read_documents, resolve_files, source_fingerprint
from kit.errors import UserError
from kit.recipe.models import Source


def read(path, **settings):
    return list(read_documents(Source(path=str(path), **settings)))


@pytest.fixture
def write(tmp_path):
    def write(content, name="corpus.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, **settings):
    with pytest.raises(UserError) as caught:
        read(path, **settings)
    return str(caught.value)


# ---- Which files ----


def test_a_pattern_is_read_sorted_and_recursively(write, tmp_path):
    for name in ("b/two.txt", "a/deep/one.txt", "c.txt", "a/other.md"):
        write(name, name)
    assert read(tmp_path / "**" / "*.txt") == ["a/deep/one.txt", "b/two.txt", "c.txt"]
    assert read(tmp_path / "*.txt") == ["c.txt"]


def test_a_file_that_a_pattern_matches_twice_is_read_once(write, tmp_path):
    write("once", "a/b/corpus.txt")
    assert read(tmp_path / "**" / "**" / "corpus.txt") == ["once"]


def test_a_file_name_may_look_like_a_pattern(write):
    assert read(write("found", "notes [2020].txt")) == ["found"]


def test_paths_are_relative_to_the_working_directory(write, tmp_path, monkeypatch):
    write("here", "data/corpus.txt")
    monkeypatch.chdir(tmp_path)
    assert read("data/corpus.txt") == ["here"]


def test_a_missing_file_is_named_with_where_it_was_sought_and_what_lies_near(write, tmp_path, monkeypatch):
    write("text", "corpus.txt")
    monkeypatch.chdir(tmp_path)
    message = refusal("corpsu.txt")
    assert str(tmp_path / "corpsu.txt") in message
    assert "did you mean `corpus.txt`?" in message


def test_a_missing_folder_yields_no_empty_list_of_names(tmp_path):
    message = refusal(tmp_path / "nowhere" / "corpus.txt")
    assert "no such file" in message
    assert "valid:" not in message


def test_a_folder_is_refused_with_a_pattern_for_its_files(write, tmp_path):
    write("text", "texts/corpus.txt")
    message = refusal(tmp_path / "texts")
    assert "is a folder" in message
    assert str(tmp_path / "texts" / "*.txt") in message


def test_a_pattern_without_matches_is_refused(tmp_path):
    message = refusal(tmp_path / "*.txt")
    assert "pattern matches no file" in message
    assert str(tmp_path) in message


def test_folders_that_a_pattern_matches_are_passed_over(write, tmp_path):
    path = write("text", "corpus.txt")
    (tmp_path / "folder.txt").mkdir()
    assert resolve_files(Source(path=str(tmp_path / "*.txt"))) == [path]


# ---- What one document is ----


def test_a_whole_file_is_a_document_kept_verbatim_inside(write):
    text = "def f():\n\treturn  1   \n\n\n    # indented\n  end"
    assert read(write("\n\n" + text + "\n")) == [text]


def test_each_line_is_a_document(write):
    assert read(write("  one\ntwo \t\n\n\tthree\n"), sample_by="line") == ["  one", "two \t", "", "\tthree"]


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


@pytest.mark.parametrize("settings", [{"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "##"}])
def test_blank_documents_are_yielded_so_that_they_can_be_counted(write, settings):
    joint = {"line": "\n", "paragraph": "\n\n"}.get(settings.get("sample_by"), "##")
    documents = read(write(joint.join(["one", "two", "  ", "three"])), **settings)
    assert [d for d in documents if d.strip()] == ["one", "two", "three"]
    # The blank paragraph is itself a separator; the other two settings make it a document.
    assert len(documents) == (3 if settings == {"sample_by": "paragraph"} else 4)


@pytest.mark.parametrize("settings", [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "##"}])
def test_an_empty_file_holds_no_text(write, settings):
    assert "".join(read(write(""), **settings)) == ""


def test_windows_line_breaks_and_byte_order_mark_do_not_reach_the_text(write):
    path = write(b"\xef\xbb\xbffirst\r\nline two\r\n\r\n\r\nsecond\r\n")
    assert read(path) == ["first\nline two\n\n\nsecond"]
    assert read(path, sample_by="paragraph") == ["first\nline two", "second"]
    assert read(path, sample_by="line") == ["first", "line two", "", "", "second"]


@pytest.mark.parametrize("separator", ["\n\n\n", "\r\n\r\n\r\n"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_separator_of_line_breaks_matches_whichever_the_file_has(write, separator, line_break):
    text = line_break.join(["first", "line two", "", "", "second"])
    assert read(write(text), separator=separator) == ["first\nline two", "second"]


@pytest.mark.parametrize("separator", ["---", "-a-", "aba", "\n\n\n", "-\n", "a"])
def test_pieces_do_not_depend_on_how_much_is_read_at_once(write, monkeypatch, separator):
    """A separator that a read cuts through must neither be missed nor found twice."""
    rng = random.Random(separator)
    for case in range(30):
        text = "".join(rng.choice("aab--\n\n ") for _ in range(rng.randint(1, 60)))
        path = write(text, f"{case}.txt")
        expected = [piece.strip("\r\n") for piece in text.split(separator)]
        for characters in (1, 2, 3, 4, 5, 7, 11, 64):
            monkeypatch.setattr(kit.data.sources, "_READ_CHARACTERS", characters)
            assert read(path, separator=separator) == expected, (text, characters)


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
            monkeypatch.setattr(kit.data.sources, "_READ_CHARACTERS", characters)
            assert read(path, sample_by="paragraph") == expected, (text, characters)


# ---- JSONL ----


def test_jsonl_is_known_by_its_suffix_and_keeps_text_verbatim(write):
    texts = ["  one\n\ntwo\n", "naïve \u2028 Größe", ""]
    content = "\n\n".join(json.dumps({"text": t, "label": 1}, ensure_ascii=False) for t in texts)
    for name in ("rows.jsonl", "rows.ndjson"):
        assert read(write(content, name)) == texts
    assert read(write(content, "rows.data"), format="jsonl") == texts
    assert read(write(content, "rows.data")) == [content]


def test_jsonl_field_is_chosen_by_name(write):
    assert read(write('{"text": "no", "body": "yes"}\r\n', "rows.jsonl"), text_column="body") == ["yes"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut', ["not JSON"]),
        ('["text"]', ["found list", "`text`"]),
        ('{"texts": "x", "label": 1}', ["no field `text`", "did you mean `texts`?", "text_column"]),
        ('{"text": 3}', ["`text` holds int", "expected text"]),
        ('{"text": null}', ["`text` holds NoneType", "expected text"]),
        ('{"text": "a\\ud800b"}', ["`text` holds \\ud800", "surrogate"]),
    ],
)
def test_a_bad_jsonl_line_is_named(write, line, expected):
    path = write('{"text": "good"}\n\n' + line + "\n", "rows.jsonl")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert all(part in message for part in expected), message


# ---- Encoding ----


@pytest.mark.parametrize(
    "settings", [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "##"}, {"format": "jsonl"}]
)
def test_bytes_that_are_not_utf8_are_named_by_line(write, settings):
    good = '{"text": "Größe"}\n'
    path = write((good * 3).encode() + '{"text": "Größe"}\n'.encode("latin-1") + (good * 3).encode())
    message = refusal(path, **settings)
    assert message.startswith(f"{path}:4: byte 0xf6 is not UTF-8")
    assert "iconv" in message


def test_a_character_that_the_file_ends_in_is_found_too(write):
    assert ":2: byte 0xc3 is not UTF-8" in refusal(write("one\ntwo ö".encode()[:-1]))


# ---- The key of a source ----


def test_fingerprint_follows_content_and_cut_but_not_the_place(write):
    def fingerprint(path, **settings):
        return source_fingerprint(Source(path=str(path), **settings))

    here, there = write("a\n\nb", "here.txt"), write("a\n\nb", "moved/there.txt")
    assert fingerprint(here) == fingerprint(there)
    settings = [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "\n\n"}, {"format": "jsonl"}]
    keys = {fingerprint(here, **s) for s in settings} | {fingerprint(write("a\n\nc", "changed.txt"))}
    assert len(keys) == len(settings) + 1


def test_fingerprint_tells_one_file_from_two(write, tmp_path):
    write("a", "one/1.txt")
    write("b", "one/2.txt")
    write("ab", "two/1.txt")
    keys = {source_fingerprint(Source(path=str(tmp_path / f / "*.txt"))) for f in ("one", "two")}
    assert len(keys) == 2


def test_every_character_of_a_text_is_in_some_document(write):
    rng = random.Random(3)
    text = "".join(rng.choice("abcäß \t\n\n\n") for _ in range(3000))
    path = write(text)
    for settings in ({}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "ab"}):
        expected = text.replace("ab", "") if "separator" in settings else text
        joined = "".join(read(path, **settings))
        assert re.sub(r"\s", "", joined) == re.sub(r"\s", "", expected)
