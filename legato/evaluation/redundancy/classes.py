"""Candidate pairs of latents, and the class of each (pairs.py defines the classes).

Shape legend: D width, F latents, A alive latents, C candidate pairs, R classified pairs, K = 2 W + 1 lags -W..W.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from legato.evaluation.redundancy import kernels
from legato.evaluation.redundancy.sums import (
    Candidates,
    CandidateSums,
    Correlations,
    LatentSums,
    binned_firing,
    profile_overlap,
    split_z,
)
from legato.evaluation.sums.lag_pairs import Floats, Ints, LagPairs
from legato.sae.kernels.pairs import PairsByLatent

DUPLICATE, POSITION_SPLIT, LEAD_LAG, ANTIPODAL = CLASSES = ("duplicate", "position_split", "lead_lag", "antipodal")
MIN_STRETCHES = 16
MAX_PAIRS = 200_000  # strongest kept, by decoder cosine and by excess; a collapsed SAE has millions
COSINE_BLOCK = 512


@dataclass(frozen=True)
class Limits:
    """Limits from which pairs count as redundant.

    window: largest lag. cosine: from it on decoders are similar, up to its negative opposite; None: 0.3, in narrow
    models the larger 5 / sqrt(D), which one of 3 million pairs of random directions reaches. correlation: a high
    excess. lead: the least by which a lag's excess must exceed that of lag 0. overlap: largest share of firings that
    two disjoint position profiles may have in common. false_discoveries: Benjamini and Hochberg's level.
    """

    window: int = 8
    cosine: float | None = None
    correlation: float = 0.3
    lead: float = 0.1
    overlap: float = 0.25
    false_discoveries: float = 0.05

    def similarity(self, width: int) -> float:
        """Return the decoder cosine asked for, or the default in a model of this width."""
        return min(0.9, max(0.3, 5.0 / width**0.5)) if self.cosine is None else self.cosine


@dataclass(frozen=True)
class PairEvidence:
    """All numbers that decide the class of the candidates.

    n_similar: pairs of alive latents with similar decoders; n_tested: latents in the lead-lag family; n_left_out: pairs
    beyond MAX_PAIRS.
    """

    candidates: Candidates
    correlations: Correlations
    cosine_C: Floats
    overlap_C: Floats
    split_z_C: Floats
    density_F: Floats
    tested_C: NDArray[np.bool_]
    n_similar: int
    n_tested: int
    n_left_out: int

    @classmethod
    def of(
        cls,
        sums: LatentSums,
        layout: LagPairs,
        order: PairsByLatent,
        directions_FD: Floats,
        similarity: float,
        correlation: float,
    ) -> "PairEvidence":
        """Find and measure the candidates; directions_FD: unit decoder directions."""
        tested_F = (sums.stretches_F >= MIN_STRETCHES) & (sums.deviation_F > 0)
        similar = similar_pairs(directions_FD, sums.count_F > 0, similarity)
        lagged = lagged_pairs(sums, layout, order, tested_F, correlation)
        chosen = [_strongest(a_C, b_C, np.abs(strength_C)) for a_C, b_C, strength_C in (similar, lagged)]
        candidates = Candidates.of(*(np.concatenate(latents) for latents in zip(*chosen, strict=True)))
        a_C, b_C = candidates.a_C, candidates.b_C
        pair_sums = CandidateSums.zero(candidates, sums.window)
        pair_sums.add(layout, order)
        firing_GFZ = binned_firing(sums)
        return cls(
            candidates,
            Correlations.of(sums, pair_sums),
            _cosines(directions_FD, candidates),
            profile_overlap(firing_GFZ, candidates),
            split_z(firing_GFZ, candidates, layout, order),
            sums.count_F / layout.n_tokens,
            tested_F[a_C] & tested_F[b_C],
            n_similar=int((similar[2] > 0).sum()),
            n_tested=int(tested_F.sum()),
            n_left_out=len(similar[0]) + len(lagged[0]) - sum(len(a_C) for a_C, _ in chosen),
        )


def similar_pairs(directions_FD: Floats, alive_F: NDArray[np.bool_], cosine: float) -> tuple[Ints, Ints, Floats]:
    """Find (a, b, cosine) of pairs of alive latents, a < b, whose decoders' |cosine| is at least `cosine`."""
    alive_A = np.flatnonzero(alive_F)
    unit_AD = directions_FD[alive_A]
    found = []
    for start in range(0, len(alive_A), COSINE_BLOCK):
        cosine_XA = unit_AD[start : start + COSINE_BLOCK] @ unit_AD[start:].T
        x_C, y_C = np.nonzero(np.triu(np.abs(cosine_XA) >= cosine, 1))
        found.append((alive_A[start + x_C], alive_A[start + y_C], cosine_XA[x_C, y_C].astype(np.float64)))
    a_C, b_C, cosine_C = (np.concatenate(column) for column in zip(*found, strict=True))
    return a_C, b_C, cosine_C


def lagged_pairs(
    sums: LatentSums, layout: LagPairs, order: PairsByLatent, chosen_F: NDArray[np.bool_], floor: float
) -> tuple[Ints, Ints, Floats]:
    """Find (a, b, excess) of the ordered pairs of chosen latents whose excess reaches `floor` at a lag of 1..W, with
    the largest such excess."""
    inverse_F = np.divide(1.0, sums.deviation_F, out=np.zeros(chosen_F.size), where=chosen_F)
    left_FV, right_FV = sums.ends()
    gained = left_FV - sums.left_FV, right_FV - sums.right_FV
    return kernels.lagged_pairs(
        (order.ptr_F, order.token_Q, order.value_Q),
        kernels.sort_by_token(order.ptr_F, order.token_Q, order.value_Q, layout.stretch_N.size),
        layout.stretch_N,
        inverse_F,
        floor,
        (sums.mean_F, *gained, sums.rate_FL, sums.pairs_VL, sums.pairs_VL.sum(1)),
    )


def _strongest(a_C: Ints, b_C: Ints, strength_C: Floats) -> tuple[Ints, Ints]:
    keep_C = np.argsort(-strength_C, kind="stable")[:MAX_PAIRS]
    return a_C[keep_C], b_C[keep_C]


def _cosines(directions_FD: Floats, candidates: Candidates) -> Floats:
    a_C, b_C = candidates.a_C, candidates.b_C
    parts = [slice(start, start + COSINE_BLOCK) for start in range(0, len(candidates), COSINE_BLOCK)]
    cosines = [(directions_FD[a_C[part]] * directions_FD[b_C[part]]).sum(1, dtype=np.float64) for part in parts]
    return np.concatenate([np.zeros(0), *cosines])


def classify(evidence: PairEvidence, limits: Limits, similarity: float) -> dict[str, Any]:
    """Return the columns (see table.py) of the pairs that have a class, strongest first inside each class."""
    correlations, cosine_C = evidence.correlations, evidence.cosine_C
    excess_CK = np.nan_to_num(correlations.excess_CK, nan=-1.0)
    W = excess_CK.shape[1] // 2
    similar_C = cosine_C >= similarity
    same_C = excess_CK[:, W]
    others_CK = excess_CK.copy()
    others_CK[:, W] = -np.inf
    lag_C, ahead_C = others_CK.argmax(1) - W, others_CK.max(1)

    p_CK = ndtr(-correlations.z_CK)
    tests_C = np.where(similar_C, p_CK[:, W], 1.0)
    q_same_C = adjusted(tests_C, evidence.n_similar)
    q_split_C = adjusted(np.where(similar_C, ndtr(-evidence.split_z_C), 1.0), evidence.n_similar)
    p_CK[~evidence.tested_C] = 1.0
    p_CK[excess_CK < limits.correlation] = 1.0
    p_CK[:, W] = 1.0
    q_CK = adjusted(p_CK.ravel(), evidence.n_tested * (evidence.n_tested - 1) * W).reshape(p_CK.shape)
    q_lag_C = np.take_along_axis(q_CK, lag_C[:, None] + W, 1)[:, 0]

    level = limits.false_discoveries
    is_class = [
        similar_C & (same_C >= limits.correlation) & (q_same_C <= level),
        similar_C & (correlations.real_CK[:, W] < 0) & (evidence.overlap_C <= limits.overlap) & (q_split_C <= level),
        (np.abs(cosine_C) < similarity) & (ahead_C - same_C >= limits.lead) & (q_lag_C <= level),
        cosine_C <= -similarity,
    ]
    q_C = np.select(is_class[:3], [q_same_C, q_split_C, q_lag_C], np.nan)
    strength_C = np.select(is_class, [same_C, cosine_C, ahead_C, -cosine_C])
    class_C = np.select(is_class, range(len(CLASSES)), len(CLASSES))
    rows = np.lexsort((-strength_C, class_C))[: int((class_C < len(CLASSES)).sum())]
    lag_R = np.where(class_C == CLASSES.index(LEAD_LAG), lag_C, 0)[rows]
    a_R, b_R = evidence.candidates.a_C[rows], evidence.candidates.b_C[rows]
    first_R, second_R = np.where(lag_R < 0, b_R, a_R), np.where(lag_R < 0, a_R, b_R)
    return {
        "latent_a": first_R,
        "latent_b": second_R,
        "class": np.asarray(CLASSES)[class_C[rows]],
        "lag": np.abs(lag_R),
        "c": correlations.real_CK[rows, lag_R + W],
        "c_lag0": correlations.real_CK[rows, W],
        "null": correlations.null_CK[rows, lag_R + W],
        "excess": correlations.excess_CK[rows, lag_R + W],
        "q": q_C[rows],
        "cosine": cosine_C[rows],
        "overlap": evidence.overlap_C[rows],
        "density_a": evidence.density_F[first_R],
        "density_b": evidence.density_F[second_R],
    }


def adjusted(p_X: Floats, n_tests: int) -> Floats:
    """Compute Benjamini and Hochberg's q values among `n_tests` tests; those with p = 1 need not be given."""
    q_X = np.ones_like(p_X)
    below = np.flatnonzero(p_X < 1.0)
    assert len(below) <= n_tests
    ascending = below[np.argsort(p_X[below], kind="stable")]
    ranked_X = p_X[ascending] * n_tests / np.arange(1, len(ascending) + 1)
    q_X[ascending] = np.minimum(np.minimum.accumulate(ranked_X[::-1])[::-1], 1.0)
    return q_X
