"""SIGTERM: end soon, leaving a state from which the same command goes on exactly where this one ended."""

import signal
from collections.abc import Callable
from types import FrameType


class Preempted(BaseException):
    """The run was asked to end; what is on disk is safe to start again from.

    Like KeyboardInterrupt no Exception: it is raised wherever the program stands, and `except Exception` in whatever
    library that is must not swallow it.
    """


class Preemption:
    """Listens for SIGTERM.

    Outside of training (preparation, scorecards) there is nothing to save: the signal raises Preempted where the
    program stands. During training it sets a flag, on which all processes agree at the next step boundary.
    """

    def __init__(self) -> None:
        """Start with no signal received, raising at once when one is."""
        self.requested = False
        self.deferred = False

    def install(self) -> Callable[[], None]:
        """Listen for SIGTERM; return a function that restores what listened before."""
        previous = signal.signal(signal.SIGTERM, self._receive)
        return lambda: signal.signal(signal.SIGTERM, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.deferred:
            raise Preempted
