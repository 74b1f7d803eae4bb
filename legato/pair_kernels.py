"""Kernels for sparsities whose code is not just the pre-activation: thresholds per latent, gradients per pair.

Deterministic like those of kernels.py: each latent or pair is owned by one thread and summed in a fixed order.

Shape legend: N flat tokens, F latents, D model width, P pairs in token order, Q pairs in latent order, G nested groups.
"""

from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from legato.kernels import FAST, Groups, LatentOrder, scan_with

Array = NDArray[Any]


@njit(parallel=True, cache=True)
def _scan_above(pre_NF, valid_N, floor_F, token, latent, count_T):
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
            for f in range(F):
                latent[p] = f
                p += row[f] > floor_F[f]
            for q in range(first, p):
                token[q] = n
        count_T[part] = -1 if full else p - start


@njit(parallel=True, cache=True, fastmath=FAST)
def _code_gradients(pull_GND, ends_G, scale, W_dec_FD, token_P, latent_P, gradient_P):
    D = W_dec_FD.shape[1]
    for p in prange(token_P.shape[0]):
        group = 0
        while ends_G[group] <= latent_P[p]:
            group += 1
        r_D = pull_GND[group, token_P[p]]
        w_D = W_dec_FD[latent_P[p]]
        dot = w_D[0] * r_D[0]
        for d in range(1, D):
            dot += w_D[d] * r_D[d]
        gradient_P[p] = dot * scale


@njit(parallel=True, cache=True, fastmath=FAST)
def _add_rows(source_GND, ends_G, ptr_F, token_Q, weight_Q, cuts_T, seeded_F, tangent, unit_FD, out_FD, squared_F):
    D = out_FD.shape[1]
    for part in prange(cuts_T.shape[0] - 1):
        for f in range(cuts_T[part], cuts_T[part + 1]):
            group = 0
            while ends_G[group] <= f:
                group += 1
            out_D = out_FD[f]
            if not seeded_F[f]:
                out_D[:] = 0
            for q in range(ptr_F[f], ptr_F[f + 1]):
                a = weight_Q[q]
                s_D = source_GND[group, token_Q[q]]
                for d in range(D):
                    out_D[d] += a * s_D[d]
            if tangent:
                w_D = unit_FD[f]
                radial = out_D[0] * w_D[0]
                for d in range(1, D):
                    radial += out_D[d] * w_D[d]
                for d in range(D):
                    out_D[d] -= radial * w_D[d]
            total = out_D[0] * out_D[0]
            for d in range(1, D):
                total += out_D[d] * out_D[d]
            squared_F[f] = total


def scan_above(pre_NF: Array, valid_N: Array, floor_F: Array, expected: int) -> tuple[Array, Array]:
    """Pairs (token_P, latent_P) with pre_NF > floor_F on valid tokens, in token order; types as for kernels.scan."""
    return scan_with(_scan_above, pre_NF, valid_N, floor_F, expected)


def code_gradients(
    pull_GND: Array, groups: Groups, scale: float, W_dec_FD: Array, token_P: Array, latent_P: Array
) -> Array:
    """Derivative of scale/2 * (sum over groups of weight * ||residual||^2) by the codes of any pairs, active or not."""
    gradient_P = np.empty(token_P.shape[0], W_dec_FD.dtype)
    number = W_dec_FD.dtype.type(scale)
    _code_gradients(pull_GND, groups.ends_G, number, W_dec_FD, token_P, latent_P, gradient_P)
    return gradient_P


def add_rows(
    source_GND: Array,
    ends_G: Array,
    order: LatentOrder,
    weight_Q: Array,
    seeded_F: Array,
    out_FD: Array,
    unit_FD: Array | None = None,
) -> Array:
    """out_f = sum of weight_q * source[group of f, token of q] over the pairs of latent f, written in place; returns
    its squared norms by latent (float64).

    Latents in seeded_F (bool) start from what out_FD holds for them. unit_FD: leave out the part along these rows.
    """
    n_parts = 8 * numba.get_num_threads()
    cuts_T = np.searchsorted(order.ptr_F, np.linspace(0, order.ptr_F[-1], n_parts + 1)[1:-1])
    cuts_T = np.concatenate([[0], cuts_T, [order.ptr_F.shape[0] - 1]])
    squared_F = np.empty(out_FD.shape[0])
    tangent = unit_FD is not None
    unit = out_FD if unit_FD is None else unit_FD
    _add_rows(
        source_GND, ends_G, order.ptr_F, order.token_Q, weight_Q, cuts_T, seeded_F, tangent, unit, out_FD, squared_F
    )
    return squared_F


def sum_by_latent(latent_P: Array, value_P: Array, n_latents: int) -> Array:
    """Sums of the pairs' values by latent, in float64."""
    return np.bincount(latent_P, weights=value_P, minlength=n_latents)
