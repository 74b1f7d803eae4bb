"""Kernels for architectures whose code is not just the pre-activation: thresholds per latent, gradients per pair.

Deterministic like those of pairs.py: each latent or pair is owned by one thread and summed in a fixed order.

Shape legend: N flat tokens, F latents, D model width, P pairs in token order, Q pairs in latent order, G nested groups.
"""

import numba
import numpy as np
from numba import njit, prange

from legato.sae.kernels.pairs import FAST, Array, Groups, Pairs, PairsByLatent


@njit(parallel=True, cache=True, fastmath=FAST)
def code_gradients(
    pull_GND: Array, groups: Groups, scale: float, W_dec_FD: Array, token_P: Array, latent_P: Array
) -> Array:
    """Derivative of scale/2 * (sum over groups of weight * ||residual||^2) by the codes of any pairs, active or not."""
    D = W_dec_FD.shape[1]
    ends_G = groups.ends_G
    factor = W_dec_FD.dtype.type(scale)
    gradient_P = np.empty(token_P.shape[0], W_dec_FD.dtype)
    for p in prange(token_P.shape[0]):
        group = 0
        while ends_G[group] <= latent_P[p]:
            group += 1
        r_D = pull_GND[group, token_P[p]]
        w_D = W_dec_FD[latent_P[p]]
        dot = w_D[0] * r_D[0]
        for d in range(1, D):
            dot += w_D[d] * r_D[d]
        gradient_P[p] = dot * factor
    return gradient_P


@njit(parallel=True, cache=True, fastmath=FAST)
def _add_rows(source_GND, ends_G, order, weight_Q, cuts_T, seeded_F, tangent, unit_FD, out_FD, squared_F):
    D = out_FD.shape[1]
    ptr_F, token_Q, _, _ = order
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


def add_rows(
    source_GND: Array,
    ends_G: Array,
    order: PairsByLatent,
    weight_Q: Array,
    seeded_F: Array,
    out_FD: Array,
    unit_FD: Array | None = None,
) -> Array:
    """out_f = sum of weight_q * source[group of f, token of q] over the pairs of latent f, written in place; returns
    its squared norms by latent (float64).

    Latents in seeded_F (bool) start from what out_FD holds for them. unit_FD: leave out the part along these rows.
    """
    squared_F = np.empty(out_FD.shape[0])
    unit, tangent = out_FD if unit_FD is None else unit_FD, unit_FD is not None
    _add_rows(source_GND, ends_G, order, weight_Q, _shares(order), seeded_F, tangent, unit, out_FD, squared_F)
    return squared_F


def _shares(order: PairsByLatent) -> Array:
    """Cut the latents into shares of about as many pairs: more than threads, as latents differ in how often they
    fire."""
    n_parts = 8 * numba.get_num_threads()
    cuts = np.searchsorted(order.ptr_F, np.linspace(0, order.ptr_F[-1], n_parts + 1)[1:-1])
    return np.concatenate([[0], cuts, [order.n_latents]])


@njit(parallel=True, cache=True, fastmath=FAST)
def decode(
    pairs: Pairs, groups: Groups, W_dec_FD: Array, b_dec_D: Array, x_ND: Array, valid_N: Array
) -> tuple[Array, Array]:
    """Compute the pull on the codes, and the squared error of every nested reconstruction, zero on invalid tokens.

    Reconstruction g uses the latents below ends_G[g]. squared_GN: its ||xhat - x||^2. pull_GND: the sum of
    weights_G * (xhat - x) over the reconstructions that a latent of group g is part of; with one group (weight 1) the
    residual itself.
    """
    N, D = x_ND.shape
    ptr_N, _, latent_P, value_P = pairs
    ends_G, weights_G = groups.ends_G, groups.weights_G.astype(x_ND.dtype)
    G = ends_G.shape[0]
    pull_GND = np.empty((G, N, D), x_ND.dtype)
    squared_GN = np.empty((G, N), x_ND.dtype)
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
    return pull_GND, squared_GN


@njit(parallel=True, cache=True, fastmath=FAST)
def _gradients(
    x_ND, pull_GND, groups, scale, W_dec_FD, order, extra_Q, cuts_T, seeded_F, gW_enc_FD, gW_dec_FD, gb_enc_F, squared_F
):
    ends_G = groups.ends_G
    ptr_F, token_Q, value_Q, _ = order
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
def _adam(w_FD, m_FD, v_FD, g_FD, unit_rows, clip, lr, beta1, beta2, eps, correct1, correct2):
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


def gradients(
    x_ND: Array,
    pull_GND: Array,
    groups: Groups,
    scale: float,
    W_dec_FD: Array,
    order: PairsByLatent,
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
    cuts_T, squared_F = _shares(order), np.empty(W_dec_FD.shape[0])
    factor, out = x_ND.dtype.type(scale), (gW_enc_FD, gW_dec_FD, gb_enc_F, squared_F)
    _gradients(x_ND, pull_GND, groups, factor, W_dec_FD, order, extra_Q, cuts_T, seeded_F, *out)
    return squared_F


def adam(
    w_FD: Array, m_FD: Array, v_FD: Array, g_FD: Array, *, clip: float, lr: float, step: int, unit_rows: bool
) -> None:
    """One Adam step in place (Kingma & Ba 2015; beta .9 .999, eps 1e-8) on clip * g; rows renormalised if unit_rows."""
    beta1, beta2 = 0.9, 0.999
    numbers = (clip, lr, beta1, beta2, 1e-8, 1 / (1 - beta1**step), 1 / (1 - beta2**step))
    _adam(w_FD, m_FD, v_FD, g_FD, unit_rows, *map(w_FD.dtype.type, numbers))
