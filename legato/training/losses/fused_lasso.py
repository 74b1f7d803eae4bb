"""Fused lasso: the total variation of a latent's codes along the sequence."""

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import NOTHING, Array, SparseLoss, leading_codes


@dataclass(frozen=True)
class FusedLasso(SparseLoss):
    """Sum of |f_{t+1} - f_t| over adjacent tokens of a run and latents, divided by the sum of f over valid tokens and
    latents (Tibshirani et al. 2005, made scale-free). 2 for isolated firings inside a run, 0 for codes constant
    inside every run and where nothing fires."""

    coefficient: float
    slow_fraction: float = 1.0
    name: str = "fused_lasso"

    @property
    def window(self) -> int:
        return 2

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        codes_BLF = leading_codes(codes_BLF, mask_BL, self.slow_fraction)
        total = codes_BLF.sum()
        if total == 0:
            return total
        pair_BL = mask_BL[:, 1:] & mask_BL[:, :-1] & (doc_BL[:, 1:] == doc_BL[:, :-1])
        return ((codes_BLF[:, 1:] - codes_BLF[:, :-1]).abs() * pair_BL.unsqueeze(-1)).sum() / total

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        total = float(slow.value_Q.sum(dtype=np.float64))
        if total == 0:
            return NOTHING
        variation_F, slope_Q = _total_variation(slow, layout.start_N, layout.end_N)
        value = float(variation_F.sum()) / total
        return value, (slope_Q - value) / total


@njit(parallel=True, cache=True)
def _total_variation(slow, start_N, end_N):
    """variation_F: sum of |f_{t+1} - f_t| over a latent's adjacent tokens; slope_Q: its derivative by the codes."""
    ptr_F, token_Q, value_Q, _ = slow
    variation_F, slope_Q = np.empty(len(ptr_F) - 1), np.empty(len(token_Q))
    for f in prange(ptr_F.shape[0] - 1):
        lo, hi = ptr_F[f], ptr_F[f + 1]
        variation = 0.0
        for q in range(lo, hi):
            t = token_Q[q]
            v = np.float64(value_Q[q])
            slope = 0.0
            if t > start_N[t]:
                before = np.float64(value_Q[q - 1]) if q > lo and token_Q[q - 1] == t - 1 else 0.0
                variation += abs(v - before)
                slope += np.sign(v - before)
            if t + 1 < end_N[t]:
                fires = q + 1 < hi and token_Q[q + 1] == t + 1
                after = np.float64(value_Q[q + 1]) if fires else 0.0
                if not fires:  # a firing neighbour counts the difference itself
                    variation += v
                slope += np.sign(v - after)
            slope_Q[q] = slope
        variation_F[f] = variation
    return variation_F, slope_Q
