"""ReLU with an L1 penalty."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from legato.sae.architectures.base import Selecting
from legato.sae.architectures.preactivations import Preactivations
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs


@dataclass(frozen=True)
class ReLU(Selecting):
    """Every positive pre-activation, with an L1 penalty: l1 / D * mean over tokens of sum_i f_i (codes with unit
    decoder rows). Dividing by D puts l1 on the scale of a loss ||x - xhat||^2 summed over D, as SAELens has it.

    l1 = 0 leaves sparsity to a temporal term that pays for it, WindowGroupLasso.
    """

    l1: float = 0.0
    name: ClassVar[str] = "standard"
    holds_l0: ClassVar[bool] = False

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        N, F = pre.shape
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(0.0), N * F // 8)
        return kernels.keep(N, token_P, latent_P, value_P, value_P > 0), 0.0

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        slope = self.l1 / (d_in * n_valid)
        return slope * float(pairs.value_P.sum(dtype=np.float64)), slope

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return pre.relu()
