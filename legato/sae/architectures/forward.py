"""One forward pass of an SAE in training, what its decoder made of the codes, and the way back.

Shape legend: N flat tokens, D width, F latents, P / Q active pairs by token / by latent, G nested groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from legato.sae.kernels import gradients as pair_kernels
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Groups, Pairs, PairsByLatent
from legato.sae.partition import SINGLE, Partition
from legato.sae.segments import Segments

# Weight of `opening`: small beside the other gradients even where all latents are dead; Adam makes steps of it anyway.
OPENING = 1e-4


def opening(threshold_F: Array, dead_F: Array) -> dict[str, float]:
    """The loss term OPENING * (sum of the thresholds of dead latents), where latents learn thresholds of their own.

    The auxiliary loss teaches dead latents directions, but not to fire: above its threshold a silent latent gets no
    gradient. The pre-activation loss of Conerly et al. 2025 (Transformer Circuits, January update) does the same
    through the pre-activations.
    """
    return {"opening": OPENING * float(threshold_F[dead_F].sum(dtype=np.float64))} if dead_F.any() else {}


@dataclass(frozen=True)
class Decoding:
    """Result of decoding the active pairs, and arrays for the gradients.

    The reconstruction loss is scale / 2 * (sum over groups of weight * ||residual||^2); pull_GND as in kernels.decode.
    order: the active pairs by latent. slope_Q: derivative of the temporal terms by their codes.
    gradients: arrays to fill, by parameter name. seeded_F: latents whose rows of W_enc, W_dec and b_enc hold a gradient
    already, to be added to. partition: of several ranks each fills in the gradients of its latents, and the squared
    norms are theirs.
    """

    x_ND: Array
    W_dec_HD: Array
    b_dec_D: Array
    layout: Segments
    n_valid: int
    groups: Groups
    pull_GND: Array
    scale: float
    order: PairsByLatent
    slope_Q: Array
    gradients: Mapping[str, Array]
    seeded_F: Array
    partition: Partition = SINGLE

    def code_gradient(self, token_P: Array, latent_P: Array, pull_GND: Array | None = None) -> Array:
        """Derivative of the reconstruction loss by the codes of any pairs, whether they are active or not."""
        pull = self.pull_GND if pull_GND is None else pull_GND
        F = len(self.seeded_F)
        groups = self.groups._replace(ends_G=self.groups.ends_G - self.partition.local(F).start)
        compute = partial(pair_kernels.code_gradients, pull, groups, self.scale, self.W_dec_HD)
        return self.partition.of_pairs(compute, token_P, latent_P, (len(self.x_ND), F))

    def _own(self) -> tuple[slice, slice, Array]:
        """This rank's latents, their rows, and where the groups end counted from the first of them."""
        own = self.partition.latents(len(self.seeded_F))
        return own, self.partition.rows(len(self.seeded_F)), self.groups.ends_G - own.start

    def through_codes(self, slope_Q: Array) -> Array:
        """Fill in W_enc, b_enc and W_dec where every active code is its pre-activation; slope_Q: derivative of all but
        the reconstruction by the codes. Returns the squared norms by latent."""
        out, (own, rows, ends_G) = self.gradients, self._own()
        return pair_kernels.gradients(
            self.x_ND,
            self.pull_GND,
            self.groups._replace(ends_G=ends_G),
            self.scale,
            self.W_dec_HD[rows],
            _only(self.order, own),
            slope_Q,
            self.seeded_F[own],
            out["W_enc_FD"][rows],
            out["W_dec_FD"][rows],
            out["b_enc_F"][rows],
        )

    def apart(self, encoder: Pairs, bias_F: Array) -> Array:
        """Fill in W_dec from the active codes, W_enc from pairs whose value_P is the derivative by <x_n, W_enc_f>, and
        b_enc. Returns the squared norms by latent."""
        own, rows, ends_G = self._own()
        W_enc_HD, W_dec_HD, b_enc_H = (self.gradients[name][rows] for name in ("W_enc_FD", "W_dec_FD", "b_enc_F"))
        order, seeded_H = _only(kernels.by_latent(encoder, len(self.seeded_F)), own), self.seeded_F[own]
        weight_Q = self.order.value_Q * self.order.value_Q.dtype.type(self.scale)
        b_enc_H[~seeded_H] = 0
        b_enc_H += bias_F[own].astype(self.x_ND.dtype)
        decoder_order = _only(self.order, own)
        return (
            np.square(b_enc_H, dtype=np.float64)
            + pair_kernels.add_rows(self.x_ND[None], ends_G[-1:], order, order.value_Q, seeded_H, W_enc_HD)
            + pair_kernels.add_rows(
                self.pull_GND, ends_G, decoder_order, weight_Q, seeded_H, W_dec_HD, self.W_dec_HD[rows]
            )
        )


def _only(order: PairsByLatent, own: slice) -> PairsByLatent:
    """The latents of a slice; their pairs lie where they did."""
    return order._replace(ptr_F=order.ptr_F[own.start : own.stop + 1])


@dataclass(frozen=True)
class Forward(ABC):
    """One forward pass: the active pairs, the state for the next one, and what the backward pass needs."""

    pairs: Pairs
    state: float

    @abstractmethod
    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        """Fill in the gradients of W_enc, b_enc, W_dec and of the architecture's own parameters.

        Returns the loss terms that the architecture adds, each already times its coefficient, and by latent (those this
        rank updates) the squared norm of the three shared gradients.
        """
