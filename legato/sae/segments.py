"""Segments of a batch: tokens that may be compared with each other.

Shape legend: B rows, L positions, N = B * L flat tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The runs of consecutive valid tokens of one document inside one row; windows and lags never leave a run.

    start_N, end_N: int32, the run [start, end) of flat tokens that token n lies in; start = end = -1 on invalid tokens.
    doc_N: int32, document number. valid_N: bool. length: L.

    >>> Segments.of(torch.tensor([[True, True, False, True]]), torch.tensor([[7, 8, 8, 8]])).start_N.tolist()
    [0, 1, -1, 3]
    """

    start_N: NDArray[Any]
    end_N: NDArray[Any]
    doc_N: NDArray[Any]
    valid_N: NDArray[Any]
    length: int

    @classmethod
    def of(cls, mask_BL: Tensor, doc_BL: Tensor) -> "Segments":
        B, L = mask_BL.shape
        valid_N = mask_BL.reshape(-1).numpy()
        doc_N = doc_BL.reshape(-1).numpy().astype(np.int32)
        opens = (mask_BL & runs(mask_BL.unsqueeze(-1), mask_BL, doc_BL)[1]).reshape(-1).numpy()
        run_N = np.cumsum(opens) - 1
        first = np.flatnonzero(opens)
        count = np.bincount(run_N[valid_N], minlength=len(first)) if len(first) else np.zeros(0, np.int64)
        start_N = np.full(B * L, -1, np.int32)
        end_N = np.full(B * L, -1, np.int32)
        start_N[valid_N] = first[run_N[valid_N]]
        end_N[valid_N] = (first + count)[run_N[valid_N]]
        return cls(start_N, end_N, doc_N, valid_N, L)

    def rows(self) -> tuple[Tensor, Tensor]:
        """(mask_BL, doc_BL), the inverse of `of`."""
        mask_BL, doc_BL = (torch.from_numpy(each_N).view(-1, self.length) for each_N in (self.valid_N, self.doc_N))
        return mask_BL, doc_BL


def runs(pre: Tensor, mask: Tensor | None, doc: Tensor | None) -> tuple[Tensor, Tensor]:
    """(valid, opens) [..., L]: which tokens take part, and which start a run of a document."""
    valid = torch.ones(pre.shape[:-1], dtype=torch.bool, device=pre.device) if mask is None else mask
    breaks = ~valid[..., :-1]
    if doc is not None:
        breaks = breaks | (doc[..., 1:] != doc[..., :-1])
    return valid, torch.cat([torch.ones_like(valid[..., :1]), breaks], dim=-1)
