"""Which latents of a token may be active: BatchTopK, TopK, ReLU with an L1 penalty.

A sparsity turns pre-activations into active pairs. The dense matmul's output (possibly bfloat16) only nominates
candidates; their values are recomputed in the weights' own precision, and the choice is made on those.

Shape legend: N flat tokens, D width, F latents, P active pairs in token order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato import kernels
from legato.kernels import Pairs
from legato.sequences import SequenceLayout

Array = NDArray[Any]

# Candidates are taken above this share of the last batch's threshold: wide enough that neither its drift between two
# batches nor bfloat16's rounding (0.4 %) can hide a pair, narrow enough to leave only some 15 % surplus to recompute.
_FLOOR_SHARE = 0.95
# bfloat16 pre-activations lie within 0.4 % of the exact ones, and a little more where large terms cancel.
_ROUGH_SHARE = 0.98


class Preactivations(NamedTuple):
    """pre_NF: the encoder's dense output, the inputs beside it for exact values; layout: tokens that take part,
    runs."""

    pre_NF: Tensor
    x_ND: Array
    W_enc_FD: Array
    b_enc_F: Array
    layout: SequenceLayout

    @property
    def n_valid(self) -> int:
        return int(self.layout.valid_N.sum())

    def scan(self, floor_N: Array, expected: int) -> tuple[Array, Array, Array]:
        """(token_P, latent_P, exact value_P) of the pairs whose pre_NF lies above the floor (in `ordered` units)."""
        token_P, latent_P = kernels.scan(self.ordered, self.layout.valid_N, floor_N, expected)
        return token_P, latent_P, self.exact(token_P, latent_P)

    def exact(self, token_P: Array, latent_P: Array) -> Array:
        return kernels.exact_values(self.x_ND, self.W_enc_FD, self.b_enc_F, token_P, latent_P)

    @property
    def ordered(self) -> Array:
        """pre_NF as an array numpy can compare: bfloat16 as its bits, whose order is that of positive numbers."""
        bits = self.pre_NF.view(torch.int16) if self.pre_NF.dtype == torch.bfloat16 else self.pre_NF
        return bits.numpy()

    def rough(self, token_P: Array, latent_P: Array) -> Array:
        """The matmul's own values of the given pairs, float32 or finer."""
        values_P = self.ordered[token_P, latent_P]
        if self.pre_NF.dtype == torch.bfloat16:
            return (values_P.astype(np.int32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
        return values_P

    def critical(self, token_P: Array, latent_P: Array, value_P: Array, release: float) -> Array:
        F = self.pre_NF.shape[1]
        return kernels.critical_thresholds(self.layout.start_N, token_P, latent_P, value_P, F, release)

    def constant_floor(self, floor: float) -> Array:
        value = torch.full((self.pre_NF.shape[0],), floor, dtype=self.pre_NF.dtype)
        return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


class Sparsity(Protocol):
    """`floor` is the selection's memory from batch to batch (a speed hint, never a result); 0 at the start."""

    architecture: ClassVar[str]

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        """Active pairs and the next floor; progress: share of the training steps done, for what is annealed."""
        ...

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        """A sparsity loss and its (constant) derivative by every active code."""
        ...


@dataclass(frozen=True)
class BatchTopK:
    """The k * (valid tokens) largest positive pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    k: int
    architecture: ClassVar[str] = "jumprelu"

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N = pre.pre_NF.shape[0]
        count = self.k * pre.n_valid
        if floor <= 0:
            floor = _quantile_floor(pre, self.k)
        while True:
            token_P, latent_P, value_P = pre.scan(pre.constant_floor(floor), count + count // 2)
            if len(token_P) >= count or floor <= 0:
                break
            floor = 0.7 * floor if floor > 1e-6 else 0.0
        keep_P = kernels.keep_batch_top(value_P, count)
        pairs = kernels.keep(N, token_P, latent_P, value_P, keep_P)
        cut = float(pairs.value_P.min()) if len(pairs.value_P) else 0.0
        return pairs, _FLOOR_SHARE * float(cut)

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class Hysteresis:
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
        if not 0 < self.release <= 1:
            raise ValueError(f"release {self.release} must lie in (0, 1]: 1 holds nothing, less holds longer")

    def release_at(self, progress: float) -> float:
        return 1 - (1 - self.release) * min(1.0, progress / max(self.anneal, 1e-9))

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N, F = pre.pre_NF.shape
        count, release = self.k * pre.n_valid, self.release_at(progress)
        if floor <= 0:
            floor = _quantile_floor(pre, self.k)
        while True:
            token_P, latent_P = kernels.scan(
                pre.ordered, pre.layout.valid_N, pre.constant_floor(release * floor), 3 * count + F
            )
            # The matmul's own values nominate what may be on; only that is computed exactly.
            rough_P = pre.critical(token_P, latent_P, pre.rough(token_P, latent_P), release)
            if int((rough_P > floor).sum()) >= count or floor <= 0:
                break
            floor = 0.7 * floor if floor > 1e-6 else 0.0
        if len(rough_P) > count:
            near = _ROUGH_SHARE * np.partition(rough_P, len(rough_P) - count)[len(rough_P) - count]
            token_P, latent_P = token_P[rough_P >= near], latent_P[rough_P >= near]
        value_P = pre.exact(token_P, latent_P)
        critical_P = pre.critical(token_P, latent_P, value_P, release)
        # All pairs at the cut: a held stretch shares the critical threshold of the token that set it.
        cut = np.partition(critical_P, -count)[-count] if len(critical_P) > count else 0.0
        keep_P = (critical_P >= cut) & (value_P > 0)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), _FLOOR_SHARE * float(cut)

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class TopK:
    """The k largest positive pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int
    architecture: ClassVar[str] = "topk"

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N = pre.pre_NF.shape[0]
        floor_N = kernels.row_floors(pre.ordered, pre.layout.valid_N, self.k)
        token_P, latent_P, value_P = pre.scan(floor_N, 3 * self.k * N)
        keep_P = kernels.keep_row_top(N, token_P, value_P, self.k)
        return kernels.keep(N, token_P, latent_P, value_P, keep_P), 0.0

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation, with an L1 penalty: l1 / D * mean over tokens of sum_i f_i (codes with unit
    decoder rows). Dividing by D puts l1 on the scale of a loss ||x - xhat||^2 summed over D, as SAELens has it."""

    l1: float
    architecture: ClassVar[str] = "standard"

    def select(self, pre: Preactivations, floor: float, progress: float) -> tuple[Pairs, float]:
        N, F = pre.pre_NF.shape
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(0.0), N * F // 8)
        return kernels.keep(N, token_P, latent_P, value_P, value_P > 0), 0.0

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        slope = self.l1 / (d_in * n_valid)
        return slope * float(pairs.value_P.sum(dtype=np.float64)), slope


def frozen_threshold(sparsity: BatchTopK | Hysteresis, batches: Sequence[Preactivations]) -> float:
    """The one threshold at which all batches together have k active latents per token, for inference."""
    release = sparsity.release if isinstance(sparsity, Hysteresis) else 1.0
    lowest = min(_quantile_floor(pre, 2 * sparsity.k) for pre in batches)
    critical = []
    for pre in batches:
        token_P, latent_P, value_P = pre.scan(pre.constant_floor(release * lowest), 4 * sparsity.k * pre.n_valid)
        critical.append(pre.critical(token_P, latent_P, value_P, release))
    critical_P = np.concatenate(critical)
    count = sparsity.k * sum(pre.n_valid for pre in batches)
    if len(critical_P) <= count:
        return lowest
    # Between the last pair that is on and the first that is not, so that > and >= mean the same.
    last_two = np.partition(critical_P, [len(critical_P) - count - 1, len(critical_P) - count])[-count - 1 :][:2]
    return float(last_two.mean())


def _quantile_floor(pre: Preactivations, k: int) -> float:
    """A first guess: the value that 1.2 k latents of a token exceed on average, from a sample of tokens."""
    rows = np.flatnonzero(pre.layout.valid_N)
    sample_SF = pre.pre_NF[torch.from_numpy(rows[:: max(1, len(rows) // 64)])].float().flatten()
    rank = max(1, round(sample_SF.numel() * (1 - 1.2 * k / pre.pre_NF.shape[1])))
    return max(0.0, float(sample_SF.kthvalue(min(rank, sample_SF.numel())).values))
