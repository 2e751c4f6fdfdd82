"""Batches of texts to flat arrays of tokens, in several processes where there is enough text for them.

A worker imports this module and the encoder's, and nothing of torch or transformers.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import numpy as np
import xxhash

from kit.errors import UserError

Encode = Callable[[list[str]], list[list[int]]]

_BATCH_CHARACTERS = 1 << 20
# A very short document takes more memory for what its encoding has beside tokens than for its text.
_BATCH_DOCUMENTS = 1 << 13
# Others take a second or two to start, and the threads of a fast tokenizer are about as fast as processes. A time may
# decide, since what comes of it is the same.
_ALONE_S = 10.0
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class EncodedBatch:
    """Some documents as tokens.

    Attributes:
        tokens: token ids, each document followed by EOS.
        lengths: int64 (documents,), tokens of each, EOS included.
        num_bytes: int64 (documents,), UTF-8 bytes of each text.
        hashes: uint64 (documents,), xxHash of each text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray

    def first(self, documents: int) -> "EncodedBatch":
        """Return the first documents of the batch."""
        tokens = self.tokens[: self.lengths[:documents].sum()]
        return EncodedBatch(tokens, self.lengths[:documents], self.num_bytes[:documents], self.hashes[:documents])


def encode_batch(texts: list[str], encode: Encode, eos_token_id: int, dtype: str) -> EncodedBatch:
    """Encode some documents, each followed by EOS."""
    encoded = encode(texts)
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), dtype=np.int64, count=len(encoded))
    tokens = np.empty(int(lengths.sum()), dtype=dtype)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = eos_token_id
    for ids, end, length in zip(encoded, ends.tolist(), lengths.tolist(), strict=True):
        tokens[end - length : end - 1] = ids
    raw = [text.encode() for text in texts]
    num_bytes = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, raw), dtype=np.uint64, count=len(raw))
    return EncodedBatch(tokens, lengths, num_bytes, hashes)


def encode_documents(
    documents: Iterable[str],
    encode: Encode,
    eos_token_id: int,
    dtype: str,
    num_proc: int,
    max_tokens: int | None = None,
) -> Iterator[EncodedBatch]:
    """Encode documents in their order; what is under way at once is bounded.

    Args:
        documents: texts.
        encode: texts to token ids; picklable where `num_proc` is more than 1.
        eos_token_id: follows each document.
        dtype: of a stored token.
        num_proc: processes that encode once there is much to do; 1 encodes here.
        max_tokens: what is going to be taken, so that not much more is read of a stream.
    """
    batches = _batches(documents, _BATCH_CHARACTERS if max_tokens is None else min(_BATCH_CHARACTERS, 4 * max_tokens))
    began = time.monotonic()
    for batch in batches:
        yield encode_batch(batch, encode, eos_token_id, dtype)
        if num_proc > 1 and time.monotonic() - began > _ALONE_S:
            break
    else:
        return
    yield from _encode_in_processes(batches, encode, eos_token_id, dtype, num_proc)


def _encode_in_processes(
    batches: Iterator[list[str]], encode: Encode, eos_token_id: int, dtype: str, num_proc: int
) -> Iterator[EncodedBatch]:
    # Not forked: this process has threads, whose locks a fork would copy in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _start_worker, (encode, eos_token_id, dtype)) as pool:
        under_way: deque[Future[EncodedBatch]] = deque()
        workers: dict[int, BaseProcess] = {}
        try:
            for batch in batches:
                under_way.append(pool.submit(_encode_in_worker, batch))
                workers.update(pool._processes or {})
                if len(under_way) > 2 * num_proc:
                    yield _result(under_way.popleft(), workers)
            while under_way:
                yield _result(under_way.popleft(), workers)
        except BrokenProcessPool:
            killed = _was_killed(workers.values())
            _end(pool, workers)
            if not killed:
                raise
            raise UserError(
                "a process that tokenises was killed, as the system does where memory runs out; lower `data.num_proc`"
            ) from None
        except BaseException:
            _end(pool, workers)
            raise


def _result(future: Future[EncodedBatch], workers: dict[int, BaseProcess]) -> EncodedBatch:
    """Wait for a result for as long as all workers live; the pool itself waits on for one that died while it sent."""
    while True:
        try:
            return future.result(timeout=_PATIENCE_S)
        except TimeoutError:
            if any(worker.exitcode is not None for worker in workers.values()) and not future.done():
                raise BrokenProcessPool("a worker died in the midst of its result") from None


def _end(pool: ProcessPoolExecutor, workers: dict[int, BaseProcess]) -> None:
    """End workers of whom nothing is wanted any more, so that leaving the pool does not wait for anything of theirs.

    Asked to end, a worker might wait for a lock that one held whom a signal has killed, the thread that feeds them for
    room in a pipe that nobody reads, and the thread that reads from them for the rest of a result.
    """
    for worker in workers.values():
        worker.kill()
    pool._call_queue.cancel_join_thread()
    # With the workers' ends gone and this one closed, that rest is the end of the file.
    pool._result_queue._writer.close()


def _was_killed(workers: Iterable[BaseProcess]) -> bool:
    """Tell whether a worker died of SIGKILL; the pool's own thread may still be collecting their ends."""
    until = time.monotonic() + _PATIENCE_S
    while any(worker.exitcode is None for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    return any(worker.exitcode == -signal.SIGKILL for worker in workers)


_worker: tuple[Encode, int, str]


def _start_worker(encode: Encode, eos_token_id: int, dtype: str) -> None:
    global _worker
    _worker = (encode, eos_token_id, dtype)
    # One core each: threads of the tokenizer's own would compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The main process decides what an interruption means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If it is killed, no one would ever tell a worker to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> EncodedBatch:
    return encode_batch(texts, *_worker)


def _batches(documents: Iterable[str], most_characters: int) -> Iterator[list[str]]:
    """Group documents so that there is work for every thread and memory stays bounded."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters > most_characters or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
