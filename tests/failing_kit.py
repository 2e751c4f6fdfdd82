"""The kit, one process of which fails: `-m tests.failing_kit train …`, with KIT_FAULT="kind rank place".

A kind is one of KINDS, the place one of PLACES. Where KIT_HANGS is set the other process stands there for ever, in C
and deaf to signals, as in an operation of NCCL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PLACES = {
    "training": ("kit.training.trainer", "KitTrainer", "training_step", 2),
    "before": ("kit.stages", "Run", "measure", 1),
}


def _raise(error):
    raise error


def _user_error():
    from kit.errors import UserError

    raise UserError("data.train.0: no such thing\n  but there is another")


def _pause():
    """Be stopped for a while, then keep every other thread of the process from running."""
    subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    ctypes.PyDLL(None).sleep(4)  # keeps the GIL


def _hang():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ctypes.CDLL(None).sleep(600)


KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "throw": lambda: _raise(ValueError("a fault\nof two lines")),
    "collective": lambda: _raise(RuntimeError("a fault like torch's")),
    "mistake": _user_error,
    "pause": _pause,
}


def fail(fault):
    """Install a fault, "kind rank place"."""
    kind, ranks, place = fault.split()
    module, owner, name, at = PLACES[place]
    owner = getattr(__import__(module, fromlist=[owner]), owner)
    original, calls = getattr(owner, name), 0
    fails = os.environ.get("RANK", "0") in ranks.split(",")

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at and fails:
            time.sleep(0.5)  # the other one stands in a collective operation by now
            KINDS[kind]()
        elif calls == at and "KIT_HANGS" in os.environ:
            _hang()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    from kit.cli import main

    fail(os.environ["KIT_FAULT"])
    sys.argv[0] = "kit"
    main()
