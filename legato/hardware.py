"""What this machine is good at, decided by measuring."""

import ctypes
import sys
import time
from functools import cache

import torch

_ROUNDS = 15


@cache
def fast_matmul_dtype() -> torch.dtype:
    """bfloat16 where its matmul beats float32's by a third on this machine, else float32 (measured once a process).

    The best of several turns, taken in alternation: results depend on the answer, which other work on the machine must
    not change.
    """
    matrices = {
        dtype: (torch.ones(512, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    best = dict.fromkeys(matrices, float("inf"))
    for _ in range(_ROUNDS):
        for dtype, (left, right) in matrices.items():
            start = time.perf_counter()
            left @ right
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return torch.bfloat16 if 1.33 * best[torch.bfloat16] < best[torch.float32] else torch.float32


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next request instead of returning them to the system.

    Training and evaluation allocate the same large buffers over and over; on a 15-minute run the page faults of giving
    them back and fetching them again were 28 million, a minute of system time. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**30)
