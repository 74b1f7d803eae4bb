"""The contrastive term as the paper states it.

Shape legend: N flat tokens, A anchors, C candidates for them.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from legato.sae.segments import Segments
from legato.training.losses.base import Array
from legato.training.losses.info_nce import MatchedTokens


@dataclass(frozen=True)
class Contrastive(MatchedTokens):
    """Symmetric InfoNCE between the codes of token t and t + lag: cosine, temperature tau, negatives from other
    documents.

    `anchors` random pairs of a batch are drawn (from `seed` and the step) among those at any of `lags`, so the cost
    grows neither with the batch nor with the lags. Bhalla et al. 2025 (arXiv 2511.05541), as the paper states it.
    Scale-free. A token without an active latent has cosine 0 with all others; without any pair the value is 0.
    """

    coefficient: float
    lags: tuple[int, ...] = (1,)
    temperature: float = 0.1
    anchors: int = 256
    slow_fraction: float = 1.0
    seed: int = 0
    name: str = "contrastive"
    cosine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.lags or min(self.lags) < 1:
            raise ValueError(f"lags {self.lags} compare nothing: use one or more, each 1 or more")
        super().__post_init__()

    @property
    def window(self) -> int:
        return max(self.lags) + 1

    def draw(self, layout: Segments, step: int) -> tuple[Array, Array, Array]:
        """The earlier and the later token of each drawn pair, both in one run, and its document."""
        index = np.arange(len(layout.end_N))
        firsts = [np.flatnonzero(layout.valid_N & (index + lag < layout.end_N)) for lag in self.lags]
        first_C = np.concatenate(firsts)
        lag_C = np.repeat(self.lags, [len(first) for first in firsts])
        rng = np.random.default_rng((self.seed, step))
        drawn_A = np.sort(rng.choice(len(first_C), min(self.anchors, len(first_C)), replace=False))
        first_A = first_C[drawn_A]
        return first_A, (first_C + lag_C)[drawn_A], layout.doc_N[first_A]
