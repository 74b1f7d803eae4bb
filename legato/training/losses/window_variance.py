"""Variance inside sliding windows.

Shape legend: B rows, L positions, F latents, Q active pairs sorted by latent, U windows, W window.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import NOTHING, Array, SparseLoss, leading_codes


@dataclass(frozen=True)
class WindowVariance(SparseLoss):
    """Variance inside sliding windows relative to power: 1 - sum_w sum_i (mean_w f_i)^2 / sum_w sum_i mean_w f_i^2.

    Equals sum over windows (length `window`, stride 1) and latents of Var_window(f_i), divided by the same sum of
    E_window(f_i^2); 0 for codes constant inside every window, (W-1)/W for isolated firings. Scale-free. Windows lie
    wholly inside valid tokens of one document; without any window or any power the value is 0. The project's founding
    idea.
    """

    window: int
    coefficient: float
    slow_fraction: float = 1.0
    name: str = "window_variance"

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        codes_BLF = leading_codes(codes_BLF, mask_BL, self.slow_fraction)
        W = self.window
        if codes_BLF.shape[1] < W:
            return codes_BLF.sum() * 0
        doc_BUW = doc_BL.unfold(1, W, 1)
        whole_BU = mask_BL.unfold(1, W, 1).all(-1) & (doc_BUW == doc_BUW[..., :1]).all(-1)
        mean_BUF = codes_BLF.unfold(1, W, 1).mean(-1)
        power_BUF = codes_BLF.square().unfold(1, W, 1).mean(-1)
        numerator = (mean_BUF.square().sum(-1) * whole_BU).sum()
        denominator = (power_BUF.sum(-1) * whole_BU).sum()
        if denominator == 0:
            return codes_BLF.sum() * 0
        return 1 - numerator / denominator

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        shared_Q, covers_Q = _window_overlaps(slow, layout.start_N, layout.end_N, self.window)
        f_Q = slow.value_Q.astype(np.float64)
        covered_Q = f_Q * covers_Q
        # Not by `@`: its sums depend on the number of threads, and those of BLAS fight with numba's.
        numerator = float((f_Q * shared_Q).sum()) / self.window**2
        denominator = float((f_Q * covered_Q).sum()) / self.window
        if denominator == 0:
            return NOTHING
        covered_Q *= 2 * numerator / (denominator**2 * self.window)
        shared_Q *= 2 / (self.window**2 * denominator)
        return 1 - numerator / denominator, covered_Q - shared_Q


@njit(parallel=True, cache=True)
def _window_overlaps(slow, start_N, end_N, window):
    """covers_Q: windows that contain the pair's token; shared_Q: sum over the latent's codes s of f_s times the
    number of windows that contain both tokens. Two running sums with two pointers: O(Q), whatever the window.

    In a run [a, b) the windows that contain s <= t start at u in [max(a, t-W+1), min(s, b-W)].
    """
    ptr_F, token_Q, value_Q, _ = slow
    shared_Q, covers_Q = np.empty(len(token_Q)), np.empty(len(token_Q))
    for f in prange(ptr_F.shape[0] - 1):
        lo, hi = ptr_F[f], ptr_F[f + 1]
        tail = lo
        plain = 0.0
        weighted = 0.0
        run = -1
        for q in range(lo, hi):  # s <= t
            t = token_Q[q]
            a = start_N[t]
            last = end_N[t] - window
            if a != run:
                run, tail, plain, weighted = a, q, 0.0, 0.0
            if last < a:
                shared_Q[q] = 0.0
                covers_Q[q] = 0.0
                continue
            first = max(a, t - window + 1)
            while token_Q[tail] < first:
                s = token_Q[tail]
                plain -= value_Q[tail]
                weighted -= value_Q[tail] * (min(s, last) - a)
                tail += 1
            plain += value_Q[q]
            weighted += value_Q[q] * (min(t, last) - a)
            shared_Q[q] = weighted - (first - a - 1) * plain
            covers_Q[q] = min(t, last) - first + 1
        run = -1
        for q in range(hi - 1, lo - 1, -1):  # s > t
            t = token_Q[q]
            a = start_N[t]
            last = end_N[t] - window
            if a != run:
                run, tail, plain, weighted = a, q, 0.0, 0.0
            if last < a:
                continue
            newest = min(t, last)
            while token_Q[tail] - window + 1 > newest:
                s = token_Q[tail]
                plain -= value_Q[tail]
                weighted -= value_Q[tail] * (max(a, s - window + 1) - a)
                tail -= 1
            shared_Q[q] += (newest - a + 1) * plain - weighted
            plain += value_Q[q]
            weighted += value_Q[q] * (max(a, t - window + 1) - a)
    return shared_Q, covers_Q
