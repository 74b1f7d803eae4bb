"""Bed of synthetic activations: planted sources in superposition, with dense noise, and their true codes.

Shape legend: B rows, L positions, D width, F sources, R all rows, P active pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from legato.common.record import record
from legato.data.activations import ActivationBatch, ActivationSource
from legato.sae.codes import SparseCodes
from legato.synthetic.sources import FAMILIES, Family, Sources, fire

BLOCK_ROWS = 32
BOS_NORM = 30.0  # in units of the usual norm: a mean over this invalid position would be visibly wrong


@record
class BedConfig:
    """Options of a bed. families: (family, number of sources) in turn. d_in: width they share.

    noise: standard deviation of the dense noise along every direction; the mean magnitude of a source is about 1, so
        1 / noise is the detection index of a source that fires alone. noise_persistence: its lag-1 correlation.
    length: positions a row, the first one a masked start token. document_length: mean tokens of a document (the end of
        one is drawn at every token); a row begins a new one.
    rows, held_out_rows: of the two sides, with the same sources and directions. seed: of all that is drawn.
    """

    families: tuple[tuple[Family, Annotated[int, Field(ge=1)]], ...] = Field(((FAMILIES["mixed"], 256),), min_length=1)
    d_in: int = Field(128, ge=2)
    noise: float = Field(0.35, ge=0)
    noise_persistence: float = Field(0.0, ge=0, lt=1)
    length: int = Field(128, ge=3)
    document_length: float = Field(512.0, ge=2)
    rows: int = Field(1024, ge=1)
    held_out_rows: int = Field(512, ge=1)
    seed: int = 0

    @property
    def l0(self) -> float:
        """Mean number of sources that are on at a token."""
        return Sources.draw(self.families, np.random.default_rng(0)).l0


@dataclass
class Rows(ActivationSource):
    """One side of a bed: activations and true codes of the same rows."""

    acts_RLD: Tensor
    mask_RL: Tensor
    doc_RL: Tensor
    codes: SparseCodes

    def __post_init__(self) -> None:
        self.n_rows, _, self.d_in = self.acts_RLD.shape

    def batches_of(self, rows: Iterable[np.ndarray]) -> Iterator[ActivationBatch]:
        return (self.take(torch.from_numpy(numbers)) for numbers in rows)

    def take(self, rows: Tensor | slice) -> ActivationBatch:
        mask_BL = self.mask_RL[rows]
        return ActivationBatch(self.acts_RLD[rows], mask_BL, self.doc_RL[rows], torch.zeros_like(mask_BL).long())

    def first_codes(self, n_rows: int) -> SparseCodes:
        """Return the true codes of the first rows."""
        _, L, F = self.codes.shape
        n_pairs = int(torch.searchsorted(self.codes.token_P, n_rows * L))  # pairs are ordered by token
        return SparseCodes(
            self.codes.token_P[:n_pairs], self.codes.latent_P[:n_pairs], self.codes.value_P[:n_pairs], (n_rows, L, F)
        )


@dataclass(frozen=True)
class Bed:
    """Sources, their unit directions directions_FD, and two sides of rows drawn from them."""

    config: BedConfig
    sources: Sources
    directions_FD: Tensor
    train: Rows
    held_out: Rows

    @classmethod
    def build(cls, config: BedConfig) -> "Bed":
        """Build the bed of a config; the same one each time."""
        rng = np.random.default_rng([config.seed, 0])
        sources = Sources.draw(config.families, rng)
        directions_FD = rng.standard_normal((sources.count, config.d_in), dtype=np.float32)
        directions_FD /= np.linalg.norm(directions_FD, axis=1, keepdims=True)
        sides = [
            _rows(config, sources, directions_FD, n_rows, np.random.default_rng([config.seed, side]))
            for side, n_rows in ((1, config.rows), (2, config.held_out_rows))
        ]
        return cls(config, sources, torch.from_numpy(directions_FD), *sides)


def _rows(
    config: BedConfig, sources: Sources, directions_FD: np.ndarray, n_rows: int, rng: np.random.Generator
) -> Rows:
    L, D = config.length, config.d_in
    acts_RLD = torch.empty(n_rows, L, D)
    mask_RL = torch.ones(n_rows, L, dtype=torch.bool)
    mask_RL[:, 0] = False
    doc_RL = torch.empty(n_rows, L, dtype=torch.int32)
    bos_D = np.zeros(D, np.float32)
    bos_D[0] = BOS_NORM * np.sqrt(sources.l0 + D * config.noise**2)
    pairs: list[Sequence[np.ndarray]] = []
    n_documents = 0
    for start in range(0, n_rows, BLOCK_ROWS):
        B = min(BLOCK_ROWS, n_rows - start)
        starts_BL = rng.random((B, L)) < 1 / config.document_length
        starts_BL[:, 0] = True
        doc_BL = np.cumsum(starts_BL.ravel()).reshape(B, L) - 1 + n_documents
        n_documents = int(doc_BL.max()) + 1
        code_BLF = fire(sources, starts_BL, rng)
        code_BLF[:, 0] = 0
        noise_BLD = rng.standard_normal((B, L, D), dtype=np.float32) * np.float32(config.noise)
        if rho := np.float32(config.noise_persistence):  # an autoregression along the row
            for t in range(1, L):
                noise_BLD[:, t] = rho * noise_BLD[:, t - 1] + np.sqrt(1 - rho**2) * noise_BLD[:, t]
        code_NF = code_BLF.reshape(B * L, -1)
        acts_BLD = (code_NF @ directions_FD + noise_BLD.reshape(B * L, D)).reshape(B, L, D)
        acts_BLD[:, 0] = bos_D
        acts_RLD[start : start + B] = torch.from_numpy(acts_BLD)
        doc_RL[start : start + B] = torch.from_numpy(doc_BL.astype(np.int32))
        token_P, source_P = code_NF.nonzero()
        pairs.append((token_P + start * L, source_P, code_NF[token_P, source_P]))
    token, source, code = (torch.from_numpy(np.concatenate(part)) for part in zip(*pairs, strict=True))
    return Rows(acts_RLD, mask_RL, doc_RL, SparseCodes(token, source, code, (n_rows, L, sources.count)))
