"""Hysteresis: a Schmitt trigger along the sequence.

Shape legend: F latents, P pairs in token order; dense: [..., L, F] pre-activations of positions L; mask, doc [..., L].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import SHARE, Number, Selecting, tensor
from legato.sae.architectures.preactivations import (
    APPROXIMATE_SHARE,
    FLOOR_SHARE,
    Columns,
    Encoder,
    Preactivations,
    budget_threshold,
    columns,
    quantile_floor,
)
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs
from legato.sae.segments import runs


@dataclass(frozen=True)
class Hysteresis(Selecting):
    """A Schmitt trigger along the sequence: a latent switches on where its pre-activation reaches a threshold, and
    stays on, token after token of one document, while it stays above `release` times that threshold.

    The threshold is the batch's own: the highest at which k latents are on per token on average, so that the budget
    pays for what is held as well as for what is set, and L0 is the baseline's by construction. The pre-activations of
    held tokens get gradient like any other code. `release` falls linearly from 1 (plain BatchTopK) over the first
    `anneal` of training. At inference the threshold is a constant. Ours.
    """

    k: int = 0
    release: float = 0.5
    anneal: float = 0.3
    threshold: Tensor = tensor()
    name: ClassVar[str] = "hysteresis"
    per_latent: ClassVar[Mapping[str, str]] = {"threshold": "F"}
    numbers: ClassVar[Mapping[str, Number]] = {"release": SHARE}
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_release(self.release)

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        N, F = pre.shape
        count, release = self.k * pre.n_valid, release_at(self.release, self.anneal, progress)
        floor = state if state > 0 else quantile_floor(pre, self.k)
        while True:
            token_P, latent_P = pre.candidates(pre.constant_floor(release * floor), 3 * count + F)
            # The matmul's own values tell what may be on; only that is computed exactly.
            approximate_P = pre.critical(token_P, latent_P, pre.approximate(token_P, latent_P), release)
            if int((approximate_P > floor).sum()) >= count or floor <= 0:
                break
            floor = 0.7 * floor if floor > 1e-6 else 0.0
        if len(approximate_P) > count:
            near_P = approximate_P >= APPROXIMATE_SHARE * np.partition(approximate_P, -count)[-count]
            token_P, latent_P = token_P[near_P], latent_P[near_P]
        value_P = pre.exact(token_P, latent_P)
        critical_P = pre.critical(token_P, latent_P, value_P, release)
        # All pairs at the cut: a held stretch shares the critical threshold of the token that set it.
        cut = np.partition(critical_P, -count)[-count] if len(critical_P) > count else 0.0
        keep_P = (critical_P >= cut) & (value_P > 0)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), FLOOR_SHARE * float(cut)

    def inference(self, calibration: Sequence[Preactivations]) -> "Hysteresis":
        threshold = budget_threshold(calibration, self.k, self.release)
        return Hysteresis(release=self.release, threshold=torch.full(calibration[0].b_enc_F.shape, threshold))

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return pre * held(pre, self.threshold, self.release, mask, doc)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        if not bool((self.threshold > 0).all()):
            return super().encode_sparse(encoder, acts_BLD, mask_BL, doc_BL)
        threshold_F, pre = self.threshold.numpy(), encoder.centred(acts_BLD, mask_BL, doc_BL)
        token_P, latent_P, value_P = pre.near(threshold_F, self.release)
        on_P = pre.critical(token_P, latent_P, value_P / threshold_F[latent_P], self.release) >= 1
        return columns(token_P[on_P], latent_P[on_P], value_P[on_P])


def check_release(release: float) -> None:
    if not 0 < release <= 1:
        raise ValueError(f"release {release} must lie in (0, 1]: 1 holds nothing, less holds longer")


def release_at(release: float, anneal: float, progress: float) -> float:
    """The release after a share `progress` of the training steps: it falls from 1 over the first `anneal` of them."""
    return 1 - (1 - release) * min(1.0, progress / max(anneal, 1e-9))


def held(
    pre: Tensor, threshold: Tensor, release: float, mask: Tensor | None = None, doc: Tensor | None = None
) -> Tensor:
    """on[..., L, F]: a latent switches on where pre >= threshold (F) and stays on while pre >= release * threshold,
    through the positions of one document.

    On where the last set is at least as recent as the last reset, found with two running maxima. A reset lies before
    the token's own set where a document starts or masked tokens end.
    """
    valid, opens = runs(pre, mask, doc)
    set_on = (pre >= threshold) & valid.unsqueeze(-1)
    reset = (pre < release * threshold) | (opens | ~valid).unsqueeze(-1)
    small = pre.shape[-2] <= torch.iinfo(torch.int16).max
    at = torch.arange(pre.shape[-2], dtype=torch.int16 if small else torch.int32, device=pre.device).unsqueeze(-1)
    never = at.new_tensor(-1)
    last_set = torch.where(set_on, at, never).cummax(-2).values
    last_reset = torch.where(reset, at, never).cummax(-2).values
    return (last_set >= last_reset) & valid.unsqueeze(-1) & (last_set >= 0) & (pre > 0)
