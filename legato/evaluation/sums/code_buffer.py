"""Codes of a limited number of rows, kept for a second pass: position matrix, bootstrap, redundancy, examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from legato.data.activations import ActivationBatch
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes
from legato.sae.kernels.pairs import PairsByLatent


class CodeBuffer:
    """The first `max_rows` rows of codes, mask and documents; 12 bytes for each active pair."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.n_rows = 0
        self.n_latents = 0
        self._pairs: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
        self._masks: list[Tensor] = []
        self._docs: list[Tensor] = []

    def add(self, codes: SparseCodes, mask_BL: Tensor, doc_BL: Tensor) -> None:
        B, L, self.n_latents = codes.shape
        take = min(B, self.max_rows - self.n_rows)
        if take <= 0:
            return
        n_pairs = int(torch.searchsorted(codes.token_P, take * L))  # pairs are ordered by token
        self._pairs.append(
            (
                (codes.token_P[:n_pairs] + self.n_rows * L).cpu().numpy().astype(np.int32),
                codes.latent_P[:n_pairs].cpu().numpy().astype(np.int32),
                codes.value_P[:n_pairs].float().cpu().numpy(),
            )
        )
        self._masks.append(mask_BL[:take].cpu())
        self._docs.append(doc_BL[:take].cpu())
        self.n_rows += take

    def layout(self, lags: tuple[int, ...] = (1,)) -> LagPairs:
        return LagPairs.of(torch.cat(self._masks), torch.cat(self._docs), lags)

    def order(self, layout: LagPairs) -> PairsByLatent:
        token_P, latent_P, value_P = (np.concatenate(part) for part in zip(*self._pairs, strict=True))
        shape = (*layout.shape, self.n_latents)
        return pairs_by_latent(
            SparseCodes(torch.from_numpy(token_P), torch.from_numpy(latent_P), torch.from_numpy(value_P), shape), layout
        )

    @property
    def doc_BL(self) -> Tensor:
        return torch.cat(self._docs)


@dataclass(frozen=True)
class CodedBatch:
    """Codes of a batch with its mask, documents and tokens; tokens_BL: input ids."""

    codes: SparseCodes
    mask_BL: Tensor
    doc_BL: Tensor
    tokens_BL: Tensor


class Encoder(Protocol):
    def encode_sparse(self, batch: ActivationBatch) -> SparseCodes: ...


def coded(sae: Encoder, batches: Iterable[ActivationBatch]) -> Iterator[CodedBatch]:
    for batch in batches:
        yield CodedBatch(sae.encode_sparse(batch), batch.mask_BL, batch.doc_BL, batch.tokens_BL)
