"""Functions and experiments run by several processes, as torchrun would start them, forked from a server that has
imported everything."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from killing import PRELOADED

PATIENCE_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[BaseProcess]:
    """`function(*arguments)` in each of n_ranks processes; what they print goes to <folder>/rank_<r>.txt."""
    port = free_port()
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "legato.common.distributed"])
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(n_ranks):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n_ranks),
            "LOCAL_WORLD_SIZE": str(n_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "LEGATO_PATIENCE_SECONDS": os.environ.get("LEGATO_PATIENCE_SECONDS", "90"),
        }
        output = folder / f"rank_{rank}.txt"
        process = context.Process(target=_rank, args=(variables, str(output), function, arguments))
        process.start()
        processes.append(process)
    return processes


def _rank(variables: dict[str, str], output: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.exit(function(*arguments))


def ends(processes: list[BaseProcess], patience: float = PATIENCE_SECONDS) -> list[int | None]:
    """Exit codes; those that do not end in time are killed and have None."""
    deadline = time.monotonic() + patience
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run_ranks(n_ranks: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> None:
    """As start_ranks, to their end, which must be a good one."""
    codes = ends(start_ranks(n_ranks, function, *arguments, folder=folder))
    assert codes == [0] * n_ranks, "\n".join(path.read_text() for path in sorted(folder.glob("rank_*.txt")))
