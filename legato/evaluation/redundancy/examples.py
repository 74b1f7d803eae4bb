"""Examples for a person to look at: contexts with the firing tokens of a pair marked, and the clustered heat map.

Shape legend: L positions, N flat tokens, H latents of the heat map, K lags -W..W.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from legato.evaluation.redundancy.sums import Candidates, CandidateSums, Correlations, LatentSums
from legato.evaluation.sums.lag_pairs import Ints, LagPairs
from legato.sae.kernels.pairs import PairsByLatent

CONTEXTS = 3
BEFORE, AFTER = 8, 3


class Contexts:
    """Texts around the tokens where two latents act.

    `17: of the[ United]₁[ States]₂ of America`: position of the first firing token of interest in its context, then the
    text; a fires at tokens marked 1, b at those marked 2, both at 12.
    """

    def __init__(
        self,
        layout: LagPairs,
        order: PairsByLatent,
        tokens_BL: Ints,
        doc_BL: Tensor,
        decode: Callable[[Sequence[int]], list[str]],
    ) -> None:
        self._length = layout.shape[1]
        self._stretch_N = layout.stretch_N
        self._order = order
        self._tokens_N = tokens_BL.ravel()
        self._doc_N = doc_BL.numpy().ravel()
        self._decode = decode

    def together(self, a: int, b: int, lag: int) -> list[str]:
        """Show the places where f_a(t) f_b(t + lag) is largest, each in another stretch, lag >= 0."""
        (on_a, value_a), (on_b, value_b) = self._firing(a), self._firing(b)
        at, in_a, in_b = np.intersect1d(on_a + lag, on_b, assume_unique=True, return_indices=True)
        same = self._stretch_N[at] == self._stretch_N[at - lag]
        strength = value_a[in_a[same]] * value_b[in_b[same]]
        return [self._text(a, b, token - lag, token) for token in self._strongest(at[same], strength)[:CONTEXTS]]

    def apart(self, a: int, b: int) -> list[str]:
        """Show the place where a is strongest, the same for b, and a's second place."""
        top_a, top_b = self._strongest(*self._firing(a)), self._strongest(*self._firing(b))
        return [self._text(a, b, token, token) for token in (*top_a[:1], *top_b[:1], *top_a[1:2])]

    def _firing(self, latent: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        part = slice(self._order.ptr_F[latent], self._order.ptr_F[latent + 1])
        return self._order.token_Q[part], self._order.value_Q[part]

    def _strongest(self, tokens: NDArray[Any], strength: NDArray[Any]) -> list[int]:
        """Return the strongest token of each stretch, strongest first."""
        ranked = tokens[np.argsort(-strength, kind="stable")]
        _, first = np.unique(self._stretch_N[ranked], return_index=True)
        return [int(token) for token in ranked[np.sort(first)]]

    def _text(self, a: int, b: int, first: int, last: int) -> str:
        start = first // self._length * self._length
        span = np.arange(max(start, first - BEFORE), min(start + self._length, last + AFTER + 1))
        span = span[self._doc_N[span] == self._doc_N[first]]
        on_a, on_b = (np.isin(span, self._firing(latent)[0]) for latent in (a, b))
        pieces = self._decode(self._tokens_N[span].tolist())
        marks = np.array(["", "₁", "₂", "₁₂"])[on_a + 2 * on_b]
        shown = [f"[{piece}]{mark}" if mark else piece for piece, mark in zip(pieces, marks, strict=True)]
        return f"{first - start}: " + "".join(shown).replace("\n", "↵")


def heat_map(latents: Ints, sums: LatentSums, layout: LagPairs, order: PairsByLatent) -> dict[str, NDArray[Any]]:
    """Correlate the given latents with each other at all lags, and order them so that neighbours are alike.

    "latents" [H], "lags" [K], "c" and "excess" [K, H, H] float32: element [k, i, j] is C_ij(lags[k]). Ordered by
    average-linkage clustering of 1 - the largest size of the excess over lags, leaves in optimal order.
    """
    H, W = len(latents), sums.window
    i, j = np.triu_indices(H)
    candidates = Candidates(np.ascontiguousarray(latents[i]), np.ascontiguousarray(latents[j]))
    pair_sums = CandidateSums.zero(candidates, W)
    pair_sums.add(layout, order)
    correlations = Correlations.of(sums, pair_sums)
    c_KHH, excess_KHH = np.zeros((2, 2 * W + 1, H, H))
    for x_KHH, x_CK in ((c_KHH, correlations.real_CK), (excess_KHH, correlations.excess_CK)):
        x_KHH[:, i, j] = x_CK.T
        x_KHH[:, j, i] = x_CK.T[::-1]  # C_ji(lag) = C_ij(-lag)
    if H > 2:
        distance_HH = 1.0 - np.minimum(np.abs(excess_KHH).max(0), 1.0)
        np.fill_diagonal(distance_HH, 0.0)
        ordered = leaves_list(linkage(squareform(distance_HH), "average", optimal_ordering=True))
        latents = latents[ordered]
        c_KHH, excess_KHH = (x_KHH[:, ordered][:, :, ordered] for x_KHH in (c_KHH, excess_KHH))
    return {
        "latents": latents,
        "lags": np.arange(-W, W + 1),
        "c": c_KHH.astype(np.float32),
        "excess": excess_KHH.astype(np.float32),
    }
