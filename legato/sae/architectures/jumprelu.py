"""JumpReLU: a learned threshold per latent.

Shape legend: F latents, P active pairs, J pairs in the kernel's band around their threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import Architecture, tensor
from legato.sae.architectures.forward import OPENING, Decoding, Forward, opening
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, budget_threshold, columns
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """A latent is active above its own threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The thresholds learn, as logarithms, from the reconstruction and from the penalty strength * (L0 / k - 1)^2, which
    holds L0 at k; the step at the threshold passes gradient as if it were a slope of width `bandwidth` (straight-
    through estimator, rectangle kernel; in normalised units, where an activation has unit mean square). Temporal terms
    move the codes and leave the thresholds alone; those of dead latents, which no band reaches any more, are lowered
    (`opening`). The first batch starts all thresholds where L0 is k.
    """

    k: int = 0
    bandwidth: float = 1.0
    strength: float = 1.0
    threshold: Tensor = tensor()
    name: ClassVar[str] = "jumprelu"
    per_latent: ClassVar[Mapping[str, str]] = {"threshold": "F"}
    own_parameters: ClassVar[tuple[str, ...]] = ("log_threshold_F",)
    # The scale of the codes changes faster in the first steps than thresholds at the weights' rate can follow (at 1, L0
    # fell to 17 of 32 and stayed below for 150 steps).
    own_rate: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.strength < 0:
            raise ValueError(f"bandwidth {self.bandwidth} must be above 0 and strength {self.strength} not below it")

    def initial(self, pre: Preactivations) -> dict[str, Tensor]:
        threshold = budget_threshold([pre], self.k)
        return {"log_threshold_F": torch.full(pre.b_enc_F.shape, np.log(max(threshold, 1e-3)))}

    def forward(self, pre: Preactivations, state: float, progress: float) -> Forward:
        threshold_F = np.exp(pre.own["log_threshold_F"])
        lowest_F = np.maximum(threshold_F - threshold_F.dtype.type(self.bandwidth / 2), 0)
        token, latent, value = pre.above(lowest_F, 4 * self.k * pre.n_valid)
        distance = value - threshold_F[latent]
        band = np.abs(distance) < self.bandwidth / 2
        pairs = kernels.keep(pre.shape[0], token, latent, value, distance > 0)
        return _Jumped(pairs, state, self, threshold_F, token[band], latent[band])

    def inference(self, calibration: Sequence[Preactivations]) -> "JumpReLU":
        return JumpReLU(threshold=torch.from_numpy(calibration[0].own["log_threshold_F"]).exp())

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return pre.relu() * (pre > self.threshold)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        if not bool((self.threshold > 0).all()):
            return super().encode_sparse(encoder, acts_BLD, mask_BL, doc_BL)
        threshold_F = self.threshold.numpy()
        token_P, latent_P, value_P = encoder.centred(acts_BLD, mask_BL, doc_BL).near(threshold_F)
        on_P = value_P > threshold_F[latent_P]
        return columns(token_P[on_P], latent_P[on_P], value_P[on_P])


@dataclass(frozen=True)
class _Jumped(Forward):
    architecture: JumpReLU
    threshold_F: Array
    token_J: Array
    latent_J: Array

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        k, strength = self.architecture.k, self.architecture.strength
        excess = len(self.pairs.value_P) / decoding.n_valid / k - 1
        # d code / d threshold = -threshold / bandwidth and d active / d threshold = -1 / bandwidth inside the band.
        of_code_J = decoding.code_gradient(self.token_J, self.latent_J) * self.threshold_F[self.latent_J]
        of_active = 2 * strength * excess / (k * decoding.n_valid)
        total_F = np.bincount(self.latent_J, of_code_J + of_active, len(self.threshold_F))
        decoding.gradients["log_threshold_F"][:] = -self.threshold_F / self.architecture.bandwidth * total_F
        dead_F = decoding.seeded_F
        decoding.gradients["log_threshold_F"][dead_F] += OPENING * self.threshold_F[dead_F]
        terms = {"sparsity": strength * excess**2, **opening(self.threshold_F, dead_F)}
        return terms, decoding.through_codes(decoding.slope_Q)
