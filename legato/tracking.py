"""What a person and a tracker see of a running stage. Nothing here changes training."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


def say(text: str) -> None:
    """One line for the person who watches."""
    print(text, flush=True)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the number of units done: a bar on a terminal, a plain line now and then
    otherwise."""
    console = Console(file=sys.stdout)
    if console.is_terminal:
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
            say(f"  {name}: {done}/{total} ({now - started:.0f} s)")

    yield plain


class RunLog:
    """Appends one record per logged step to log.jsonl and, where TensorBoard is installed, to its event files."""

    def __init__(self, log: Path, tensorboard: Path) -> None:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(log.open("a", buffering=1))
        self._writers: dict[str, Any] = {}
        self._tensorboard = tensorboard if find_spec("tensorboard") else None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()
        self._stack.close()

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            writer = self._writer(record["arm"])
            for name, value in record.items():
                if name == "loss_terms":
                    for term, share in value.items():
                        writer.add_scalar(f"loss/{term}", share, record["step"])
                elif isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, record["step"])

    def _writer(self, arm: str) -> Any:
        if arm not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[arm] = SummaryWriter(str(self._tensorboard / arm))  # type: ignore[operator]
        return self._writers[arm]
