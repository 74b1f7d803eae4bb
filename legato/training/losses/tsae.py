"""The objective of the published T-SAE code, for parity runs.

Source: AI4LIFE-GROUP/temporal-saes, trainers/temporal_sequence_top_k.py at 8daecb2 (with --contrastive), behind
Bhalla et al. 2025 (arXiv 2511.05541). Where the paper has a cosine, a temperature and negatives from other documents,
the code has none.

Shape legend: D width, F latents, A token pairs.
"""

from dataclasses import dataclass

import numpy as np

from legato.sae.segments import Segments
from legato.training.losses.base import Array
from legato.training.losses.info_nce import MatchedTokens


@dataclass(frozen=True)
class TsaeContrastive(MatchedTokens):
    """The contrastive part of the published objective (tests/published_tsae.py has all of it): symmetric InfoNCE on the
    raw inner products of the first group's codes, between a token and one drawn evenly from the tokens before it in
    its run; every other drawn pair is a negative, of the same document or not.

    Not scale-free: multiplying the codes by c is the same as dividing the temperature by c^2. The published code runs
    on raw activations x and sums its squared error over D. On x' = s (x - mean), beside a reconstruction loss per
    dimension sum_g w_g mean ||x' - xhat'_g||^2 / D, its objective is temperature s^2 and coefficient .1 * 2 s^2 / D.
    `anchors` pairs are drawn (from `seed` and the step); the published batch draws 8192.
    """

    coefficient: float = 0.1
    temperature: float = 1.0
    anchors: int = 256
    slow_fraction: float = 0.2
    seed: int = 0
    name: str = "tsae"

    def draw(self, layout: Segments, step: int) -> tuple[Array, Array, Array]:
        """Drawn tokens, an earlier token of the same run for each, and the numbers of the pairs."""
        index = np.arange(len(layout.start_N))
        candidates = np.flatnonzero(layout.valid_N & (index > layout.start_N))
        rng = np.random.default_rng((self.seed, step))
        now_A = np.sort(rng.choice(candidates, min(self.anchors, len(candidates)), replace=False))
        return now_A, rng.integers(layout.start_N[now_A], now_A), np.arange(len(now_A))
