"""What every sparsity is.

Shape legend: N flat tokens, F latents, P active pairs in token order.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from legato.kernels import Pairs
from legato.sparsity.preactivations import Preactivations


class Sparsity(ABC):
    """Which latents of a token may be active, in training and afterwards.

    architecture: what it is at inference (see SparseAutoencoder).
    """

    architecture: ClassVar[str]

    @abstractmethod
    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        """Active pairs and the next floor.

        floor: the selection's memory from batch to batch (a speed hint, never a result); 0 at the start. progress:
        share of the training steps done, for what is annealed.
        """

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        """A sparsity loss and its (constant) derivative by every active code."""
        return 0.0, 0.0

    @abstractmethod
    def frozen(self, calibration: Sequence[Preactivations]) -> dict[str, Any]:
        """The fields of the SparseAutoencoder that training ends in, besides its weights, on the normalised
        activations that it was trained on (`SparseAutoencoder.on_raw` turns them into those for raw ones).

        calibration: pre-activations of the finished weights on a few batches, at least one.
        """
