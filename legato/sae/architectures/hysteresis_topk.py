"""Hysteresis inside each token's own budget.

Shape legend: [..., L, F] pre-activations of positions L and latents F; mask, doc [..., L].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from legato.sae.architectures.base import BUDGET, SHARE, Number, Selecting
from legato.sae.architectures.hysteresis import check_release, release_at
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, held_top_columns, held_top_pairs
from legato.sae.architectures.topk import TopK
from legato.sae.kernels.pairs import Pairs
from legato.sae.segments import runs


@dataclass(frozen=True)
class HysteresisTopK(Selecting):
    """The k largest pre-activations of each token, where those of latents that were on at the token before, of the
    same document, count 1 / release times.

    A Schmitt trigger with a threshold of each token's own: a latent switches on where it reaches the threshold and
    stays on down to `release` times it, and the threshold is such that k are on. L0 is exactly that of TopK. `release`
    falls linearly from 1 (plain TopK) over the first `anneal` of training. Ours.
    """

    k: int
    release: float = 0.5
    anneal: float = 0.3
    name: ClassVar[str] = "hysteresis_topk"
    numbers: ClassVar[Mapping[str, Number]] = {"k": BUDGET, "release": SHARE}
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_release(self.release)

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        return held_top_pairs(pre, self.k, release_at(self.release, self.anneal, progress)), 0.0

    def inference(self, calibration: Sequence[Preactivations]) -> "HysteresisTopK":
        return HysteresisTopK(self.k, self.release)

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return pre * held_top(pre, self.k, self.release, mask, doc)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        return held_top_columns(encoder.centred(acts_BLD, mask_BL, doc_BL), self.k, self.release)

    def stateless(self, pre_NF: Tensor, count: int) -> TopK:
        return TopK(self.k)


def held_top(pre: Tensor, k: int, release: float, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
    """on[..., L, F]: the k largest positive pre-activations of each token, where those of latents that were on at the
    token before, of the same document, count 1 / release times."""
    valid, opens = runs(pre, mask, doc)
    on = []
    before = torch.zeros_like(pre[..., 0, :], dtype=torch.bool)
    for t in range(pre.shape[-2]):
        before = before & ~opens[..., t, None]
        score = torch.where(before, pre[..., t, :] / release, pre[..., t, :])
        best = torch.zeros_like(before).scatter_(-1, score.topk(k, dim=-1, sorted=False).indices, True)
        before = best & (pre[..., t, :] > 0) & valid[..., t, None]
        on.append(before)
    return torch.stack(on, dim=-2)
