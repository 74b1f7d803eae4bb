"""The budget is spent on stretches: a latent is chosen for a whole window of tokens.

Shape legend: N flat tokens, F latents, P pairs in token order, G windows, C candidate (window, latent) cells; dense:
[..., L, F] pre-activations of positions L; mask, doc [..., L].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from legato.sae.architectures.base import TOKENS, Number, Selecting, tensor
from legato.sae.architectures.preactivations import Preactivations
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Pairs
from legato.sae.segments import Segments, runs

_SURPLUS = 1.1  # what the candidate cells hold over the budget, so that rounding cannot hide a cell that belongs to it


@dataclass(frozen=True)
class WindowTopK(Selecting):
    """BatchTopK over (window, latent) cells: all positive pre-activations of the cells of largest norm
    sqrt(sum over the window of relu(pre)^2) are on, with as many cells as make k active latents a token.

    Windows of `window` tokens do not overlap and start where a run of a document starts. The choice for a token looks
    ahead to the end of its window, which makes this the non-causal relative of hysteresis. At inference the norm's
    threshold is a constant. Ours.
    """

    k: int = 0
    window: int = 8
    threshold: Tensor = tensor()
    name: ClassVar[str] = "window_topk"
    per_latent: ClassVar[Mapping[str, str]] = {"threshold": "F"}
    numbers: ClassVar[Mapping[str, Number]] = {"window": TOKENS}
    stateful: ClassVar[bool] = True

    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        cells = best_cells(pre, self.window, self.k * pre.n_valid)
        threshold = _budget_norm(cells.norm_C, cells.positive_C, self.k * pre.n_valid)[0]
        keep_P = (cells.norm_C >= threshold)[cells.cell_P] & (cells.value_P > 0)
        return kernels.keep(pre.shape[0], cells.token_P, cells.latent_P, cells.value_P, keep_P), 0.0

    def inference(self, calibration: Sequence[Preactivations]) -> "WindowTopK":
        cells = [best_cells(pre, self.window, self.k * pre.n_valid) for pre in calibration]
        norm_C = np.concatenate([each.norm_C for each in cells])
        positive_C = np.concatenate([each.positive_C for each in cells])
        last_and_next = _budget_norm(norm_C, positive_C, self.k * sum(pre.n_valid for pre in calibration))
        threshold = torch.full(calibration[0].b_enc_F.shape, sum(last_and_next) / 2)
        return WindowTopK(window=self.window, threshold=threshold)

    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        return pre * held_windows(pre, self.threshold, self.window, mask, doc)


@dataclass(frozen=True)
class Cells:
    """Candidate cells: exact norm_C, number of positive pre-activations positive_C; and their pairs: cell_P, token_P,
    latent_P, exact value_P."""

    norm_C: Array
    positive_C: Array
    cell_P: Array
    token_P: Array
    latent_P: Array
    value_P: Array


def best_cells(pre: Preactivations, window: int, count: int) -> Cells:
    """The cells of largest norm, enough of them for `count` positive pre-activations if there are that many."""
    window_N, first_G, end_G = windows_of(pre.layout, window)
    valid = np.flatnonzero(window_N >= 0)
    squares_NH = pre.dense(valid).relu().float().square_()
    norm2_GH = torch.zeros(len(first_G), squares_NH.shape[1])
    norm2_GH.index_add_(0, torch.from_numpy(window_N[valid]), squares_NH)
    n_cells, most = 2 * count // window + 1, len(first_G) * pre.shape[1]
    while True:
        n_cells = min(n_cells, most)
        cells = _exact_cells(pre, *_candidate_cells(pre, norm2_GH, n_cells), first_G, end_G)
        if cells.positive_C.sum() >= _SURPLUS * count or n_cells == most:
            return cells
        n_cells *= 2


def _candidate_cells(pre: Preactivations, norm2_GH: Tensor, n_cells: int) -> tuple[Array, Array]:
    """(window_C, latent_C) of the n_cells largest, from each rank's best."""
    n_held, first = norm2_GH.shape[1], pre.partition.local(pre.shape[1]).start
    own = norm2_GH.flatten().topk(min(n_cells, norm2_GH.numel()), sorted=False)
    cell_C = own.indices.numpy()
    window_C, latent_C, norm2_C = (
        pre.partition.of_latents(column) for column in (cell_C // n_held, cell_C % n_held + first, own.values.numpy())
    )
    best = torch.from_numpy(norm2_C).topk(n_cells, sorted=False).indices.numpy()
    return window_C[best], latent_C[best]


def windows_of(layout: Segments, window: int) -> tuple[Array, Array, Array]:
    """(window_N, first_G, end_G): each valid token's window, -1 for the others, and the tokens [first, end) of each."""
    tokens = np.arange(len(layout.start_N))
    opens_N = layout.valid_N & ((tokens - layout.start_N) % window == 0)
    window_N = np.where(layout.valid_N, np.cumsum(opens_N) - 1, -1)
    first_G = np.flatnonzero(opens_N)
    return window_N, first_G, np.minimum(first_G + window, layout.end_N[first_G])


def _exact_cells(pre: Preactivations, window_C: Array, latent_C: Array, first_G: Array, end_G: Array) -> Cells:
    length_C = (end_G - first_G)[window_C]
    cell_P = np.repeat(np.arange(len(window_C)), length_C)
    step_P = np.arange(len(cell_P)) - np.repeat(np.cumsum(length_C) - length_C, length_C)
    token_P, latent_P = first_G[window_C][cell_P] + step_P, latent_C[cell_P]
    order = np.argsort(token_P * pre.shape[1] + latent_P)
    cell_P, token_P, latent_P = cell_P[order], token_P[order].astype(np.int32), latent_P[order].astype(np.int32)
    value_P = pre.exact(token_P, latent_P)
    positive_P = np.maximum(value_P, 0)
    norm_C = np.sqrt(np.bincount(cell_P, positive_P.astype(np.float64) ** 2, len(window_C)))
    return Cells(norm_C, np.bincount(cell_P, value_P > 0, len(window_C)), cell_P, token_P, latent_P, value_P)


def _budget_norm(norm_C: Array, positive_C: Array, count: int) -> tuple[float, float]:
    """Norms of the last cell that `count` active pairs pay for, and of the one after it."""
    order = np.argsort(-norm_C, kind="stable")
    last = min(int(np.searchsorted(np.cumsum(positive_C[order]), count)), len(order) - 1)
    return float(norm_C[order[last]]), float(norm_C[order[min(last + 1, len(order) - 1)]])


def held_windows(
    pre: Tensor, threshold: Tensor, window: int, mask: Tensor | None = None, doc: Tensor | None = None
) -> Tensor:
    """on[..., L, F]: positive pre-activations of those (window, latent) cells whose norm sqrt(sum relu(pre)^2) reaches
    the threshold (F); windows of `window` tokens start where a run of a document starts."""
    valid, opens = runs(pre, mask, doc)
    at = torch.arange(pre.shape[-2], device=pre.device).expand(valid.shape)
    start = torch.where(opens & valid, at, torch.zeros_like(at)).cummax(-1).values
    new_window = valid & ((at - start) % window == 0)
    cell = new_window.long().cumsum(-1) * valid  # 0: not valid
    squares = pre.relu().square() * valid.unsqueeze(-1)
    index = cell.unsqueeze(-1).expand(pre.shape)
    norm2 = torch.zeros_like(torch.cat([pre, pre[..., :1, :]], dim=-2)).scatter_add_(-2, index, squares)
    return (norm2.gather(-2, index).sqrt() >= threshold) & (pre > 0) & valid.unsqueeze(-1)
