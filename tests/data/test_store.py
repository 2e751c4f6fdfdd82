"""The token store: written once, keyed right, and never believed where it is damaged."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import xxhash

import kit.data.store
from kit.data import tokenising
from kit.data.columns import LeftOut
from kit.data.store import open_store
from kit.errors import UserError
from tests.material import documents

EOS = 0
BLANK = [LeftOut("empty", "here"), LeftOut("empty", "there")]
TEXTS = ["alpha", BLANK[0], "Größe", BLANK[1], "alpha", "z"]
KEPT = ["alpha", "Größe", "alpha", "z"]

# Both wait for a line on stdin when they are ready, so that all builders begin at once.
BUILDER = """
import os, sys
from kit.data.store import open_store
folder, log, fate = sys.argv[1:]
def documents():
    with open(log, "a") as file:
        file.write("built\\n")
    return ["first", "second"] * 20000
def encode(texts):
    if fate == "killed":
        os.kill(os.getpid(), 9)
    return [[ord(c) for c in text] for text in texts]
print("ready", flush=True)
sys.stdin.readline()
store = open_store(folder, "name", "content", "tokenizer", documents, encode, 0, 256)
print(int(store.tokens.sum()), store.num_documents)
"""


class Encoder:
    """Encodes each character as its code point, and counts how often it was called."""

    calls = 0

    def __call__(self, texts):
        """Encode."""
        self.calls += 1
        return [[ord(c) for c in text] for text in texts]


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def open_one(tmp_path, encoder):
    def open_one(texts=TEXTS, content="content", tokenizer="tokenizer", vocab_size=256, **settings):
        return open_store(
            tmp_path, "name", content, tokenizer, lambda: iter(texts), encoder, EOS, vocab_size, **settings
        )

    return open_one


def documents_of(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def test_holds_each_document_with_its_eos_its_bytes_and_its_hash(open_one):
    store = open_one()
    assert documents_of(store) == [[*map(ord, text), EOS] for text in KEPT]
    assert store.num_bytes.tolist() == [len(text.encode()) for text in KEPT] == [5, 7, 5, 1]
    assert store.hashes.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in KEPT]
    assert store.num_documents == 4
    assert store.left_out == {"empty": {"documents": 2, "examples": ["here", "there"]}}
    assert not store.stopped
    assert store.offsets.dtype == store.num_bytes.dtype == np.int64
    assert store.hashes.dtype == np.uint64


def test_tokens_are_mapped_and_cannot_be_written(open_one):
    tokens = open_one().tokens
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


def test_holds_what_the_tokenizer_makes_of_each_document(tmp_path, tokenizer, coding, monkeypatch):
    """Encoding in batches must give what one document at a time gives."""
    texts = documents(60, seed=5)
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 1000)
    store = open_store(
        tmp_path, "name", "content", coding.key, lambda: texts, coding.encode, coding.eos_token_id, coding.vocab_size
    )
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert documents_of(store) == [[*ids, tokenizer.eos_token_id] for ids in alone]
    decoded = [tokenizer.decode(ids[:-1]) for ids in documents_of(store)]
    assert decoded == texts


@pytest.mark.parametrize("characters", [0, 1, 7, 10**9])
def test_how_documents_are_batched_does_not_matter(open_one, monkeypatch, characters):
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", characters)
    assert documents_of(open_one()) == [[*map(ord, text), EOS] for text in KEPT]


def test_a_document_that_encodes_to_nothing_keeps_its_eos(tmp_path):
    store = open_store(tmp_path, "n", "c", "t", lambda: ["a", "b"], lambda texts: [[], [5]], EOS, 256)
    assert documents_of(store) == [[EOS], [5, EOS]]


def test_is_written_once(open_one, encoder):
    first = open_one()
    assert encoder.calls == 1
    second = open_one(texts=None)  # not even iterable: the documents are not asked for again
    assert encoder.calls == 1
    assert documents_of(first) == documents_of(second)
    assert (first.key, first.left_out) == (second.key, second.left_out)


def test_another_content_tokenizer_or_format_is_another_store(open_one, encoder, monkeypatch):
    stores = [open_one(), open_one(content="other"), open_one(tokenizer="other")]
    monkeypatch.setattr(kit.data.store, "_FORMAT", -1)
    stores.append(open_one())
    assert len({store.key for store in stores}) == encoder.calls == 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_tokens_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    largest = vocab_size - 1
    store = open_store(tmp_path, "n", "c", "t", lambda: ["x"], lambda texts: [[1, largest]], largest, vocab_size)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [1, largest, largest]


def test_a_token_beyond_the_vocabulary_is_not_wrapped_around(tmp_path):
    with pytest.raises(OverflowError):
        open_store(tmp_path, "n", "c", "t", lambda: ["x"], lambda texts: [[65536]], EOS, 256)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "missing": lambda path: path.unlink(),
}


DAMAGED = [(name, damage) for name in ("tokens.bin", "offsets.npy", "bytes.npy", "hashes.npy") for damage in DAMAGE]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGED, ("complete.json", "truncated"), ("complete.json", "missing")])
def test_a_damaged_store_is_built_again(tmp_path, open_one, encoder, name, damage):
    folder = tmp_path / "tokens" / open_one().key
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGE[damage](folder / name)
    assert documents_of(open_one()) == [[*map(ord, text), EOS] for text in KEPT]
    assert encoder.calls == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    open_one()
    assert encoder.calls == 2


@pytest.mark.parametrize(
    ("texts", "why"),
    [([], "it is empty"), (BLANK, "empty: 2"), ([*BLANK, LeftOut("short", "x")], "empty: 2; short: 1")],
)
def test_a_source_without_text_is_refused_and_leaves_nothing(tmp_path, open_one, texts, why):
    with pytest.raises(UserError, match=rf"`name`: no document is left in it \({why}\)"):
        open_one(texts)
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


# ---- What is left out ----


@pytest.mark.parametrize("characters", [0, 5, 10**9])
def test_what_is_left_out_is_counted_by_cause_with_three_examples(open_one, monkeypatch, characters):
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", characters)
    texts = []
    for n in range(20):
        texts += [LeftOut("short", f"line {n}"), f"document {n}"] + [LeftOut("unusable text", f"row {n}")] * (n % 2)
    assert open_one(texts).left_out == {
        "short": {"documents": 20, "examples": ["line 0", "line 1", "line 2"]},
        "unusable text": {"documents": 10, "examples": ["row 1", "row 3", "row 5"]},
    }


def test_what_is_left_out_at_either_end_is_counted(open_one):
    store = open_one([LeftOut("short", "first"), "x", LeftOut("short", "last")])
    assert store.left_out == {"short": {"documents": 2, "examples": ["first", "last"]}}


# ---- At most so many tokens ----


@pytest.mark.parametrize("characters", [0, 3, 10, 10**9])
def test_the_first_documents_with_at_most_so_many_tokens(open_one, monkeypatch, characters):
    """Each cut, each way of batching: documents 1 + 1, 2 + 1, … tokens long, of which a prefix is taken."""
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", characters)
    texts = ["x" * n for n in range(1, 7)]
    ends = np.cumsum([len(text) + 1 for text in texts])
    for most in range(2, ends[-1] + 3):
        store = open_one(texts, max_tokens=most)
        expected = int((ends <= most).sum())
        assert documents_of(store) == [[*map(ord, text), EOS] for text in texts[:expected]]
        assert len(store.tokens) <= most
        assert store.stopped == (expected < len(texts))


def test_the_limit_is_in_the_key(open_one, encoder):
    stores = [open_one(["aa", "bb"], max_tokens=most) for most in (None, 3, 4, 100)]
    assert len({store.key for store in stores}) == encoder.calls == 4
    assert [store.num_documents for store in stores] == [2, 1, 1, 2]
    assert [store.stopped for store in stores] == [False, True, True, False]
    assert open_one(None, max_tokens=3).stopped


def test_a_first_document_that_is_too_long_is_told(open_one):
    with pytest.raises(UserError, match=r"the first document alone has more than `max_tokens: 3`"):
        open_one(["abc", "x"], max_tokens=3)


@pytest.mark.parametrize("characters", [0, 3, 10**9])
def test_what_is_left_out_is_counted_as_far_as_documents_are_taken(open_one, monkeypatch, characters):
    """More is read ahead than is taken; how much, depends on the batches and on the number of processes."""
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", characters)
    texts = [part for n in range(10) for part in (LeftOut("short", f"{n}"), "ab")]
    store = open_one(texts, max_tokens=9)
    assert store.num_documents == 3
    assert store.left_out == {"short": {"documents": 4, "examples": ["0", "1", "2"]}}


def test_a_stream_is_not_read_much_further_than_its_limit(open_one, monkeypatch):
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 100)
    read = []

    def stream():
        while True:
            read.append(1)
            yield "0123456789"

    assert open_one(stream(), max_tokens=220).num_documents == 20
    assert len(read) < 40


def test_an_error_on_the_way_leaves_nothing(tmp_path, open_one):
    def texts():
        yield "good"
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        open_one(texts())
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []
    assert open_one(["good"]).num_documents == 1


def start(folder, log, fate):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), str(log), fate],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_that_open_it_at_once_build_it_once(tmp_path):
    log = tmp_path / "log"
    processes = [start(tmp_path / "store", log, "lives") for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    expected = 20000 * sum(map(ord, "firstsecond"))
    assert answers == [f"{expected} 40000\n"] * 3
    assert log.read_text() == "built\n"


def test_what_a_killed_builder_left_is_removed(tmp_path):
    folder, log = tmp_path / "store", tmp_path / "log"
    killed = start(folder, log, "killed")
    killed.communicate("\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in (folder / "tokens").iterdir() if path.is_dir()], "nothing was left: nothing is tested"
    answer, _ = start(folder, log, "lives").communicate("\n", timeout=60)
    assert answer.endswith(" 40000\n")
    left = [path for path in (folder / "tokens").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert not left[0].name.startswith(".")
