"""The term against codes that depend on the position in the row.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, T parts of the
latents.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import NOTHING, VARIES, Array, SparseLoss, leading_codes

_PARTS = 64  # of the latents, for threads to share; the result does not depend on it


@dataclass(frozen=True)
class PositionPenalty(SparseLoss):
    """Mean over latents of the share of a latent's variance in the batch that its position in the row explains.

    Epsilon squared (Kelley 1935), as the metric `eta2` has it: (SSB - (G - 1) MSW) / SST for G positions, so 0 on
    average where position does not matter, whatever the batch size. Scale-free. Latents that do not vary in the batch
    are left out of the mean; where none varies, or no position has two valid tokens, the value is 0. The founding
    plan's penalty.
    """

    coefficient: float
    slow_fraction: float = 1.0
    name: str = "position_penalty"

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        codes_BLF = leading_codes(codes_BLF, mask_BL, self.slow_fraction)
        count_L = mask_BL.sum(0)
        n, groups = int(count_L.sum()), int((count_L > 0).sum())
        if n <= groups:
            return codes_BLF.sum() * 0
        mean_F = codes_BLF.sum((0, 1)) / n
        total_F = ((codes_BLF - mean_F) * mask_BL.unsqueeze(-1)).square().sum((0, 1))
        mean_LF = codes_BLF.sum(0) / count_L.clamp_min(1).unsqueeze(-1)
        between_F = ((mean_LF - mean_F).square() * count_L.unsqueeze(-1)).sum(0)
        varies_F = total_F > VARIES * codes_BLF.square().sum((0, 1))
        if not varies_F.any():
            return codes_BLF.sum() * 0
        return _corrected((between_F[varies_F] / total_F[varies_F]).mean(), n, groups)

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        count_L = layout.valid_N.reshape(-1, layout.length).sum(0)
        n, groups = int(count_L.sum()), int((count_L > 0).sum())
        if n <= groups:
            return NOTHING
        share_F, slope_Q = _between_positions(slow, count_L, n, _PARTS)
        varies_F = share_F >= 0
        if not varies_F.any():
            return NOTHING
        slope_Q *= (n - 1) / (n - groups) / varies_F.sum()
        return _corrected(float(share_F[varies_F].mean()), n, groups), slope_Q


def _corrected(eta2, n: int, groups: int):
    """Epsilon squared from eta squared = SSB / SST."""
    return 1 - (1 - eta2) * ((n - 1) / (n - groups))


@njit(parallel=True, cache=True)
def _between_positions(slow, count_L, n, n_parts):
    """share_F: SSB / SST of a latent, -1 where it does not vary; slope_Q: its derivative by the codes."""
    ptr_F, token_Q, value_Q, _ = slow
    share_F, slope_Q = np.empty(len(ptr_F) - 1), np.empty(len(token_Q))
    F = ptr_F.shape[0] - 1
    L = count_L.shape[0]
    for part in prange(n_parts):
        sum_L = np.zeros(L)
        for f in range(F * part // n_parts, F * (part + 1) // n_parts):
            lo, hi = ptr_F[f], ptr_F[f + 1]
            total = 0.0
            square = 0.0
            for q in range(lo, hi):
                v = np.float64(value_Q[q])
                sum_L[token_Q[q] % L] += v
                total += v
                square += v * v
            mean = total / n
            sst = square - total * mean
            varies = sst > VARIES * square
            ssb = -total * mean
            for q in range(lo, hi):
                at = token_Q[q] % L
                slope_Q[q] = sum_L[at] / count_L[at]
                ssb += value_Q[q] * slope_Q[q]
            share = max(0.0, ssb / sst) if varies else -1.0
            share_F[f] = share
            for q in range(lo, hi):
                sum_L[token_Q[q] % L] = 0.0
                slope_Q[q] = 2 * (slope_Q[q] - mean - share * (value_Q[q] - mean)) / sst if varies else 0.0
    return share_F, slope_Q
