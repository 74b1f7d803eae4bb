import torch

from legato.common import hardware


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
