"""What a run prints: on rank 0 only, with progress bars on a terminal and plain lines elsewhere."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
_PLAIN_LINE_EVERY_S = 10.0

# A terminal or log that is not UTF-8 shows what it can; a sample of text that it cannot must not end a run.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")
# A log file has no width of its own; tables in it should not be squeezed into 80 columns. What is printed is data:
# the brackets of a glob are no markup, and a text between colons is no emoji.
_console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)


def is_main_process() -> bool:
    """Tell whether this process is the one that prints and writes; the launcher's environment says so."""
    return int(os.environ.get("RANK", "0")) == 0


def is_local_main_process() -> bool:
    """Tell whether this process is the first one on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def say(message: object = "", style: str | None = None) -> None:
    """Print a line or a rich renderable on rank 0."""
    if is_main_process():
        _console.print(message, style=style, soft_wrap=isinstance(message, str))
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print a warning on rank 0: something that is supported but suspicious."""
    say(f"warning: {message}", style="yellow")


def table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    """Print a table on rank 0, the first column left-aligned and the others right-aligned.

    On a terminal too narrow for it, each row becomes a block of lines, `column: cell`.
    """
    if not is_main_process():
        return
    rows = list(rows)
    grid = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    names = min(20, max((len(row[0]) for row in rows), default=0))
    grid.add_column(columns[0], overflow="fold", min_width=names)
    for column in columns[1:]:
        grid.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    say()
    # Not rich's own measure, which takes a cell with spaces for one that may be folded.
    lines = [[line for cell in cells for line in cell.split("\n")] for cells in zip(columns, *rows, strict=True)]
    needed = names + sum(max(map(cell_len, cells)) for cells in lines[1:]) + 3 * len(columns) + 1
    if needed <= _console.width:
        say(grid)
        return
    say(title, style="bold")
    for first, *others in rows:
        say(f"{columns[0]}: {first}")
        for column, cell in zip(columns[1:], others, strict=True):
            say(f"  {column}: {' '.join(cell.split())}")


def new_progress() -> Progress:
    """Return a progress display for a terminal; the caller starts it and adds tasks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_console,
        transient=True,
    )


def shows_bars() -> bool:
    """Tell whether progress is drawn as bars (rank 0 on a terminal) rather than as plain lines."""
    return is_main_process() and _console.is_terminal


def progress(items: Iterable[T], description: str, total: int | None = None, size=lambda item: 1) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done.

    A terminal gets a bar; anything else a plain line every ten seconds, so that logs stay readable. `size` tells
    how much of `total` one item is.
    """
    if not is_main_process():
        yield from items
        return
    if shows_bars():
        with new_progress() as bar:
            task = bar.add_task(description, total=total, note="")
            for item in items:
                yield item
                bar.advance(task, size(item))
        return
    done, last = 0, time.monotonic()
    for item in items:
        yield item
        done += size(item)
        if time.monotonic() - last > _PLAIN_LINE_EVERY_S:
            last = time.monotonic()
            say(f"{description}: {done:,}" + (f" of {total:,}" if total else ""))


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of the run's output; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Trainer's notice, of a class that the kit does not use: the task smooths labels itself, several of a row too.
    warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
