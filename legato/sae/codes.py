"""Sparse codes: the active (token, latent, value) triples of a batch of sequences.

Shape legend: B rows (contexts), L positions, F latents, P active pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """Active pairs of a batch, ordered by flat token index, then by latent.

    token_P: int64, flat token index b * L + t.
    latent_P: int64, latent index.
    value_P: float, code rescaled by its decoder norm; always > 0.
    shape: (B, L, F).

    >>> SparseCodes.from_dense(torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])).latent_P
    tensor([1, 0])
    """

    token_P: Tensor
    latent_P: Tensor
    value_P: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def from_dense(cls, codes_BLF: Tensor) -> "SparseCodes":
        B, L, F = codes_BLF.shape
        token_P, latent_P = codes_BLF.reshape(B * L, F).nonzero(as_tuple=True)
        return cls(token_P, latent_P, codes_BLF.reshape(B * L, F)[token_P, latent_P], (B, L, F))

    def dense(self) -> Tensor:
        """codes_BLF with zeros where nothing fires."""
        B, L, F = self.shape
        codes_NF = torch.zeros(B * L, F, dtype=self.value_P.dtype)
        codes_NF[self.token_P, self.latent_P] = self.value_P
        return codes_NF.view(B, L, F)

    def __len__(self) -> int:
        return self.token_P.numel()
