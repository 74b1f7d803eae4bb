"""An architecture and a temporal term that have only what is required of them, a dense form."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import Architecture, tensor
from legato.sae.architectures.preactivations import budget_threshold
from legato.training.losses import TemporalLoss


@dataclass(frozen=True)
class SoftThreshold(Architecture):
    """relu(pre - threshold), a threshold per latent that is learned, and an L1 penalty."""

    k: int = 0
    l1: float = 0.3
    threshold: Tensor = tensor()
    per_latent: ClassVar = {"threshold": "F"}
    own_parameters: ClassVar = ("threshold",)
    holds_l0: ClassVar = False
    name: ClassVar = "soft_threshold"

    def activate(self, pre, mask=None, doc=None):
        return (pre - self.threshold).relu()

    def initial(self, pre):
        return {"threshold": torch.full(pre.b_enc_F.shape, budget_threshold([pre], self.k))}

    def penalty(self, pairs, n_valid, d_in):
        slope = self.l1 / (d_in * n_valid)
        return slope * float(pairs.value_P.sum(dtype=np.float64)), slope


@dataclass(frozen=True)
class Flicker(TemporalLoss):
    """Squared differences between neighbours over squared codes."""

    coefficient: float = 0.05
    name: str = "flicker"

    def loss(self, codes_BLF, mask_BL, doc_BL):
        pair_BL = mask_BL[:, 1:] & mask_BL[:, :-1] & (doc_BL[:, 1:] == doc_BL[:, :-1])
        change_BLF = (codes_BLF[:, 1:] - codes_BLF[:, :-1]) * pair_BL[..., None]
        return change_BLF.square().sum() / codes_BLF.square().sum()
