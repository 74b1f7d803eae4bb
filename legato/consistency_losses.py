"""Temporal consistency terms: what makes a latent hold across the tokens of a sequence.

A term has two faces. `loss` is the definition: a pure, differentiable function of dense codes. `sparse` is the same value
with its gradient from the active pairs alone, at a cost that does not depend on the window. Tests hold the two equal.
Codes are always rescaled by their decoder norm, so neither can be moved by trading encoder scale for decoder scale.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, A anchors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from legato.kernels import LatentOrder
from legato.sequences import SequenceLayout

Array = NDArray[Any]


class TermValue(NamedTuple):
    """value of a term (not yet times its coefficient) and its derivative by each active code."""

    value: float
    gradient_Q: Array


class TemporalTerm(Protocol):
    """A temporal consistency term. `coefficient` multiplies it next to the reconstruction loss (an FVU, so about .1 to 1)."""

    @property
    def name(self) -> str: ...
    @property
    def coefficient(self) -> float: ...
    @property
    def window(self) -> int: ...

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor: ...
    def sparse(self, order: LatentOrder, layout: SequenceLayout, step: int) -> TermValue: ...


@dataclass(frozen=True)
class WindowVariance:
    """Variance inside sliding windows relative to power: 1 - sum_w sum_i (mean_w f_i)^2 / sum_w sum_i mean_w f_i^2.

    Equals sum over windows (length `window`, stride 1) and latents of Var_window(f_i), divided by the same sum of
    E_window(f_i^2); 0 for codes constant inside every window, (W-1)/W for isolated firings. Scale-free. Windows lie wholly
    inside valid tokens of one document; without any window or any power the value is 0. The project's founding idea.
    """

    window: int
    coefficient: float
    name: str = "window_variance"

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window {self.window} compares nothing: use 2 or more")

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        W = self.window
        whole_BU = _whole_windows(mask_BL, doc_BL, W)
        codes_BLF = codes_BLF * mask_BL.unsqueeze(-1)
        mean_BUF = codes_BLF.unfold(1, W, 1).mean(-1)
        power_BUF = codes_BLF.square().unfold(1, W, 1).mean(-1)
        numerator = (mean_BUF.square().sum(-1) * whole_BU).sum()
        denominator = (power_BUF.sum(-1) * whole_BU).sum()
        if denominator == 0:
            return codes_BLF.sum() * 0
        return 1 - numerator / denominator

    def sparse(self, order: LatentOrder, layout: SequenceLayout, step: int) -> TermValue:
        shared_Q = np.empty(order.token_Q.shape[0], np.float64)
        covers_Q = np.empty(order.token_Q.shape[0], np.float64)
        _window_overlaps(
            order.ptr_F, order.token_Q, order.value_Q, layout.start_N, layout.end_N, self.window, shared_Q, covers_Q
        )
        f_Q = order.value_Q.astype(np.float64)
        numerator = float(f_Q @ shared_Q) / self.window**2
        denominator = float(np.square(f_Q) @ covers_Q) / self.window
        if denominator == 0:
            return TermValue(0.0, np.zeros_like(order.value_Q))
        gradient_Q = 2 * (
            numerator / denominator**2 * f_Q * covers_Q / self.window - shared_Q / self.window**2 / denominator
        )
        return TermValue(1 - numerator / denominator, gradient_Q.astype(order.value_Q.dtype))


@dataclass(frozen=True)
class Contrastive:
    """Symmetric InfoNCE between the codes of token t and t + lag: cosine, temperature tau, negatives from other documents.

    `anchors` random pairs of a batch are drawn (from `seed` and the step), so the cost does not grow with the batch.
    Bhalla et al. 2025 (arXiv 2511.05541), as the paper states it. Scale-free.
    """

    coefficient: float
    lag: int = 1
    temperature: float = 0.1
    anchors: int = 256
    slow_fraction: float = 1.0
    seed: int = 0
    name: str = "contrastive"

    @property
    def window(self) -> int:
        return self.lag + 1

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        layout = SequenceLayout.of(mask_BL, doc_BL)
        first_A = self._anchors(layout, step)
        n_slow = round(self.slow_fraction * codes_BLF.shape[-1])
        codes_NF = codes_BLF.flatten(0, 1)[:, :n_slow]
        return self._info_nce(codes_NF[first_A], codes_NF[first_A + self.lag], layout.doc_N[first_A])

    def sparse(self, order: LatentOrder, layout: SequenceLayout, step: int) -> TermValue:
        first_A = self._anchors(layout, step)
        gradient_Q = np.zeros_like(order.value_Q)
        if len(first_A) == 0:
            return TermValue(0.0, gradient_Q)
        n_slow = round(self.slow_fraction * (len(order.ptr_F) - 1))
        latent_Q = np.repeat(np.arange(len(order.ptr_F) - 1), np.diff(order.ptr_F))
        sides = []
        for token_A in (first_A, first_A + self.lag):
            slot_N = np.full(len(layout.doc_N), -1, np.int64)
            slot_N[token_A] = np.arange(len(token_A))
            q = np.flatnonzero((slot_N[order.token_Q] >= 0) & (latent_Q < n_slow))
            dense_AF = torch.zeros(len(token_A), n_slow, dtype=torch.from_numpy(order.value_Q).dtype)
            at = (torch.from_numpy(slot_N[order.token_Q[q]]), torch.from_numpy(latent_Q[q]))
            dense_AF[at] = torch.from_numpy(order.value_Q[q])
            sides.append((dense_AF.requires_grad_(), at, q))
        value = self._info_nce(sides[0][0], sides[1][0], layout.doc_N[first_A])
        for (_, at, q), g_AF in zip(sides, torch.autograd.grad(value, [s[0] for s in sides]), strict=True):
            gradient_Q[q] += g_AF[at].numpy()
        return TermValue(float(value.detach()), gradient_Q)

    def _anchors(self, layout: SequenceLayout, step: int) -> Array:
        """Flat index of the earlier token of each drawn pair; both ends lie in one run."""
        index = np.arange(len(layout.end_N))
        candidates = np.flatnonzero(layout.valid_N & (index + self.lag < layout.end_N))
        rng = np.random.default_rng((self.seed, step))
        return np.sort(rng.choice(candidates, min(self.anchors, len(candidates)), replace=False))

    def _info_nce(self, first_AF: Tensor, second_AF: Tensor, doc_A: Array) -> Tensor:
        if len(doc_A) == 0:
            return first_AF.sum() * 0
        similarity_AA = _unit_rows(first_AF) @ _unit_rows(second_AF).T / self.temperature
        doc = torch.from_numpy(doc_A)
        same_document = (doc[:, None] == doc[None, :]) & ~torch.eye(len(doc), dtype=torch.bool)
        similarity_AA = similarity_AA.masked_fill(same_document, float("-inf"))
        target_A = torch.arange(len(doc))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(similarity_AA, target_A) + cross_entropy(similarity_AA.T, target_A)) / 2


def _unit_rows(codes_AF: Tensor) -> Tensor:
    """Rows over their norm; the square is floored before the root, so that an empty row has gradient 0 and not NaN."""
    return codes_AF / codes_AF.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()


def _whole_windows(mask_BL: Tensor, doc_BL: Tensor, window: int) -> Tensor:
    """whole_BU: window u = [u, u + window) lies wholly in valid tokens of one document."""
    valid_BUW = mask_BL.unfold(1, window, 1)
    doc_BUW = doc_BL.unfold(1, window, 1)
    return valid_BUW.all(-1) & (doc_BUW == doc_BUW[..., :1]).all(-1)


@njit(parallel=True, cache=True)
def _window_overlaps(ptr_F, token_Q, value_Q, start_N, end_N, window, shared_Q, covers_Q):
    """covers_Q: windows that contain the pair's token; shared_Q: sum over the latent's codes s of f_s times the number of
    windows that contain both tokens. Two running sums with two pointers: O(Q), whatever the window.

    In a run [a, b) the windows that contain s <= t start at u in [max(a, t-W+1), min(s, b-W)].
    """
    for f in prange(ptr_F.shape[0] - 1):
        lo, hi = ptr_F[f], ptr_F[f + 1]
        tail = lo
        plain = 0.0
        weighted = 0.0
        run = -1
        for q in range(lo, hi):  # s <= t
            t = token_Q[q]
            a = start_N[t]
            last = end_N[t] - window
            if a != run:
                run, tail, plain, weighted = a, q, 0.0, 0.0
            if last < a:
                shared_Q[q] = 0.0
                covers_Q[q] = 0.0
                continue
            first = max(a, t - window + 1)
            while token_Q[tail] < first:
                s = token_Q[tail]
                plain -= value_Q[tail]
                weighted -= value_Q[tail] * (min(s, last) - a)
                tail += 1
            plain += value_Q[q]
            weighted += value_Q[q] * (min(t, last) - a)
            shared_Q[q] = weighted - (first - a - 1) * plain
            covers_Q[q] = min(t, last) - first + 1
        run = -1
        for q in range(hi - 1, lo - 1, -1):  # s > t
            t = token_Q[q]
            a = start_N[t]
            last = end_N[t] - window
            if a != run:
                run, tail, plain, weighted = a, q, 0.0, 0.0
            if last < a:
                continue
            newest = min(t, last)
            while token_Q[tail] - window + 1 > newest:
                s = token_Q[tail]
                plain -= value_Q[tail]
                weighted -= value_Q[tail] * (max(a, s - window + 1) - a)
                tail -= 1
            shared_Q[q] += (newest - a + 1) * plain - weighted
            plain += value_Q[q]
            weighted += value_Q[q] * (max(a, t - window + 1) - a)
