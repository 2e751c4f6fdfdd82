"""How a file of fields is split: found out where it is not said, refused with the first rows where nothing fits."""

import csv
import io

import pytest

from kit.data import columns
from kit.data.sniffing import sniff_dialect
from kit.errors import UserError
from kit.recipe.classification import LabeledSource

TEXTS = ["hello, you", "a; b", 'he said "hi"', "x | y", "tab\there", "two\nlines", "plain"]


def sniff(path, format="csv", wanted=("label",), **settings):
    found = sniff_dialect(path, LabeledSource(path=str(path), **settings), format, wanted)
    return found and (found.delimiter, found.quoting)


def refusal(path, format="csv", wanted=("label",), **settings):
    with pytest.raises(UserError) as caught:
        sniff(path, format, wanted, **settings)
    return str(caught.value)


def written(rows, **options):
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("format", ["csv", "tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", [True, False])
def test_what_a_writer_of_csv_made_is_found(write, format, delimiter, header):
    rows = [["text", "label"]] * header + [[text, "ham"] for text in TEXTS]
    path = write(written(rows, delimiter=delimiter))
    settings = {} if header else {"column_names": ["text", "label"]}
    assert sniff(path, format, **settings) == (delimiter, True)


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_tabs_without_quoting_are_found_whatever_the_format_is_called(write, format):
    path = write('label\ttext\nham\tsaid "hi", and "bye"\nham\t"Hi" he said\nspam\t"; x\n')
    assert sniff(path, format) == ("\t", False)


def test_a_header_with_the_label_outweighs_what_the_name_promises(write):
    assert sniff(write("text,a;label\nx,y;ham\nx,z;spam\n")) == (";", True)


def test_the_format_decides_where_several_delimiters_fit_the_names(write):
    path = write("ham;a,b\nspam;c,d\n")
    settings = {"column_names": ["label", "text"]}
    assert sniff(path, "csv", **settings) == (",", True)
    message = refusal(path, "tsv", **settings)
    assert "fields may be separated by commas or semicolons; say which with `delimiter`" in message
    assert "`ham;a` | `b`" in message
    assert "`ham` | `a,b`" in message
    assert sniff(path, "tsv", **settings, delimiter=";") == (";", False)


def test_what_is_given_is_not_sought(write):
    path = write('label,text\nham,"a, b"\n')
    assert sniff(path) == (",", True)
    message = refusal(path, quoting=False)
    assert message.startswith(f"{path}:2: 3 fields where 2 are expected (`label`, `text`)")
    assert "split at ',': `label` | `text`; `ham` | `\"a` | ` b\"`" in message
    assert "no header" not in message


def test_the_last_of_given_columns_may_hold_the_delimiter(write):
    path = write("0 How did it ?\n1 What is it ?\n")
    assert sniff(path, "tsv", delimiter=" ", column_names=["label", "text"]) == (" ", False)


def test_a_row_that_does_not_fit_is_named_with_a_preview(write):
    """Not split at a delimiter that no row has, at which all rows would be alike."""
    message = refusal(write("label,text\nham,a\nspam,b,c\n"))
    assert ":3: 3 fields where 2 are expected" in message
    assert "`label` | `text`; `ham` | `a`; `spam` | `b` | `c`" in message


def test_a_row_that_does_not_fit_is_named_where_every_row_has_the_label_of_its_source(write):
    assert ":3: 3 fields where 2 are expected" in refusal(write("id,text\n1,a\n2,b,c\n"), wanted=())


def test_data_without_header_is_told_as_such(write):
    message = refusal(write("ham,hello\nspam,buy, now\n"))
    assert "`ham` | `hello`; `spam` | `buy` | ` now`; where the first row is no header, name the columns" in message


def test_a_quote_that_is_never_closed_is_told(write):
    message = refusal(write('label,text\nham,"a\nspam,b, c\n'))
    assert ":2: a quoted field that does not end" in message
    assert "split at ',': `label` | `text`" in message


def test_quotes_that_may_join_lines_are_not_guessed(write):
    """Each line is a row with the same fields; were the quotes of two texts a pair, one of the rows would be lost."""
    content = 'label,text\nham,"a\nspam,b"\n'
    path = write(content)
    message = refusal(path)
    assert "say which with `quoting`" in message
    assert '`ham` | `"a`; `spam` | `b"`' in message
    assert sniff(path, quoting=True) == (",", True)
    assert sniff(write(content.replace(",", "\t")), "tsv") == ("\t", False)
    assert sniff(write('label,text\nham,"a\nb"\nspam,c\n')) == (",", True)


def test_doubled_quotes_tell_that_fields_of_a_tsv_are_quoted(write):
    assert sniff(write('label\ttext\nham\t"said ""hi"""\nspam\tx\n'), "tsv") == ("\t", True)
    assert sniff(write('label\ttext\nham\t"said"\nspam\tx\n'), "tsv") == ("\t", False)


def test_an_empty_file_has_no_dialect(write):
    assert sniff(write("")) is None
    assert sniff(write("\n\n")) is None


def test_a_wrong_encoding_is_told_as_ever(write):
    message = refusal(write("label,text\nham,é\n".encode("latin-1")))
    assert ":2: byte 0xe9 is not UTF-8; say which encoding it is, for example with `encoding: latin-1`" in message


def test_what_was_found_is_told_once(write, capsys):
    columns.tell_once.cache_clear()
    path = write("label;text\nham;a\n")
    sniff(path)
    sniff(path)
    out = capsys.readouterr().out
    assert out.count('fields are separated by semicolons, `"` around a field quotes it') == 1
    sniff(path, delimiter=";", quoting=False)
    assert capsys.readouterr().out == ""


def test_a_preview_is_short(write):
    message = refusal(write("\n".join(",".join(["x" * 500] * n) for n in (50, 51, 52, 53))))
    assert len(message.split("the first rows")[1]) < 1200
