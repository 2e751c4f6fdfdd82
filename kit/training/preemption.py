"""SIGTERM: end soon, leaving a state from which the same command goes on exactly where this one ended."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from kit.training.topology import launcher

_POLL_S = 1.0


class Preempted(BaseException):
    """The run was asked to end; what is on disk is safe to start again from.

    Like KeyboardInterrupt no Exception: it is raised wherever the program stands, and `except Exception` in whatever
    library that is must not swallow it.
    """


class Preemption:
    """Listens for SIGTERM.

    Outside of training (preparation, scorecards) there is nothing to save: the signal raises Preempted where the
    program stands. During training it sets a flag, on which all processes agree at the next step boundary.

    Attributes:
        requested: whether the signal has come.
        deferred: whether it sets the flag only.
        raises: what is raised; where the signal stands for another process's end, what that one ended with.
    """

    def __init__(self) -> None:
        """Start with no signal received, raising at once when one is."""
        self.requested = False
        self.deferred = False
        self.raises: BaseException | type[BaseException] = Preempted

    def install(self) -> Callable[[], None]:
        """Listen for SIGTERM, and take the end of the launcher for one; return a function that stops both."""
        previous = signal.signal(signal.SIGTERM, self._receive)
        stopped = threading.Event()
        if parent := launcher():
            threading.Thread(target=_outlive, args=(parent.pid, stopped), daemon=True).start()

        def stop() -> None:
            stopped.set()
            if signal.getsignal(signal.SIGTERM) == self._receive:
                signal.signal(signal.SIGTERM, previous)

        return stop

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.deferred:
            raise self.raises


def _outlive(launcher: int, stopped: threading.Event) -> None:
    """Send SIGTERM to this process once its launcher is gone; that of a single process dies of one alone."""
    while not stopped.wait(_POLL_S):
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGTERM)
            return
