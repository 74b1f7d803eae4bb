"""The exact sparse training step on a CPU: dense work only in the encoder's matmul, everything else on active latents.

All loops are deterministic: tokens (or latents) are owned by one thread each and summed in a fixed order, whatever the
number of threads. The kernels take numpy views of torch tensors; float32 in training, float64 in the exactness tests.

Shape legend: N flat tokens, F latents, D model width, P active pairs in token order (CSR: ptr over N), Q the same pairs
in latent order (CSC: ptr over F), G nested groups.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[Any]

# No "nnan"/"ninf": a NaN must stay one, so that the guards in training see it. No "nsz": with it LLVM orders a sum anew
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


class PairsByLatent(NamedTuple):
    """Pairs sorted by latent, tokens ascending: pair q of latent f lies in ptr_F[f]:ptr_F[f+1].

    source_Q maps back: value_Q[q] == value_P[source_Q[q]].
    """

    ptr_F: Array
    token_Q: Array
    value_Q: Array
    source_Q: Array

    @property
    def n_latents(self) -> int:
        return len(self.ptr_F) - 1


@njit(parallel=True, cache=True)
def _scan(pre_NF, valid_N, floor, by_latent, token, latent, count_T):
    """floor: of each latent, or of each token. count_T: the pairs that each part found, -1 where its room is full."""
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
            first = p
            if by_latent:
                for f in range(F):  # branch-free compaction: about one cycle a latent
                    latent[p] = f
                    p += row[f] > floor[f]
            else:
                floor_of_token = floor[n]
                for f in range(F):
                    latent[p] = f
                    p += row[f] > floor_of_token
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
def row_floors(pre_NF: Array, valid_N: Array, k: int) -> Array:
    """A floor for each token, at or below its k-th largest pre-activation and never below zero (by sampling,
    verified)."""
    N, F = pre_NF.shape
    zero = pre_NF.dtype.type(0)
    floor_N = np.zeros(N, pre_NF.dtype)
    stride = min(8, max(1, F // 64))
    rank = min((2 * k) // stride + 4, F // stride - 1)
    for n in prange(N):
        if valid_N[n]:
            guess = kth_largest(pre_NF[n, ::stride].copy(), rank + 1)
            above = 0
            for f in range(F):
                above += pre_NF[n, f] > guess
            floor_N[n] = guess if above >= k and guess > zero else zero
    return floor_N


@njit(parallel=True, cache=True, fastmath=FAST)
def exact_values(x_ND: Array, W_enc_FD: Array, b_enc_F: Array, token_P: Array, latent_P: Array) -> Array:
    """Pre-activations <x_n, W_enc_f> + b_f of the given pairs in the weights' own precision."""
    D = x_ND.shape[1]
    value_P = np.empty(token_P.shape[0], x_ND.dtype)
    for p in prange(token_P.shape[0]):
        x_D = x_ND[token_P[p]]
        w_D = W_enc_FD[latent_P[p]]
        total = b_enc_F[latent_P[p]]
        for d in range(D):
            total += x_D[d] * w_D[d]
        value_P[p] = total
    return value_P


@njit(parallel=True, cache=True)
def keep_row_top(N: int, token_P: Array, value_P: Array, k: int) -> Array:
    """Mask of each token's k largest positive values; ties at the cut go to the lowest latents."""
    ptr_N = np.searchsorted(token_P, np.arange(N + 1))
    keep_P = np.empty(value_P.shape[0], np.bool_)
    for n in prange(N):
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
    return keep_P


@njit(cache=True)
def keep(N: int, token_P: Array, latent_P: Array, value_P: Array, keep_P: Array) -> Pairs:
    """The kept pairs, still in token order."""
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
    return Pairs(ptr_N, token, latent, value)


@njit(cache=True)
def sort_by_latent(token_P: Array, latent_P: Array, value_P: Array, n_latents: int) -> PairsByLatent:
    """Counting sort of the pairs by latent; tokens stay ascending inside a latent."""
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
    return PairsByLatent(ptr_F, token, value, source)


def scan(pre_NF: Array, valid_N: Array, floor: Array, expected: int, *, by_latent: bool = False) -> tuple[Array, Array]:
    """Pairs (token_P, latent_P) with pre_NF above the floor on valid tokens, in token order.

    pre_NF may be any ordered type: float32, float64, or the bits of bfloat16 as int16 (for positive numbers their order
    is the numbers' order, and negative numbers stay below every positive one). floor: of each token, or by_latent of
    each latent, in the same type. expected: pairs to have room for at first; there is more until they all fit.
    """
    N, F = pre_NF.shape
    n_parts = numba.get_num_threads()
    capacity = expected // n_parts + F
    while True:
        token = np.empty(n_parts * capacity, np.int32)
        latent = np.empty(n_parts * capacity, np.int32)
        count_T = np.empty(n_parts, np.int64)
        _scan(pre_NF, valid_N, floor, by_latent, token, latent, count_T)
        if (count_T >= 0).all():
            spans = [slice(t * capacity, t * capacity + count_T[t]) for t in range(n_parts)]
            return np.concatenate([token[s] for s in spans]), np.concatenate([latent[s] for s in spans])
        capacity = min(2 * capacity, ((N + n_parts - 1) // n_parts + 1) * F)


def keep_batch_top(value_P: Array, count: int) -> Array:
    """Mask of the `count` largest positive values; ties at the cut go to the earliest pairs."""
    if value_P.shape[0] <= count:
        return value_P > 0
    cut = np.partition(value_P, value_P.shape[0] - count)[value_P.shape[0] - count]
    keep_P = value_P > cut
    ties = np.flatnonzero(value_P == cut)
    keep_P[ties[: count - int(keep_P.sum())]] = True
    return keep_P & (value_P > 0)


def by_latent(pairs: Pairs, n_latents: int) -> PairsByLatent:
    """`sort_by_latent` of pairs."""
    return sort_by_latent(pairs.token_P, pairs.latent_P, pairs.value_P, n_latents)


def by_token(token_Q: Array, latent_Q: Array, value_Q: Array, N: int) -> Pairs:
    """Pairs in latent order as pairs in token order; latents stay ascending inside a token."""
    ptr_N, latent_P, value_P, source_P = sort_by_latent(latent_Q, token_Q, value_Q, N)
    return Pairs(ptr_N, token_Q[source_P], latent_P, value_P)
