"""The contrastive term as the paper states it.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, A anchors, E the
active pairs of A tokens.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from legato.consistency_losses.info_nce import ActiveRows, info_nce, sparse_info_nce
from legato.consistency_losses.term import (
    Array,
    TermValue,
    check_fraction,
    leading_codes,
    leading_pairs,
)
from legato.kernels import LatentOrder
from legato.sequences import SequenceLayout


@dataclass(frozen=True)
class Contrastive:
    """Symmetric InfoNCE between the codes of token t and t + lag: cosine, temperature tau, negatives from other
    documents.

    `anchors` random pairs of a batch are drawn (from `seed` and the step), so the cost does not grow with the batch.
    Bhalla et al. 2025 (arXiv 2511.05541), as the paper states it. Scale-free. A token without an active latent has
    cosine 0 with all others; without any pair the value is 0.
    """

    coefficient: float
    lag: int = 1
    temperature: float = 0.1
    anchors: int = 256
    slow_fraction: float = 1.0
    seed: int = 0
    name: str = "contrastive"

    def __post_init__(self) -> None:
        check_fraction(self.slow_fraction)
        if self.lag < 1:
            raise ValueError(f"lag {self.lag} compares nothing: use 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")

    @property
    def window(self) -> int:
        return self.lag + 1

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        layout = SequenceLayout.of(mask_BL, doc_BL)
        first_A = self._anchors(layout, step)
        codes_NF = leading_codes(codes_BLF, mask_BL, self.slow_fraction).flatten(0, 1)
        first_AF, second_AF = _unit_rows(codes_NF[first_A]), _unit_rows(codes_NF[first_A + self.lag])
        return info_nce(first_AF, second_AF, layout.doc_N[first_A], self.temperature)

    def sparse(self, order: LatentOrder, layout: SequenceLayout, step: int) -> TermValue:
        first_A = self._anchors(layout, step)
        gradient_Q = np.zeros_like(order.value_Q)
        if len(first_A) == 0:
            return TermValue(0.0, gradient_Q)
        slow = leading_pairs(order, self.slow_fraction)
        sides = [ActiveRows.of(slow, token_A, len(layout.doc_N)) for token_A in (first_A, first_A + self.lag)]
        norms = [np.sqrt(np.bincount(s.row_E, s.value_E**2, minlength=len(first_A)))[s.row_E] for s in sides]
        units = [s._replace(value_E=s.value_E / norm_E) for s, norm_E in zip(sides, norms, strict=True)]
        value, *slopes = sparse_info_nce(units[0], units[1], layout.doc_N[first_A], self.temperature)
        for unit, norm_E, slope_E in zip(units, norms, slopes, strict=True):
            radial_A = np.bincount(unit.row_E, unit.value_E * slope_E, minlength=len(first_A))
            gradient_Q[unit.at_E] += (slope_E - radial_A[unit.row_E] * unit.value_E) / norm_E
        return TermValue(value, gradient_Q)

    def _anchors(self, layout: SequenceLayout, step: int) -> Array:
        """Flat index of the earlier token of each drawn pair; both ends lie in one run."""
        index = np.arange(len(layout.end_N))
        candidates = np.flatnonzero(layout.valid_N & (index + self.lag < layout.end_N))
        rng = np.random.default_rng((self.seed, step))
        return np.sort(rng.choice(candidates, min(self.anchors, len(candidates)), replace=False))


def _unit_rows(codes_AF: Tensor) -> Tensor:
    """Rows over their norm; the square is floored before the root, so that an empty row has gradient 0 and not NaN."""
    return codes_AF / codes_AF.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
