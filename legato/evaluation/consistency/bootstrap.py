"""Intervals for consistency metrics by a bootstrap over documents.

Documents are drawn with replacement. A replicate weighs every token by how often its document was drawn and computes
the whole statistic, both nulls included, from the weighted sums: no resampling of codes, no approximation by blocks.
One seed draws the same documents for every SAE judged on the same rows, so replicates of two SAEs are paired and their
difference or ratio can be formed replicate by replicate.

Shape legend: R replicates, F latents, Q populations of latents, P active pairs, L positions, N flat tokens,
S stretches, M documents.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numba
import numpy as np
from numpy.typing import NDArray

from legato.evaluation.sums.accumulators import ROUNDING
from legato.evaluation.sums.code_buffer import CodeBuffer
from legato.evaluation.sums.lag_pairs import Floats

STATISTICS = ("ac_excess_within", "ac_excess_cross", "kappa_excess_within", "kappa_excess_cross")
_GROUPS = 64  # fixed number of partial sums, so the result does not depend on the number of threads


def bootstrap_documents(
    kept: CodeBuffer,
    *,
    lag: int = 1,
    replicates: int = 200,
    seed: int = 0,
    populations: Mapping[str, NDArray[np.bool_]] = MappingProxyType({}),
) -> dict[str, Floats]:
    """Compute the mean excess of all latents that fire, and of each population [F], per replicate [R], at one lag.

    Keys as in STATISTICS with the lag after the name, `kappa1_excess_within`, `<population>/kappa1_excess_within`. A
    latent whose firings all lie in documents that a replicate did not draw is left out of that replicate's mean, and a
    mean over none is NaN. Cost O(P R + F L R) whatever the number of populations, memory O((L + Q) R).
    """
    documents, document_N = np.unique(kept.doc_BL.numpy().ravel(), return_inverse=True)
    layout = kept.layout((lag,))
    valid_N = layout.stretch_N >= 0
    present_M = np.bincount(document_N[valid_N], minlength=documents.size) > 0
    weight_MR = np.zeros((documents.size, replicates))
    rng = np.random.default_rng(seed)
    n_present = int(present_M.sum())
    weight_MR[present_M] = rng.multinomial(n_present, np.full(n_present, 1.0 / n_present), size=replicates).T
    return _weighted_means(kept, lag, weight_MR, document_N, populations)


def document_means(
    kept: CodeBuffer, *, lag: int = 1, populations: Mapping[str, NDArray[np.bool_]] = MappingProxyType({})
) -> dict[str, float]:
    """Compute the statistics of bootstrap_documents with every document drawn once."""
    document_N = np.zeros(kept.doc_BL.numel(), np.intp)
    means = _weighted_means(kept, lag, np.ones((1, 1)), document_N, populations)
    return {name: float(values_R[0]) for name, values_R in means.items()}


def intervals(
    replicates: Mapping[str, Floats], means: Mapping[str, float], level: float = 0.95
) -> dict[str, list[float] | None]:
    """Compute the percentile interval [low, high] of each statistic about its mean; None without any value.

    A replicate leaves out latents that fire in no drawn document, mostly rare ones. This shifts all replicates alike
    (some 3 % on the demo), so they are recentred on the mean of the documents themselves.
    """
    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    found: dict[str, list[float] | None] = {}
    for name, values_R in replicates.items():
        has_values = np.isfinite(values_R).any()
        recentred_R = values_R - np.nanmean(values_R) + means[name] if has_values else values_R
        found[name] = [float(v) for v in np.nanquantile(recentred_R, tails)] if has_values else None
    return found


def _weighted_means(
    kept: CodeBuffer,
    lag: int,
    weight_MR: Floats,
    document_N: NDArray[np.intp],
    populations: Mapping[str, NDArray[np.bool_]] = MappingProxyType({}),
) -> dict[str, Floats]:
    layout = kept.layout((lag,))
    order = kept.order(layout)
    B, L = layout.shape
    n_latents = order.n_latents
    member_FQ = np.stack([np.ones(n_latents, np.bool_), *populations.values()], axis=1)
    valid_N = layout.stretch_N >= 0
    document_S = np.zeros(layout.size_S.size, np.int64)
    document_S[layout.stretch_N[valid_N]] = document_N[valid_N]
    position_N = np.arange(B * L) % L
    tokens_LR, pairs_LR = np.zeros((L, weight_MR.shape[1])), np.zeros((L, weight_MR.shape[1]))
    np.add.at(tokens_LR, position_N[valid_N], weight_MR[document_N[valid_N]])
    left_N = layout.left_N > 0
    np.add.at(pairs_LR, position_N[left_N], weight_MR[document_N[left_N]])
    total_QXR, count_QXR = _means(
        (order.ptr_F, order.token_Q, order.value_Q),
        member_FQ,
        lag,
        (layout.stretch_N, layout.left_N, layout.right_N, layout.size_S, layout.pairs_SK[:, 0].copy()),
        (weight_MR[document_S], tokens_LR, pairs_LR),
    )
    means_QXR = np.divide(total_QXR, count_QXR, out=np.full_like(total_QXR, np.nan), where=count_QXR > 0)
    return {
        prefix + name.replace("_", f"{lag}_", 1): values_R
        for prefix, means_XR in zip(["", *(f"{name}/" for name in populations)], means_QXR, strict=True)
        for name, values_R in zip(STATISTICS, means_XR, strict=True)
    }


@numba.njit(cache=True, parallel=True)
def _means(codes, member_FQ, lag, layout, weights):  # type: ignore[no-untyped-def]
    R = weights[0].shape[1]
    Q = member_FQ.shape[1]
    total_GQXR = np.zeros((_GROUPS, Q, 4, R))
    count_GQXR = np.zeros((_GROUPS, Q, 4, R))
    for g in numba.prange(_GROUPS):
        _add_group(g, codes, member_FQ, lag, layout, weights, total_GQXR[g], count_GQXR[g])
    return total_GQXR.sum(0), count_GQXR.sum(0)


@numba.njit(cache=True)
def _add_group(g, codes, member_FQ, lag, layout, weights, total_QXR, count_QXR):  # type: ignore[no-untyped-def]
    start_F, token_P, value_P = codes
    stretch_N, left_N, right_N, size_S, pairs_S = layout
    weight_SR, tokens_LR, pairs_LR = weights
    L, R = tokens_LR.shape
    n_R = tokens_LR.sum(0)
    n_pairs_R = pairs_LR.sum(0)
    # per signal (value, firing): sums over the replicate of f, f^2, f f', f + f' and the shuffled last two
    sums = np.zeros((2, 6, R))
    at = np.zeros((2, L, R))
    one = np.zeros((2, 6))
    for i in range(g, start_F.size - 1, _GROUPS):
        begin, end = start_F[i], start_F[i + 1]
        if begin == end:
            continue
        sums[:] = 0.0
        at[:] = 0.0
        one[:] = 0.0
        ahead = begin
        for j in range(begin, end):
            token = token_P[j]
            stretch = stretch_N[token]
            f = np.float64(value_P[j])
            one[0, 0] += f
            one[0, 1] += f * f
            one[1, 0] += 1.0
            one[1, 1] += 1.0
            if left_N[token] > 0:
                one[0, 3] += f
                one[1, 3] += 1.0
                ahead = max(ahead, j + 1)
                while ahead < end and token_P[ahead] < token + lag:
                    ahead += 1
                if ahead < end and token_P[ahead] == token + lag:
                    one[0, 2] += f * np.float64(value_P[ahead])
                    one[1, 2] += 1.0
            if right_N[token] > 0:
                one[0, 3] += f
                one[1, 3] += 1.0
            position = token % L
            for r in range(R):
                at[0, position, r] += f * weight_SR[stretch, r]
                at[1, position, r] += weight_SR[stretch, r]
            if j + 1 == end or stretch_N[token_P[j + 1]] != stretch:
                n = np.float64(size_S[stretch])
                pairs = np.float64(pairs_S[stretch])
                for x in range(2):
                    if pairs > 0.0:
                        one[x, 4] = pairs * (one[x, 0] * one[x, 0] - one[x, 1]) / (n * (n - 1.0))
                        one[x, 5] = 2.0 * pairs * one[x, 0] / n
                    for y in range(6):
                        for r in range(R):
                            sums[x, y, r] += one[x, y] * weight_SR[stretch, r]
                one[:] = 0.0
        _score(member_FQ[i], lag, sums, at, tokens_LR, pairs_LR, n_R, n_pairs_R, total_QXR, count_QXR)


@numba.njit(cache=True)
def _score(member_Q, lag, sums, at, tokens_LR, pairs_LR, n_R, n_pairs_R, total_QXR, count_QXR):  # type: ignore[no-untyped-def]
    """Add the excesses of one latent, in each replicate, to the populations that it is a member of."""
    for x in range(2):
        for r in range(n_R.size):
            if n_R[r] == 0.0 or n_pairs_R[r] == 0.0:
                continue
            mean = sums[x, 0, r] / n_R[r]
            mean_square = sums[x, 1, r] / n_R[r]
            variance = mean_square - mean * mean
            if variance <= ROUNDING * mean_square:
                continue
            cross = 0.0
            for t in range(tokens_LR.shape[0] - lag):
                if pairs_LR[t, r] > 0.0:
                    left = at[x, t, r] / tokens_LR[t, r] - mean
                    right = at[x, t + lag, r] / tokens_LR[t + lag, r] - mean
                    cross += pairs_LR[t, r] * left * right
            real = (sums[x, 2, r] - mean * sums[x, 3, r]) / n_pairs_R[r] + mean * mean
            within = (sums[x, 4, r] - mean * sums[x, 5, r]) / n_pairs_R[r] + mean * mean
            for q in range(member_Q.size):
                if member_Q[q]:
                    total_QXR[q, 2 * x, r] += (real - within) / variance
                    total_QXR[q, 2 * x + 1, r] += (real - cross / n_pairs_R[r]) / variance
                    count_QXR[q, 2 * x : 2 * x + 2, r] += 1.0
