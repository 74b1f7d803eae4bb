"""The exact sparse training step on a CPU: dense work only in the encoder's matmul, everything else on active latents.

All loops are deterministic: tokens (or latents) are owned by one thread each and summed in a fixed order, whatever the
number of threads. The kernels take numpy views of torch tensors; float32 in training, float64 in the exactness tests.

Shape legend: N flat tokens, F latents, D model width, P active pairs in token order (CSR: ptr over N), Q the same pairs
in latent order (CSC: ptr over F), G nested groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[Any]

# No "nnan"/"ninf": a NaN must stay one, so that the guards in train.py see it. No "nsz": with it LLVM orders a sum anew
# each time it optimises a kernel, and what it compiles and what it opens from numba's cache end in other last digits.
FAST = {"contract", "reassoc", "arcp"}


class Pairs(NamedTuple):
    """Active pairs in token order: pair p is token token_P[p], latent latent_P[p], pre-activation value_P[p] > 0."""

    ptr_N: Array
    token_P: Array
    latent_P: Array
    value_P: Array


class Groups(NamedTuple):
    """Nested reconstructions (Matryoshka): the g-th uses the latents below ends_G[g], its error counts weights_G[g]."""

    ends_G: Array
    weights_G: Array


class LatentOrder(NamedTuple):
    """The same pairs sorted by latent, tokens ascending: pair q of latent f lies in ptr_F[f]:ptr_F[f+1].

    source_Q maps back: value_Q[q] == value_P[source_Q[q]].
    """

    ptr_F: Array
    token_Q: Array
    value_Q: Array
    source_Q: Array


@njit(parallel=True, cache=True)
def _scan(pre_NF, valid_N, floor_N, token, latent, count_T):
    N, F = pre_NF.shape
    n_parts = count_T.shape[0]
    capacity = token.shape[0] // n_parts
    rows = (N + n_parts - 1) // n_parts
    for part in prange(n_parts):
        start = part * capacity
        p = start
        full = False
        for n in range(part * rows, min(N, (part + 1) * rows)):
            if not valid_N[n]:
                continue
            if p > start + capacity - F:
                full = True
                break
            row = pre_NF[n]
            floor = floor_N[n]
            first = p
            for f in range(F):  # branch-free compaction: about one cycle a latent
                latent[p] = f
                p += row[f] > floor
            for q in range(first, p):
                token[q] = n
        count_T[part] = -1 if full else p - start


@njit(cache=True)
def kth_largest(values, k):
    """The k-th largest of at least k values; for a small k, 2 to 4 times as fast as numba's np.partition."""
    if k > 64:
        return np.partition(values, len(values) - k)[len(values) - k]
    top = np.sort(values[:k])
    for value in values[k:]:
        if value > top[0]:
            i = 0
            while i < k - 1 and top[i + 1] < value:
                top[i] = top[i + 1]
                i += 1
            top[i] = value
    return top[0]


@njit(parallel=True, cache=True)
def _row_floors(pre_NF, valid_N, k, stride, zero, floor_N):
    N, F = pre_NF.shape
    rank = min((2 * k) // stride + 4, F // stride - 1)
    for n in prange(N):
        if valid_N[n]:
            guess = kth_largest(pre_NF[n, ::stride].copy(), rank + 1)
            above = 0
            for f in range(F):
                above += pre_NF[n, f] > guess
            floor_N[n] = guess if above >= k and guess > zero else zero


@njit(parallel=True, cache=True, fastmath=FAST)
def _exact_values(x_ND, W_enc_FD, b_enc_F, token_P, latent_P, value_P):
    D = x_ND.shape[1]
    for p in prange(token_P.shape[0]):
        x_D = x_ND[token_P[p]]
        w_D = W_enc_FD[latent_P[p]]
        total = b_enc_F[latent_P[p]]
        for d in range(D):
            total += x_D[d] * w_D[d]
        value_P[p] = total


@njit(parallel=True, cache=True)
def _keep_row_top(ptr_N, value_P, k, keep_P):
    for n in prange(ptr_N.shape[0] - 1):
        lo, hi = ptr_N[n], ptr_N[n + 1]
        values = value_P[lo:hi]
        if hi - lo <= k:
            for p in range(lo, hi):
                keep_P[p] = value_P[p] > 0
            continue
        cut = kth_largest(values, k)
        above = 0
        for p in range(lo, hi):
            above += value_P[p] > cut
        room = k - above  # ties at the cut: the lowest latents win
        for p in range(lo, hi):
            keep = value_P[p] > cut
            if value_P[p] == cut and room > 0:
                keep = True
                room -= 1
            keep_P[p] = keep and value_P[p] > 0


@njit(cache=True)
def _filter(N, token_P, latent_P, value_P, keep_P):
    kept = 0
    for p in range(keep_P.shape[0]):
        kept += keep_P[p]
    ptr_N = np.zeros(N + 1, np.int64)
    token = np.empty(kept, token_P.dtype)
    latent = np.empty(kept, latent_P.dtype)
    value = np.empty(kept, value_P.dtype)
    q = 0
    for p in range(keep_P.shape[0]):
        if keep_P[p]:
            token[q] = token_P[p]
            latent[q] = latent_P[p]
            value[q] = value_P[p]
            ptr_N[token_P[p] + 1] += 1
            q += 1
    for n in range(N):
        ptr_N[n + 1] += ptr_N[n]
    return ptr_N, token, latent, value


@njit(cache=True)
def _by_latent(token_P, latent_P, value_P, n_latents):
    P = token_P.shape[0]
    ptr_F = np.zeros(n_latents + 1, np.int64)
    for p in range(P):
        ptr_F[latent_P[p] + 1] += 1
    for f in range(n_latents):
        ptr_F[f + 1] += ptr_F[f]
    at_F = ptr_F[:-1].copy()
    token = np.empty(P, token_P.dtype)
    value = np.empty(P, value_P.dtype)
    source = np.empty(P, np.int64)
    for p in range(P):
        q = at_F[latent_P[p]]
        at_F[latent_P[p]] += 1
        token[q] = token_P[p]
        value[q] = value_P[p]
        source[q] = p
    return ptr_F, token, value, source


@njit(parallel=True, cache=True)
def _critical(ptr_F, token_Q, value_Q, source_Q, start_N, release, critical_P):
    for f in prange(ptr_F.shape[0] - 1):
        before = value_Q.dtype.type(0)
        last = -2
        for q in range(ptr_F[f], ptr_F[f + 1]):
            t = token_Q[q]
            follows = t == last + 1 and start_N[t] != t
            value = value_Q[q]
            before = max(value, min(before, value / release)) if follows else value
            critical_P[source_Q[q]] = before
            last = t


@njit(parallel=True, cache=True, fastmath=FAST)
def _decode(ptr_N, latent_P, value_P, ends_G, weights_G, W_dec_FD, b_dec_D, x_ND, valid_N, pull_GND, squared_GN):
    N, D = x_ND.shape
    G = ends_G.shape[0]
    for n in prange(N):
        if not valid_N[n]:
            pull_GND[:, n] = 0
            squared_GN[:, n] = 0
            continue
        x_D = x_ND[n]
        p = ptr_N[n]
        for g in range(G):
            r_D = pull_GND[g, n]
            for d in range(D):
                r_D[d] = b_dec_D[d] - x_D[d] if g == 0 else pull_GND[g - 1, n, d]
            while p < ptr_N[n + 1] and latent_P[p] < ends_G[g]:
                a = value_P[p]
                w_D = W_dec_FD[latent_P[p]]
                for d in range(D):
                    r_D[d] += a * w_D[d]
                p += 1
            total = r_D[0] * r_D[0]
            for d in range(1, D):
                total += r_D[d] * r_D[d]
            squared_GN[g, n] = total
        if G > 1:  # a latent of group g is part of every reconstruction from g on
            for d in range(D):
                pull = weights_G[G - 1] * pull_GND[G - 1, n, d]
                pull_GND[G - 1, n, d] = pull
                for g in range(G - 2, -1, -1):
                    pull += weights_G[g] * pull_GND[g, n, d]
                    pull_GND[g, n, d] = pull


@njit(parallel=True, cache=True, fastmath=FAST)
def _gradients(
    x_ND,
    pull_GND,
    ends_G,
    scale,
    W_dec_FD,
    ptr_F,
    token_Q,
    value_Q,
    extra_Q,
    cuts_T,
    seeded_F,
    gW_enc_FD,
    gW_dec_FD,
    gb_enc_F,
    squared_F,
):
    D = x_ND.shape[1]
    for part in prange(cuts_T.shape[0] - 1):
        for f in range(cuts_T[part], cuts_T[part + 1]):
            group = 0
            while ends_G[group] <= f:
                group += 1
            pull_ND = pull_GND[group]
            g_enc_D = gW_enc_FD[f]
            g_dec_D = gW_dec_FD[f]
            w_D = W_dec_FD[f]
            if not seeded_F[f]:
                g_enc_D[:] = 0
                g_dec_D[:] = 0
                gb_enc_F[f] = 0
            g_bias = gb_enc_F[f]
            for q in range(ptr_F[f], ptr_F[f + 1]):
                r_D = pull_ND[token_Q[q]]
                x_D = x_ND[token_Q[q]]
                dot = w_D[0] * r_D[0]
                for d in range(1, D):
                    dot += w_D[d] * r_D[d]
                a = value_Q[q] * scale
                g = dot * scale + extra_Q[q]
                g_bias += g
                for d in range(D):
                    g_dec_D[d] += a * r_D[d]
                    g_enc_D[d] += g * x_D[d]
            gb_enc_F[f] = g_bias
            radial = g_dec_D[0] * w_D[0]  # rows stay on the unit sphere: only the tangential part moves them
            for d in range(1, D):
                radial += g_dec_D[d] * w_D[d]
            total = g_bias * g_bias
            for d in range(D):
                g_dec_D[d] -= radial * w_D[d]
                total += g_dec_D[d] * g_dec_D[d] + g_enc_D[d] * g_enc_D[d]
            squared_F[f] = total


@njit(parallel=True, cache=True, fastmath=FAST)
def _adam(w_FD, m_FD, v_FD, g_FD, clip, lr, beta1, beta2, eps, correct1, correct2, unit_rows):
    F, D = w_FD.shape
    one = w_FD.dtype.type(1)
    for f in prange(F):
        w_D = w_FD[f]
        m_D = m_FD[f]
        v_D = v_FD[f]
        g_D = g_FD[f]
        for d in range(D):
            g = g_D[d] * clip
            m = beta1 * m_D[d] + (one - beta1) * g
            v = beta2 * v_D[d] + (one - beta2) * g * g
            m_D[d] = m
            v_D[d] = v
            w_D[d] -= lr * (m * correct1) / (np.sqrt(v * correct2) + eps)
        if unit_rows:
            total = w_D[0] * w_D[0]
            for d in range(1, D):
                total += w_D[d] * w_D[d]
            inverse = one / np.sqrt(total)
            for d in range(D):
                w_D[d] *= inverse


def scan(pre_NF: Array, valid_N: Array, floor_N: Array, expected: int) -> tuple[Array, Array]:
    """Pairs (token_P, latent_P) with pre_NF > floor_N on valid tokens, in token order.

    pre_NF may be any ordered type: float32, float64, or the bits of bfloat16 as int16 (for positive numbers their order
    is the numbers' order, and negative numbers stay below every positive one).
    """
    return scan_with(_scan, pre_NF, valid_N, floor_N, expected)


def scan_with(
    kernel: Callable[..., None], pre_NF: Array, valid_N: Array, floor: Array, expected: int
) -> tuple[Array, Array]:
    """Run a scanning kernel with room for `expected` pairs, and with more until they all fit."""
    N, F = pre_NF.shape
    n_parts = numba.get_num_threads()
    capacity = expected // n_parts + F
    while True:
        token = np.empty(n_parts * capacity, np.int32)
        latent = np.empty(n_parts * capacity, np.int32)
        count_T = np.empty(n_parts, np.int64)
        kernel(pre_NF, valid_N, floor, token, latent, count_T)
        if (count_T >= 0).all():
            spans = [slice(t * capacity, t * capacity + count_T[t]) for t in range(n_parts)]
            return np.concatenate([token[s] for s in spans]), np.concatenate([latent[s] for s in spans])
        capacity = min(2 * capacity, ((N + n_parts - 1) // n_parts + 1) * F)


def row_floors(pre_NF: Array, valid_N: Array, k: int) -> Array:
    """A floor for each token, at or below its k-th largest pre-activation and never below zero (by sampling,
    verified)."""
    floor_N = np.zeros(pre_NF.shape[0], pre_NF.dtype)
    stride = min(8, max(1, pre_NF.shape[1] // 64))
    _row_floors(pre_NF, valid_N, k, stride, pre_NF.dtype.type(0), floor_N)
    return floor_N


def critical_thresholds(
    start_N: Array, token_P: Array, latent_P: Array, value_P: Array, n_latents: int, release: float
) -> Array:
    """The highest threshold at which a Schmitt trigger has each pair on; the pairs are given in token order.

    A pair is on at threshold h if value >= h, or if the latent was on at the token before, of the same run (start_N:
    its first token), and value >= release * h. So c_t = max(v_t, min(c_{t-1}, v_t / release)), in one pass, and the
    pairs that are on at h are those with c >= h.
    """
    order = LatentOrder(*_by_latent(token_P, latent_P, value_P, n_latents))
    critical_P = np.empty_like(value_P)
    number = value_P.dtype.type
    _critical(order.ptr_F, order.token_Q, order.value_Q, order.source_Q, start_N, number(release), critical_P)
    return critical_P


def exact_values(x_ND: Array, W_enc_FD: Array, b_enc_F: Array, token_P: Array, latent_P: Array) -> Array:
    """Pre-activations <x_n, W_enc_f> + b_f of the given pairs in the weights' own precision."""
    value_P = np.empty(token_P.shape[0], x_ND.dtype)
    _exact_values(x_ND, W_enc_FD, b_enc_F, token_P, latent_P, value_P)
    return value_P


def keep_batch_top(value_P: Array, count: int) -> Array:
    """Mask of the `count` largest positive values; ties at the cut go to the earliest pairs."""
    if value_P.shape[0] <= count:
        return value_P > 0
    cut = np.partition(value_P, value_P.shape[0] - count)[value_P.shape[0] - count]
    keep_P = value_P > cut
    ties = np.flatnonzero(value_P == cut)
    keep_P[ties[: count - int(keep_P.sum())]] = True
    return keep_P & (value_P > 0)


def keep_row_top(N: int, token_P: Array, value_P: Array, k: int) -> Array:
    """Mask of each token's k largest positive values; ties at the cut go to the lowest latents."""
    ptr_N = np.searchsorted(token_P, np.arange(N + 1))
    keep_P = np.empty(value_P.shape[0], np.bool_)
    _keep_row_top(ptr_N, value_P, k, keep_P)
    return keep_P


def keep(N: int, token_P: Array, latent_P: Array, value_P: Array, keep_P: Array) -> Pairs:
    """The kept pairs, still in token order."""
    return Pairs(*_filter(N, token_P, latent_P, value_P, keep_P))


def by_latent(pairs: Pairs, n_latents: int) -> LatentOrder:
    """Counting sort of the pairs by latent; tokens stay ascending inside a latent."""
    return LatentOrder(*_by_latent(pairs.token_P, pairs.latent_P, pairs.value_P, n_latents))


def by_token(token_Q: Array, latent_Q: Array, value_Q: Array, N: int) -> Pairs:
    """Pairs in latent order as pairs in token order; latents stay ascending inside a token."""
    ptr_N, latent_P, value_P, source_P = _by_latent(latent_Q, token_Q, value_Q, N)
    return Pairs(ptr_N, token_Q[source_P], latent_P, value_P)


def decode(
    pairs: Pairs, groups: Groups, W_dec_FD: Array, b_dec_D: Array, x_ND: Array, valid_N: Array
) -> tuple[Array, Array]:
    """What pulls on the codes, and the squared error of every nested reconstruction, zero on invalid tokens.

    Reconstruction g uses the latents below ends_G[g]. squared_GN: its ||xhat - x||^2. pull_GND: the sum of
    weights_G * (xhat - x) over the reconstructions that a latent of group g is part of; with one group (weight 1) the
    residual itself.
    """
    pull_GND = np.empty((len(groups.ends_G), *x_ND.shape), x_ND.dtype)
    squared_GN = np.empty(pull_GND.shape[:2], x_ND.dtype)
    _decode(
        pairs.ptr_N,
        pairs.latent_P,
        pairs.value_P,
        groups.ends_G,
        groups.weights_G.astype(x_ND.dtype),
        W_dec_FD,
        b_dec_D,
        x_ND,
        valid_N,
        pull_GND,
        squared_GN,
    )
    return pull_GND, squared_GN


def gradients(
    x_ND: Array,
    pull_GND: Array,
    groups: Groups,
    scale: float,
    W_dec_FD: Array,
    order: LatentOrder,
    extra_Q: Array,
    seeded_F: Array,
    gW_enc_FD: Array,
    gW_dec_FD: Array,
    gb_enc_F: Array,
) -> Array:
    """Gradients of scale/2 * (sum over groups of weight * ||residual||^2) plus the term whose derivative by code q is
    extra_Q, written in place, each decoder row's without its part along the (unit) row; returns their
    squared norms by latent (float64).

    For an active pair the code is its pre-activation, so d/d code = scale * <W_dec_f, pull_n> + extra; that number
    times x_n is the encoder's share, the decoder's is scale * code * pull_n. Inactive latents get zero. Latents in
    seeded_F (bool) start from what the arrays hold for them.
    """
    n_parts = 8 * numba.get_num_threads()  # more parts than threads: latents differ much in how often they fire
    cuts_T = np.searchsorted(order.ptr_F, np.linspace(0, order.ptr_F[-1], n_parts + 1)[1:-1])
    cuts_T = np.concatenate([[0], cuts_T, [order.ptr_F.shape[0] - 1]])
    squared_F = np.empty(W_dec_FD.shape[0])
    _gradients(
        x_ND,
        pull_GND,
        groups.ends_G,
        x_ND.dtype.type(scale),
        W_dec_FD,
        order.ptr_F,
        order.token_Q,
        order.value_Q,
        extra_Q,
        cuts_T,
        seeded_F,
        gW_enc_FD,
        gW_dec_FD,
        gb_enc_F,
        squared_F,
    )
    return squared_F


def adam(
    w_FD: Array, m_FD: Array, v_FD: Array, g_FD: Array, *, clip: float, lr: float, step: int, unit_rows: bool
) -> None:
    """One Adam step in place (Kingma & Ba 2015; beta .9 .999, eps 1e-8) on clip * g; rows renormalised if unit_rows."""
    beta1, beta2 = 0.9, 0.999
    number = w_FD.dtype.type
    _adam(
        w_FD,
        m_FD,
        v_FD,
        g_FD,
        number(clip),
        number(lr),
        number(beta1),
        number(beta2),
        number(1e-8),
        number(1 / (1 - beta1**step)),
        number(1 / (1 - beta2**step)),
        unit_rows,
    )
