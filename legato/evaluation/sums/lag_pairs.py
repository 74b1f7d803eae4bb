"""Valid positions and pairs of a batch, and its codes by latent: the input of every metric along the sequence.

Shape legend: B rows (contexts), L positions, F latents, K lags, N flat tokens (b * L + t), P active pairs, S stretches
(the part of one document that lies in one row).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.common.errors import UsageError
from legato.sae.codes import SparseCodes
from legato.sae.kernels.pairs import PairsByLatent, sort_by_latent

DEFAULT_LAGS = (1, 2, 4, 8, 16, 32, 64)
MAX_LAGS = 64  # one bit per lag in a 64-bit word

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_lags(lags: Sequence[int]) -> tuple[int, ...]:
    """Return the lags as a tuple of increasing positive integers; raise UsageError otherwise."""
    lags = tuple(int(lag) for lag in lags)
    if not lags or lags[0] < 1 or any(b <= a for a, b in pairwise(lags)) or len(lags) > MAX_LAGS:
        raise UsageError(f"lags must be 1 to {MAX_LAGS} increasing positive integers, not {list(lags)}")
    return lags


@dataclass(frozen=True)
class LagPairs:
    """Places of the valid positions and pairs of one batch, shared by all that is measured on the batch.

    A pair (t, t + lag) is valid if both ends are valid and of the same document in the same row.
    shape: (B, L).  stretch_N: stretch of each token, -1 where the token is not valid.  left_N / right_N: bit k is set
    where the token is the left / right end of a valid pair at lags[k].  size_S: valid tokens of a stretch.  pairs_SK:
    its valid pairs.  tokens_L: valid tokens by position.  pairs_KL: valid pairs by position of their left end.
    """

    lags: tuple[int, ...]
    shape: tuple[int, int]
    stretch_N: NDArray[np.int32]
    left_N: NDArray[np.uint64]
    right_N: NDArray[np.uint64]
    size_S: Ints
    pairs_SK: Ints
    tokens_L: Ints
    pairs_KL: Ints

    @classmethod
    def of(cls, mask_BL: Tensor, doc_BL: Tensor | None = None, lags: Sequence[int] = DEFAULT_LAGS) -> "LagPairs":
        """Lay out a batch.  mask_BL: True where a position is valid.  doc_BL: document numbers; None: one per row.

        Raises UsageError for lags that are not 1 to 64 increasing positive integers, ValueError for other shapes.
        """
        lags = check_lags(lags)
        doc_BL = torch.zeros(mask_BL.shape) if doc_BL is None else doc_BL
        if mask_BL.dim() != 2 or mask_BL.shape != doc_BL.shape:
            raise ValueError(f"mask and doc must both be [B, L], not {list(mask_BL.shape)} and {list(doc_BL.shape)}")
        mask = np.ascontiguousarray(mask_BL.detach().cpu().numpy().astype(np.bool_))
        doc = np.ascontiguousarray(doc_BL.detach().cpu().numpy().astype(np.int64))
        stretch_N, left_N, right_N, size_S, pairs_SK, pairs_KL = _lay_out(mask, doc, np.asarray(lags, np.int64))
        B, L = mask_BL.shape
        return cls(lags, (B, L), stretch_N, left_N, right_N, size_S, pairs_SK, mask.sum(0), pairs_KL)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_L.sum())

    def valid_rows(self) -> int:
        """Count rows with at least one valid position."""
        return int((self.stretch_N.reshape(self.shape) >= 0).any(1).sum())


@numba.njit(cache=True)
def _lay_out(mask, doc, lags):  # type: ignore[no-untyped-def]
    B, L = mask.shape
    K = lags.size
    stretch = np.full(B * L, -1, np.int32)
    n_stretches = 0
    for b in range(B):
        last_doc = np.int64(0)
        started = False
        for t in range(L):
            if mask[b, t]:
                if not started or doc[b, t] != last_doc:
                    n_stretches += 1
                started = True
                last_doc = doc[b, t]
                stretch[b * L + t] = n_stretches - 1
    left = np.zeros(B * L, np.uint64)
    right = np.zeros(B * L, np.uint64)
    size = np.zeros(n_stretches, np.int64)
    pairs_SK = np.zeros((n_stretches, K), np.int64)
    pairs_KL = np.zeros((K, L), np.int64)
    for b in range(B):
        for t in range(L):
            token = b * L + t
            s = stretch[token]
            if s < 0:
                continue
            size[s] += 1
            for k in range(K):
                if t + lags[k] < L and stretch[token + lags[k]] == s:
                    bit = np.uint64(1) << np.uint64(k)
                    left[token] |= bit
                    right[token + lags[k]] |= bit
                    pairs_SK[s, k] += 1
                    pairs_KL[k, t] += 1
    return stretch, left, right, size, pairs_SK, pairs_KL


def step_norms(acts_BLD: Tensor) -> Tensor:
    """Compute ||x_t - x_{t-1}||, [B, L] float32, 0 at the first position."""
    acts_BLD = acts_BLD.float()
    step_BL = acts_BLD.new_zeros(acts_BLD.shape[:2])
    step_BL[:, 1:] = (acts_BLD[:, 1:] - acts_BLD[:, :-1]).norm(dim=-1)
    return step_BL


def pairs_by_latent(codes: SparseCodes, layout: LagPairs) -> PairsByLatent:
    """Sort the active pairs of a batch by latent, by token within a latent, in O(P + F).

    Pairs at positions that are not valid are dropped. ValueError if the codes are of another [B, L] than the layout.
    """
    if codes.shape[:2] != layout.shape:
        raise ValueError(f"codes are {codes.shape[:2]} rows x positions, the mask is {layout.shape}")
    token_P, latent_P = codes.token_P.detach().cpu().numpy(), codes.latent_P.detach().cpu().numpy()
    value_P = codes.value_P.detach().float().cpu().numpy()
    valid_P = layout.stretch_N[token_P] >= 0
    if not valid_P.all():
        token_P, latent_P, value_P = token_P[valid_P], latent_P[valid_P], value_P[valid_P]
    return sort_by_latent(token_P.astype(np.int32, copy=False), latent_P, value_P, codes.shape[2])
