"""float32 matmuls on a processor that multiplies bfloat16 faster, for weights that bfloat16 holds exactly.

A float32 x is the sum of two bfloat16 numbers up to 2^-17 of its size; each product with a weight that was published in
bfloat16 is exact, and sums are kept in float32. Two such passes take half of the time of one in float32.

Shape legend: N tokens, D width, V outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from legato.hardware import fast_matmul_dtype

_ROWS = 8192


def can_split(weight_VD: Tensor) -> bool:
    """Whether the weights are float32 on a processor fast at bfloat16, and lose nothing in bfloat16."""
    if weight_VD.dtype != torch.float32 or weight_VD.device.type != "cpu" or fast_matmul_dtype() != torch.bfloat16:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return all(torch.equal(part, part.bfloat16().float()) for part in weight_VD.split(_ROWS))


def split_matmul(x_ND: Tensor, weight_VD: Tensor, out: Tensor | None = None) -> Tensor:
    """x_ND @ weight_VD.T in float32 for weights that `can_split`; relative error of every product at most 2^-17."""
    high_ND = x_ND.bfloat16().float()
    with _bfloat16_products():
        logits_NV = torch.mm(high_ND, weight_VD.T, out=out)
        return logits_NV.addmm_(x_ND - high_ND, weight_VD.T)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Within it float32 matmuls round their inputs to bfloat16 and nothing else."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
