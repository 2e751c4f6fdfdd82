"""A source: which files it names, which of its documents are taken, and the key of what it holds."""

import gzip
import json
import os
import random
import re

import numpy as np
import pytest

from kit.data.sources import hash_text, read_documents, resolve_files, source_fingerprint, watch
from kit.data.splits import held_out
from kit.errors import UserError
from kit.recipe.data import Source, TrainSource
from kit.recipe.models import EvaluationSet
from tests.data.reading import left_out, read, refusal, texts


def fingerprint(path, **settings):
    return source_fingerprint(Source(path=str(path), **settings))


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


# ---- What is left out ----


@pytest.mark.parametrize("settings", [{"sample_by": "line"}, {"separator": "##"}])
def test_blank_documents_are_left_out_and_told(write, settings):
    joint = "##" if "separator" in settings else "\n"
    path = write(joint.join(["one", "two", " \t", "", "three"]))
    documents = read(path, **settings)
    assert texts(documents) == ["one", "two", "three"]
    line = (3, 4) if "sample_by" in settings else (1, 1)
    assert left_out(documents) == [("empty", f"{path}:{number}") for number in line]


def test_short_and_long_documents_are_left_out_by_characters(write):
    path = write("a\nbb\nccc\n\nöööö\nfffff\n")
    documents = read(path, sample_by="line", min_characters=2, max_characters=4)
    assert texts(documents) == ["bb", "ccc", "öööö"]
    assert left_out(documents) == [
        ("shorter than min_characters", f"{path}:1"),
        ("empty", f"{path}:4"),
        ("longer than max_characters", f"{path}:6"),
    ]


def test_what_is_too_short_may_be_unusable_too(write):
    path = write("a\0\nlong enough\n")
    assert texts(read(path, sample_by="line", min_characters=5)) == ["long enough"]


# ---- How many documents ----


@pytest.fixture
def lines(write):
    """A function that writes shuffled lines, some of them twice."""

    def lines(seed, count=200):
        documents = [f"document {n}" for n in range(count)] + [f"document {n}" for n in range(0, count, 3)]
        random.Random(seed).shuffle(documents)
        return write("\n\n".join(documents), f"{seed}/lines.txt")

    return lines


@pytest.mark.parametrize("most", [1, 7, 50, 200, 1000])
def test_so_many_different_documents_are_read(lines, most):
    documents = read(lines(0), sample_by="line", max_documents=most)
    assert len(texts(documents)) == len(set(texts(documents))) == min(most, 200)


def test_which_documents_are_chosen_does_not_depend_on_their_order(lines):
    chosen = [set(texts(read(lines(seed), sample_by="line", max_documents=20))) for seed in range(4)]
    assert all(chosen[0] == other for other in chosen)


def test_chosen_documents_keep_their_order(lines):
    path = lines(5)
    everything, chosen = texts(read(path, sample_by="line")), texts(read(path, sample_by="line", max_documents=20))
    assert [everything.index(text) for text in chosen] == sorted(everything.index(text) for text in chosen)


def test_fewer_documents_are_a_part_of_more(lines):
    path = lines(0)
    few, more = (set(texts(read(path, sample_by="line", max_documents=most))) for most in (10, 30))
    assert few < more


def test_an_evaluation_set_chooses_among_the_documents_that_it_holds_out(lines):
    path = str(lines(0))
    wanted = EvaluationSet(path=path, sample_by="line", fraction=0.2, seed=3, max_documents=12)
    documents = texts(read_documents(wanted))
    assert len(documents) == 12
    assert held_out(np.array([hash_text(d) for d in documents], dtype=np.uint64), 0.2, 3).all()
    keys = {
        source_fingerprint(EvaluationSet(path=path, sample_by="line", **settings, max_documents=12))
        for settings in ({}, {"fraction": 0.2}, {"fraction": 0.3}, {"fraction": 0.2, "seed": 3})
    }
    assert len(keys) == 4
    # All of the documents are stored where no number is given: the fraction is arithmetic over them.
    everything = [EvaluationSet(path=path, **settings) for settings in ({}, {"fraction": 0.2})]
    assert source_fingerprint(everything[0]) == source_fingerprint(everything[1])


def test_what_is_left_out_is_told_once_where_documents_are_chosen(write):
    path = write("a\n\nb\nc\n")
    documents = read(path, sample_by="line", max_documents=2)
    assert left_out(documents) == [("empty", f"{path}:2"), ("beyond max_documents", "")] or left_out(documents) == [
        ("beyond max_documents", ""),
        ("empty", f"{path}:2"),
    ]
    assert len(texts(documents)) == 2


# ---- A source that changes ----


@pytest.mark.parametrize("change", ["grows", "touched", "another"])
@pytest.mark.parametrize("settings", [{}, {"max_documents": 2}])
def test_a_source_that_changes_while_it_is_read_is_refused(write, tmp_path, change, settings):
    """The store's key was made from the old content: the documents of another would lie under it."""
    path = write("a\nb\nc\n")
    source = Source(path=str(tmp_path / "*.txt"), sample_by="line", **settings)
    check_unchanged = watch(source)
    next(read_documents(source))
    check_unchanged()
    if change == "grows":
        path.write_text("a\nb\nc\nd\n")
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        write("x", "another.txt")
    with pytest.raises(UserError, match="changed while it was read"):
        check_unchanged()


# ---- Keys that say nothing about a file ----


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("a.txt", {"text_column": "body"}, "text_column"),
        ("a.txt", {"template": "{a}"}, "template"),
        ("a.txt", {"delimiter": ","}, "delimiter"),
        ("a.txt", {"quoting": False}, "quoting"),
        ("a.jsonl", {"sample_by": "paragraph"}, "sample_by"),
        ("a.jsonl", {"separator": "x"}, "separator"),
        ("a.jsonl", {"column_names": ["a"]}, "column_names"),
        ("a.csv", {"separator": "x"}, "separator"),
        ("a.tsv.gz", {"sample_by": "line"}, "sample_by"),
        ("a.parquet", {"delimiter": ";"}, "delimiter"),
        ("a.parquet", {"encoding": "latin-1"}, "encoding"),
    ],
)
def test_a_key_that_says_nothing_about_the_files_format_is_refused(write, name, settings, key):
    path = write(b"", name)
    with pytest.raises(UserError) as caught:
        fingerprint(path, **settings)  # before anything is read
    assert f"`{key}` says nothing about {name}, which is " in str(caught.value)
    assert f"`{key}` says nothing about {name}" in refusal(path, **settings)


def test_a_default_that_is_written_out_is_no_wish(write):
    """The recipe that a run directory keeps names every default."""
    path = write('{"text": "a"}\n', "a.jsonl")
    assert texts(read(path, sample_by="document", encoding="utf-8", on_bad_text="error")) == ["a"]


@pytest.mark.parametrize("first", ["{}", '{"id": 1}', '{"abstract": null}'])
def test_a_first_row_without_the_text_does_not_decide_for_the_others(write, first):
    path = write(first + '\n{"id": 2, "abstract": "a"}\n', "a.jsonl")
    assert texts(read(path, text_column="abstract", on_bad_text="skip")) == ["a"]
    assert "a.jsonl:1: column `abstract`" in refusal(path, text_column="abstract")


def test_files_of_one_source_have_their_text_in_the_same_column(write, tmp_path):
    write('{"body": "a", "id": 1}\n', "1.jsonl")
    write('{"title": "b"}\n', "2.jsonl")
    message = refusal(tmp_path / "*.jsonl")
    assert "2.jsonl: the text would be column `title`, in the files before `body`" in message


def test_one_file_of_a_pattern_that_a_key_says_nothing_about_is_named(write, tmp_path):
    write("a\n", "a.txt")
    write('{"text": "b"}\n', "b.jsonl")
    assert "`sample_by` says nothing about b.jsonl, which is jsonl" in refusal(tmp_path / "*", sample_by="line")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "a", "encoding": "klingon"}, "no such encoding: `klingon`"),
        ({"path": "a", "encoding": "hex"}, "no such encoding: `hex`"),
        ({"path": "a", "delimiter": '"'}, "cannot separate fields"),
        ({"path": "a", "delimiter": "\n"}, "cannot separate fields"),
        ({"path": "a", "template": "no column"}, "at least one column"),
        ({"path": "a", "template": "{}"}, "at least one column"),
        ({"path": "a", "template": "{a:>3}"}, "names of columns alone"),
        ({"path": "a", "template": "{a!r}"}, "names of columns alone"),
        ({"path": "a", "template": "{a"}, "written twice"),
        ({"path": "a", "template": "a}{b}"}, "written twice"),
        ({"path": "a", "template": "{a}", "text_column": "b"}, "contradict each other"),
        ({"path": "a", "separator": "x", "sample_by": "line"}, "contradict each other"),
        ({"path": "a", "min_characters": 5, "max_characters": 4}, "less than `min_characters`"),
        ({"path": "a", "split": "train"}, "`split` does not go with `path`"),
        ({"dataset": "a", "separator": "x"}, "`separator` does not go with `dataset`"),
        ({"builtin": "python-reference", "text_column": "x"}, "`text_column` does not go with `builtin`"),
        ({"path": "a", "dataset": "b"}, "exactly one of"),
        ({}, "exactly one of"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused_with_the_recipe(settings, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        Source(**settings)


# ---- The key of a source ----


def test_fingerprint_follows_content_and_cut_but_not_the_place(write):
    here, there = write("a\n\nb", "here.txt"), write("a\n\nb", "moved/there.txt")
    assert fingerprint(here) == fingerprint(there)
    settings = [{}, {"sample_by": "line"}, {"sample_by": "paragraph"}, {"separator": "\n\n"}, {"format": "jsonl"}]
    keys = {fingerprint(here, **s) for s in settings} | {fingerprint(write("a\n\nc", "changed.txt"))}
    assert len(keys) == len(settings) + 1


CUTS = [
    {}, {"text_column": "body"}, {"template": "{text}"}, {"template": "{text} {body}"}, {"encoding": "latin-1"},
    {"on_bad_text": "skip"}, {"min_characters": 2}, {"max_characters": 100}, {"max_documents": 3},
    {"max_documents": 4}, {"format": "text"},
]  # fmt: skip


def test_whatever_changes_the_documents_changes_the_key(write):
    path = write(json.dumps({"text": "a", "body": "b"}) + "\n", "a.jsonl")
    assert len({fingerprint(path, **settings) for settings in CUTS}) == len(CUTS)


def test_what_leaves_the_documents_alone_leaves_the_key(write):
    path = write("a\nb\n")
    weighted = TrainSource(path=str(path), weight=0.5, max_tokens=100)
    assert source_fingerprint(weighted) == fingerprint(path), "the store's own key has `max_tokens` in it"


def test_a_change_of_the_same_size_within_a_run_is_seen(write):
    """Hashes are kept by size and time of a file, so that it is read once a run."""
    path = write("a\nb\n")
    before = fingerprint(path)
    path.write_text("a\nc\n")
    os.utime(path, ns=(10**18, 10**18))
    assert fingerprint(path) != before


def test_the_content_is_the_files_bytes_and_what_its_name_says(write):
    content = b'{"text": "a"}\n'
    assert fingerprint(write(content, "a.jsonl")) != fingerprint(write(content, "a.txt"))
    assert fingerprint(write(gzip.compress(content), "a.jsonl.gz")) != fingerprint(write(content, "a.jsonl"))


def test_fingerprint_tells_one_file_from_two(write, tmp_path):
    write("a", "one/1.txt")
    write("b", "one/2.txt")
    write("ab", "two/1.txt")
    keys = {source_fingerprint(Source(path=str(tmp_path / f / "*.txt"))) for f in ("one", "two")}
    assert len(keys) == 2
