"""Messages of a working command: lines, and a progress bar."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from legato.common import distributed

_SECONDS_BETWEEN_LINES = 15.0


def log(text: str) -> None:
    """Print one line; of several ranks only the writer does."""
    if distributed.is_rank0():
        print(text, flush=True)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of units done: it draws a bar on a terminal, else prints a line now and
    then."""
    console = Console(file=sys.stdout)
    if console.is_terminal and distributed.is_rank0():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    started = last = time.monotonic()

    def plain(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            log(f"  {name}: {done}/{total} ({now - started:.0f} s)")

    yield plain
