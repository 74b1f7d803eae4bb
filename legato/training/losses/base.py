"""The base of every temporal term, the register of them, and the parts they share.

Shape legend: B rows, L positions, F latents, Q active pairs sorted by latent.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
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


_LOSSES: dict[str, type["TemporalLoss"]] = {}


def losses() -> dict[str, type["TemporalLoss"]]:
    """The temporal terms by name."""
    return dict(_LOSSES)


class TemporalLoss(ABC):
    """A temporal consistency term. A subclass is a frozen dataclass with the fields `coefficient` and `name`, and is
    known by that name.

    coefficient: multiplies it next to the reconstruction loss (an FVU, so about .1 to 1). window: tokens that are
    compared with each other, None where that is the whole row. slow_fraction: leading share of the latents that the
    term looks at.
    """

    name: str
    coefficient: float
    window: Any
    slow_fraction: float

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for attribute, default in (("window", None), ("slow_fraction", 1.0)):
            if attribute not in {*vars(cls), *inspect.get_annotations(cls)}:  # a field may be without a default
                setattr(cls, attribute, default)
        if name := vars(cls).get("name"):
            _LOSSES[name] = cls

    @abstractmethod
    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Tensor:
        """The value, differentiable. One that draws at random takes `step` besides, to seed what it draws."""

    def sparse(self, order: PairsByLatent, layout: Segments, step: int) -> TermValue:
        """The value and its derivative by every active code: by autograd through `loss` on the dense codes of the
        batch. Override where it can be had from the active codes alone, some thousand times as fast."""
        mask_BL, doc_BL = layout.rows()
        token_Q = torch.from_numpy(order.token_Q).long()
        latent_Q = torch.arange(order.n_latents).repeat_interleave(torch.from_numpy(np.diff(order.ptr_F)))
        value_Q = torch.from_numpy(order.value_Q.copy()).requires_grad_()
        with torch.enable_grad():
            codes_NF = value_Q.new_zeros(mask_BL.numel(), order.n_latents).index_put((token_Q, latent_Q), value_Q)
            seeded = {"step": step} if "step" in inspect.signature(self.loss).parameters else {}
            value = self.loss(codes_NF.view(*mask_BL.shape, -1), mask_BL, doc_BL, **seeded)
        (gradient_Q,) = torch.autograd.grad(value, [value_Q], materialize_grads=True)
        return TermValue(float(value.detach()), gradient_Q.numpy())


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
