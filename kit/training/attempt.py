"""An attempt at a run: its folder held, and how it ended entered in the manifest."""

from collections.abc import Iterator
from contextlib import contextmanager

from kit.errors import UserError
from kit.training.peers import Ended
from kit.training.preemption import Preempted
from kit.training.run_directory import RunDirectory


@contextmanager
def holding(directory: RunDirectory) -> Iterator[None]:
    """Hold the run directory."""
    directory.lock()
    try:
        yield
    finally:
        directory.unlock()


@contextmanager
def attempt(directory: RunDirectory) -> Iterator[None]:
    """Hold the run directory, and record in its manifest how the attempt ended."""
    with holding(directory):
        outcome = {"status": "failed"}
        try:
            yield
            outcome = {"status": "done"}
        except UserError as error:
            outcome = {"status": "user-error", "message": str(error)}
            raise
        except Preempted:
            outcome = {"status": "preempted"}
            raise
        except KeyboardInterrupt:
            outcome = {"status": "interrupted"}
            raise
        except Ended as end:
            outcome = {"status": end.status, "message": end.message}
            raise
        except Exception as error:
            outcome["message"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            directory.end(**outcome)
