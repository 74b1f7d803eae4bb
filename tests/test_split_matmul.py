import pytest
import torch

from legato import split_matmul
from legato.split_matmul import can_split


def test_only_weights_that_bfloat16_holds_exactly_are_split(monkeypatch):
    monkeypatch.setattr(split_matmul, "fast_matmul_dtype", lambda: torch.bfloat16)
    exact = torch.randn(20, 8).bfloat16().float()
    assert can_split(exact)
    assert not can_split(exact + 1e-6)
    assert not can_split(exact.bfloat16())
    monkeypatch.setattr(split_matmul, "fast_matmul_dtype", lambda: torch.float32)
    assert not can_split(exact)


@pytest.mark.parametrize("n_tokens", [1, 37])
def test_split_products_have_float32_precision(n_tokens):
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(500, 64, generator=generator).bfloat16().float()
    x_ND = torch.randn(n_tokens, 64, generator=generator)
    exact_NV = x_ND.double() @ weight_VD.double().T
    # every product is off by 2^-17 of itself at most, and float32 rounds the sums
    bound_NV = 2**-16 * (x_ND.abs().double() @ weight_VD.abs().double().T)
    out_NV = torch.empty(n_tokens, 500)
    found_NV = split_matmul.split_matmul(x_ND, weight_VD, out_NV)
    assert found_NV.data_ptr() == out_NV.data_ptr()
    assert bool(((found_NV.double() - exact_NV).abs() <= bound_NV).all())
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
