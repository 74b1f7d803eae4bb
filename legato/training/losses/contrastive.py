"""The contrastive term as the paper states it.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, A anchors, E the
active pairs of A tokens.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import Array, TemporalLoss, TermValue, check_fraction, leading_codes, leading_pairs
from legato.training.losses.info_nce import ActiveRows, info_nce, sparse_info_nce


@dataclass(frozen=True)
class Contrastive(TemporalLoss):
    """Symmetric InfoNCE between the codes of token t and t + lag: cosine, temperature tau, negatives from other
    documents.

    `anchors` random pairs of a batch are drawn (from `seed` and the step) among those at any of `lags`, so the cost
    grows neither with the batch nor with the lags. Bhalla et al. 2025 (arXiv 2511.05541), as the paper states it.
    Scale-free. A token without an active latent has cosine 0 with all others; without any pair the value is 0.
    """

    coefficient: float
    lags: tuple[int, ...] = (1,)
    temperature: float = 0.1
    anchors: int = 256
    slow_fraction: float = 1.0
    seed: int = 0
    name: str = "contrastive"

    def __post_init__(self) -> None:
        check_fraction(self.slow_fraction)
        if not self.lags or min(self.lags) < 1:
            raise ValueError(f"lags {self.lags} compare nothing: use one or more, each 1 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")

    @property
    def window(self) -> int:
        return max(self.lags) + 1

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        layout = Segments.of(mask_BL, doc_BL)
        first_A, second_A = self._anchors(layout, step)
        codes_NF = leading_codes(codes_BLF, mask_BL, self.slow_fraction).flatten(0, 1)
        first_AF, second_AF = _unit_rows(codes_NF[first_A]), _unit_rows(codes_NF[second_A])
        return info_nce(first_AF, second_AF, layout.doc_N[first_A], self.temperature)

    def sparse(self, order: PairsByLatent, layout: Segments, step: int) -> TermValue:
        first_A, second_A = self._anchors(layout, step)
        gradient_Q = np.zeros_like(order.value_Q)
        if len(first_A) == 0:
            return TermValue(0.0, gradient_Q)
        slow = leading_pairs(order, self.slow_fraction)
        sides = [ActiveRows.of(slow, token_A, len(layout.doc_N)) for token_A in (first_A, second_A)]
        norms = [np.sqrt(np.bincount(s.row_E, s.value_E**2, minlength=len(first_A)))[s.row_E] for s in sides]
        units = [s._replace(value_E=s.value_E / norm_E) for s, norm_E in zip(sides, norms, strict=True)]
        value, *slopes = sparse_info_nce(units[0], units[1], layout.doc_N[first_A], self.temperature)
        for unit, norm_E, slope_E in zip(units, norms, slopes, strict=True):
            radial_A = np.bincount(unit.row_E, unit.value_E * slope_E, minlength=len(first_A))
            slope_E = (slope_E - radial_A[unit.row_E] * unit.value_E) / norm_E
            np.add.at(gradient_Q, unit.at_E, slope_E.astype(gradient_Q.dtype))  # a token may be drawn more than once
        return TermValue(value, gradient_Q)

    def _anchors(self, layout: Segments, step: int) -> tuple[Array, Array]:
        """Flat indices of the earlier and the later token of each drawn pair; both lie in one run."""
        index = np.arange(len(layout.end_N))
        firsts = [np.flatnonzero(layout.valid_N & (index + lag < layout.end_N)) for lag in self.lags]
        first_C = np.concatenate(firsts)
        lag_C = np.repeat(self.lags, [len(first) for first in firsts])
        rng = np.random.default_rng((self.seed, step))
        drawn_A = np.sort(rng.choice(len(first_C), min(self.anchors, len(first_C)), replace=False))
        return first_C[drawn_A], (first_C + lag_C)[drawn_A]


def _unit_rows(codes_AF: Tensor) -> Tensor:
    """Rows over their norm; the square is floored before the root, so that an empty row has gradient 0 and not NaN."""
    return codes_AF / codes_AF.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
