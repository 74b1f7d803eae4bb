"""Burstiness of latents: the gaps between firings, compared with shuffled firings.

Shape legend: F latents, N flat tokens, S stretches (the part of one document that lies in one row).
"""

from dataclasses import dataclass

import numba
import numpy as np

from legato.evaluation.sums.accumulators import Summed
from legato.evaluation.sums.lag_pairs import Floats, LagPairs
from legato.sae.kernels.pairs import PairsByLatent


@dataclass
class GapSums(Summed):
    """Sums over the gaps between consecutive firings of a latent inside a stretch, in valid tokens.

    gaps_F, total_F, square_F: number, sum and sum of squares. shuffled_total_F, shuffled_square_F: the expectations of
    the two sums over all orders inside each stretch. k firings cut the n + 1 steps across a stretch into k + 1 parts,
    all compositions equally likely, so with M = n + 1 and m = k + 1 a gap g has E g = M / m and
    E g (g + 1) = 2 M (M + 1) / (m (m + 1)).
    """

    gaps_F: Floats
    total_F: Floats
    square_F: Floats
    shuffled_total_F: Floats
    shuffled_square_F: Floats

    @classmethod
    def zero(cls, n_latents: int) -> "GapSums":
        return cls(*(np.zeros(n_latents) for _ in range(5)))

    def add(self, layout: LagPairs, order: PairsByLatent) -> None:
        rank_N = np.cumsum(layout.stretch_N >= 0)  # a position that is not valid takes no time
        _add_gaps(
            order.ptr_F,
            order.token_Q,
            layout.stretch_N,
            rank_N,
            layout.size_S,
            (self.gaps_F, self.total_F, self.square_F, self.shuffled_total_F, self.shuffled_square_F),
        )


@numba.njit(cache=True, parallel=True)
def _add_gaps(start_F, token_P, stretch_N, rank_N, size_S, sums):  # type: ignore[no-untyped-def]
    gaps_F, total_F, square_F, shuffled_total_F, shuffled_square_F = sums
    for i in numba.prange(start_F.size - 1):
        j = start_F[i]
        while j < start_F[i + 1]:
            stretch = stretch_N[token_P[j]]
            firings = 1
            while j + firings < start_F[i + 1] and stretch_N[token_P[j + firings]] == stretch:
                gap = np.float64(rank_N[token_P[j + firings]] - rank_N[token_P[j + firings - 1]])
                total_F[i] += gap
                square_F[i] += gap * gap
                firings += 1
            gaps = firings - 1.0
            steps, parts = size_S[stretch] + 1.0, firings + 1.0
            mean = steps / parts
            gaps_F[i] += gaps
            shuffled_total_F[i] += gaps * mean
            shuffled_square_F[i] += gaps * (2.0 * mean * (steps + 1.0) / (parts + 1.0) - mean)
            j += firings


def burstiness(sums: GapSums) -> tuple[Floats, Floats]:
    """Return (B, B of shuffled firings), B = (sigma - mu) / (sigma + mu) of the gaps (Goh & Barabasi 2008).

    -1 for a periodic latent, 0 for exponential gaps, towards 1 for bursts. Gaps longer than a context cannot be seen,
    which lowers B of rare latents, and tokens are discrete, which lowers B of frequent ones. So compare with the B of
    shuffled gaps. NaN where there are fewer than two gaps.
    """
    return _b(sums.gaps_F, sums.total_F, sums.square_F), _b(sums.gaps_F, sums.shuffled_total_F, sums.shuffled_square_F)


def _b(gaps_F: Floats, total_F: Floats, square_F: Floats) -> Floats:
    n_F = np.where(gaps_F >= 2, gaps_F, np.nan)
    mean_F = total_F / n_F
    variance_F = square_F / n_F - mean_F**2
    # equal gaps leave a variance of about 1e-16 of their mean square
    deviation_F = np.sqrt(np.where(variance_F > 1e-12 * mean_F**2, variance_F, 0.0 * n_F))
    return (deviation_F - mean_F) / (deviation_F + mean_F)


def burstiness_features(sums: GapSums) -> dict[str, np.ndarray]:
    """Return per-latent columns; NaN where undefined."""
    real_F, null_F = burstiness(sums)
    return {
        "burstiness": real_F,
        "burstiness_within_null": null_F,
        "burstiness_excess_within": real_F - null_F,
    }
