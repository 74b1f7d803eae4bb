"""Neighbours of a latent: latents of similar decoder direction, and latents that fire with it.

Shape legend: F latents, G latents of the other SAE, D width, K kept, N positions, P active pairs ordered by latent.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent

ROWS_AT_ONCE = 512
FEWEST_TOGETHER = 3
MOST_STEPS = 500_000_000  # of the loop over pairs that fire together


@dataclass(frozen=True)
class OtherSAE:
    """Another arm, in which to find each latent's nearest latent. alive_F: latents that fire."""

    W_dec: Tensor
    alive_F: NDArray[np.bool_]


@torch.no_grad()
def nearest_directions(
    W_dec: Tensor, alive_F: NDArray[np.bool_], other: OtherSAE | None, *, k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the latents of the other SAE (None: of the same one, itself left out) with the largest decoder cosine.

    Index and cosine [F, k], largest first; -1 and 0 for latents that are not alive and past the last candidate. Only
    latents that are alive are candidates. Memory: O(ROWS_AT_ONCE G).
    """
    own_FD = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=1)
    their_GD = own_FD if other is None else torch.nn.functional.normalize(other.W_dec.detach().float().cpu(), dim=1)
    candidates = torch.from_numpy(np.flatnonzero(alive_F if other is None else other.alive_F))
    rows = torch.from_numpy(np.flatnonzero(alive_F))
    index_FK = np.full((len(W_dec), k), -1, np.int32)
    cosine_FK = np.zeros((len(W_dec), k), np.float32)
    k = min(k, len(candidates) - (other is None))
    if k < 1:
        return index_FK, cosine_FK
    their_DC = their_GD[candidates].T.contiguous()
    for part in rows.split(ROWS_AT_ONCE):
        cosine_RC = own_FD[part] @ their_DC
        if other is None:
            cosine_RC[torch.arange(len(part)), torch.searchsorted(candidates, part)] = -torch.inf
        best = cosine_RC.topk(k, dim=1)
        index_FK[part.numpy(), :k] = candidates[best.indices].numpy()
        cosine_FK[part.numpy(), :k] = best.values.numpy()
    return index_FK, cosine_FK


def coactivation(order: PairsByLatent, n_positions: int, *, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the latents that share most positions with a latent: index and Jaccard index of the two sets, [F, k] each.

    Pairs that share fewer than FEWEST_TOGETHER positions are left out (-1 and 0). Cost: the sum over positions of L0^2;
    where that is more than MOST_STEPS, only every s-th position is counted, with the smallest s that is enough.
    """
    steps = float((np.bincount(order.token_Q, minlength=n_positions).astype(np.float64) ** 2).sum())
    stride = max(1, int(np.ceil(steps / MOST_STEPS)))
    latent_P = np.repeat(np.arange(order.n_latents, dtype=np.int32), np.diff(order.ptr_F))
    counted_P = order.token_Q % stride == 0
    token_P, latent_P = order.token_Q[counted_P], latent_P[counted_P]
    by_token = np.argsort(token_P, kind="stable")
    start_N = np.concatenate([[0], np.cumsum(np.bincount(token_P, minlength=n_positions))])
    start_F = np.concatenate([[0], np.cumsum(np.bincount(latent_P, minlength=order.n_latents))])
    index_FK = np.full((order.n_latents, k), -1, np.int32)
    jaccard_FK = np.zeros((order.n_latents, k), np.float32)
    _count_together(start_F, token_P, start_N, latent_P[by_token], index_FK, jaccard_FK)
    return index_FK, jaccard_FK


@numba.njit(cache=True, parallel=True)
def _count_together(start_F, token_P, start_N, latent_Q, index_FK, jaccard_FK):  # type: ignore[no-untyped-def]
    F, K = index_FK.shape
    for i in numba.prange(F):
        own = start_F[i + 1] - start_F[i]
        if own < FEWEST_TOGETHER:
            continue
        both_F = np.zeros(F, np.int32)
        for p in range(start_F[i], start_F[i + 1]):
            for q in range(start_N[token_P[p]], start_N[token_P[p] + 1]):
                both_F[latent_Q[q]] += 1
        for j in range(F):
            if j == i or both_F[j] < FEWEST_TOGETHER:
                continue
            jaccard = both_F[j] / (own + start_F[j + 1] - start_F[j] - both_F[j])
            if jaccard <= jaccard_FK[i, K - 1]:
                continue
            at = K - 1
            while at > 0 and jaccard_FK[i, at - 1] < jaccard:
                jaccard_FK[i, at] = jaccard_FK[i, at - 1]
                index_FK[i, at] = index_FK[i, at - 1]
                at -= 1
            jaccard_FK[i, at] = jaccard
            index_FK[i, at] = j
