"""BatchTopK: one budget for all tokens of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from legato.sae.architectures.base import Selecting
from legato.sae.architectures.jumprelu import JumpReLU
from legato.sae.architectures.preactivations import FLOOR_SHARE, Preactivations, budget_threshold, quantile_floor
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs


@dataclass(frozen=True)
class BatchTopK(Selecting):
    """The k * (valid tokens) largest positive pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410).

    At inference a JumpReLU with one threshold for all latents, at which k of them are active per token.
    """

    k: int
    name: ClassVar[str] = "batchtopk"
    is_saved: ClassVar[bool] = False

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        return batch_top(pre, self.k, state)

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        codes = pre.relu() if mask is None else pre.relu() * mask.unsqueeze(-1)
        tokens = codes[..., 0].numel() if mask is None else int(mask.sum())
        top = codes.flatten().topk(min(self.k * tokens, codes.numel()), sorted=False)
        return torch.zeros_like(codes).flatten().scatter(0, top.indices, top.values).view_as(codes)

    def inference(self, calibration: Sequence[Preactivations]) -> JumpReLU:
        threshold = budget_threshold(calibration, self.k)
        return JumpReLU(threshold=torch.full(calibration[0].b_enc_F.shape, threshold))


def batch_top(pre: Preactivations, k: float, floor: float) -> tuple[Pairs, float]:
    """The k * (valid tokens) largest positive pre-activations, and the floor for the next batch."""
    N = pre.shape[0]
    count = round(k * pre.n_valid)
    if floor <= 0:
        floor = quantile_floor(pre, k)
    while True:
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(floor), count + count // 2)
        if len(token_P) >= count or floor <= 0:
            break
        floor = 0.7 * floor if floor > 1e-6 else 0.0
    keep_P = kernels.keep_batch_top(value_P, count)
    pairs = kernels.keep(N, token_P, latent_P, value_P, keep_P)
    cut = float(pairs.value_P.min()) if len(pairs.value_P) else 0.0
    return pairs, FLOOR_SHARE * float(cut)
