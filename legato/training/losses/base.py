"""The base of every temporal term, the register of them, and the parts they share.

Shape legend: B rows, L positions, F latents, Q active pairs sorted by latent.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from legato.sae.groups import leading_count
from legato.sae.kernels.pairs import Array, PairsByLatent
from legato.sae.segments import Segments

# A latent varies in a batch if its variance exceeds this share of its mean square: far above float64 rounding.
VARIES = 1e-9


class TermValue(NamedTuple):
    """value of a term (not yet times its coefficient) and its derivative by each active code."""

    value: float
    gradient_Q: Array


_LOSSES: dict[str, type["TemporalLoss"]] = {}


def losses() -> dict[str, type["TemporalLoss"]]:
    """The temporal terms by name.

    >>> losses()["slowness"](window=4, coefficient=0.1)
    Slowness(window=4, coefficient=0.1, slow_fraction=1.0, name='slowness')
    """
    return dict(_LOSSES)


class TemporalLoss(ABC):
    """A temporal consistency term. A subclass is a frozen dataclass with the fields `coefficient` and `name`, and is
    known by that name.

    coefficient: multiplies it next to the reconstruction loss (an FVU, so about .1 to 1). window: tokens that are
    compared with each other, None where that is the whole row. slow_fraction: leading share of the latents that the
    term looks at. least_window: the shortest that compares anything.
    """

    name: str
    coefficient: float
    window: Any
    slow_fraction: float
    least_window: ClassVar[int] = 2

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := vars(cls).get("name"):  # a term, and no base of several
            _LOSSES[name] = cls
            for attribute, default in (("window", None), ("slow_fraction", 1.0)):
                if attribute not in {*vars(cls), *inspect.get_annotations(cls)}:  # a field may be without a default
                    setattr(cls, attribute, default)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < self.least_window:
            raise ValueError(f"window {self.window} compares nothing: use {self.least_window} or more")
        if not 0 < self.slow_fraction <= 1:
            raise ValueError(
                f"slow_fraction {self.slow_fraction} is no share of the latents: use more than 0 and at most 1"
            )

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


class SparseLoss(TemporalLoss):
    """A term that has a form of its own on the active pairs of the leading latents."""

    def sparse(self, order: PairsByLatent, layout: Segments, step: int) -> TermValue:
        value, slope_Q = self.on_pairs(leading_pairs(order, self.slow_fraction), layout, step)
        gradient_Q = np.zeros_like(order.value_Q)
        gradient_Q[: len(slope_Q)] = slope_Q
        return TermValue(value, gradient_Q)

    @abstractmethod
    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        """The value and its derivative by the leading latents' codes; NOTHING where nothing can be compared."""


NOTHING = (0.0, np.zeros(0))
