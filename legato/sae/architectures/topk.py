"""TopK: a budget for each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from legato.sae.architectures.base import Architecture
from legato.sae.architectures.preactivations import Preactivations
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs


@dataclass(frozen=True)
class TopK(Architecture):
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    architecture: ClassVar[str] = "topk"

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N = pre.shape[0]
        token_P, latent_P, value_P = pre.scan(pre.row_floors(self.k), (2 * self.k + 64) * N)
        keep_P = kernels.keep_row_top(N, token_P, value_P, self.k)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), 0.0

    def frozen(self, calibration: Sequence[Preactivations]) -> dict[str, Any]:
        return {"architecture": self.architecture, "k": self.k}
