"""Runs of `kit train` in processes of their own, one or several, with a fault wherever a test wants one.

The processes are forked from a server that has imported the kit, which saves the seconds that an import takes, and get
the environment that torchrun would give them. Tests of the real launcher are in `test_distributed.py`.
"""

import fnmatch
import functools
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kit.run", "wandb"])


@dataclass(frozen=True)
class Fault:
    """Send `signal` to the process that makes the `call`-th call of `target` ("module:Class.function").

    Attributes:
        path: where given, only calls with an argument that matches it count, such as `*/model`.
        after: let the call return before.
    """

    target: str
    call: int = 1
    signal: int = signal.SIGKILL
    rank: int = 0
    path: str | None = None
    after: bool = False


def run_kit(arguments, processes=1, fault=None, change=None, timeout=240, output=None):
    """Run `kit` with `arguments` in one or several processes; return the exit code of each, -9 for SIGKILL.

    As under a launcher, the other processes are killed once one has failed. `change` is called in each process before
    the command; it must be a function of a module, and is how a test breaks the kit on purpose. What all of them
    print is appended to the file `output`, if there is one.
    """
    port = _free_port()
    children = [
        _context.Process(target=_main, args=([str(a) for a in arguments], rank, processes, port, fault, change, output))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    grace = None
    while any(child.is_alive() for child in children):
        if grace is None and any(child.exitcode for child in children):
            grace = time.monotonic() + 10
        if time.monotonic() > deadline or (grace and time.monotonic() > grace):
            for child in children:
                child.kill()
        if grace and any(child.exitcode == -signal.SIGKILL for child in children):
            for child in children:
                child.kill()
        time.sleep(0.02)
    return [child.exitcode for child in children]


def _main(arguments, rank, processes, port, fault, change, output):
    if output:
        # Not `capfd`: what the server of forks has for its output is what the first test that used it had.
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    if fault and fault.rank == rank:
        install_fault(fault)
    if change:
        change()
    from kit import cli

    sys.argv = ["kit", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        # `_exit`, as the command itself does in a group: what a test inherits from its parent is not to be torn down.
        sys.stdout.flush()
        os._exit(stop.code or 0)


def install_fault(fault, strike=None):
    """Wrap the fault's target so that it sends the signal, or calls `strike` instead."""
    strike = strike or (lambda: os.kill(os.getpid(), fault.signal))
    module, _, path = fault.target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        nonlocal calls
        struck = False
        if fault.path is None or any(fnmatch.fnmatch(str(each), fault.path) for each in (*args, *kwargs.values())):
            calls += 1
            struck = calls == fault.call
        if struck and not fault.after:
            strike()
        returned = original(*args, **kwargs)
        if struck and fault.after:
            strike()
        return returned

    setattr(owner, name, wrapper)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
