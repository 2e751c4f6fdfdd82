"""The token store: written once, keyed right, and never believed where it is damaged."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import xxhash

import kit.data.store
from kit.data.store import open_store
from kit.errors import UserError
from tests.material import documents

EOS = 0
TEXTS = ["alpha", "", "Größe", "  \n", "alpha", "z"]

# Both wait for a line on stdin when they are ready, so that all builders begin at once.
BUILDER = """
import os, sys
from kit.data.store import open_store
folder, log, fate = sys.argv[1:]
def encode(texts):
    with open(log, "a") as file:
        file.write("built\\n")
    if fate == "killed":
        os.kill(os.getpid(), 9)
    return [[ord(c) for c in text] for text in texts]
print("ready", flush=True)
sys.stdin.readline()
store = open_store(folder, "name", "content", "tokenizer", lambda: ["first", "second"] * 20000, encode, 0, 256)
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
    def open_one(texts=TEXTS, content="content", tokenizer="tokenizer", vocab_size=256):
        return open_store(tmp_path, "name", content, tokenizer, lambda: iter(texts), encoder, EOS, vocab_size)

    return open_one


def documents_of(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def test_holds_each_document_with_its_eos_its_bytes_and_its_hash(open_one):
    store = open_one()
    kept = [text for text in TEXTS if text.strip()]
    assert documents_of(store) == [[*map(ord, text), EOS] for text in kept]
    assert store.num_bytes.tolist() == [len(text.encode()) for text in kept] == [5, 7, 5, 1]
    assert store.hashes.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in kept]
    assert (store.num_documents, store.empty) == (4, 2)
    assert store.offsets.dtype == store.num_bytes.dtype == np.int64
    assert store.hashes.dtype == np.uint64


def test_tokens_are_mapped_and_cannot_be_written(open_one):
    tokens = open_one().tokens
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


def test_holds_what_the_tokenizer_makes_of_each_document(tmp_path, tokenizer, coding, monkeypatch):
    """Encoding in batches must give what one document at a time gives."""
    texts = documents(60, seed=5)
    monkeypatch.setattr(kit.data.store, "_BATCH_CHARACTERS", 1000)
    store = open_store(
        tmp_path, "name", "content", coding.key, lambda: texts, coding.encode, coding.eos_token_id, coding.vocab_size
    )
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert documents_of(store) == [[*ids, tokenizer.eos_token_id] for ids in alone]
    decoded = [tokenizer.decode(ids[:-1]) for ids in documents_of(store)]
    assert decoded == texts


@pytest.mark.parametrize("characters", [0, 1, 7, 10**9])
def test_how_documents_are_batched_does_not_matter(open_one, monkeypatch, characters):
    monkeypatch.setattr(kit.data.store, "_BATCH_CHARACTERS", characters)
    assert documents_of(open_one()) == [[*map(ord, text), EOS] for text in TEXTS if text.strip()]


def test_a_document_that_encodes_to_nothing_keeps_its_eos(tmp_path):
    store = open_store(tmp_path, "n", "c", "t", lambda: ["a", "b"], lambda texts: [[], [5]], EOS, 256)
    assert documents_of(store) == [[EOS], [5, EOS]]


def test_is_written_once(open_one, encoder):
    first = open_one()
    assert encoder.calls == 1
    second = open_one(texts=None)  # not even iterable: the documents are not asked for again
    assert encoder.calls == 1
    assert documents_of(first) == documents_of(second)
    assert (first.key, first.empty) == (second.key, second.empty)


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
    assert documents_of(open_one()) == [[*map(ord, text), EOS] for text in TEXTS if text.strip()]
    assert encoder.calls == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    open_one()
    assert encoder.calls == 2


@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_a_source_without_text_is_refused_and_leaves_nothing(tmp_path, open_one, texts):
    with pytest.raises(UserError, match=rf"`name`: no text in it \({len(texts)} empty documents\)"):
        open_one(texts)
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


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
