"""What every temporal term is, and the parts they share.

Shape legend: B rows, L positions, F latents, Q active pairs sorted by latent.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from legato.sae.groups import leading_count
from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments

Array = NDArray[Any]

# A latent varies in a batch if its variance exceeds this share of its mean square: far above float64 rounding.
VARIES = 1e-9


class TermValue(NamedTuple):
    """value of a term (not yet times its coefficient) and its derivative by each active code."""

    value: float
    gradient_Q: Array


class TemporalLoss(Protocol):
    """A temporal consistency term. `coefficient` multiplies it next to the reconstruction loss (an FVU, so about .1
    to 1).

    window: tokens that are compared with each other, None where that is the whole row. slow_fraction: leading share
    of the latents that the term looks at. `step` seeds what a term draws at random.
    """

    @property
    def name(self) -> str: ...
    @property
    def coefficient(self) -> float: ...
    @property
    def window(self) -> int | None: ...
    @property
    def slow_fraction(self) -> float: ...

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor: ...
    def sparse(self, order: PairsByLatent, layout: Segments, step: int) -> TermValue: ...


def leading_codes(codes_BLF: Tensor, mask_BL: Tensor, fraction: float) -> Tensor:
    """The leading latents' codes, zero on invalid tokens."""
    return codes_BLF[..., : leading_count(codes_BLF.shape[-1], fraction)] * mask_BL.unsqueeze(-1)


def leading_pairs(order: PairsByLatent, fraction: float) -> PairsByLatent:
    """The leading latents' pairs, which come first in latent order: views, nothing is copied."""
    ptr_F = order.ptr_F[: leading_count(len(order.ptr_F) - 1, fraction) + 1]
    n_pairs = ptr_F[-1]
    return PairsByLatent(ptr_F, *(pairs_Q[:n_pairs] for pairs_Q in order[1:]))


def for_all_pairs(order: PairsByLatent, gradient_Q: Array) -> Array:
    """A gradient by the leading latents' codes as one by all codes, in their dtype."""
    all_Q = np.zeros_like(order.value_Q)
    all_Q[: len(gradient_Q)] = gradient_Q
    return all_Q


def check_window(window: int, least: int = 2) -> None:
    if window < least:
        raise ValueError(f"window {window} compares nothing: use {least} or more")


def check_fraction(slow_fraction: float) -> None:
    if not 0 < slow_fraction <= 1:
        raise ValueError(f"slow_fraction {slow_fraction} is no share of the latents: use more than 0 and at most 1")
