"""Arrays on disk by what they were computed from: written once by whoever comes first, read by all processes.

A store is a folder of logs. Each process that writes has a log of its own, to which it appends records; all processes
read all logs. So nothing is locked, and several processes, runs or machines may fill and read one store at a time. A
record is a header (magic number, digest of what it was computed from, length, checksum over digest and payload) and the
payload. It counts only if its checksum is right: a record that a kill cut off, a truncated or a damaged file are as if
what they held had never been written.

Nothing is mapped into memory: a file that somebody cuts off, or a disk that is full, would end the process by SIGBUS.
"""

import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

_MAGIC = b"KITP"
_HEADER = struct.Struct("<4s16sQQ")
_SUFFIX = ".log"


@dataclass
class _Log:
    file: int
    end: int = 0  # up to where its headers are known
    broken: bool = False

    def __del__(self) -> None:
        os.close(self.file)


class PrefixStore:
    """A store; see the module.

    Attributes:
        folder: where it lies; made by the first write.
        limit: bytes that it may have; more is refused.
        damaged: records that were not what their checksums say, and logs with something in them that is no record.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Open a store, which need not exist."""
        self.folder, self.limit, self.damaged = folder, limit, 0
        self._logs: dict[str, _Log] = {}
        self._places: dict[bytes, tuple[_Log, int, int, int]] = {}  # digest: log, offset, length, checksum
        self._own: _Log | None = None
        self._refresh()

    def __len__(self) -> int:
        """Return the number of records that are known of."""
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Bytes that are known of."""
        return sum(log.end for log in self._logs.values())

    def holds(self, digests: list[bytes]) -> bool:
        """Return whether there is a record for each digest; what others have written since is looked for."""
        if any(digest not in self._places for digest in digests):
            self._refresh()
        return all(digest in self._places for digest in digests)

    def read(self, digest: bytes, into: np.ndarray) -> bool:
        """Fill an array of bytes with a record's payload; return whether there is one, whole and of this length."""
        place = self._places.get(digest)
        if place is None:
            return False
        log, offset, length, checksum = place
        try:
            whole = length == into.nbytes == os.preadv(log.file, [into], offset)
        except OSError:
            whole = False
        if whole and _checksum(digest, into) == checksum:
            return True
        self.damaged += 1
        del self._places[digest]
        return False

    def write(self, digest: bytes, payload: np.ndarray, reserved: int = 0) -> None:
        """Append a record, unless there is one.

        Args:
            digest: 16 bytes.
            payload: uint8 (bytes,).
            reserved: bytes of the limit that are others'.

        Raises:
            OSError: there is no room on the disk, or none within the limit. What the record began is removed.
        """
        if digest in self._places:
            return
        size = _HEADER.size + payload.nbytes
        if self.num_bytes + size > self.limit - reserved:
            raise OSError(f"more than {self.limit - reserved:,} bytes would be stored")
        checksum = _checksum(digest, payload)
        own = self._own = self._own or self._begin_log()
        header = _HEADER.pack(_MAGIC, digest, payload.nbytes, checksum)
        written = 0
        try:
            written = os.pwritev(own.file, [header, payload], own.end)
            if written < size:  # the rest says why
                rest = np.concatenate([np.frombuffer(header, np.uint8), payload])[written:]
                while len(rest):
                    rest = rest[os.pwrite(own.file, rest, own.end + size - len(rest)) :]
        except OSError:
            os.ftruncate(own.file, own.end)
            raise
        self._places[digest] = (own, own.end + _HEADER.size, payload.nbytes, checksum)
        own.end += size

    def _begin_log(self) -> _Log:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}{_SUFFIX}"
        log = _Log(os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        self._logs[name] = log
        return log

    def _refresh(self) -> None:
        """Take up what other processes have appended."""
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(_SUFFIX))
        except OSError:
            names = []
        for name in names:
            if name not in self._logs:
                try:
                    self._logs[name] = _Log(os.open(self.folder / name, os.O_RDONLY))
                except OSError:
                    continue
        for log in self._logs.values():
            if log is not self._own and not log.broken:
                self._places |= {digest: place for digest, place in self._scan(log) if digest not in self._places}

    def _scan(self, log: _Log) -> Iterator[tuple[bytes, tuple[_Log, int, int, int]]]:
        size = os.fstat(log.file).st_size
        while log.end + _HEADER.size <= size:
            header = os.pread(log.file, _HEADER.size, log.end)
            if len(header) < _HEADER.size:  # cut off just now
                return
            magic, digest, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC:
                log.broken, self.damaged = True, self.damaged + 1
                return
            start = log.end + _HEADER.size
            if start + length > size:  # being written, or cut off
                return
            log.end = start + length
            yield digest, (log, start, length, checksum)


def _checksum(digest: bytes, payload: np.ndarray) -> int:
    hashed = xxhash.xxh3_64(digest)
    hashed.update(payload.data)
    return hashed.intdigest()


def make_room(folder: Path, keep: Path, needed: int, limit: int) -> list[Path]:
    """Remove the stores of a folder that were used longest ago, until `needed` more bytes are within the limit.

    A process that reads or writes one of them goes on with what it has open; what another process removes in the
    meantime is gone.

    Args:
        folder: of all stores.
        keep: the one that is about to be used, which counts with `needed`.
        needed: bytes of it.
        limit: of all of them together, in bytes.

    Returns:
        What was removed.
    """
    stores, sizes, removed = [], {}, []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path != keep:
            with suppress(OSError):
                used, size = path.stat().st_mtime, sum(log.stat().st_size for log in path.glob(f"*{_SUFFIX}"))
                stores.append((used, path))
                sizes[path] = size
    for _, path in sorted(stores):
        if sum(sizes.values()) + needed <= limit:
            break
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]
        removed.append(path)
    return removed
