"""Which latents of a token may be active: BatchTopK, TopK, ReLU with an L1 penalty.

A sparsity turns pre-activations into active pairs. The dense matmul's output (possibly bfloat16) only nominates
candidates; their values are recomputed in the weights' own precision, and the choice is made on those.

Shape legend: N flat tokens, D width, F latents, P active pairs in token order.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato import kernels
from legato.kernels import Pairs

Array = NDArray[Any]

# Candidates are taken above this share of the last batch's threshold: wide enough that neither its drift between two
# batches nor bfloat16's rounding (0.4 %) can hide a pair, narrow enough to leave only some 15 % surplus to recompute.
_FLOOR_SHARE = 0.95


class Preactivations(NamedTuple):
    """pre_NF: the encoder's dense output, the inputs beside it for exact values; valid_N: tokens that take part."""

    pre_NF: Tensor
    x_ND: Array
    W_enc_FD: Array
    b_enc_F: Array
    valid_N: Array

    def scan(self, floor_N: Array, expected: int) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the pairs whose pre_NF lies above the floor (in `ordered` units)."""
        token_P, latent_P = kernels.scan(self.ordered, self.valid_N, floor_N, expected)
        return token_P, latent_P, kernels.exact_values(self.x_ND, self.W_enc_FD, self.b_enc_F, token_P, latent_P)

    @property
    def ordered(self) -> Array:
        """pre_NF as an array numpy can compare: bfloat16 as its bits, whose order is that of positive numbers."""
        bits = self.pre_NF.view(torch.int16) if self.pre_NF.dtype == torch.bfloat16 else self.pre_NF
        return bits.numpy()

    def constant_floor(self, floor: float) -> Array:
        value = torch.full((self.pre_NF.shape[0],), floor, dtype=self.pre_NF.dtype)
        return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


class Sparsity(Protocol):
    """`floor` is the selection's memory from batch to batch (a speed hint, never a result); 0 at the start."""

    architecture: ClassVar[str]

    def select(self, pre: Preactivations, floor: float) -> tuple[Pairs, float]: ...
    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        """A sparsity loss and its (constant) derivative by every active code."""
        ...


@dataclass(frozen=True)
class BatchTopK:
    """The k * (valid tokens) largest positive pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    k: int
    architecture: ClassVar[str] = "batchtopk"

    def select(self, pre: Preactivations, floor: float) -> tuple[Pairs, float]:
        N, F = pre.pre_NF.shape
        count = self.k * int(pre.valid_N.sum())
        if floor <= 0:
            floor = _quantile_floor(pre, self.k)
        while True:
            token_P, latent_P, value_P = pre.scan(pre.constant_floor(floor), count + count // 2)
            if len(token_P) >= count or floor <= 0:
                break
            floor = 0.7 * floor if floor > 1e-6 else 0.0
        keep_P = kernels.keep_batch_top(value_P, count)
        pairs = kernels.keep(N, token_P, latent_P, value_P, keep_P)
        cut = float(pairs.value_P.min()) if len(pairs.value_P) else 0.0
        return pairs, _FLOOR_SHARE * cut

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class TopK:
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    architecture: ClassVar[str] = "topk"

    def select(self, pre: Preactivations, floor: float) -> tuple[Pairs, float]:
        N = pre.pre_NF.shape[0]
        floor_N = kernels.row_floors(pre.ordered, pre.valid_N, self.k)
        token_P, latent_P, value_P = pre.scan(floor_N, 3 * self.k * N)
        keep_P = kernels.keep_row_top(N, token_P, value_P, self.k)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), 0.0

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation, with an L1 penalty: l1 / D * mean over tokens of sum_i f_i (codes with unit decoder
    rows). Dividing by D puts l1 on the scale of a loss ||x - xhat||^2 summed over D, as SAELens has it."""

    l1: float
    architecture: ClassVar[str] = "standard"

    def select(self, pre: Preactivations, floor: float) -> tuple[Pairs, float]:
        N, F = pre.pre_NF.shape
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(0.0), N * F // 8)
        return kernels.keep(N, token_P, latent_P, value_P, value_P > 0), 0.0

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        slope = self.l1 / (d_in * n_valid)
        return slope * float(pairs.value_P.sum(dtype=np.float64)), slope


def _quantile_floor(pre: Preactivations, k: int) -> float:
    """A first guess: the value that 1.2 k latents of a token exceed on average, from a sample of tokens."""
    rows = np.flatnonzero(pre.valid_N)
    sample_SF = pre.pre_NF[torch.from_numpy(rows[:: max(1, len(rows) // 64)])].float().flatten()
    rank = max(1, round(sample_SF.numel() * (1 - 1.2 * k / pre.pre_NF.shape[1])))
    return max(0.0, float(sample_SF.kthvalue(min(rank, sample_SF.numel())).values))
