"""Hysteresis: a Schmitt trigger along the sequence.

Activations that look along the sequence, on dense pre-activations: what a SAE with state does at inference.

Shape legend: [..., L, F] pre-activations of positions L and latents F; mask, doc [..., L].

Shape legend of the dense function: [..., L, F] pre-activations of positions L and latents F; mask, doc [..., L].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import Architecture
from legato.sae.architectures.preactivations import FLOOR_SHARE, Preactivations, budget_threshold, quantile_floor
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Pairs
from legato.sae.segments import runs

# bfloat16 pre-activations lie within 0.4 % of the exact ones, and a little more where large terms cancel.
ROUGH_SHARE = 0.98


@dataclass(frozen=True)
class Hysteresis(Architecture):
    """A Schmitt trigger along the sequence: a latent switches on where its pre-activation reaches a threshold, and
    stays on, token after token of one document, while it stays above `release` times that threshold.

    The threshold is the batch's own: the highest at which k latents are on per token on average, so that the budget
    pays for what is held as well as for what is set, and L0 is the baseline's by construction. The pre-activations of
    held tokens get gradient like any other code. `release` falls linearly from 1 (plain BatchTopK) over the first
    `anneal` of training. At inference the threshold is a constant. Ours.
    """

    k: int
    release: float = 0.5
    anneal: float = 0.3
    architecture: ClassVar[str] = "hysteresis"

    def __post_init__(self) -> None:
        check_release(self.release)

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N, F = pre.shape
        count, release = self.k * pre.n_valid, release_at(self.release, self.anneal, progress)
        if floor <= 0:
            floor = quantile_floor(pre, self.k)
        while True:
            token_P, latent_P = pre.nominated(pre.constant_floor(release * floor), 3 * count + F)
            # The matmul's own values nominate what may be on; only that is computed exactly.
            rough_P = pre.critical(token_P, latent_P, pre.rough(token_P, latent_P), release)
            if int((rough_P > floor).sum()) >= count or floor <= 0:
                break
            floor = 0.7 * floor if floor > 1e-6 else 0.0
        if len(rough_P) > count:
            near = ROUGH_SHARE * np.partition(rough_P, len(rough_P) - count)[len(rough_P) - count]
            token_P, latent_P = token_P[rough_P >= near], latent_P[rough_P >= near]
        value_P = pre.exact(token_P, latent_P)
        critical_P = pre.critical(token_P, latent_P, value_P, release)
        # All pairs at the cut: a held stretch shares the critical threshold of the token that set it.
        cut = np.partition(critical_P, -count)[-count] if len(critical_P) > count else 0.0
        keep_P = (critical_P >= cut) & (value_P > 0)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), FLOOR_SHARE * float(cut)

    def frozen(self, calibration: Sequence[Preactivations]) -> dict[str, Any]:
        threshold_F = torch.full(calibration[0].b_enc_F.shape, budget_threshold(calibration, self.k, self.release))
        return {"architecture": self.architecture, "threshold": threshold_F, "release": self.release}


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
