"""BatchTopK: one budget for all tokens of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from legato.sae.architectures.base import Architecture
from legato.sae.architectures.preactivations import FLOOR_SHARE, Preactivations, budget_threshold, quantile_floor
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs


@dataclass(frozen=True)
class BatchTopK(Architecture):
    """The k * (valid tokens) largest positive pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    k: int
    architecture: ClassVar[str] = "jumprelu"

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        return batch_top(pre, self.k, floor)

    def frozen(self, calibration: Sequence[Preactivations]) -> dict[str, Any]:
        threshold = budget_threshold(calibration, self.k)
        return {"architecture": self.architecture, "threshold": torch.full(calibration[0].b_enc_F.shape, threshold)}


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
