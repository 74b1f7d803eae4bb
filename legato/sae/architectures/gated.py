"""Gated: one path decides whether a latent is active, another how much.

Shape legend: F latents, P active pairs, J pairs with an open gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import Architecture, masked, tensor
from legato.sae.architectures.forward import OPENING, Decoding, Forward, opening
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, budget_threshold, columns
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Pairs

# The logarithm of the coefficient follows the relative excess of L0, cut to -1..1: its sum over the steps (integral),
# and at once (proportional), without which L0 swings.
_INTEGRAL, _PROPORTIONAL = 0.05, 2.0


@dataclass(frozen=True)
class Gated(Architecture):
    """Gate and magnitude share their weights up to a factor per latent (Rajamanoharan et al. 2024, arXiv 2404.16014):
    gate = <x, W_enc> + b_gate, code = [gate > 0] * relu(exp(r_mag) * <x, W_enc> + b_enc).

    The gate learns from an L1 penalty on relu(gate), on the scale of ReLU.l1, and from a reconstruction of its own, by
    relu(gate) through the decoder as it stands. With k the coefficient of L1, which starts at l1, is steered: it grows
    while L0 exceeds k and shrinks while it is below. The first batch starts all gates where L0 is k, or 32 without.
    A closed gate gets no gradient from either, so those of dead latents are opened (`opening`). Under Matryoshka groups
    both reconstructions are nested.
    """

    l1: float = 1.0
    k: int | None = None
    b_gate: Tensor = tensor()
    r_mag: Tensor = tensor()
    name: ClassVar[str] = "gated"
    per_latent: ClassVar[Mapping[str, str]] = {"b_gate": "F", "r_mag": "F"}
    bias: ClassVar[str] = "b_mag"
    own_parameters: ClassVar[tuple[str, ...]] = ("b_gate_F", "r_mag_F")
    own_rate: ClassVar[float] = 3.0

    def initial(self, pre: Preactivations) -> dict[str, Tensor]:
        threshold = budget_threshold([pre], self.k or 32)
        b_enc_F = torch.from_numpy(pre.b_enc_F)
        return {"b_gate_F": b_enc_F - threshold, "r_mag_F": torch.zeros_like(b_enc_F)}

    def forward(self, pre: Preactivations, state: float, progress: float) -> Forward:
        """state: logarithm of the steered coefficient over l1."""
        b_gate_F, gain_F = pre.own["b_gate_F"], np.exp(pre.own["r_mag_F"])
        N = pre.shape[0]
        token, latent, value = pre.above(pre.b_enc_F - b_gate_F, 4 * (self.k or 32) * pre.n_valid)
        product = value - pre.b_enc_F[latent]
        code = gain_F[latent] * product + pre.b_enc_F[latent]
        everywhere = np.ones(len(token), np.bool_)
        gates = kernels.keep(N, token, latent, product + b_gate_F[latent], everywhere)
        pairs = kernels.keep(N, token, latent, code, code > 0)
        excess = 0.0 if self.k is None else len(pairs.value_P) / pre.n_valid / self.k - 1
        excess = float(np.clip(excess, -1, 1))
        l1 = self.l1 * float(np.exp(state + _PROPORTIONAL * excess))
        return _Gates(pairs, state + _INTEGRAL * excess, gates, code > 0, gain_F, pre.b_enc_F, b_gate_F, l1)

    def inference(self, calibration: Sequence[Preactivations]) -> "Gated":
        own = {name: torch.from_numpy(value).clone() for name, value in calibration[0].own.items()}
        return Gated(b_gate=own["b_gate_F"], r_mag=own["r_mag_F"])

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """Compute the gate's own codes from <x, W_enc> + b_gate; its reconstruction in training is made of them."""
        return pre.relu()

    def encode(self, product: Tensor, b_enc: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return masked(torch.relu(self.r_mag.exp() * product + b_enc) * (self.activate(product + self.b_gate) > 0), mask)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        threshold = -encoder.centre_F - self.b_gate
        if not bool((threshold > 0).all()):
            return super().encode_sparse(encoder, acts_BLD, mask_BL, doc_BL)
        gain, threshold_F = self.r_mag.exp(), threshold.numpy()
        gain_F, offset_F = gain.numpy(), (gain * encoder.centre_F + encoder.b_enc).numpy()
        pre = encoder.centred(acts_BLD, mask_BL, doc_BL, bias_F=torch.zeros_like(threshold))
        token_P, latent_P, value_P = pre.near(threshold_F)
        on_P = value_P > threshold_F[latent_P]
        value_P = gain_F[latent_P] * value_P + offset_F[latent_P]
        on_P &= value_P > 0
        return columns(token_P[on_P], latent_P[on_P], value_P[on_P])

    def scaled(self, b_enc: Tensor, shift_F: Tensor, scale: float) -> tuple[Tensor, "Gated"]:
        return b_enc / scale - shift_F * self.r_mag.exp(), replace(self, b_gate=self.b_gate / scale - shift_F)


@dataclass(frozen=True)
class _Gates(Forward):
    gates: Pairs
    active_J: Array
    gain_F: Array
    b_enc_F: Array
    b_gate_F: Array
    l1: float

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        d, gates, latent_P = decoding, self.gates, self.pairs.latent_P
        F, D = len(self.b_enc_F), len(d.b_dec_D)
        pull_GND, squared_GN = d.partition.decode(gates, d.groups, d.W_dec_HD, d.b_dec_D, d.x_ND, d.layout.valid_N)
        slope = self.l1 / (D * d.n_valid)
        gate_J = d.code_gradient(gates.token_P, gates.latent_P, pull_GND) + d.x_ND.dtype.type(slope)
        code_P = np.empty_like(d.slope_Q)
        code_P[d.order.source_Q] = d.slope_Q
        code_P += d.code_gradient(self.pairs.token_P, latent_P)

        by_product_J = gate_J.copy()
        by_product_J[self.active_J] += code_P * self.gain_F[latent_P]
        d.gradients["b_gate_F"][:] = np.bincount(gates.latent_P, gate_J, F)
        d.gradients["r_mag_F"][:] = np.bincount(latent_P, code_P * (self.pairs.value_P - self.b_enc_F[latent_P]), F)
        squared = d.apart(gates._replace(value_P=by_product_J), np.bincount(latent_P, code_P, F))
        errors_G = squared_GN.sum(1, dtype=np.float64)
        d.gradients["b_gate_F"][d.seeded_F] -= OPENING
        terms = {
            "sparsity": slope * float(gates.value_P.sum(dtype=np.float64)),
            **opening(-self.b_gate_F, d.seeded_F),
            "gate": float(d.groups.weights_G @ errors_G) / (D * d.n_valid),
        }
        return terms, squared
