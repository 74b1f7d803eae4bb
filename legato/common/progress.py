"""What a command says while it works: lines, and a bar of progress."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from legato.common import distributed

_SECONDS_BETWEEN_LINES = 15.0


def log(text: str) -> None:
    """One line for the person who watches; of several ranks only the writer's is said."""
    if distributed.is_rank0():
        print(text, flush=True)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of units done: a bar on a terminal, a plain line now and then
    otherwise."""
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
