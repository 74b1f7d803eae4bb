"""SIGINT and SIGTERM: the first ends the command where nothing is lost, the second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The first signal. Not an Exception: what libraries catch must not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As a shell reports a command that the signal killed: 130 or 143."""
        return 128 + self.signum


class Interrupts:
    """While it is entered, a signal raises Interrupted in the main thread; inside `held_back` it only shows in
    `pending` and is raised at its end. A second signal has its default effect: the process dies of it."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._held_back = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """For work that must not be cut in the middle; it asks `raise_pending` where it may be."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
        self.raise_pending()

    def raise_pending(self) -> None:
        if self.pending is not None:
            raise Interrupted(self.pending)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.pending = signum
        if not self._held_back:
            raise Interrupted(signum)
