"""Configuration of one SAE of a bank, and of the bank's training."""

from dataclasses import dataclass

import numpy as np

from legato.common.errors import LegatoError
from legato.sae.architectures import Architecture, ReLU
from legato.sae.groups import leading_count
from legato.sae.kernels import pairs as kernels
from legato.training.losses import TemporalLoss, WindowGroupLasso


@dataclass(frozen=True)
class SAEConfig:
    """One SAE of the bank: its architecture, its temporal terms (none: a baseline), its width and its seed.

    term_warmup: share of the training steps over which the terms' coefficients grow linearly from 0.
    groups: Matryoshka prefixes (share of the latents, weight of that prefix's reconstruction error), the last share 1
    (Bussmann et al. 2025, arXiv 2503.17547). One group: an ordinary SAE.

    Two controls: freeze_decoder leaves the decoder's rows as they are drawn at random; shuffle_positions trains on the
    same activations with the valid positions of each document's stretch inside a row in another order.
    """

    name: str
    architecture: Architecture
    d_sae: int
    terms: tuple[TemporalLoss, ...] = ()
    term_warmup: float = 0.1
    seed: int = 0
    groups: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    freeze_decoder: bool = False
    shuffle_positions: bool = False

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.groups]
        if shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
            raise ValueError(f"groups {self.groups} must be growing shares of the latents that end at 1")
        if not 0 <= self.term_warmup <= 1:
            raise ValueError(f"term_warmup {self.term_warmup} is no share of the training steps: use 0 to 1")
        if getattr(self.architecture, "k", None) == 0:
            raise ValueError(
                f"{self.name}: {type(self.architecture).__name__} cannot train without a budget: give it k"
            )
        unpaid = isinstance(self.architecture, ReLU) and self.architecture.l1 <= 0
        if unpaid and not any(isinstance(term, WindowGroupLasso) for term in self.terms):
            raise ValueError(f"{self.name}: nothing makes ReLU codes sparse at l1 0: add it or WindowGroupLasso")

    def term_scale_at(self, step: int, steps: int) -> float:
        """Return the factor of the terms' coefficients at step 0, 1, ... of `steps`."""
        return min(1.0, (step + 1) / max(1.0, self.term_warmup * steps))

    def nested(self) -> kernels.Groups:
        ends = [leading_count(self.d_sae, share) for share, _ in self.groups]
        return kernels.Groups(np.array(ends), np.array([weight for _, weight in self.groups]))


@dataclass(frozen=True)
class TrainConfig:
    """Training of every SAE of a bank.

    steps: optimiser steps. lr: Adam's peak learning rate, after a linear warm-up over `warmup` of the steps and before
    a linear decay to 0 over the last `decay` of them.
    clip_norm: the gradient's global norm is cut to this, after the backward pass and before Adam.
    dead_after_tokens: a latent that fired on none of that many tokens is dead; the `aux_k` dead latents with the
    largest pre-activations then learn the residual of `aux_tokens` tokens, weighted by aux_coefficient (Gao et al.
    2024, 2.4, who take half of the width for aux_k; runs as short as ours need more weight than their 1/32).
    """

    steps: int
    lr: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.3
    clip_norm: float = 1.0
    dead_after_tokens: int = 250_000
    aux_k: int = 256
    aux_tokens: int = 1024
    aux_coefficient: float = 1 / 8
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LegatoError(f"{self.steps} training steps would leave the SAE untrained: raise --tokens")

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, up, down)
