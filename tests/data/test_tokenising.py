"""Encoding in several processes: the same tokens, bounded memory, and no process that outlives its purpose."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from kit.data import tokenising
from kit.data.columns import LeftOut
from kit.data.store import open_store
from kit.data.tokenising import encode_documents
from kit.errors import UserError
from tests.data.encoders import (
    encode_and_die_while_sending,
    encode_and_fail,
    encode_and_kill,
    encode_characters,
    encode_elsewhere,
)
from tests.material import documents

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(monkeypatch):
    """Batches of a few documents, and other processes from the second batch on."""
    monkeypatch.setattr(tokenising, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(tokenising, "_ALONE_S", -1.0)


def files_of(store_dir):
    (folder,) = [path for path in (store_dir / "tokens").iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_batches_hold_each_document_once_and_in_order(small):
    texts = documents(50, seed=2)
    batches = list(encode_documents(texts, encode_characters, 1, "uint32", 1))
    assert len(batches) > 5
    assert np.concatenate([b.tokens for b in batches]).tolist() == [t for x in texts for t in [*map(ord, x), 1]]
    assert np.concatenate([b.lengths for b in batches]).tolist() == [len(text) + 1 for text in texts]
    assert np.concatenate([b.num_bytes for b in batches]).tolist() == [len(text.encode()) for text in texts]


def test_several_processes_give_the_store_of_one_bit_for_bit(tmp_path, coding, small):
    texts = documents(150, seed=4) + ["<eos> in a text is no end"]
    everything = [part for n, text in enumerate(texts) for part in (text, LeftOut("short", f"{n}"))]
    for settings in ({}, {"max_tokens": 3000}):
        stores = []
        for num_proc in (1, 2):
            folder = tmp_path / f"{num_proc}{settings}"
            store = open_store(
                folder, "name", "content", coding.key, lambda: everything, coding.encode, coding.eos_token_id,
                coding.vocab_size, num_proc=num_proc, **settings,
            )  # fmt: skip
            stores.append((store.left_out, store.stopped, files_of(folder)))
        assert stores[0] == stores[1]


def test_other_processes_do_the_work_once_there_is_much(small):
    batches = encode_documents(["x" * 600] * 30, encode_elsewhere, 0, "uint64", 2)
    processes = [int(batch.tokens[0]) for batch in batches]
    assert processes[0] == os.getpid()
    assert os.getpid() not in processes[1:]
    assert len(processes) == 30


def test_little_text_starts_no_process():
    batches = list(encode_documents(documents(100, seed=0), encode_elsewhere, 0, "uint64", 8))
    assert [int(batch.tokens[0]) for batch in batches] == [os.getpid()]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_documents_are_not_read_far_ahead_of_what_is_taken(small, num_proc):
    """Whatever is read ahead is held in memory: that must not be the corpus."""
    read = 0

    def stream():
        nonlocal read
        while True:
            read += 1
            yield "x" * 600  # a batch of its own

    batches = encode_documents(stream(), encode_characters, 0, "uint32", num_proc)
    for taken in range(1, 25):
        next(batches)
        assert read - taken <= (2 * num_proc + 1 if num_proc > 1 else 0)
    batches.close()
    assert _only_trackers()


def _only_trackers():
    return all("resource_tracker" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True))


def test_a_worker_that_is_killed_is_told_and_leaves_no_store(tmp_path, small):
    texts = ["x" * 600] * 5 + ["kill", "x" * 600] + ["x" * 600] * 5
    with pytest.raises(UserError, match=r"was killed.*lower `data.num_proc`"):
        open_store(tmp_path, "n", "c", "t", lambda: texts, encode_and_kill, 0, 256, num_proc=2)
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []
    assert _only_trackers()


def test_a_worker_that_is_killed_while_it_sends_is_told(small, monkeypatch):
    """Python's pool waits for the rest of the result for ever."""
    monkeypatch.setattr(tokenising, "_PATIENCE_S", 0.5)
    texts = ["x" * 600] * 5 + ["kill", "x" * 6_000] + ["x" * 600] * 5
    with pytest.raises(UserError, match=r"was killed.*lower `data.num_proc`"):
        list(encode_documents(texts, encode_and_die_while_sending, 0, "uint64", 2))
    assert _only_trackers()


def test_leaving_does_not_wait_for_the_rest_of_a_result(small):
    """So it is where a signal to the whole group ends the workers as they send."""
    texts = ["x" * 600] * 2 + ["kill", "x" * 6_000] + ["x" * 600] * 20
    batches = encode_documents(texts, encode_and_die_while_sending, 0, "uint64", 2)
    next(batches)
    next(batches)
    time.sleep(3)
    batches.close()
    assert _only_trackers()


def test_what_a_worker_raises_and_what_the_source_raises_arrive(tmp_path, small):
    texts = ["x" * 600] * 5 + ["fail", "x" * 600]
    with pytest.raises(ValueError, match="this cannot be encoded"):
        list(encode_documents(texts, encode_and_fail, 0, "uint16", 2))

    def broken():
        yield from ["x" * 600] * 6
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        open_store(tmp_path, "n", "c", "t", broken, encode_characters, 0, 256, num_proc=2)
    assert _only_trackers()


PARENT = """
import sys
from kit.data import tokenising
from tests.data.encoders import encode_slowly
tokenising._BATCH_CHARACTERS = 10
tokenising._ALONE_S = -1.0
if __name__ == "__main__":
    encode = tokenising.encode_batch
    tokenising.encode_batch = lambda texts, *rest: encode(texts, lambda t: [[1] for _ in t], *rest[1:])
    list(tokenising.encode_documents(["x" * 20] * 100, encode_slowly, 0, "uint16", 2))
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """A worker waits for its parent's next batch, or is in the midst of one: neither ends by itself."""
    (tmp_path / "parent.py").write_text(PARENT)
    workers = tmp_path / "workers"
    workers.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORKERS": str(workers)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    try:
        wait_until(lambda: len(list(workers.iterdir())) == 2)
        processes = [psutil.Process(int(path.name)) for path in workers.iterdir()]
        assert all(process.is_running() for process in processes)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))


INTERRUPTED = """
import os, signal
from kit.data import tokenising
from tests.data.encoders import encode_characters

class Interruption(BaseException):
    pass

def interrupt(*arguments):
    raise Interruption

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    tokenising._ALONE_S = -1.0
    try:
        texts = iter(lambda: "x" * 1000, 0)
        for number, _ in enumerate(tokenising.encode_documents(texts, encode_characters, 0, "uint16", 2)):
            if number == 4:
                os.killpg(os.getpgid(0), signal.SIGTERM)
    except Interruption:
        print("interrupted")
"""


def test_a_signal_to_the_whole_group_is_an_interruption_and_no_fault(tmp_path):
    """Schedulers end a job that way: the workers are gone first, which must not look like too little memory."""
    (tmp_path / "parent.py").write_text(INTERRUPTED)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    assert (result.stdout, result.returncode) == ("interrupted\n", 0), result.stderr


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_worker_imports_nothing_heavy():
    """Each would take two seconds and half a gigabyte to import torch."""
    code = "import sys, kit.data.tokenising, kit.model.encoding; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(modules.split())


def test_the_first_documents_of_a_batch():
    batch = tokenising.encode_batch(["ab", "c", "def"], encode_characters, 0, "uint16")
    for number, tokens in ((0, 0), (1, 3), (2, 5), (3, 9)):
        part = batch.first(number)
        assert part.tokens.tolist() == batch.tokens.tolist()[:tokens]
        assert [len(part.lengths), len(part.num_bytes), len(part.hashes)] == [number] * 3


@pytest.mark.parametrize(("max_tokens", "batches"), [(None, 1), (25, 3), (10**6, 1)])
def test_a_small_limit_makes_small_batches(max_tokens, batches):
    """What is read of a stream beyond the limit is thrown away."""
    encoded = list(encode_documents(["x" * 50] * 8, encode_characters, 0, "uint16", 1, max_tokens))
    assert len(encoded) == batches


def test_an_encoder_that_cannot_be_pickled_does_for_one_process(small):
    encode = partial(lambda texts: encode_characters(texts))
    assert len(list(encode_documents(["x" * 600] * 3, encode, 0, "uint16", 1))) == 3
