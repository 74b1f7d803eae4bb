"""What every command of Legato does with an error: one line on stderr and an exit code."""

import errno
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from legato.distributed import SaidElsewhereError
from legato.errors import LegatoError, UsageError
from legato.interrupts import Interrupted, Interrupts

# How torch's allocators and the system word it, in a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


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
        return _say(f"interrupted{further}", stop.exit_code)
    except KeyboardInterrupt:
        return _say(f"interrupted{further}", 130)
    except Exception as error:
        said = one_line(error)
        if debug or said is None:
            raise
        kept = "" if isinstance(error, LegatoError) else further
        return _say(said + kept, 2 if isinstance(error, UsageError) else 1)


def one_line(error: Exception) -> str | None:
    """What went wrong and what to do, in one line; None for an error that can only be a fault of Legato's, nothing for
    one that another process tells of."""
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
