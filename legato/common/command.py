"""Error handling of every command: one line on stderr and an exit code.

The first SIGINT or SIGTERM ends the command at a place where nothing is lost, the second at once.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from safetensors import SafetensorError

from legato.common.errors import LegatoError, SaidElsewhereError, UsageError

# Words of torch's allocators and the system for it, in a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


class Interrupts:
    """Context in which a signal raises Interrupted in the main thread. Inside `held_back` it only sets `pending` and is
    raised at the end. A second signal has its default effect: it kills the process."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._held_back = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Protect work that must not be interrupted; it looks at `pending` where it may be."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
        if self.pending is not None:
            raise Interrupted(self.pending)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.pending = signum
        if not self._held_back:
            raise Interrupted(signum)


def run_command(command: Callable[[Interrupts], None], *, debug: bool = False, go_on: str = "") -> int:
    """Run a command and return its exit code: 0, 1 for a failure, 2 for wrong use, 130 or 143 after a signal.

    debug: let errors through with their traceback. go_on: what to do after a failure that was not the command's fault
    (disk, memory, a signal).
    """
    further = f"; {go_on}" if go_on else ""
    try:
        with Interrupts() as interrupts:
            command(interrupts)
        return 0
    except Interrupted as stop:
        return _say(f"interrupted{further}", 128 + stop.signum)  # as a shell says of a command that the signal killed
    except KeyboardInterrupt:
        return _say(f"interrupted{further}", 130)
    except Exception as error:
        said = one_line(error)
        if debug or said is None:
            raise
        kept = "" if isinstance(error, LegatoError) else further
        return _say(said + kept, 2 if isinstance(error, UsageError) else 1)


def one_line(error: Exception) -> str | None:
    """Say in one line what went wrong and what to do; None for an error that can only be a bug of Legato, an empty text
    for one that another process reports."""
    if isinstance(error, SaidElsewhereError):
        return ""
    if isinstance(error, LegatoError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _NO_MEMORY)
    ):
        return f"out of memory ({text[:160] or 'no more to be had'}): lower --d_sae or --batch_rows, or free memory"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        advice = ": make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        return f"{place}{error.strerror or text}{advice}"
    if isinstance(error, SafetensorError) and ("I/O error" in text or "os error" in text.lower()):
        return f"a file cannot be written ({text}): make room on the disk"
    return None


def _say(text: str, code: int) -> int:
    if not text:
        return code
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The first signal. Not an Exception, so that libraries do not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
