"""Real corpora of the development machine, whose traps no made-up text has. Tokens are bytes: all counts are exact.

Each count is compared with one that a few lines of plain Python make of the same file.
"""

import json
import re
from pathlib import Path

import pytest

from kit.data.corpus import TokenCoding, build_corpus
from kit.data.sources import read_documents
from kit.errors import UserError
from kit.recipe.data import DataSection, Source
from tests.data.reading import left_out, texts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")

BYTES = TokenCoding(
    key="bytes",
    encode=lambda texts: [list(text.encode()) for text in texts],
    decode=lambda ids: bytes(ids).decode(),
    vocab_size=257,
    eos_token_id=256,
    context_token_id=256,
    pad_token_id=256,
)


def read(name, **settings):
    return list(read_documents(Source(path=str(DATA / name), **settings)))


def ledger_of(tmp_path, source, **data):
    """Build the corpus of one source; check that its account adds up."""
    data = {"train": [source], "store_dir": str(tmp_path), "block_size": 512, "num_proc": 1, **data}
    corpus = build_corpus(DataSection.model_validate(data), {}, BYTES, seed=0)
    (row,) = corpus.ledger
    assert row.read + row.repeated == row.trained + row.context + row.total_dropped
    assert len(corpus.rows) * 512 == row.trained + row.padding
    return corpus, row


def size(documents):
    """Tokens of some documents: their bytes, and an EOS each."""
    return sum(len(document.encode()) + 1 for document in documents)


# ---- SMS: `label<TAB>text`, no header, quotes that quote nothing, duplicates ----

SMS = {
    "path": str(DATA / "sms_spam" / "SMSSpamCollection"),
    "format": "tsv",
    "column_names": ["label", "text"],
}


def test_sms_texts_with_their_quotes(tmp_path):
    lines = (DATA / "sms_spam" / "SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    expected = [line.split("\t", 1)[1] for line in lines]
    assert sum(text.startswith('"') for text in expected) > 5, "no trap: nothing is tested"
    assert list(read_documents(Source(**SMS))) == expected
    assert len(expected) == 5574
    _, row = ledger_of(tmp_path, SMS)
    assert row.documents == 5574
    assert row.read == size(expected)
    # Python's dictionaries keep the first of each: the others are dropped, and accounted for.
    distinct = list(dict.fromkeys(expected))
    assert row.trained == size(distinct)
    assert row.dropped == {"exact duplicate": size(expected) - size(distinct)}
    assert row.dropped_documents["exact duplicate"]["documents"] == len(expected) - len(distinct) == 5574 - 5171
    kept = ledger_of(tmp_path, SMS, exact_duplicates="keep")[1]
    assert (kept.trained, kept.dropped) == (size(expected), {})


def test_sms_read_with_quoting_is_refused():
    """As CSV readers would: from one quote to the next, which may be hundreds of messages later."""
    with pytest.raises(UserError, match=r"SMSSpamCollection:\d+: .*`quoting: false`"):
        list(read_documents(Source(**SMS, quoting=True)))


def test_sms_texts_that_occur_twice_stand_on_one_side_of_the_split(tmp_path):
    corpus, row = ledger_of(tmp_path, SMS, validation={"fraction": 0.2})
    held = corpus.sets["domain"]
    assert row.documents + row.held_out == 5574
    assert set(row.dropped) == {"exact duplicate"}
    part = corpus.rows.parts[0]
    assert not set(part.store.hashes[part.documents]) & set(held.hashes)
    assert len(set(held.hashes)) < len(held.hashes)


def test_sms_lines(tmp_path):
    lines = (DATA / "sms_spam" / "SMSSpamCollection").read_bytes().split(b"\n")[:-1]
    _, row = ledger_of(tmp_path, {"path": SMS["path"], "sample_by": "line"})
    assert row.read == sum(map(len, lines)) + len(lines)


# ---- TREC: latin-1, `label text` with the first blank between them ----


@pytest.mark.parametrize(("name", "questions"), [("TREC.train.all", 5452), ("TREC.test.all", 500)])
def test_trec_questions(name, questions):
    lines = (DATA / "trec" / name).read_bytes().decode("latin-1").split("\n")
    expected = [line.split(" ", 1)[1].rstrip("\r") for line in lines if line]
    settings = {"format": "csv", "delimiter": " ", "quoting": False, "column_names": ["label", "text"]}
    documents = read(f"trec/{name}", encoding="latin-1", **settings)
    assert documents == expected
    assert len(documents) == questions
    try:
        (DATA / "trec" / name).read_bytes().decode()
    except UnicodeDecodeError as error:
        line = (DATA / "trec" / name).read_bytes().count(b"\n", 0, error.start) + 1
        with pytest.raises(UserError, match=rf"{name}:{line}: byte 0x.* is not UTF-8.*`encoding: latin-1`"):
            read(f"trec/{name}", **settings)


# ---- SciCite: JSONL whose name says text ----


@pytest.mark.parametrize(("name", "rows"), [("train.txt", 7320), ("dev.txt", 916), ("test.txt", 1861)])
def test_scicite_contexts(name, rows):
    lines = (DATA / "sci_cite" / name).read_text(encoding="utf-8").split("\n")
    expected = [json.loads(line) for line in lines if line]
    assert len(expected) == rows
    documents = read(f"sci_cite/{name}", format="jsonl")
    assert documents == [row["text"].strip("\r\n") for row in expected]
    labelled = read(f"sci_cite/{name}", format="jsonl", template="{text} ({label})")
    assert labelled == [f"{row['text']} ({row['label']})" for row in expected]


def test_scicite_metadata_is_no_text():
    assert all(
        document.cause == "unusable text"
        for document in read("sci_cite/dev.txt", format="jsonl", text_column="metadata", on_bad_text="skip")
    )


def test_scicite_under_its_own_name_is_text():
    """A key that says nothing about text tells a user that the format has to be named."""
    with pytest.raises(UserError, match=r"`text_column` says nothing about dev.txt, which is text"):
        read("sci_cite/dev.txt", text_column="text")


# ---- PubMedQA: sections as JSONL, abstracts as text ----


def test_pubmedqa_sections_and_abstracts(tmp_path):
    lines = (DATA / "pubmedqa" / "sections.jsonl").read_text(encoding="utf-8").split("\n")
    expected = [json.loads(line)["text"] for line in lines if line]
    assert read("pubmedqa/sections.jsonl") == expected
    text = (DATA / "pubmedqa" / "abstracts.txt").read_text(encoding="utf-8")
    abstracts = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    assert len(abstracts) == 1000
    path = str(DATA / "pubmedqa" / "abstracts.txt")
    _, row = ledger_of(tmp_path, {"path": path, "sample_by": "paragraph"})
    assert row.documents == 1000
    assert row.read == size(abstracts)
    assert row.trained == size(dict.fromkeys(abstracts))


def test_long_sections_are_left_out_and_counted(tmp_path):
    source = {"path": str(DATA / "pubmedqa" / "sections.jsonl"), "max_characters": 1000, "min_characters": 100}
    lines = (DATA / "pubmedqa" / "sections.jsonl").read_text(encoding="utf-8").split("\n")
    lengths = [len(json.loads(line)["text"]) for line in lines if line]
    _, row = ledger_of(tmp_path, source)
    assert row.documents == sum(100 <= length <= 1000 for length in lengths)
    assert {cause: entry["documents"] for cause, entry in row.left_out.items()} == {
        "longer than max_characters": sum(length > 1000 for length in lengths),
        "shorter than min_characters": sum(length < 100 for length in lengths),
    }


# ---- Long texts ----


def test_novels_by_paragraph(tmp_path):
    """Windows and Unix line breaks in one file, and paragraphs that run over several reads."""
    path = DATA / "novels" / "novels_10MB.txt"
    text = path.read_bytes().replace(b"\r\n", b"\n").strip(b"\n").decode()
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]
    _, row = ledger_of(tmp_path, {"path": str(path), "sample_by": "paragraph"})
    assert row.documents == len(paragraphs)
    assert row.left_out == {}
    assert row.read == size(paragraphs)
    assert row.trained == size(dict.fromkeys(paragraphs))


def test_novels_up_to_a_number_of_tokens(tmp_path):
    path = DATA / "novels" / "novels_10MB.txt"
    lines = [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n")]
    total, count = 0, 0
    for line in filter(bytes.strip, lines):
        if total + len(line) + 1 > 100_000:
            break
        total, count = total + len(line) + 1, count + 1
    source = {"path": str(path), "sample_by": "line", "max_tokens": 100_000}
    _, row = ledger_of(tmp_path, source, exact_duplicates="keep")
    assert (row.read, row.documents, row.stopped) == (total, count, True)


def test_python_docs_by_separator(tmp_path):
    path = DATA / "python_docs" / "corpus.txt"
    documents = [d.strip("\n") for d in path.read_bytes().decode().split("\n\n\n")]
    filled = [document for document in documents if document.strip()]
    _, row = ledger_of(tmp_path, {"path": str(path), "separator": "\n\n\n"}, packing=True)
    assert row.documents == len(filled)
    assert row.left_out.get("empty", {"documents": 0})["documents"] == len(documents) - len(filled)
    assert row.read == size(filled)
    assert row.trained == size(dict.fromkeys(filled))


def test_tinyshakespeare_lines(tmp_path):
    """A third of its lines are blank or a speaker's name: the account of what is left out has to be exact."""
    path = DATA / "tinyshakespeare" / "input.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    source = {"path": str(path), "sample_by": "line", "min_characters": 10}
    documents = read("tinyshakespeare/input.txt", sample_by="line", min_characters=10)
    assert texts(documents) == [line for line in lines if len(line) >= 10]
    short = [n for n, line in enumerate(lines, start=1) if line and len(line) < 10]
    assert left_out(documents) == [
        ("shorter than min_characters" if lines[n - 1] else "empty", f"{path}:{n}")
        for n in range(1, len(lines) + 1)
        if len(lines[n - 1]) < 10
    ]
    _, row = ledger_of(tmp_path, source)
    assert row.left_out["shorter than min_characters"]["documents"] == len(short)
    assert row.left_out["empty"]["documents"] == lines.count("")
    assert row.trained == size({line for line in lines if len(line) >= 10})


@pytest.mark.parametrize(
    "source",
    [SMS, {"path": str(DATA / "tinyshakespeare" / "input.txt"), "sample_by": "paragraph"}],
    ids=["sms", "tinyshakespeare"],
)
def test_best_fit_fills_rows_and_cuts_only_what_is_longer_than_one(tmp_path, source):
    corpus, row = ledger_of(tmp_path, source, packing="best-fit")
    [part] = corpus.rows.parts
    assert row.padding <= 0.01 * 512 * len(corpus.rows)
    assert row.cut == (part.store.lengths(part.documents) > 512).sum()
    _, as_chain = ledger_of(tmp_path, source)
    assert (as_chain.read, as_chain.trained) == (row.read, row.trained)
    assert as_chain.cut > 2 * row.cut
