"""InfoNCE between matched tokens, dense and from the active pairs alone.

Shape legend: B rows, L positions, F latents, N = B * L flat tokens, Q active pairs sorted by latent, A matched token
pairs, E the active pairs of A tokens.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments
from legato.training.losses.base import NOTHING, Array, SparseLoss, leading_codes


class MatchedTokens(SparseLoss):
    """InfoNCE between the codes of the tokens of drawn pairs. cosine: of codes over their norm, else as they are."""

    temperature: float
    cosine: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not positive")

    @abstractmethod
    def draw(self, layout: Segments, step: int) -> tuple[Array, Array, Array]:
        """Flat indices of both tokens of each pair (A), and a number: pairs of the same one are no negatives."""

    def loss(self, codes_BLF: Tensor, mask_BL: Tensor, doc_BL: Tensor, step: int = 0) -> Tensor:
        *sides, doc_A = self.draw(Segments.of(mask_BL, doc_BL), step)
        codes_NF = leading_codes(codes_BLF, mask_BL, self.slow_fraction).flatten(0, 1)
        first_AF, second_AF = (codes_NF[token_A] for token_A in sides)
        if self.cosine:
            first_AF, second_AF = _unit_rows(first_AF), _unit_rows(second_AF)
        return info_nce(first_AF, second_AF, doc_A, self.temperature)

    def on_pairs(self, slow: PairsByLatent, layout: Segments, step: int) -> tuple[float, Array]:
        *tokens, doc_A = self.draw(layout, step)
        if len(doc_A) == 0:
            return NOTHING
        sides = [ActiveRows.of(slow, token_A, len(layout.doc_N)) for token_A in tokens]
        if self.cosine:
            norms = [np.sqrt(np.bincount(s.row_E, s.value_E**2, minlength=len(doc_A)))[s.row_E] for s in sides]
            sides = [s._replace(value_E=s.value_E / norm_E) for s, norm_E in zip(sides, norms, strict=True)]
        value, *slopes = sparse_info_nce(sides[0], sides[1], doc_A, self.temperature)
        slope_Q = np.zeros_like(slow.value_Q)
        for number, (side, slope_E) in enumerate(zip(sides, slopes, strict=True)):
            if self.cosine:
                radial_A = np.bincount(side.row_E, side.value_E * slope_E, minlength=len(doc_A))
                slope_E = (slope_E - radial_A[side.row_E] * side.value_E) / norms[number]
            np.add.at(slope_Q, side.at_E, slope_E.astype(slope_Q.dtype))  # a token may be drawn more than once
        return value, slope_Q


def _unit_rows(codes_AF: Tensor) -> Tensor:
    """Rows over their norm; the square is floored before the root, so that an empty row has gradient 0 and not NaN."""
    return codes_AF / codes_AF.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()


def info_nce(first_AF: Tensor, second_AF: Tensor, doc_A: Array, temperature: float) -> Tensor:
    """Symmetric InfoNCE of the inner products over temperature: row a of either side has to find its match among the
    rows of other documents (van den Oord et al. 2018). 0 without any pair."""
    if len(doc_A) == 0:
        return first_AF.sum() * 0
    logits_AA = first_AF @ second_AF.T / temperature
    doc = torch.from_numpy(doc_A)
    same_document = (doc[:, None] == doc[None, :]) & ~torch.eye(len(doc), dtype=torch.bool)
    logits_AA = logits_AA.masked_fill(same_document, float("-inf"))
    target_A = torch.arange(len(doc))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits_AA, target_A) + cross_entropy(logits_AA.T, target_A)) / 2


class ActiveRows(NamedTuple):
    """The active codes of A tokens, sorted by latent: entry e of latent f, in ptr_F[f]:ptr_F[f+1], is the code
    value_E[e] of token number row_E[e], and pair at_E[e] of the batch."""

    ptr_F: Array
    row_E: Array
    at_E: Array
    value_E: Array

    @classmethod
    def of(cls, order: PairsByLatent, token_A: Array, n_tokens: int) -> "ActiveRows":
        by_token_A = np.argsort(token_A, kind="stable")  # a token may be drawn more than once
        ptr_N = np.searchsorted(token_A[by_token_A], np.arange(n_tokens + 1))
        first_Q = ptr_N[order.token_Q]
        count_Q = ptr_N[order.token_Q + 1] - first_Q
        start_Q = np.concatenate([[0], np.cumsum(count_Q)])
        at_E = np.repeat(np.arange(len(count_Q)), count_Q)
        row_E = by_token_A[first_Q[at_E] + np.arange(len(at_E)) - start_Q[at_E]]
        return cls(start_Q[order.ptr_F], row_E, at_E, order.value_Q[at_E].astype(np.float64))


def sparse_info_nce(
    first: ActiveRows, second: ActiveRows, doc_A: Array, temperature: float
) -> tuple[float, Array, Array]:
    """(`info_nce`, its derivatives by first.value_E, by second.value_E). Cost: A^2 plus the co-active entries."""
    logits_AA = np.zeros((len(doc_A), len(doc_A)))
    _inner_products(
        first.ptr_F, first.row_E, first.value_E / temperature, second.ptr_F, second.row_E, second.value_E, logits_AA
    )
    by_first_AA, by_second_AA = logits_AA, logits_AA.T.copy()
    entropy_A = _softmax_cross_entropy(by_first_AA, doc_A) + _softmax_cross_entropy(by_second_AA, doc_A)
    slope_AA = (by_first_AA + by_second_AA.T) / (2 * len(doc_A) * temperature)
    slopes = []
    for rows, others, g_AA in ((first, second, slope_AA), (second, first, slope_AA.T.copy())):
        slope_E = np.empty(len(rows.value_E))
        _pull_back(rows.ptr_F, rows.row_E, others.ptr_F, others.row_E, others.value_E, g_AA, slope_E)
        slopes.append(slope_E)
    return float(entropy_A.mean()) / 2, slopes[0], slopes[1]


@njit(cache=True)
def _inner_products(ptr_1, row_1, value_1, ptr_2, row_2, value_2, out_AA):
    for f in range(ptr_1.shape[0] - 1):
        for i in range(ptr_1[f], ptr_1[f + 1]):
            for j in range(ptr_2[f], ptr_2[f + 1]):
                out_AA[row_1[i], row_2[j]] += value_1[i] * value_2[j]


@njit(parallel=True, cache=True)
def _softmax_cross_entropy(logits_AA, doc_A):
    """Cross-entropy of row a against target a, the other rows of its document left out; logits_AA becomes its
    derivative."""
    A = logits_AA.shape[0]
    entropy_A = np.empty(A)
    for a in prange(A):
        row = logits_AA[a]
        target = row[a]
        largest = target
        for b in range(A):
            if b != a and doc_A[b] == doc_A[a]:
                row[b] = -np.inf
            largest = max(largest, row[b])
        total = 0.0
        for b in range(A):
            row[b] = np.exp(row[b] - largest)
            total += row[b]
        for b in range(A):
            row[b] /= total
        row[a] -= 1
        entropy_A[a] = largest - target + np.log(total)
    return entropy_A


@njit(parallel=True, cache=True)
def _pull_back(ptr_1, row_1, ptr_2, row_2, value_2, slope_AA, slope_1):
    """slope_1[i] = sum over the other side's entries j of the same latent of slope_AA[row i, row j] * value j."""
    for f in prange(ptr_1.shape[0] - 1):
        for i in range(ptr_1[f], ptr_1[f + 1]):
            total = 0.0
            for j in range(ptr_2[f], ptr_2[f + 1]):
                total += slope_AA[row_1[i], row_2[j]] * value_2[j]
            slope_1[i] = total
