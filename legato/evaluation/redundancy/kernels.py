"""Loops over sparse codes for sums.py, which explains the arrays.

Each candidate or latent is done by one thread from start to end, so results do not depend on the number of threads.
"""

import numba
import numpy as np


@numba.njit(cache=True, parallel=True)
def add_latents(start_F, token_P, value_P, stretch_N, n_positions, first_row, sums):  # type: ignore[no-untyped-def]
    at_FL, firing_GFL, square_F, left_FV, right_FV, stretches_F = sums
    V = left_FV.shape[1]
    for i in numba.prange(start_F.size - 1):
        last = -1
        for j in range(start_F[i], start_F[i + 1]):
            token = token_P[j]
            stretch = stretch_N[token]
            f = np.float64(value_P[j])
            row, t = token // n_positions, token % n_positions
            at_FL[i, t] += f
            firing_GFL[(first_row + row) % 2, i, t] += 1.0
            square_F[i] += f * f
            if stretch != last:
                stretches_F[i] += 1.0
                last = stretch
            for k in range(V):
                if t + k < n_positions and stretch_N[token + k] == stretch:
                    left_FV[i, k] += f
                if t - k >= 0 and stretch_N[token - k] == stretch:
                    right_FV[i, k] += f


@numba.njit(cache=True, parallel=True)
def add_candidates(a_C, b_C, codes, product_CK, square_CK):  # type: ignore[no-untyped-def]
    start_F, token_P, value_P, stretch_N = codes
    K = product_CK.shape[1]
    W = K // 2
    for c in numba.prange(a_C.size):
        unit_K = np.zeros(K)
        stretch = -1
        low, end = start_F[b_C[c]], start_F[b_C[c] + 1]
        for j in range(start_F[a_C[c]], start_F[a_C[c] + 1]):
            token = token_P[j]
            if stretch_N[token] != stretch:
                for k in range(K):
                    product_CK[c, k] += unit_K[k]
                    square_CK[c, k] += unit_K[k] * unit_K[k]
                    unit_K[k] = 0.0
                stretch = stretch_N[token]
            while low < end and token_P[low] < token - W:
                low += 1
            p = low
            while p < end and token_P[p] <= token + W:
                if stretch_N[token_P[p]] == stretch:
                    unit_K[token_P[p] - token + W] += np.float64(value_P[j]) * np.float64(value_P[p])
                p += 1
        for k in range(K):
            product_CK[c, k] += unit_K[k]
            square_CK[c, k] += unit_K[k] * unit_K[k]


@numba.njit(cache=True)
def null_product(a, b, lag, rate_FL, pairs_VL):  # type: ignore[no-untyped-def]
    """Sum over positions t of pairs(t, t + lag) r_a(t) r_b(t + lag), lag >= 0."""
    total = 0.0
    for t in range(rate_FL.shape[1] - lag):
        total += pairs_VL[lag, t] * rate_FL[a, t] * rate_FL[b, t + lag]
    return total


@numba.njit(cache=True, parallel=True)
def null_products(a_C, b_C, rate_FL, pairs_VL):  # type: ignore[no-untyped-def]
    W = pairs_VL.shape[0] - 1
    product_CK = np.zeros((a_C.size, 2 * W + 1))
    for c in numba.prange(a_C.size):
        for lag in range(W + 1):
            product_CK[c, W + lag] = null_product(a_C[c], b_C[c], lag, rate_FL, pairs_VL)
            product_CK[c, W - lag] = null_product(b_C[c], a_C[c], lag, rate_FL, pairs_VL)
    return product_CK


@numba.njit(cache=True, parallel=True)
def squared_differences(a_C, b_C, codes, bin_L, score_GCZ, count_TGC):  # type: ignore[no-untyped-def]
    """Sum (mean score of a's firings less that of b's)^2 over the stretches of each fold; T = 2: a and b."""
    start_F, token_P, stretch_N = codes
    L = bin_L.size
    square_GC = np.zeros((2, a_C.size))
    for c in numba.prange(a_C.size):
        at, end = start_F[a_C[c]], start_F[a_C[c] + 1]
        other, other_end = start_F[b_C[c]], start_F[b_C[c] + 1]
        while at < end or other < other_end:
            token = token_P[at] if at < end else token_P[other]
            if other < other_end and token_P[other] < token:
                token = token_P[other]
            stretch, fold = stretch_N[token], (token // L) % 2
            difference = 0.0
            while at < end and stretch_N[token_P[at]] == stretch:
                difference += score_GCZ[fold, c, bin_L[token_P[at] % L]] / count_TGC[0, fold, c]
                at += 1
            while other < other_end and stretch_N[token_P[other]] == stretch:
                difference -= score_GCZ[fold, c, bin_L[token_P[other] % L]] / count_TGC[1, fold, c]
                other += 1
            square_GC[fold, c] += difference * difference
    return square_GC


@numba.njit(cache=True)
def sort_by_token(start_F, token_P, value_P, n_tokens):  # type: ignore[no-untyped-def]
    """Sort the active pairs by token, by latent within a token: start_N, latent_Q, value_Q."""
    start = np.zeros(n_tokens + 1, np.int64)
    for j in range(token_P.size):
        start[token_P[j] + 1] += 1
    for n in range(n_tokens):
        start[n + 1] += start[n]
    place = start[:-1].copy()
    latent = np.empty(token_P.size, np.int32)
    value = np.empty(token_P.size, np.float32)
    for i in range(start_F.size - 1):
        for j in range(start_F[i], start_F[i + 1]):
            latent[place[token_P[j]]] = i
            value[place[token_P[j]]] = value_P[j]
            place[token_P[j]] += 1
    return start, latent, value


@numba.njit(cache=True)
def lagged_pairs(by_latent, by_token, stretch_N, inverse_F, floor, nulls):  # type: ignore[no-untyped-def]
    """Find ordered pairs whose excess over the null reaches `floor` at a lag of 1..W, with the largest such excess.

    One row of the matrices of all lags is done at a time: memory is O(F W) beside codes and result. inverse_F is 1 over
    the standard deviation, 0 for latents to leave out. nulls: mean_F, the null's ends less the real ends (left, right),
    rate_FL, pairs_VL, and the number of pairs by lag. Codes are positive, so a null of 0 at every position bounds the
    excess from above, and the null is summed over positions only where that bound reaches the floor.
    """
    start_F, token_P, value_P = by_latent
    start_N, latent_Q, value_Q = by_token
    mean_F, left_FV, right_FV, rate_FL, pairs_VL, pairs_V = nulls
    F, V = left_FV.shape
    N = start_N.size - 1
    product_FV = np.zeros((F, V))
    seen_F = np.zeros(F, np.bool_)
    touched_F = np.empty(F, np.int64)
    capacity = 1024
    a_C, b_C, excess_C = np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity)
    n_found = 0
    for i in range(F):
        if inverse_F[i] == 0.0:
            continue
        n_touched = 0
        for j in range(start_F[i], start_F[i + 1]):
            token = token_P[j]
            f = np.float64(value_P[j])
            for k in range(1, min(V, N - token)):
                if stretch_N[token + k] == stretch_N[token]:
                    for q in range(start_N[token + k], start_N[token + k + 1]):
                        other = latent_Q[q]
                        if not seen_F[other]:
                            seen_F[other] = True
                            touched_F[n_touched] = other
                            n_touched += 1
                        product_FV[other, k] += f * np.float64(value_Q[q])
        for m in range(n_touched):
            other = touched_F[m]
            best = floor
            found = False
            for k in range(1, V):
                scale = inverse_F[i] * inverse_F[other]
                ends = mean_F[i] * right_FV[other, k] + mean_F[other] * left_FV[i, k]
                if scale > 0.0 and (product_FV[other, k] + ends) * scale >= best * pairs_V[k]:
                    product = product_FV[other, k] - null_product(i, other, k, rate_FL, pairs_VL)
                    excess = (product + ends) * scale / pairs_V[k]
                    if excess >= best:
                        best = excess
                        found = True
                product_FV[other, k] = 0.0
            seen_F[other] = False
            if found and other != i:
                if n_found == capacity:
                    capacity *= 2
                    a_C = np.concatenate((a_C, np.empty(n_found, np.int64)))
                    b_C = np.concatenate((b_C, np.empty(n_found, np.int64)))
                    excess_C = np.concatenate((excess_C, np.empty(n_found)))
                a_C[n_found], b_C[n_found], excess_C[n_found] = i, other, best
                n_found += 1
    return a_C[:n_found], b_C[:n_found], excess_C[:n_found]
