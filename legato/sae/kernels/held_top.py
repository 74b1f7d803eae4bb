"""The k largest of each token where what is held counts more: one pass along every run of a document.

Shape legend: N flat tokens, F latents, P pairs in token order, R runs.
"""

import numpy as np
from numba import njit, prange

from legato.sae.kernels.pairs import Array, kth_largest, sort_by_latent


@njit(parallel=True, cache=True)
def held_top(
    start_N: Array,
    end_N: Array,
    token_P: Array,
    latent_P: Array,
    value_P: Array,
    n_latents: int,
    k: int,
    release: float,
    margin: float = 1.0,
) -> Array:
    """Mask of each token's k best positive pairs; ties at the cut go to the pairs that come first.

    A pair counts its value, and 1 / release times that where its latent was on at the token before, of the same run
    [start_N, end_N). margin: with less than 1 for values that are not exact, also those pairs that may be among the k:
    that count at least this share of the k-th, or would if their latent was on where it may have been.
    """
    N = len(start_N)
    ptr_N = np.searchsorted(token_P, np.arange(N + 1))
    first_R = np.flatnonzero(start_N == np.arange(N))
    bonus, share = value_P.dtype.type(1 / release), value_P.dtype.type(margin)
    keep_P = np.zeros(len(value_P), np.bool_)
    for r in prange(first_R.shape[0]):
        on_since = np.full(n_latents, -2, np.int64)  # the last token at which a latent was on
        kept_since = np.full(n_latents, -2, np.int64)  # the last one at which it may have been, for all we know
        for t in range(first_R[r], end_N[first_R[r]]):
            lo, hi = ptr_N[t], ptr_N[t + 1]
            score = value_P[lo:hi].copy()
            for p in range(lo, hi):
                if on_since[latent_P[p]] == t - 1:
                    score[p - lo] *= bonus
            cut = score.dtype.type(0)
            room = hi - lo
            if hi - lo > k:
                cut = kth_largest(score, k)
                room = k
                for p in range(lo, hi):
                    room -= score[p - lo] > cut
            for p in range(lo, hi):
                latent = latent_P[p]
                on = score[p - lo] > cut
                if score[p - lo] == cut and cut > 0 and room > 0:
                    on = True
                    room -= 1
                keep = on
                if share < 1:
                    most = value_P[p] * bonus if kept_since[latent] == t - 1 else score[p - lo]
                    keep = on or most >= share * cut
                keep_P[p] = keep and value_P[p] > 0
                if on:
                    on_since[latent] = t
                if keep_P[p]:
                    kept_since[latent] = t
    return keep_P


@njit(parallel=True, cache=True)
def critical_thresholds(
    start_N: Array, token_P: Array, latent_P: Array, value_P: Array, n_latents: int, release: float
) -> Array:
    """The highest threshold at which a Schmitt trigger has each pair on; the pairs are given in token order.

    A pair is on at threshold h if value >= h, or if the latent was on at the token before, of the same run (start_N:
    its first token), and value >= release * h. So c_t = max(v_t, min(c_{t-1}, v_t / release)), in one pass, and the
    pairs that are on at h are those with c >= h.
    """
    ptr_F, token_Q, value_Q, source_Q = sort_by_latent(token_P, latent_P, value_P, n_latents)
    release_in_type = value_P.dtype.type(release)
    critical_P = np.empty_like(value_P)
    for f in prange(n_latents):
        before = value_Q.dtype.type(0)
        last = -2
        for q in range(ptr_F[f], ptr_F[f + 1]):
            t = token_Q[q]
            follows = t == last + 1 and start_N[t] != t
            value = value_Q[q]
            before = max(value, min(before, value / release_in_type)) if follows else value
            critical_P[source_Q[q]] = before
            last = t
    return critical_P
