"""Activations: their record, sources that give them in batches, and the normaliser of training.

Shape legend: B rows (contexts), L positions, D width, N valid tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato.common import distributed
from legato.common.errors import LegatoError
from legato.common.files import sha256_json
from legato.common.hardware import single_threaded
from legato.data.language_model import LanguageModel
from legato.data.sites import check_finite
from legato.data.tokens import TokenSet

OUTLIER_FACTOR = 8.0
MEDIAN_ROWS = 32
BATCH_ROWS = 32
NORMALISER_ROWS = 1024


@dataclass(frozen=True)
class ActivationBatch:
    """Rows of activations with mask, document and token of each position.

    acts_BLD: raw activations in the model's dtype. mask_BL: bool, True where the position is text and no outlier.
    doc_BL: int32, document number, -1 on pad. tokens_BL: int64, input ids.
    """

    acts_BLD: Tensor
    mask_BL: Tensor
    doc_BL: Tensor
    tokens_BL: Tensor

    def __post_init__(self) -> None:
        """Check the fields. Raises LegatoError where the four are not of the same positions."""
        if self.acts_BLD.ndim != 3 or not self.acts_BLD.is_floating_point():
            raise LegatoError(f"acts_BLD is {self.acts_BLD.dtype} {[*self.acts_BLD.shape]}: give floats [B, L, D]")
        if self.mask_BL.dtype != torch.bool:
            raise LegatoError(f"mask_BL is {self.mask_BL.dtype}: give torch.bool")
        for name in ("mask_BL", "doc_BL", "tokens_BL"):
            if (shape := getattr(self, name).shape) != self.acts_BLD.shape[:2]:
                raise LegatoError(f"{name} is {[*shape]} where acts_BLD is {[*self.acts_BLD.shape]}")


class ActivationSource(ABC):
    """Rows of activations in batches: a store on disk, a stream, the synthetic bed."""

    d_in: int
    n_rows: int

    @abstractmethod
    def batches_of(self, rows: Iterable[np.ndarray]) -> Iterator[ActivationBatch]:
        """Yield a batch for each array of row numbers, its rows in that order."""

    def batches(
        self,
        rows_per_batch: int,
        *,
        seed: int | None,
        epochs: int | None = 1,
        drop_last: bool = False,
        start_batch: int = 0,
    ) -> Iterator[ActivationBatch]:
        """Yield batches of rows: in order (seed None), or in an order drawn from `seed` anew for each epoch.

        epochs: passes over the rows, None for endless. drop_last: leave out an epoch's last batch if it is smaller.
        start_batch: batches to skip at the start, without reading them (to go on after an interruption).
        Raises LegatoError, at the first batch, where the rows do not fill one.
        """
        return self.batches_of(_row_batches(self.n_rows, rows_per_batch, seed, epochs, drop_last, start_batch))


def _row_batches(
    n_rows: int, rows_per_batch: int, seed: int | None, epochs: int | None, drop_last: bool, start_batch: int
) -> Iterator[np.ndarray]:
    assert rows_per_batch > 0, rows_per_batch
    n_batches = n_rows // rows_per_batch if drop_last else -(-n_rows // rows_per_batch)
    if n_batches == 0:
        raise LegatoError(f"{n_rows} rows do not fill one batch of {rows_per_batch}: use more text or smaller batches")
    first_epoch, first_batch = divmod(start_batch, n_batches)
    for epoch in count(first_epoch) if epochs is None else range(first_epoch, epochs):
        order = np.arange(n_rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(n_rows)
        for batch in range(first_batch if epoch == first_epoch else 0, n_batches):
            yield order[batch * rows_per_batch : (batch + 1) * rows_per_batch]


@dataclass(eq=False)
class ActivationStream(ActivationSource):
    """Activations of a token set at one site, computed on demand; equal to those that `harvest` stores.

    outlier_factor: positions whose norm exceeds that many median norms are masked.
    Raises UsageError for a layer or site that does not exist.
    """

    language_model: LanguageModel
    tokens: TokenSet
    _: KW_ONLY
    layer: int
    site: str = "resid_post"
    outlier_factor: float = OUTLIER_FACTOR

    def __post_init__(self) -> None:
        at = self.language_model.site(self.layer, self.site)
        self.module_path, self.d_in, self.dtype = str(at), at.width, at.dtype
        self.n_rows = len(self.tokens)
        self.context_length = self.tokens.context_length
        self._yardstick: Tensor | None = None  # activations of the rows of the median

    def first_tokens(self, n_rows: int) -> Tensor:
        """Return int64 input ids [n_rows, L] of the first rows, or of all if there are fewer."""
        return self.tokens.tokens_BL[:n_rows].long()

    def batches_of(self, rows: Iterable[np.ndarray]) -> Iterator[ActivationBatch]:
        """Yield batches. Several ranks must call it together: each computes one batch in turn and gets those of the
        others."""
        numbers = iter(rows)
        while turn := list(islice(numbers, distributed.world_size())):
            own = turn[distributed.rank() :][:1]
            for batches in distributed.gather([self.compute(one)[0] for one in own]):
                yield from batches

    def compute(self, rows: np.ndarray) -> tuple[ActivationBatch, np.ndarray]:
        """Compute the rows' activations in a forward pass of their own, and count outliers among each row's text.

        Raises LegatoError for activations that are not finite.
        """
        outlier_norm, self._yardstick = self.outlier_factor * self.median_norm, None
        return self._masked(rows, self._forward(rows), outlier_norm)

    def compute_in_order(self, rows: np.ndarray) -> tuple[ActivationBatch, np.ndarray]:
        """Like `compute`, for a caller that reads all rows in order: rows of the median come from its forward pass.

        That pass is not run twice, but it is run if the median is known already: the last bits of a row may depend on
        the other rows in its forward pass.
        """
        first = self._rows_of_median()
        if not np.isin(rows, first).all():
            return self.compute(rows)
        if self._yardstick is None:
            self._yardstick = self._forward(first)
        outlier_norm = self.outlier_factor * self.median_norm
        return self._masked(rows, self._yardstick[np.searchsorted(first, rows)], outlier_norm)

    @cached_property
    def median_norm(self) -> float:
        """Median norm of the text positions of the first 32 rows with text. Set it where it is already known.

        Raises LegatoError if there is no text or if the norms are zero or not finite.
        """
        rows = self._rows_of_median()
        if not len(rows):
            raise LegatoError("the rows hold no text: every token is BOS, separator, pad or otherwise special")
        acts_BLD = self._forward(rows)
        self._yardstick = acts_BLD
        median = float(_finite_norms(acts_BLD)[self.tokens.mask_BL[rows]].median())
        if median == 0:
            raise LegatoError(f"{self.module_path} puts out nothing but zeros")
        return median

    def key(self) -> str:
        """Compute the SHA-256 of all that determines the activations."""
        parts = {
            "format": FORMAT,
            "model": self.language_model.fingerprint(),
            "tokens": self.tokens.fingerprint,
            "layer": self.layer,
            "site": self.site,
            "dtype": str(self.dtype),
            "outlier_factor": self.outlier_factor,
        }
        return sha256_json(parts)

    def provenance(self) -> dict[str, Any]:
        """Describe the origin of the activations for people, json-able, with the library versions."""
        return {
            "model": self.language_model.name,
            "model_sha256": self.language_model.fingerprint(),
            "tokens_sha256": self.tokens.fingerprint,
            "layer": self.layer,
            "site": self.site,
            "module_path": self.module_path,
            "outlier_factor": self.outlier_factor,
            "median_norm": self.median_norm,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def _rows_of_median(self) -> np.ndarray:
        return np.flatnonzero(self.tokens.mask_BL.any(1).numpy())[:MEDIAN_ROWS]

    def _forward(self, rows: np.ndarray) -> Tensor:
        return self.language_model.activations(self.tokens.tokens_BL[rows], self.layer, self.site).cpu()

    def _masked(self, rows: np.ndarray, acts_BLD: Tensor, outlier_norm: float) -> tuple[ActivationBatch, np.ndarray]:
        is_text_BL = self.tokens.mask_BL[rows]
        is_outlier_BL = is_text_BL & (_finite_norms(acts_BLD) > outlier_norm)
        tokens_BL, doc_BL = self.tokens.tokens_BL[rows].long(), self.tokens.doc_BL[rows].int()
        return ActivationBatch(acts_BLD, is_text_BL & ~is_outlier_BL, doc_BL, tokens_BL), is_outlier_BL.sum(1).numpy()


def _finite_norms(acts_BLD: Tensor) -> Tensor:
    norms_BL = torch.linalg.vector_norm(acts_BLD, dim=-1, dtype=torch.float32)
    check_finite(norms_BL)
    return norms_BL


@dataclass(frozen=True)
class Normaliser:
    """Scale of training: x' = (x - mean_D) * scale, so that over valid positions E x' = 0 and E ||x'||^2 = D.

    mean_D: float32. scale: sqrt(D / E ||x - mean||^2).
    """

    mean_D: Tensor
    scale: float

    @classmethod
    @single_threaded()
    def fit(cls, source: ActivationSource, *, max_rows: int = NORMALISER_ROWS) -> "Normaliser":
        """Fit to the valid positions of up to `max_rows` rows drawn at random; sums in float64.

        Raises LegatoError if there are none, or if they are all equal or not finite.
        """
        total_D = torch.zeros(source.d_in, dtype=torch.float64)
        total_square, n_valid, n_rows = 0.0, 0, 0
        for batch in source.batches(BATCH_ROWS, seed=0):
            x_ND = batch.acts_BLD[batch.mask_BL].double()
            total_D += x_ND.sum(0)
            total_square += float(x_ND.square().sum())
            n_valid += len(x_ND)
            n_rows += len(batch.mask_BL)
            if n_rows >= max_rows:
                break
        if n_valid == 0:
            raise LegatoError("the activations hold no valid position: every token is special or an outlier")
        mean_D = total_D / n_valid
        variance = total_square / n_valid - float(mean_D.square().sum())
        if not math.isfinite(variance):
            raise LegatoError(
                "activations hold values that are not finite; harvest them again, or with --dtype float32"
            )
        if variance <= 1e-12 * total_square / n_valid:
            raise LegatoError("all activations are equal: there is nothing to learn from this layer and site")
        return cls(mean_D.float(), math.sqrt(source.d_in / variance))

    def apply(self, acts: Tensor) -> Tensor:
        """Normalise activations [..., D] to float32."""
        return (acts.float() - self.mean_D.to(acts.device)) * self.scale


def position_shuffled(batches: Iterable[ActivationBatch], seed: int = 0) -> Iterator[ActivationBatch]:
    """Permute the valid positions of each document's stretch inside a row.

    This destroys the sequence, so persistence that an SAE still shows comes from its own mechanism. Special tokens and
    outliers keep their place.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        acts_BLD = batch.acts_BLD.clone()
        for row in range(len(acts_BLD)):
            doc_L, mask_L = batch.doc_BL[row], batch.mask_BL[row]
            for document in doc_L[mask_L].unique():
                places = ((doc_L == document) & mask_L).nonzero().flatten()
                order = torch.randperm(len(places), generator=generator)
                acts_BLD[row, places] = batch.acts_BLD[row, places[order]]
        yield replace(batch, acts_BLD=acts_BLD)


FORMAT = "legato-activations-1"
