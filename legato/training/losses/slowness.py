"""Slowness: differences between tokens of one run.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, W window.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import NOTHING, VARIES, Array, SparseLoss, leading_codes


@dataclass(frozen=True)
class Slowness(SparseLoss):
    """Mean over latents of E(f_{t+lag} - f_t)^2 / (2 Var f), lags 1 .. window - 1: slow feature analysis (Wiskott &
    Sejnowski 2002). About 1 for codes without order, 0 for codes constant inside every run. Scale-free.

    E weighs every pair (t, t + lag) of the batch alike, both ends in one run. Var is over the batch's valid tokens
    and takes part in the gradient: slow feature analysis keeps it at 1, and held constant it would let the optimiser
    lower the value by shrinking the codes without end, since the next batch's Var shrinks with them. Latents that do
    not vary in the batch are left out of the mean; where none varies, or no pair exists, the value is 0.
    """

    window: int
    coefficient: float
    slow_fraction: float = 1.0
    name: str = "slowness"

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        codes_BLF = leading_codes(codes_BLF, mask_BL, self.slow_fraction)
        run_BL = torch.from_numpy(Segments.of(mask_BL, doc_BL).start_N).view(mask_BL.shape)
        n_valid = max(1, int(mask_BL.sum()))
        centred_BLF = (codes_BLF - codes_BLF.sum((0, 1)) / n_valid) * mask_BL.unsqueeze(-1)
        variance_F = centred_BLF.square().sum((0, 1)) / n_valid
        varies_F = variance_F > VARIES * codes_BLF.square().sum((0, 1)) / n_valid
        squared_F = torch.zeros_like(variance_F)
        n_pairs = 0
        for lag in range(1, min(self.window, mask_BL.shape[1])):
            pair_BL = (run_BL[:, lag:] == run_BL[:, :-lag]) & mask_BL[:, lag:]
            difference_BLF = (codes_BLF[:, lag:] - codes_BLF[:, :-lag]) * pair_BL.unsqueeze(-1)
            squared_F = squared_F + difference_BLF.square().sum((0, 1))
            n_pairs += int(pair_BL.sum())
        if n_pairs == 0 or not varies_F.any():
            return codes_BLF.sum() * 0
        return (squared_F[varies_F] / (2 * n_pairs * variance_F[varies_F])).mean()

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        before_N = (np.arange(len(layout.start_N)) - layout.start_N)[layout.valid_N]
        n_pairs = int(np.minimum(before_N, self.window - 1).sum())
        if n_pairs == 0:
            return NOTHING
        ratio_F, slope_Q = _slowness(slow, layout.start_N, layout.end_N, self.window, len(before_N), n_pairs)
        varies_F = ratio_F >= 0
        if not varies_F.any():
            return NOTHING
        slope_Q /= varies_F.sum()
        return float(ratio_F[varies_F].mean()), slope_Q


@njit(parallel=True, cache=True)
def _slowness(slow, start_N, end_N, window, n_valid, n_pairs):
    """ratio_F: a latent's E(difference^2) / (2 Var), -1 where it does not vary; slope_Q: its derivative by the codes.

    Sum over pairs of (f_t - f_s)^2 = sum_t f_t (degree_t f_t - near_t): degree_t = partners of t, whether they fire
    or not, near_t = the sum of their codes, a running sum with two pointers from either side.
    """
    ptr_F, token_Q, value_Q, _ = slow
    ratio_F, slope_Q = np.empty(len(ptr_F) - 1), np.empty(len(token_Q))
    for f in prange(ptr_F.shape[0] - 1):
        lo, hi = ptr_F[f], ptr_F[f + 1]
        run = -1
        tail = lo
        near = 0.0
        for q in range(lo, hi):
            t = token_Q[q]
            if start_N[t] != run:
                run, tail, near = start_N[t], q, 0.0
            while token_Q[tail] <= t - window:
                near -= value_Q[tail]
                tail += 1
            slope_Q[q] = -near
            near += value_Q[q]
        run = -1
        total = 0.0
        square = 0.0
        squared_differences = 0.0
        for q in range(hi - 1, lo - 1, -1):
            t = token_Q[q]
            if start_N[t] != run:
                run, tail, near = start_N[t], q, 0.0
            while token_Q[tail] >= t + window:
                near -= value_Q[tail]
                tail -= 1
            v = np.float64(value_Q[q])
            degree = min(t - run, window - 1) + min(end_N[t] - 1 - t, window - 1)
            slope_Q[q] += degree * v - near
            near += v
            total += v
            square += v * v
            squared_differences += v * slope_Q[q]
        mean = total / n_valid
        variance = square / n_valid - mean * mean
        if variance <= VARIES * square / n_valid:
            ratio_F[f] = -1.0
            slope_Q[lo:hi] = 0.0
            continue
        ratio = max(0.0, squared_differences / (2 * n_pairs * variance))
        ratio_F[f] = ratio
        for q in range(lo, hi):
            pull = 2 * (value_Q[q] - mean) / n_valid
            slope_Q[q] = slope_Q[q] / (n_pairs * variance) - ratio / variance * pull
    return ratio_F, slope_Q
