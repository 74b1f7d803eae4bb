"""The faster matmul dtype of this machine, by measurement, and products whose bits do not depend on the cores.

Shape legend: N rows of a product, K what is summed over, M columns.
"""

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.files import cache_dir, write_atomically

T = TypeVar("T")

_REMEMBERED = "matmul_dtype.json"
_ROUNDS = 15
_CLEAR = 3.0  # ratio of the best times that ends the measurement: noise does not reach it
_WORTH = 1.33  # least gain, since bfloat16 costs precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_settled: list[torch.dtype] = []
_cores_outside: list[int] = []


def settle_matmul_dtype(name: str) -> None:
    """Fix the answer of `fast_matmul_dtype`: bfloat16 or float32, as the user or an earlier process of this run chose;
    auto: measured."""
    _settled[:] = [] if name == "auto" else [_DTYPES[name]]


def fast_matmul_dtype() -> torch.dtype:
    """Return bfloat16 where its matmul beats float32's by a third on this machine, else float32.

    Measured once per machine: the answer is kept in Legato's cache under the processor and the version of torch.
    """
    return _settled[0] if _settled else _measured_matmul_dtype()


@cache
def _measured_matmul_dtype() -> torch.dtype:
    key = f"{platform.machine()} {processor_name()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"
    try:
        known = json.loads((cache_dir() / _REMEMBERED).read_text())
    except (OSError, ValueError, LegatoError):  # missing or damaged: it can be measured again
        known = {}
    if not isinstance(known, dict) or known.get(key) not in [*_DTYPES]:
        others = known if isinstance(known, dict) else {}
        known = {**others, key: str(_faster_dtype()).removeprefix("torch.")}
        with suppress(OSError, LegatoError):  # without a cache it is only measured again
            write_atomically(cache_dir() / _REMEMBERED, json.dumps(known, indent=1).encode())
    return _DTYPES[known[key]]


def processor_name() -> str:
    """Return the processor's name, or the platform's name for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _faster_dtype() -> torch.dtype:
    """Time both dtypes' products by turns, so that other work on the machine slows both, until one is clearly faster
    (soon where bfloat16 is emulated: there a product takes 100 times as long)."""
    for size in (64, 512):  # a small product is enough to find an emulation
        matrices = {
            dtype: (torch.ones(size, size, dtype=dtype), torch.ones(size, 4 * size, dtype=dtype))
            for dtype in _DTYPES.values()
        }
        for left, right in matrices.values():
            left @ right  # warm up
        best = dict.fromkeys(matrices, float("inf"))
        for turn in range(_ROUNDS):
            for dtype, (left, right) in matrices.items():
                start = time.perf_counter()
                left @ right
                best[dtype] = min(best[dtype], time.perf_counter() - start)
            if turn >= 2 and best[torch.bfloat16] > _CLEAR * best[torch.float32]:
                return torch.float32
    return torch.bfloat16 if _WORTH * best[torch.bfloat16] < best[torch.float32] else torch.float32


@cache
def _workers(n_threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch and OpenMP use one core each."""
    pool = ThreadPoolExecutor(n_threads, "one-core")
    all_started = Barrier(n_threads)

    def settle() -> None:
        torch.get_num_threads()  # a thread's first call sets its number to the process's
        torch.set_num_threads(1)
        all_started.wait()

    for settled in [pool.submit(settle) for _ in range(n_threads)]:
        settled.result()
    return pool


def on_each_core(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `function` for every item, several at a time, each on one core: the bits are those of one thread.

    MKL has one number of threads for the process, OpenMP one for each thread: both must be 1 while the workers work.
    """
    n_threads = cores()
    with single_threaded():
        if n_threads == 1:
            for item in items:
                function(item)
        else:
            list(_workers(n_threads).map(function, items))


def cores() -> int:
    """Return the number of threads this process may use, also within `single_threaded`."""
    return _cores_outside[-1] if _cores_outside else torch.get_num_threads()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Make torch sum in the order of one thread, for any number of cores.

    Reductions over many numbers and products with few rows are divided among threads, and their last bits depend on
    where they are cut. `fixed_matmul` still uses all cores.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    _cores_outside.append(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _cores_outside.pop()
        torch.set_num_threads(before)


def rows_a_block(n_rows: int) -> int:
    """Return the rows that `fixed_matmul` multiplies at a time, which depend on their number alone."""
    return min(256, max(16, n_rows // 8))


def fixed_matmul(
    left_NK: Tensor, right_KM: Tensor, bias_M: Tensor | None = None, *, block: int = 0, out_NM: Tensor | None = None
) -> Tensor:
    """Compute left_NK @ right_KM (+ bias_M), with the same bits for any number of threads or ranks that divide it.

    A library's product of few rows differs in the last bits from the same rows in a larger one (MKL on AVX2: below 4
    rows a thread), so rows are multiplied in blocks of a fixed size, each by one core. Ranks that divide the rows must
    cut them between blocks and name the `block` of the whole: rows_a_block(N). No slower than the library's own
    division of the work (4096 x 640 x 4096 by 2 cores: .186 s in blocks, .205 s at once). out_NM: written to.
    """
    out = left_NK.new_empty(len(left_NK), right_KM.shape[1]) if out_NM is None else out_NM
    block = block or rows_a_block(len(left_NK))

    def multiply(first: int) -> None:
        rows = slice(first, first + block)
        with torch.no_grad():  # a setting of each thread
            if bias_M is None:
                torch.mm(left_NK[rows], right_KM, out=out[rows])
            else:
                torch.addmm(bias_M, left_NK[rows], right_KM, out=out[rows])

    on_each_core(multiply, range(0, len(left_NK), block))
    return out


class _FixedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left_NK: Tensor, right_KM: Tensor) -> Tensor:
        ctx.save_for_backward(left_NK, right_KM)
        return fixed_matmul(left_NK, right_KM)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (slope_NM,), (left_NK, right_KM) = slopes, ctx.saved_tensors
        left = fixed_matmul(slope_NM, right_KM.T) if ctx.needs_input_grad[0] else None
        right = fixed_matmul(left_NK.T, slope_NM) if ctx.needs_input_grad[1] else None
        return left, right


def fixed_product(left_NK: Tensor, right_KM: Tensor) -> Tensor:
    """Do `fixed_matmul` with autograd; its gradients are fixed likewise."""
    return _FixedProduct.apply(left_NK, right_KM)


@contextmanager
def fast_float32() -> Iterator[None]:
    """Run float32 matmuls in oneDNN's kernels, where those keep float32's precision.

    torch gives float32 to MKL, which leaves AVX-512 unused on AMD's processors: 160 GFLOP/s where oneDNN reaches 400 (2
    cores, 1024 x 640 x 32768). The switch is the one that lets oneDNN round to bfloat16; only processors with AMX do.
    """
    with _onednn_float32() if _onednn_keeps_float32() else nullcontext():
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
    """Test that products under the switch are float32's; inputs rounded to bfloat16 give an error of 1e-3."""
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

    Training and evaluation allocate the same large buffers again and again; on a 15-minute run this caused 28 million
    page faults, a minute of system time. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**30)
