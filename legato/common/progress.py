"""Messages of a working command: lines, a progress bar, and the time that its stages take."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
            left = f", about {duration((total - done) * (now - started) / done)} left" if 0 < done < total else ""
            log(f"  {name}: {done}/{total} ({duration(now - started)}{left})")

    yield plain


def duration(seconds: float) -> str:
    """Say a time in the units that a person waits in.

    >>> duration(4.2), duration(75), duration(5400)
    ('4 s', '1:15 min', '1:30 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class Stopwatch:
    """Adds up the seconds of each stage, over the attempts at a run."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a stage's, whether it ends well or not."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
