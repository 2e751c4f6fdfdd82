"""An attempt at a run: its folder held, SIGTERM listened for, and how it ended entered in the manifest."""

from collections.abc import Iterator
from contextlib import contextmanager

from kit.errors import UserError
from kit.files import disk_fault
from kit.recipe.models import Recipe
from kit.training.preemption import Preempted, Preemption
from kit.training.run_directory import RunDirectory


@contextmanager
def holding(directory: RunDirectory) -> Iterator[Preemption]:
    """Hold the run directory and listen for SIGTERM."""
    preemption = Preemption()
    stop_listening = preemption.install()
    directory.lock()
    try:
        yield preemption
    finally:
        stop_listening()
        directory.unlock()


@contextmanager
def attempt(directory: RunDirectory, recipe: Recipe) -> Iterator[Preemption]:
    """Hold the run directory, and record in its manifest how the attempt ended."""
    with holding(directory) as preemption:
        outcome = {"status": "failed"}
        try:
            yield preemption
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
        except Exception as error:
            folders = {"run.output_dir": directory.path, "data.store_dir": recipe.data.store_dir}
            if fault := disk_fault(error, folders):
                outcome = {"status": "user-error", "message": fault}
                raise UserError(fault) from error
            outcome["message"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            directory.end(**outcome)
