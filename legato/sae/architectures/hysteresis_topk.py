"""Hysteresis inside each token's own budget.

Shape legend of the dense function: [..., L, F] pre-activations of positions L and latents F; mask, doc [..., L].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from legato.sae.architectures.base import Architecture
from legato.sae.architectures.hysteresis import ROUGH_SHARE, check_release, release_at
from legato.sae.architectures.preactivations import Preactivations
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.held_top import held_top as held_top_kernel
from legato.sae.kernels.pairs import Pairs
from legato.sae.segments import runs


@dataclass(frozen=True)
class HysteresisTopK(Architecture):
    """The k largest pre-activations of each token, where those of latents that were on at the token before, of the
    same document, count 1 / release times.

    A Schmitt trigger with a threshold of each token's own: a latent switches on where it reaches the threshold and
    stays on down to `release` times it, and the threshold is such that k are on. L0 is exactly that of TopK. `release`
    falls linearly from 1 (plain TopK) over the first `anneal` of training. Ours.
    """

    k: int
    release: float = 0.5
    anneal: float = 0.3
    architecture: ClassVar[str] = "hysteresis_topk"

    def __post_init__(self) -> None:
        check_release(self.release)

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        release = release_at(self.release, self.anneal, progress)
        return held_top_pairs(pre, self.k, release), 0.0

    def frozen(self, calibration: Sequence[Preactivations]) -> dict[str, Any]:
        return {"architecture": self.architecture, "k": self.k, "release": self.release}


def held_top_pairs(pre: Preactivations, k: int, release: float, rough_share: float = ROUGH_SHARE) -> Pairs:
    """The pairs that are on, exact among those that the matmul's own values nominate: what counts there at least
    `rough_share` of the token's k-th."""
    N, F = pre.shape
    layout = pre.layout

    def top(value_P: Any, margin: float) -> Any:
        return held_top_kernel(
            layout.start_N, layout.end_N, token_P, latent_P, value_P, n_latents=F, k=k, release=release, margin=margin
        )

    floor_N = pre.lowered(pre.row_floors(k), rough_share * release)
    token_P, latent_P = pre.nominated(floor_N, 6 * k * N)
    near_P = top(pre.rough(token_P, latent_P), rough_share)
    token_P, latent_P = token_P[near_P], latent_P[near_P]
    value_P = pre.exact(token_P, latent_P)
    return kernels.keep(N, token_P, latent_P, value_P, top(value_P, 1.0))


def held_top(pre: Tensor, k: int, release: float, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
    """on[..., L, F]: the k largest positive pre-activations of each token, where those of latents that were on at the
    token before, of the same document, count 1 / release times."""
    valid, opens = runs(pre, mask, doc)
    on = torch.zeros_like(pre, dtype=torch.bool)
    before = torch.zeros_like(on[..., 0, :])
    for t in range(pre.shape[-2]):
        before &= ~opens[..., t, None]
        score = torch.where(before, pre[..., t, :] / release, pre[..., t, :])
        best = torch.zeros_like(before).scatter_(-1, score.topk(k, dim=-1, sorted=False).indices, True)
        before = best & (pre[..., t, :] > 0) & valid[..., t, None]
        on[..., t, :] = before
    return on
