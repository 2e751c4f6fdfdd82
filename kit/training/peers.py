"""Processes that end together: one that throws, is killed or crashes takes the others with it within seconds.

Otherwise they stand in a collective operation that never ends (NCCL), or fail in it for a reason that is not theirs
(gloo). So each holds a connection to process 0. The operating system closes it when a process dies, however that comes
about, and keeps it open while one is stopped, waits for a disk, or computes without looking up: nobody is taken for
dead for being slow, as with heartbeats. A machine that is lost with all its processes no longer answers the probes that
keep a connection alive.
"""

import _thread
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import NoReturn

import torch.distributed as dist

from kit.console import warn
from kit.errors import UserError
from kit.files import disk_fault
from kit.recipe.models import Recipe
from kit.training.preemption import Preempted, Preemption
from kit.training.run_directory import RunDirectory, exit_code
from kit.training.topology import from_main_process

# What fails because another process did waits so long to hear of it.
_GRACE_S = 2.0
# A process that knows of the end and does not come to it by itself is ended after so long; a preempted one may have
# something to save.
_PATIENCE_S = {"user-error": 6.0, "failed": 6.0, "killed": 6.0, "preempted": 30.0, "interrupted": 30.0}
_CONNECT_S = 20.0
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a machine is lost after a minute


@dataclass(frozen=True)
class Word:
    """Why a process ends.

    Attributes:
        rank: of the process.
        status: as in the manifest.
        message: what the manifest and the other processes say.
        traceback: where it is a fault.
    """

    rank: int
    status: str
    message: str
    traceback: str = ""


class Ended(SystemExit):
    """All processes end because of one of them; process 0 has told why."""

    def __init__(self, word: Word) -> None:
        """Exit with the code of the run's status."""
        super().__init__(exit_code(word.status))
        self.status = word.status
        self.message = word.message


@contextmanager
def ending_together(recipe: Recipe, directory: RunDirectory | None = None) -> Iterator[Preemption]:
    """Listen for SIGTERM and for the other processes; whatever ends one of them ends all, for the same reason.

    It begins when the process group is there: until then a process waits for the others in torch, which no handler of
    Python's interrupts, and SIGTERM ends it at once.

    Args:
        recipe: whose folders are named where a disk is full.
        directory: of the run, whose manifest is told should process 0 have to be ended from outside.

    Raises:
        UserError: a single process's own, or the fault of a disk.
        Preempted: one of the processes was.
        Ended: in a group, anything else.
    """
    preemption = Preemption()
    stop_listening = preemption.install()
    peers = None
    try:
        if dist.is_initialized() and dist.get_world_size() > 1:
            peers = _connect(directory, preemption)
        yield preemption
    except BaseException as error:
        own = error
        if isinstance(error, Exception) and not isinstance(error, UserError):
            folders = {"run.output_dir": recipe.run.output_dir, "data.store_dir": recipe.data.store_dir}
            if fault := disk_fault(error, {key: folder for key, folder in folders.items() if folder}):
                own = UserError(fault)
        if peers:
            peers.end(own)
        if own is error:
            raise
        raise own from error
    finally:
        if peers:
            peers.leave()
        stop_listening()


class _Peers:
    """The other processes, as one of them sees them: process 0 is connected to all, each other one to process 0.

    What process 0 hears first is why all of them end, and goes out to everybody.
    """

    def __init__(
        self, connections: dict[Connection, int], directory: RunDirectory | None, preemption: Preemption
    ) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._connections, self._directory, self._preemption = connections, directory, preemption
        self._verdict: Word | None = None
        self._left = False
        self._settled = threading.Event()
        self._lock = threading.Lock()
        for connection in connections:
            # A process forked from here (a worker that loads data) must not hold it open.
            os.register_at_fork(after_in_child=connection.close)
        threading.Thread(target=self._listen, daemon=True).start()

    def end(self, error: BaseException) -> NoReturn:
        """End this process for the reason that all of them have, which may be its own error or not."""
        # From here on the launcher's SIGTERM, which ends the others once one has failed, has nothing to tell.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        own = self._word(error)
        if own.status != "user-error":  # which nobody else's end brings about
            self._settled.wait(_GRACE_S)
        if self._rank == 0:
            self._settle(own)
        elif self._connections and not self._settled.is_set():
            for connection in self._connections:
                _send(connection, own)
            self._settled.wait(_PATIENCE_S["failed"])
        if self._verdict is None:  # process 0 is stopped
            _show(own)
            self._settle(own)
        verdict = self._verdict
        if (own.status, own.message) != (verdict.status, verdict.message):
            self._say_why()
        if verdict.status == "preempted":
            raise Preempted from None
        if verdict.status == "interrupted":
            raise KeyboardInterrupt from None
        raise Ended(verdict) from None

    def leave(self) -> None:
        """Tell the others that this process no longer needs them, and end with none of them from here on."""
        with self._lock:
            self._left = True
        for connection in self._connections:
            _send(connection, None)

    def _word(self, error: BaseException) -> Word:
        if isinstance(error, UserError):
            return Word(self._rank, "user-error", str(error))
        if isinstance(error, Preempted):
            return Word(self._rank, "preempted", "SIGTERM")
        if isinstance(error, KeyboardInterrupt):
            return Word(self._rank, "interrupted", "Ctrl-C")
        message = f"process {self._rank} of {self._size} raised {type(error).__name__}: {error}"
        return Word(self._rank, "failed", message, "".join(traceback.format_exception(error)))

    def _listen(self) -> None:
        peers = dict(self._connections)
        while peers:
            for connection in wait(list(peers)):
                try:
                    said = json.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    said = asdict(self._death_of(peers.pop(connection)))
                if said:
                    self._settle(Word(**said))
                else:
                    peers.pop(connection)

    def _death_of(self, rank: int) -> Word:
        message = f"process {rank} of {self._size} died without a word (killed, out of memory, or a crash)"
        return Word(rank, "killed", f"{message}; the launcher tells its exit code")

    def _settle(self, word: Word) -> None:
        """Take the first word for the reason that all end, and pass it on."""
        with self._lock:
            if self._left or self._verdict:
                return
            self._verdict = word
            if self._rank == 0:
                _show(word)  # before anybody else says a line
                for connection in self._connections:
                    _send(connection, word)
        timer = threading.Timer(_PATIENCE_S[word.status], self._end_from_outside)
        timer.daemon = True
        timer.start()
        self._settled.set()
        if self._directory:  # now, since NCCL may abort the process before it can
            self._directory.end(status=word.status, message=word.message)
        if threading.current_thread() is not threading.main_thread():
            # Where Python code runs, it is left from here, as for a SIGTERM, and cleans up after itself.
            if word.status != "preempted":
                self._preemption.raises = Ended(word)
            _thread.interrupt_main(signal.SIGTERM)

    def _end_from_outside(self) -> None:
        self._say_why()
        sys.stdout.flush()
        os._exit(exit_code(self._verdict.status))

    def _say_why(self) -> None:
        if self._rank not in (0, self._verdict.rank) and self._verdict.status in ("user-error", "failed", "killed"):
            _complain(f"process {self._rank} ends, since {_first_line(self._verdict)}")


def _first_line(word: Word) -> str:
    line = word.message.splitlines()[0][:200]
    return f"process {word.rank} stopped: {line}" if word.status == "user-error" else line


def _show(word: Word) -> None:
    """Tell why the run ends, with the traceback of the process that threw."""
    if word.status == "user-error":
        _complain(f"error: {word.message}")
    elif word.traceback:
        _complain(f"process {word.rank}:\n{word.traceback.rstrip()}")
    elif word.status in ("failed", "killed"):
        _complain(f"error: {word.message}")


def _complain(text: str) -> None:
    # In one call: the lines of several processes would mix.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _send(connection: Connection, word: Word | None) -> None:
    with contextlib.suppress(OSError):  # who is gone needs no word
        connection.send_bytes(json.dumps(word and asdict(word)).encode())


# ---- the connections


def _connect(directory: RunDirectory | None, preemption: Preemption) -> _Peers:
    """Connect all processes with process 0, at an address that it chooses."""
    rank, others = dist.get_rank(), dist.get_world_size() - 1
    server = _listening_socket() if rank == 0 else None

    def address() -> tuple[list[str], int, str]:
        hosts = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
        return [host for host in hosts if host], server.getsockname()[1], secrets.token_hex(16)

    hosts, port, token = from_main_process(address)
    if server:
        with server:
            connections = _accept(server, token, others)
        if len(connections) < others:
            warn(
                f"{others - len(connections)} of {others} processes could not reach process 0 at port {port} of "
                f"{' or '.join(hosts)}: should one of them fail, the others wait until torch's own time limit"
            )
    else:
        connection = _reach(hosts, port)
        connections = {connection: 0} if connection else {}
        for each in connections:
            each.send_bytes(json.dumps([token, rank]).encode())
    return _Peers(connections, directory, preemption)


def _listening_socket() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accept(server: socket.socket, token: str, count: int) -> dict[Connection, int]:
    """Return the connections of those who know the token: a port may be found by others too."""
    found: dict[Connection, int] = {}
    until = time.monotonic() + _CONNECT_S
    while len(found) < count and (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection = _as_connection(server.accept()[0])
        except TimeoutError:
            break
        with contextlib.suppress(OSError, EOFError, ValueError):
            if connection.poll(_CONNECT_S / 4):
                said, rank = json.loads(connection.recv_bytes(maxlength=1000))
                if secrets.compare_digest(said, token):
                    found[connection] = rank
    return found


def _reach(hosts: list[str], port: int) -> Connection | None:
    for host in hosts:
        with contextlib.suppress(OSError):
            return _as_connection(socket.create_connection((host, port), timeout=_CONNECT_S / 4))
    return None


def _as_connection(connected: socket.socket) -> Connection:
    connected.setblocking(True)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(connected.detach())
