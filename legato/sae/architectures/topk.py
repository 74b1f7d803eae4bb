"""TopK: a budget for each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from legato.sae.architectures.base import BUDGET, Number, Selecting
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, held_top_columns
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs


@dataclass(frozen=True)
class TopK(Selecting):
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    name: ClassVar[str] = "topk"
    numbers: ClassVar[Mapping[str, Number]] = {"k": BUDGET}

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        N = pre.shape[0]
        token_P, latent_P, value_P = pre.scan(pre.row_floors(self.k), (2 * self.k + 64) * N)
        keep_P = kernels.keep_row_top(N, token_P, value_P, self.k)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), 0.0

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        top = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        return held_top_columns(encoder.centred(acts_BLD, mask_BL, doc_BL), self.k, 1.0)
