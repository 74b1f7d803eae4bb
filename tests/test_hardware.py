import pytest
import torch

from legato.common import hardware
from legato.sae.partition import Partition


def test_fast_float32_keeps_the_precision_of_float32():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 500, generator=generator), torch.randn(500, 700, generator=generator)
    exact = left.double() @ right.double()
    with hardware.fast_float32():
        found = left @ right
        batched = left.view(3, 100, 500) @ right
    for product in (found, batched.view(300, 700)):
        # float32 sums of 500 products of size 1 are off by some 2^-24 * 500 at most, rounding to bfloat16 by 2^-9 * 22
        assert float((product - exact).abs().max()) < 1e-3


def test_fast_float32_leaves_torch_as_it_was():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        with hardware.fast_float32(), hardware.fast_float32():
            raise KeyError
    except KeyError:
        pass
    assert matmul.fp32_precision == before


def test_a_processor_that_rounds_to_bfloat16_is_not_used_for_float32(monkeypatch):
    class Rounding:
        """What oneDNN does with float32 inputs where the processor multiplies bfloat16 tiles."""

        fp32_precision = "none"

    real = torch.Tensor.__matmul__

    def rounded(left, right):
        if Rounding.fp32_precision == "bf16" and left.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return real(left, right)

    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Rounding)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    hardware._onednn_keeps_float32.cache_clear()
    try:
        assert not hardware._onednn_keeps_float32()
        with hardware.fast_float32():
            assert Rounding.fp32_precision == "none"
    finally:
        hardware._onednn_keeps_float32.cache_clear()


def products(left_NK, right_KM, n_threads, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        return hardware.fixed_matmul(left_NK, right_KM, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 10, 60, 128, 300])
def test_a_product_has_the_same_bits_for_any_number_of_threads_and_ranks(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    left_NK, right_KM = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 60), (60, 48)))
    bias_M = torch.randn(48, generator=generator).to(dtype)
    one = products(left_NK, right_KM, 1, bias_M=bias_M)
    exact = (left_NK.double() @ right_KM.double() + bias_M.double()).float()
    torch.testing.assert_close(one.float(), exact, rtol=0.02, atol=1e-4 if dtype == torch.float32 else 0.1)
    for n_threads in (2, 4):
        assert torch.equal(products(left_NK, right_KM, n_threads, bias_M=bias_M), one)
    for n_ranks in (2, 3):
        by_rank = []
        for rank in range(n_ranks):
            part = Partition(rank, n_ranks).tokens(rows)
            block = hardware.rows_a_block(rows)
            by_rank.append(products(left_NK[part], right_KM, 1 + rank, bias_M=bias_M, block=block))
        assert torch.equal(torch.cat(by_rank), one)


def test_gradients_of_a_fixed_product_are_those_of_the_ordinary_one():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((37, 5), (5, 11)))
    slope = torch.randn(37, 11, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(
        (hardware.fixed_product(left.requires_grad_(), right.requires_grad_()) * slope).sum(), [left, right]
    )
    torch.testing.assert_close(found[0], slope @ right.T)
    torch.testing.assert_close(found[1], left.T @ slope)


def test_work_on_each_core_sees_one_thread_and_leaves_the_number_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        hardware.on_each_core(lambda item: seen.append((item, torch.get_num_threads())), range(5))
        with hardware.single_threaded():
            assert torch.get_num_threads() == 1
            assert hardware.cores() == 2
            hardware.on_each_core(lambda item: seen.append((item, torch.get_num_threads())), range(5, 8))
        assert sorted(seen) == [(item, 1) for item in range(8)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_faster_dtype_is_measured_once_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_settled", [])
    measured = []
    monkeypatch.setattr(hardware, "_faster_dtype", lambda: measured.append(1) or torch.bfloat16)
    hardware._measured_matmul_dtype.cache_clear()
    try:
        for _process in range(2):
            assert hardware.fast_matmul_dtype() == torch.bfloat16
            hardware._measured_matmul_dtype.cache_clear()
        assert len(measured) == 1
        (tmp_path / "matmul_dtype.json").write_text("{ cut")
        assert hardware.fast_matmul_dtype() == torch.bfloat16
        assert len(measured) == 2
        hardware.settle_matmul_dtype("float32")  # what --dtype says counts before what was measured
        assert hardware.fast_matmul_dtype() == torch.float32
    finally:
        hardware._measured_matmul_dtype.cache_clear()
