"""What becomes of an error or a signal at the end of a command: one line and an exit code."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from legato.common.command import Interrupts, run_command
from legato.common.errors import LegatoError, UsageError


def no_room(_):
    raise OSError(errno.ENOSPC, "No space left on device", "run_1/metrics.json")


def too_large(_):
    torch.empty(2**60, dtype=torch.uint8)


def no_folder(_):
    save_file({"w": torch.ones(2)}, "/nowhere/at/all/w.safetensors")


def raising(error):
    def command(_):
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (lambda _: None, 0, ""),
        (raising(LegatoError("no SAE: train one")), 1, "error: no SAE: train one\n"),
        (raising(UsageError("--k 0 is too small")), 2, "error: --k 0 is too small\n"),
        (no_room, 1, "error: run_1/metrics.json: No space left on device: make room on the disk; go on\n"),
        (raising(OSError("Not a parquet file")), 1, "error: Not a parquet file; go on\n"),
        (raising(PermissionError(13, "Permission denied", "a")), 1, "error: a: Permission denied; go on\n"),
        (raising(MemoryError()), 1, "error: out of memory (no more to be had): lower --d_sae or --batch_rows, or"),
        (too_large, 1, "error: out of memory ("),
        (no_folder, 1, "error: a file cannot be written ("),
        (raising(KeyboardInterrupt()), 130, "error: interrupted; go on\n"),
        (lambda _: signal.raise_signal(signal.SIGINT), 130, "error: interrupted; go on\n"),
        (lambda _: signal.raise_signal(signal.SIGTERM), 143, "error: interrupted; go on\n"),
    ],
)
def test_every_end_has_a_line_and_a_code(command, code, said, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(command, go_on="go on") == code
    shown = capsys.readouterr().err
    assert shown.startswith(said)
    assert shown.count("\n") == bool(said)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [LegatoError("x"), OSError(28, "full")])
def test_debug_shows_the_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error), debug=True)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("mean")])
def test_a_fault_of_legato_is_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_held_back_work_ends_before_the_signal_counts():
    done = []

    def command(interrupts: Interrupts) -> None:
        with interrupts.held_back():
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.pending == signal.SIGTERM
            done.append("work")
        done.append("never")

    assert run_command(command) == 143
    assert done == ["work"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(signum):
    script = (
        "import time; from legato.common.command import Interrupts\n"
        "with Interrupts() as interrupts, interrupts.held_back():\n"
        "    print('ready', flush=True)\n"
        "    while interrupts.pending is None: time.sleep(0.001)\n"
        "    print('held back', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signum)
    assert process.stdout.readline() == "held back\n"
    started = time.monotonic()
    os.kill(process.pid, signum)
    assert process.wait(timeout=30) == -signum
    assert time.monotonic() - started < 20
    process.stdout.close()
