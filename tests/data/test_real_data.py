"""Real corpora of the development machine, whose traps no made-up text has. Tokens are bytes: all counts are exact."""

import re
from pathlib import Path

import pytest

from kit.data.corpus import TokenCoding, build_corpus
from kit.recipe.models import DataSection

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared corpora are not on this machine ({DATA})")

BYTES = TokenCoding(
    key="bytes",
    encode=lambda texts: [list(text.encode()) for text in texts],
    vocab_size=257,
    eos_token_id=256,
    context_token_id=256,
    pad_token_id=256,
)


def ledger_of(tmp_path, source, **data):
    section = DataSection.model_validate({"train": [source], "store_dir": str(tmp_path), "block_size": 512, **data})
    corpus = build_corpus(section, {}, BYTES, seed=0)
    (row,) = corpus.ledger
    assert row.read + row.repeated == row.trained + row.context + row.total_dropped
    assert len(corpus.rows) * 512 == row.trained + row.padding
    return corpus, row


def test_sms_lines(tmp_path):
    """Quotes and tabs are text; 403 texts occur more than once and must stand on one side of the split."""
    path = DATA / "sms_spam" / "SMSSpamCollection"
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    corpus, row = ledger_of(tmp_path, {"path": str(path), "sample_by": "line"}, validation={"fraction": 0.2})
    held = corpus.sets["domain"]
    assert row.documents + row.held_out == len(lines) == 5574
    assert row.read + held.lengths.sum() == sum(map(len, lines)) + len(lines)
    assert row.dropped == {}
    part = corpus.rows.parts[0]
    assert not set(part.store.hashes[part.documents]) & set(held.hashes)
    assert len(set(held.hashes)) < len(held.hashes)


def test_novels_by_paragraph(tmp_path):
    """Windows and Unix line breaks in one file, and paragraphs that run over several reads."""
    path = DATA / "novels" / "novels_10MB.txt"
    text = path.read_bytes().replace(b"\r\n", b"\n").strip(b"\n").decode()
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    _, row = ledger_of(tmp_path, {"path": str(path), "sample_by": "paragraph"})
    assert row.documents == len(paragraphs)
    assert row.empty == 0
    assert row.read == sum(len(p.strip("\n").encode()) + 1 for p in paragraphs)


def test_python_docs_by_separator(tmp_path):
    path = DATA / "python_docs" / "corpus.txt"
    text = path.read_bytes().decode()
    documents = [d.strip("\n") for d in text.split("\n\n\n")]
    _, row = ledger_of(tmp_path, {"path": str(path), "separator": "\n\n\n"}, packing=True)
    assert row.documents + row.empty == len(documents)
    assert row.read == sum(len(d.encode()) + 1 for d in documents if d.strip())
