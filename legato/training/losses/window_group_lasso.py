"""Group lasso over windows: a latent's whole window is on or off."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import Array, SparseLoss, leading_codes


@dataclass(frozen=True)
class WindowGroupLasso(SparseLoss):
    """A sparsity penalty that pays per (latent, window) instead of per (latent, token); it stands in place of L1:
    1/W * mean over valid tokens of the sum over windows and latents of sqrt(sum_{t in window} f_{t,i}^2).

    Yuan & Lin 2006, groups = windows of stride 1. An isolated firing costs its L1 norm; a code held for long costs
    1/sqrt(W) of it. Windows are cut off at the ends of a run, so that every token lies in exactly W of them: with
    whole windows only, short documents and the ends of long ones would be free. `window` 1 is the L1 penalty. Not
    scale-free, as L1 is not: the value grows in proportion to the codes. `coefficient` = l1 / D matches `ReLU(l1)`.
    """

    window: int
    coefficient: float
    slow_fraction: float = 1.0
    name: str = "window_group_lasso"
    least_window: ClassVar[int] = 1

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        codes_BLF = leading_codes(codes_BLF, mask_BL, self.slow_fraction)
        codes_NF = codes_BLF.flatten(0, 1)
        layout = Segments.of(mask_BL, doc_BL)
        starts = np.unique(layout.start_N[layout.valid_N])
        total = codes_BLF.sum() * 0
        for start in starts.tolist():
            run_TF = codes_NF[start : layout.end_N[start]]
            padded_TF = torch.nn.functional.pad(run_TF, (0, 0, self.window - 1, self.window - 1))
            square_UF = padded_TF.square().unfold(0, self.window, 1).sum(-1)
            total = total + square_UF[square_UF > 0].sqrt().sum()
        return total / (self.window * max(1, int(mask_BL.sum())))

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        norms_F, slope_Q = _window_norms(slow, layout.start_N, self.window)
        share = 1 / (self.window * max(1, int(layout.valid_N.sum())))
        return share * float(norms_F.sum()), share * slope_Q


@njit(parallel=True, cache=True)
def _window_norms(slow, start_N, window):
    """norms_F: sum over windows u of sqrt(S_u), S_u = sum of f_t^2 over the run's tokens t in [u, u + W);
    slope_Q: its derivative f_t * sum_{u: t in window} 1 / sqrt(S_u). O(Q), whatever the window.

    As u slides, S_u changes only where a token enters (u = t - W + 1) or leaves (u = t + 1). `inverse` sums 1 /
    sqrt(S_u) so far; a token's share is what it grew by between the token's entering and leaving.
    """
    ptr_F, token_Q, value_Q, _ = slow
    norms_F, slope_Q = np.empty(len(ptr_F) - 1), np.empty(len(token_Q))
    for f in prange(ptr_F.shape[0] - 1):
        norms = 0.0
        first = ptr_F[f]
        while first < ptr_F[f + 1]:  # one run of tokens after the other
            run = start_N[token_Q[first]]
            end = first
            while end < ptr_F[f + 1] and start_N[token_Q[end]] == run:
                end += 1
            enters = first
            leaves = first
            u = 0
            square = 0.0
            inverse = 0.0
            while leaves < end:
                entering = enters < end and token_Q[enters] - window <= token_Q[leaves]
                at = token_Q[enters] - window + 1 if entering else token_Q[leaves] + 1
                if enters > leaves:
                    root = np.sqrt(square)
                    norms += (at - u) * root
                    inverse += (at - u) / root
                u = at
                if entering:
                    v = np.float64(value_Q[enters])
                    square += v * v
                    slope_Q[enters] = inverse
                    enters += 1
                else:
                    v = np.float64(value_Q[leaves])
                    slope_Q[leaves] = v * (inverse - slope_Q[leaves])
                    leaves += 1
                    if enters > leaves:  # rounding may not take the sum below what surely remains
                        newest = np.float64(value_Q[enters - 1])
                        square = max(square - v * v, newest * newest)
                    else:
                        square = 0.0
            first = end
        norms_F[f] = norms
    return norms_F, slope_Q
