"""Codes of a limited number of rows, kept for a second pass: position matrix, bootstrap, redundancy, examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from legato.data.activations import ActivationBatch
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes
from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.protocol import EvaluableSAE


@dataclass(frozen=True)
class CodedBatch:
    """Codes of a batch with its mask, documents and tokens; tokens_BL: input ids."""

    codes: SparseCodes
    mask_BL: Tensor
    doc_BL: Tensor
    tokens_BL: Tensor


class CodeBuffer:
    """The first `max_rows` rows of coded batches; 12 bytes for each active pair."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.n_rows = 0
        self._batches: list[CodedBatch] = []

    @classmethod
    def of(cls, batches: Iterable[CodedBatch], max_rows: int) -> "CodeBuffer":
        """Read batches until `max_rows` rows are kept."""
        kept = cls(max_rows)
        for batch in batches:
            kept.add(batch)
            if kept.n_rows == max_rows:
                break
        return kept

    def add(self, batch: CodedBatch) -> None:
        codes, (B, L, F) = batch.codes, batch.codes.shape
        if (take := min(B, self.max_rows - self.n_rows)) <= 0:
            return
        n_pairs = int(torch.searchsorted(codes.token_P, take * L))  # pairs are ordered by token
        token_P, latent_P = (index_P[:n_pairs].cpu().int() for index_P in (codes.token_P, codes.latent_P))
        kept = SparseCodes(token_P, latent_P, codes.value_P[:n_pairs].float().cpu(), (take, L, F))
        rows = (rows_BL[:take].cpu() for rows_BL in (batch.mask_BL, batch.doc_BL, batch.tokens_BL))
        self._batches.append(CodedBatch(kept, *rows))
        self.n_rows += take

    def first(self, n_rows: int) -> "CodeBuffer":
        return CodeBuffer.of(self._batches, n_rows)

    def layout(self, lags: tuple[int, ...] = (1,)) -> LagPairs:
        return LagPairs.of(torch.cat([batch.mask_BL for batch in self._batches]), self.doc_BL, lags)

    def order(self, layout: LagPairs) -> PairsByLatent:
        codes, L = [batch.codes for batch in self._batches], layout.shape[1]
        firsts = torch.tensor([0, *(part.shape[0] for part in codes[:-1])]).cumsum(0).tolist()
        token_P = torch.cat([part.token_P + first * L for part, first in zip(codes, firsts, strict=True)])
        latent_P, value_P = (torch.cat([getattr(part, f) for part in codes]) for f in ("latent_P", "value_P"))
        return pairs_by_latent(SparseCodes(token_P, latent_P, value_P, (*layout.shape, self.n_latents)), layout)

    @property
    def n_latents(self) -> int:
        return self._batches[0].codes.shape[2] if self._batches else 0

    @property
    def doc_BL(self) -> Tensor:
        return torch.cat([batch.doc_BL for batch in self._batches])

    @property
    def tokens_BL(self) -> Tensor:
        return torch.cat([batch.tokens_BL for batch in self._batches])


def coded(sae: EvaluableSAE, batches: Iterable[ActivationBatch]) -> Iterator[CodedBatch]:
    for batch in batches:
        yield CodedBatch(sae.encode_sparse(batch), batch.mask_BL, batch.doc_BL, batch.tokens_BL)
