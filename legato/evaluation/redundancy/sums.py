"""Sums over pairs of latents at every lag, and the tests on them.

C_ab(lag) = corr(f_a(t), f_b(t + lag)) over pairs of valid tokens of one document in one row, with global means and
standard deviations, as the autocorrelation in persistence.py; so it may be slightly above 1 where a latent varies more
inside the pairs than outside. Its null, rows shuffled at fixed position for each latent on its own, has the exact
expectation
  E sum f_a(t) f_b(t + lag) = sum over positions of pairs(t, t + lag) r_a(t) r_b(t + lag), r(t) = mean over rows.

Shape legend: F latents, L positions, N flat tokens, P active pairs, C candidate pairs (a, b), W window, V = W + 1 lags
0..W, K = 2 W + 1 lags -W..W, G = 2 folds (even and odd rows), Z position bins.
"""

from dataclasses import dataclass, field

import numpy as np

from legato.evaluation.redundancy import kernels
from legato.evaluation.sums.accumulators import ROUNDING, Summed
from legato.evaluation.sums.lag_pairs import Floats, Ints, LagPairs
from legato.sae.kernels.pairs import PairsByLatent

POSITION_BINS = 16  # equal ones; below the first edge, bins double in width, since early positions differ most


@dataclass
class LatentSums(Summed):
    """Sums over single latents, from which correlations, nulls and position profiles are computed.

    at_FL: sum of f by position. firing_GFL: firings by position in even and odd rows. left_FV, right_FV: sum of f over
    the left, right ends of the valid pairs at each lag. stretches_F: stretches (parts of one document that lie in one
    row) in which the latent fires.
    """

    tokens_L: Floats
    pairs_VL: Floats
    at_FL: Floats
    firing_GFL: Floats
    square_F: Floats
    left_FV: Floats
    right_FV: Floats
    stretches_F: Floats
    n_stretches: float = 0.0

    @classmethod
    def zero(cls, n_latents: int, n_positions: int, window: int) -> "LatentSums":
        F, L, V = n_latents, n_positions, window + 1
        return cls(
            tokens_L=np.zeros(L),
            pairs_VL=np.zeros((V, L)),
            at_FL=np.zeros((F, L)),
            firing_GFL=np.zeros((2, F, L)),
            square_F=np.zeros(F),
            left_FV=np.zeros((F, V)),
            right_FV=np.zeros((F, V)),
            stretches_F=np.zeros(F),
        )

    def add(self, layout: LagPairs, order: PairsByLatent, first_row: int = 0) -> None:
        """Add a batch whose layout has the lags 1..W; first_row: rows before it, which tells even rows from odd."""
        assert len(layout.lags) == self.window
        self.tokens_L += layout.tokens_L
        self.pairs_VL += np.concatenate([layout.tokens_L[None], layout.pairs_KL])
        self.n_stretches += layout.size_S.size
        sums = (self.at_FL, self.firing_GFL, self.square_F, self.left_FV, self.right_FV, self.stretches_F)
        kernels.add_latents(
            order.ptr_F, order.token_Q, order.value_Q, layout.stretch_N, layout.shape[1], first_row, sums
        )

    @property
    def window(self) -> int:
        return len(self.pairs_VL) - 1

    @property
    def count_F(self) -> Floats:
        return self.firing_GFL.sum((0, 2))

    @property
    def mean_F(self) -> Floats:
        return self.at_FL.sum(1) / max(self.tokens_L.sum(), 1.0)

    @property
    def deviation_F(self) -> Floats:
        """Compute the standard deviation over valid tokens; 0 for a latent that does not vary."""
        square_F = self.square_F / max(self.tokens_L.sum(), 1.0)
        variance_F = square_F - self.mean_F**2
        return np.sqrt(np.where(variance_F > ROUNDING * square_F, variance_F, 0.0))

    @property
    def rate_FL(self) -> Floats:
        """Compute the mean code at each position."""
        return np.divide(self.at_FL, self.tokens_L, out=np.zeros_like(self.at_FL), where=self.tokens_L > 0)

    def ends(self) -> tuple[Floats, Floats]:
        """Compute the expectations of left_FV and right_FV under the null."""
        V, L = self.pairs_VL.shape
        rate_FL = self.rate_FL
        left_FV = rate_FL @ self.pairs_VL.T
        right_FV = np.stack([rate_FL[:, k:] @ self.pairs_VL[k, : L - k] for k in range(V)], 1)
        return left_FV, right_FV


@dataclass(frozen=True, eq=False)
class Candidates:
    """Pairs of latents (a, b), every pair once; sums over the same object can be merged."""

    a_C: Ints
    b_C: Ints

    @classmethod
    def of(cls, a_C: Ints, b_C: Ints) -> "Candidates":
        """Take pairs in any order, with repetition."""
        pairs = np.unique(np.stack([np.minimum(a_C, b_C), np.maximum(a_C, b_C)], 1).astype(np.int64), axis=0)
        return cls(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))

    def __len__(self) -> int:
        return self.a_C.size


@dataclass
class CandidateSums(Summed):
    """Sum of f_a(t) f_b(t + lag) over all valid pairs, and the sum over stretches of its square, by lag -W..W."""

    candidates: Candidates = field(metadata={"identity": True})
    product_CK: Floats
    square_CK: Floats

    @classmethod
    def zero(cls, candidates: Candidates, window: int) -> "CandidateSums":
        size = (len(candidates), 2 * window + 1)
        return cls(candidates, np.zeros(size), np.zeros(size))

    def add(self, layout: LagPairs, order: PairsByLatent) -> None:
        kernels.add_candidates(
            self.candidates.a_C,
            self.candidates.b_C,
            (order.ptr_F, order.token_Q, order.value_Q, layout.stretch_N),
            self.product_CK,
            self.square_CK,
        )


@dataclass(frozen=True)
class Correlations:
    """C by lag -W..W, its null, and the test that it exceeds the null; NaN and z = 0 where a latent does not vary.

    z_CK: with the stretches u as units and P_u = sum of f_a(t) f_b(t + lag) inside one, (sum P_u - E) over
    sqrt(sum (P_u - E / n)^2), where E is the null's expectation of the sum and n the number of stretches. Stretches are
    taken as independent, neighbouring tokens are not. z^2 is at most the number of stretches in which the pair fires
    together (the spread is taken about the null, not about the mean), so a few stretches are never significant, and
    rare pairs are judged with caution. Upper tail only: pairs that never fire together have a large negative z.
    """

    real_CK: Floats
    null_CK: Floats
    z_CK: Floats

    @property
    def excess_CK(self) -> Floats:
        return self.real_CK - self.null_CK

    @classmethod
    def of(cls, sums: LatentSums, pairs: CandidateSums) -> "Correlations":
        a_C, b_C = pairs.candidates.a_C, pairs.candidates.b_C
        null_product_CK = kernels.null_products(a_C, b_C, sums.rate_FL, sums.pairs_VL)
        W = sums.window
        n_K = np.abs(np.arange(-W, W + 1))  # lag -k of (a, b) is lag k of (b, a)
        pairs_K = sums.pairs_VL.sum(1)[n_K]
        mean_F, deviation_F = sums.mean_F, sums.deviation_F
        mean_aC, mean_bC = mean_F[a_C, None], mean_F[b_C, None]
        scale_C = (deviation_F[a_C] * deviation_F[b_C])[:, None]

        def correlation(product_CK: Floats, left_FV: Floats, right_FV: Floats) -> Floats:
            a_CK = np.concatenate([right_FV[a_C, :0:-1], left_FV[a_C]], 1)
            b_CK = np.concatenate([left_FV[b_C, :0:-1], right_FV[b_C]], 1)
            return ((product_CK - mean_aC * b_CK - mean_bC * a_CK) / pairs_K + mean_aC * mean_bC) / scale_C

        with np.errstate(invalid="ignore", divide="ignore"):
            real_CK = correlation(pairs.product_CK, sums.left_FV, sums.right_FV)
            null_CK = correlation(null_product_CK, *sums.ends())
            unit_CK = null_product_CK / sums.n_stretches
            spread_CK = pairs.square_CK - 2.0 * unit_CK * pairs.product_CK + sums.n_stretches * unit_CK**2
            z_CK = (pairs.product_CK - null_product_CK) / np.sqrt(np.maximum(spread_CK, 0.0))
        undefined_CK = ~np.isfinite(real_CK)
        real_CK[undefined_CK] = null_CK[undefined_CK] = np.nan
        return cls(real_CK, null_CK, np.where(undefined_CK | ~np.isfinite(z_CK), 0.0, z_CK))


# --- position profiles ------------------------------------------------------------------------------------------------


def position_bins(n_positions: int) -> Ints:
    """Number the bin of each position: 0, 1, 2-3, 4-7, ... up to 1 / 16 of the context wide, then equal ones."""
    width = max(1, n_positions // POSITION_BINS)
    powers = 2 ** np.arange(int(np.log2(width)) + 1)
    edges = np.unique(np.concatenate([powers, np.arange(width, n_positions + 1, width)]))
    return np.searchsorted(edges, np.arange(n_positions), side="right")


def binned_firing(sums: LatentSums) -> Floats:
    """Count firings by fold, latent and position bin, [G, F, Z]."""
    bin_L = position_bins(sums.tokens_L.size)
    return np.add.reduceat(sums.firing_GFL, np.flatnonzero(np.diff(bin_L, prepend=-1)), axis=2)


def profile_overlap(firing_GFZ: Floats, candidates: Candidates) -> Floats:
    """Sum min(share of a's firings, share of b's) over position bins: 1 for equal profiles, 0 for disjoint ones."""
    share_FZ = _shares(firing_GFZ.sum(0))
    return np.minimum(share_FZ[candidates.a_C], share_FZ[candidates.b_C]).sum(1)


def split_z(firing_GFZ: Floats, candidates: Candidates, layout: LagPairs, order: PairsByLatent) -> Floats:
    """Test that two latents fire at different positions, [C]; N(0, 1) or narrower where their profiles are equal.

    Each fold of rows is scored by the difference of the two profiles in the other fold, so that the score does not
    depend on the rows that it tests. With the stretches u as units and d_u = sum over a's firings in u of (score -
    mean) / n_a less the same of b, z of a fold is sum d_u / sqrt(sum d_u^2). The two folds' z have the same numerator,
    so they are averaged as if they were one number.
    """
    share_GFZ = np.stack([_shares(fold_FZ) for fold_FZ in firing_GFZ])
    share_aGCZ, share_bGCZ = share_GFZ[:, candidates.a_C], share_GFZ[:, candidates.b_C]
    score_GCZ = (share_aGCZ - share_bGCZ)[::-1]
    n_aGC, n_bGC = (firing_GFZ[:, latent_C].sum(2) for latent_C in (candidates.a_C, candidates.b_C))
    mean_aGC, mean_bGC = (score_GCZ * share_aGCZ).sum(2), (score_GCZ * share_bGCZ).sum(2)
    tested_GC = (n_aGC > 0) & (n_bGC > 0)
    centre_GC = (n_aGC * mean_aGC + n_bGC * mean_bGC) / np.maximum(n_aGC + n_bGC, 1.0)
    square_GC = kernels.squared_differences(
        candidates.a_C,
        candidates.b_C,
        (order.ptr_F, order.token_Q, layout.stretch_N),
        position_bins(layout.shape[1]),
        np.ascontiguousarray(score_GCZ - centre_GC[..., None]),
        np.stack([n_aGC, n_bGC]),
    )
    z_GC = np.divide(
        mean_aGC - mean_bGC, np.sqrt(square_GC), out=np.zeros_like(square_GC), where=tested_GC & (square_GC > 0)
    )
    return z_GC.mean(0)


def _shares(count_FZ: Floats) -> Floats:
    return count_FZ / np.maximum(count_FZ.sum(1, keepdims=True), 1.0)
