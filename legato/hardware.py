"""What this machine is good at, decided by measuring."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_ROUNDS = 15


_settled: list[torch.dtype] = []


def settle_matmul_dtype(name: str) -> None:
    """Take the answer of `fast_matmul_dtype` from an earlier process whose work goes on here."""
    _settled[:] = [{"bfloat16": torch.bfloat16, "float32": torch.float32}[name]]


def fast_matmul_dtype() -> torch.dtype:
    """bfloat16 where its matmul beats float32's by a third on this machine, else float32 (measured once a process)."""
    return _settled[0] if _settled else _measured_matmul_dtype()


@cache
def _measured_matmul_dtype() -> torch.dtype:
    """As `fast_matmul_dtype`.

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


@contextmanager
def fast_float32() -> Iterator[None]:
    """Within it float32 matmuls run in oneDNN's kernels, where those keep float32's precision.

    torch gives float32 to MKL, which leaves AVX-512 unused on AMD's processors: 160 GFLOP/s where oneDNN reaches 400 (2
    cores, 1024 x 640 x 32768). The switch is the one that lets oneDNN round to bfloat16; only processors with AMX do.
    """
    if not _onednn_keeps_float32():
        yield
        return
    with _onednn_float32():
        yield


@contextmanager
def _onednn_float32() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _onednn_keeps_float32() -> bool:
    """Whether products under the switch are float32's; rounding their inputs to bfloat16 would be off by 1e-3."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision"):
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with _onednn_float32():
        errors = [(left @ right - exact).abs().max(), (left[0] @ right[0] - exact[0]).abs().max()]
    return bool(max(errors) < 1e-4 * exact.std())


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
