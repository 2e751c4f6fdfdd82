"""The one error a user can cause, and the words that help to mend it."""

import difflib
from collections.abc import Iterable

_MOST_LISTED = 20


_OUT_OF_MEMORY_SAID = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


class UserError(Exception):
    """A mistake in a recipe, a file or a command, as opposed to a fault of the kit.

    The command line prints the message without a traceback and exits with code 2. A message names where the mistake
    is (file, line, key), what was found, what is expected and, where one exists, the nearest valid name.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether what was raised means that memory ran out, in whichever library."""
    # By name: torch is not imported here.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(said in str(error) for said in _OUT_OF_MEMORY_SAID)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the member of `valid` that `name` most probably stands for, or None."""
    matches = difflib.get_close_matches(name.lower(), {v.lower(): v for v in valid}, n=1, cutoff=0.6)
    return next((v for v in valid if v.lower() == matches[0]), None) if matches else None


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean `x`?"``, or nothing where nothing is near."""
    best = nearest(name, list(valid))
    return f"; did you mean `{best}`?" if best else ""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean `x`?"``; where nothing is near, the valid names if they are few, else nothing."""
    names = sorted(valid)
    listed = f"; valid: {', '.join(names)}" if 0 < len(names) <= _MOST_LISTED else ""
    return suggest(name, names) or listed
