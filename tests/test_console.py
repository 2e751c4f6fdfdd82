"""What is printed is data, shown as it is, by the main process alone."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kit import console

ROOT = Path(__file__).parents[1]
TEXTS = ["corpus/[ab]*.txt", "[bold]x[/bold]", "[/x]", "[link=a]", ":smile: :on:", "100 % of 1,234", "naïve Größe Δ"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_printed_as_it_is(text, capsys):
    """Rich would take the brackets of a glob for markup and a word between colons for an emoji."""
    console.say(text)
    console.warn(text)
    assert capsys.readouterr().out == f"{text}\nwarning: {text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_text_in_tables_is_printed_as_it_is(text, capsys):
    console.table(f"of {text}", ["name", text], [[text, "1"], ["other", text]])
    assert capsys.readouterr().out.count(text) == 4


def test_long_lines_are_not_broken(capsys):
    line = "word " * 100 + "end"
    console.say(line)
    assert capsys.readouterr().out == line + "\n"


def test_only_the_main_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.say("text")
    console.warn("text")
    console.table("title", ["a"], [["b"]])
    assert list(console.progress([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    console.say("text")
    assert capsys.readouterr().out == "text\n"


def test_first_process_of_a_machine(monkeypatch):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert console.is_local_main_process()
    assert not console.is_main_process()


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1_000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    items = console.progress(["aa"] * 7, "reading", total=14, size=len)
    assert "".join(items) == "aa" * 7
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert len(lines) < 4
    assert lines[0].startswith("reading: ")
    assert lines[0].endswith(" of 14")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_that_is_not_utf8_does_not_end_the_run(encoding):
    """Samples are printed after hours of training and may hold any character."""
    code = "from kit.console import say, table; say('Δ 🧪 naïve'); table('t', ['Δ'], [['日本語']])"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    out = result.stdout.decode(encoding)
    assert ("Δ 🧪 naïve" in out) is (encoding == "utf-8")
    assert ("naïve" in out) is (encoding != "ascii")


@pytest.mark.parametrize("width", [30, 60, 200])
def test_a_table_shows_every_cell_whatever_the_width(width, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(console, "_console", Console(file=output, width=width, markup=False))
    cells = ["first", "1,234,567", "89.012", "a long cell\nin two lines"]
    console.table("Title", ["name", "one", "two", "three"], [cells])
    for cell in ("name", "one", "two", "three", "first", "1,234,567", "89.012", "a long cell", "in two lines"):
        assert cell in output.getvalue()
