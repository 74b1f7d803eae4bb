"""Dependence of codes on the position in the context: variance explained, mutual information, profiles, the matrix.

Shape legend: B rows, L positions, F latents, P active pairs, G groups of latents.
"""

from typing import Any

import numba
import numpy as np

from legato.evaluation.consistency.persistence import finite_or_none, mean
from legato.evaluation.sums.accumulators import CodeSums, share_between_groups
from legato.evaluation.sums.lag_pairs import Floats, LagPairs
from legato.sae.kernels.pairs import PairsByLatent

Z95 = 1.959963984540054
FIRST_POSITIONS = 2  # shown apart: models treat the first tokens of a context in their own way
MATRIX_GROUPS = 64  # fixed number of partial sums, so the result does not depend on the number of threads


def eta2(sums: CodeSums) -> Floats:
    """Compute Var_t(E[f | t]) / Var(f), the share of a latent's variance explained by position, bias-corrected.

    The mean is 0 where position does not matter, so single values may be slightly negative. NaN where the latent does
    not vary.
    """
    seen_L = sums.counts.tokens_L > 0
    squares_F = (sums.value.at_FL[:, seen_L] ** 2 / sums.counts.tokens_L[seen_L]).sum(1)
    return share_between_groups(sums, squares_F, float(seen_L.sum()))


def mutual_information(sums: CodeSums) -> Floats:
    """Compute the mutual information of firing (on / off) and position in nats, Miller-Madow corrected.

    Plug-in estimate less (m_joint - m_firing - m_position + 1) / (2 N), m = number of cells seen (Miller 1955). May be
    slightly negative. 0 for a latent that never fires or never stops.
    """
    n = sums.counts.n_tokens
    seen_L = sums.counts.tokens_L > 0
    tokens_T = sums.counts.tokens_L[seen_L]
    on_FT = sums.firing.at_FL[:, seen_L]
    off_FT = tokens_T - on_FT
    on_F = sums.firing.total_F
    firing_entropy_F = _entropy(np.stack([on_F, n - on_F], 1) / n)
    position_entropy = _entropy(tokens_T[None] / n)[0]
    plug_in_F = firing_entropy_F + position_entropy - _entropy(on_FT / n) - _entropy(off_FT / n)
    cells_F = (on_FT > 0).sum(1) + (off_FT > 0).sum(1)
    firing_cells_F = (on_F > 0).astype(int) + (on_F < n)
    return plug_in_F - (cells_F - firing_cells_F - tokens_T.size + 1) / (2.0 * n)


def _entropy(p_XY: Floats) -> Floats:
    """Sum -p log p over the last axis."""
    return -(p_XY * np.log(np.where(p_XY > 0, p_XY, 1.0))).sum(1)


def position_profile(sums: CodeSums) -> tuple[Floats, Floats, Floats]:
    """Return each latent's firing rate at each position with its 95 % Wilson interval: (rate_FL, low_FL, high_FL).

    NaN at positions where no token is valid.
    """
    n_L = np.where(sums.counts.tokens_L > 0, sums.counts.tokens_L, np.nan)
    rate_FL = sums.firing.at_FL / n_L
    return rate_FL, *wilson(rate_FL, n_L)


def wilson(rate: Floats, n: Floats) -> tuple[Floats, Floats]:
    """Compute the 95 % Wilson interval (low, high) of a rate seen in n trials, element by element."""
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return centre - half, centre + half


def l0_by_position(sums: CodeSums) -> tuple[Floats, Floats, Floats]:
    """Return mean L0 by position with a 95 % normal interval: (mean_L, low_L, high_L); NaN where no token is valid."""
    n_L = np.where(sums.counts.tokens_L > 0, sums.counts.tokens_L, np.nan)
    mean_L = sums.l0_L / n_L
    half_L = Z95 * np.sqrt(np.maximum(sums.l0_square_L / n_L - mean_L**2, 0.0) / n_L)
    return mean_L, mean_L - half_L, mean_L + half_L


def position_features(sums: CodeSums) -> dict[str, np.ndarray]:
    """Return per-latent columns: eta2, mi (nats), firing rate at positions 0 and 1 (NaN where nothing is valid)."""
    rate_FL, _, _ = position_profile(sums)
    first = {f"rate_position{t}": rate_FL[:, t] for t in range(min(FIRST_POSITIONS, rate_FL.shape[1]))}
    return {"eta2": eta2(sums), "mi": mutual_information(sums), **first}


def position_metrics(sums: CodeSums) -> dict[str, Any]:
    """Average over alive latents; keys as in metrics.json. None where undefined."""
    count_F = sums.firing.total_F
    alive_F = count_F > 0
    eta2_F, mi_F = eta2(sums), mutual_information(sums)
    mean_L, low_L, high_L = l0_by_position(sums)
    return {
        "eta2_mean": mean(eta2_F, alive_F),
        "eta2_weighted": mean(eta2_F, alive_F, count_F),
        "mi_mean": mean(mi_F, alive_F),
        "mi_weighted": mean(mi_F, alive_F, count_F),
        "l0_by_position": [finite_or_none(v) for v in mean_L],
        "l0_by_position_low": [finite_or_none(v) for v in low_L],
        "l0_by_position_high": [finite_or_none(v) for v in high_L],
        "first_positions": [
            {"position": t, "tokens": int(sums.counts.tokens_L[t]), "l0": finite_or_none(mean_L[t])}
            for t in range(min(FIRST_POSITIONS, mean_L.size))
        ],
        "l0_elsewhere": finite_or_none(
            sums.l0_L[FIRST_POSITIONS:].sum() / (sums.counts.tokens_L[FIRST_POSITIONS:].sum() or np.nan)
        ),
    }


def position_matrix(layout: LagPairs, order: PairsByLatent) -> Floats:
    """Compute M[t, t'] = mean over latents of corr over rows of (f_t, f_t'), [L, L].

    Rows count where t and t' are both valid and of one document. A latent counts where it varies at t and at t' over
    those rows. NaN where no latent does. Cost O(P L + F L^2), memory O(L^2).
    """
    B, L = layout.shape
    stretch_BL = layout.stretch_N.reshape(B, L)
    rows_LL = _paired_rows(stretch_BL)
    upper = (sums.sum(0) for sums in _matrix_sums(order.ptr_F, order.token_Q, order.value_Q, stretch_BL, rows_LL))
    sum_LL, latents_LL = (upper_LL + np.triu(upper_LL, 1).T for upper_LL in upper)
    with np.errstate(invalid="ignore"):
        return sum_LL / np.where(latents_LL > 0, latents_LL, np.nan)


@numba.njit(cache=True)
def _paired_rows(stretch_BL):  # type: ignore[no-untyped-def]
    B, L = stretch_BL.shape
    rows = np.zeros((L, L))
    for b in range(B):
        for t in range(L):
            if stretch_BL[b, t] >= 0:
                for u in range(L):
                    if stretch_BL[b, u] == stretch_BL[b, t]:
                        rows[t, u] += 1.0
    return rows


@numba.njit(cache=True, parallel=True)
def _matrix_sums(start_F, token_P, value_P, stretch_BL, rows_LL):  # type: ignore[no-untyped-def]
    L = rows_LL.shape[0]
    n_latents = start_F.size - 1
    sum_GLL = np.zeros((MATRIX_GROUPS, L, L))
    latents_GLL = np.zeros((MATRIX_GROUPS, L, L))
    for g in numba.prange(MATRIX_GROUPS):
        product = np.zeros((L, L))
        total = np.zeros((L, L))  # total[t, u]: sum of f_t over the rows where (t, u) is a pair
        square = np.zeros((L, L))
        for i in range(g, n_latents, MATRIX_GROUPS):
            begin, end = start_F[i], start_F[i + 1]
            if begin == end:
                continue
            product[:] = 0.0
            total[:] = 0.0
            square[:] = 0.0
            for j in range(begin, end):
                row = token_P[j] // L
                t = token_P[j] % L
                f = np.float64(value_P[j])
                stretch = stretch_BL[row, t]
                for u in range(L):
                    if stretch_BL[row, u] == stretch:
                        total[t, u] += f
                        square[t, u] += f * f
                other = j
                while other < end and token_P[other] // L == row:
                    u = token_P[other] % L
                    if stretch_BL[row, u] == stretch:
                        product[t, u] += f * np.float64(value_P[other])
                    other += 1
            for t in range(L):
                for u in range(t, L):
                    n = rows_LL[t, u]
                    if n < 2.0 or total[t, u] == 0.0 or total[u, t] == 0.0:
                        continue
                    variance_t = square[t, u] - total[t, u] * total[t, u] / n
                    variance_u = square[u, t] - total[u, t] * total[u, t] / n
                    if variance_t > 1e-12 * square[t, u] and variance_u > 1e-12 * square[u, t]:
                        covariance = product[t, u] - total[t, u] * total[u, t] / n
                        sum_GLL[g, t, u] += covariance / np.sqrt(variance_t * variance_u)
                        latents_GLL[g, t, u] += 1.0
    return sum_GLL, latents_GLL
