"""Tokens -> activations: harvested once into a store, or computed as training asks for them.

Shape legend: B rows (contexts), L positions, D width, N valid tokens.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from legato import distributed
from legato.activation_store import (
    FORMAT,
    MANIFEST,
    ActivationBatch,
    ActivationStore,
    Manifest,
    StoreWriter,
    batches_per_epoch,
    row_batches,
)
from legato.cache import cache_dir, locked, sha256_json
from legato.errors import LegatoError, UsageError
from legato.language_model import LanguageModel
from legato.remote_store import is_url, key_at, local_copy_of, put_store
from legato.tokens import TokenSet

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "ActivationStore",
    "ActivationStream",
    "Normaliser",
    "cache_dir",
    "harvest",
]

OUTLIER_FACTOR = 8.0
MEDIAN_ROWS = 32
BATCH_ROWS = 32
LOCK = ".lock"
NORMALISER_ROWS = 1024


class ActivationSource(Protocol):
    """What a store and a stream have in common."""

    @property
    def d_in(self) -> int: ...

    @property
    def n_rows(self) -> int: ...

    def batches(
        self,
        rows_per_batch: int,
        *,
        seed: int | None,
        epochs: int | None = 1,
        drop_last: bool = False,
        start_batch: int = 0,
    ) -> Iterator[ActivationBatch]: ...


@dataclass(frozen=True)
class Normaliser:
    """x' = (x - mean_D) * scale, so that over valid positions E x' = 0 and E ||x'||^2 = D.

    mean_D: float32. scale: sqrt(D / E ||x - mean||^2).
    """

    mean_D: Tensor
    scale: float

    @classmethod
    def fit(cls, source: ActivationSource, *, max_rows: int = NORMALISER_ROWS) -> "Normaliser":
        """From the valid positions of up to `max_rows` rows drawn at random; sums in float64.

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
        """Normalised activations [..., D], float32."""
        return (acts.float() - self.mean_D.to(acts.device)) * self.scale

    def invert(self, normalised: Tensor) -> Tensor:
        """Raw activations [..., D] of normalised ones, float32."""
        return normalised.float() / self.scale + self.mean_D.to(normalised.device)

    def save(self, path: str | Path) -> None:
        save_file({"mean": self.mean_D, "scale": torch.tensor(self.scale, dtype=torch.float64)}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Normaliser":
        tensors = load_file(path)
        return cls(tensors["mean"], float(tensors["scale"]))


class ActivationStream:
    """Activations of a token set at one site, computed batch by batch as they are asked for.

    Yields what a store harvested from the same model and tokens would, in the same order.
    store_path: also write a store there during the first full epoch; once it is whole, everything is read from it.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        tokens: TokenSet,
        *,
        layer: int,
        site: str = "resid_post",
        outlier_factor: float = OUTLIER_FACTOR,
        store_path: str | Path | None = None,
    ) -> None:
        language_model.module_path(layer, site)  # tells early of a layer or site that does not exist
        self.language_model = language_model
        self.tokens = tokens
        self.layer = layer
        self.site = site
        self.outlier_factor = outlier_factor
        self.store_path = None if store_path is None else Path(store_path)
        self._median_norm: float | None = None
        self._first_rows: tuple[np.ndarray, Tensor] | None = None  # what the median was taken from, for `compute`

    @property
    def d_in(self) -> int:
        return self.language_model.d_model

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def context_length(self) -> int:
        return self.tokens.context_length

    def first_tokens(self, n_rows: int) -> Tensor:
        """int64 input ids [n_rows, L] of the first rows, or of all there are."""
        return self.tokens.tokens_BL[:n_rows].long()

    @property
    def median_norm(self) -> float:
        """Median norm of the text positions of the first rows, the yardstick for outliers.

        Raises LegatoError if there is no text or if the norms are zero or not finite.
        """
        if self._median_norm is None:
            mask_BL, rows = self.tokens.mask_BL, self._rows_of_median()
            if not len(rows):
                raise LegatoError("the rows hold no text: every token is BOS, separator, pad or otherwise special")
            acts_BLD = self._activations(rows)
            self._first_rows = rows, acts_BLD
            self._median_norm = float(_finite_norms(acts_BLD)[mask_BL[rows]].median())
            if self._median_norm == 0:
                raise LegatoError(
                    f"{self.language_model.module_path(self.layer, self.site)} puts out nothing but zeros"
                )
        return self._median_norm

    def _rows_of_median(self) -> np.ndarray:
        return np.flatnonzero(self.tokens.mask_BL.any(1).numpy())[:MEDIAN_ROWS]

    def compute(self, rows: np.ndarray) -> tuple[ActivationBatch, np.ndarray]:
        """The rows' activations, and how many text positions of each row are outliers.

        Raises LegatoError for activations that are not finite.
        """
        tokens_BL, doc_BL = self.tokens.tokens_BL[rows].long(), self.tokens.doc_BL[rows].int()
        is_text_BL = self.tokens.mask_BL[rows]
        threshold = self.outlier_factor * self.median_norm
        acts_BLD = self._activations(rows)
        is_outlier_BL = is_text_BL & (_finite_norms(acts_BLD) > threshold)
        batch = ActivationBatch(acts_BLD, is_text_BL & ~is_outlier_BL, doc_BL, tokens_BL)
        return batch, is_outlier_BL.sum(1).numpy()

    def batches(
        self,
        rows_per_batch: int,
        *,
        seed: int | None,
        epochs: int | None = 1,
        drop_last: bool = False,
        start_batch: int = 0,
    ) -> Iterator[ActivationBatch]:
        """As `ActivationStore.batches`; one such iterator at a time may write the store.

        Several ranks must go through it together: each computes one batch in turn, and gets those of the others.
        """
        if self.store_path is None:
            numbers = row_batches(
                self.n_rows, rows_per_batch, seed=seed, epochs=epochs, drop_last=drop_last, start_batch=start_batch
            )
            while turn := list(islice(numbers, distributed.size())):
                self._drop_first_rows()
                own = turn[distributed.rank() :][:1]
                for batches in distributed.gather([self.compute(rows)[0] for rows in own]):
                    yield from batches
            return
        with _locked(self.store_path):
            manifest = self._claim_store(self.store_path)
            if not manifest.is_whole:
                n_batches = batches_per_epoch(self.n_rows, rows_per_batch, drop_last)
                epoch_end = (start_batch // n_batches + 1) * n_batches
                with StoreWriter(self.store_path, manifest) as writer:
                    for rows in row_batches(
                        self.n_rows,
                        rows_per_batch,
                        seed=seed,
                        epochs=epochs,
                        drop_last=drop_last,
                        start_batch=start_batch,
                    ):
                        batch, n_outliers_B = self.compute(rows)
                        writer.put(rows, batch, n_outliers_B)
                        yield batch
                        start_batch += 1
                        if start_batch == epoch_end:
                            break
            self._fill_store(self.store_path, manifest)
        store = ActivationStore.open(self.store_path, verify=False)
        yield from store.batches(rows_per_batch, seed=seed, epochs=epochs, drop_last=drop_last, start_batch=start_batch)

    def _drop_first_rows(self) -> None:
        """Rounding may depend on the rows of a batch: a batch must not depend on those that were asked for before."""
        assert self.median_norm > 0
        self._first_rows = None

    def key(self) -> str:
        """SHA-256 of all that determines the activations."""
        parts = {
            "format": FORMAT,
            "model": self.language_model.fingerprint(),
            "tokens": self.tokens.fingerprint(),
            "layer": self.layer,
            "site": self.site,
            "dtype": str(self.language_model.dtype),
            "outlier_factor": self.outlier_factor,
        }
        return sha256_json(parts)

    def _activations(self, rows: np.ndarray) -> Tensor:
        if self._first_rows is not None:
            known, acts_BLD = self._first_rows
            places = np.searchsorted(known, rows)
            if (places < len(known)).all() and (known[places] == rows).all():
                return acts_BLD[places]
            self._first_rows = None
        return self.language_model.activations(self.tokens.tokens_BL[rows], self.layer, self.site).cpu()

    def _claim_store(self, path: Path) -> Manifest:
        """The manifest of this stream's store at `path`, less what is damaged there; a new one in an empty folder."""
        key = self.key()
        manifest = Manifest.united(path)
        if manifest is None:
            if any(entry.name != LOCK for entry in path.iterdir()):
                raise UsageError(f"{path} is not empty and holds no activations: choose another folder")
            manifest = Manifest.new(
                key,
                n_rows=self.n_rows,
                context_length=self.context_length,
                d_in=self.d_in,
                dtype=self.language_model.dtype,
                provenance=self._provenance(),
            )
            manifest.write(path)
        elif manifest.key != key:
            raise UsageError(
                f"{path} holds activations of {_description(manifest.provenance)}, not of "
                f"{_description(self._provenance())}: choose another folder"
            )
        self._median_norm = manifest.provenance["median_norm"]
        for leftover in path.glob("*.partial"):
            leftover.unlink()
        for name in manifest.damaged_shards(path):
            print(f"{path / name} is missing or damaged: it is harvested again", file=sys.stderr, flush=True)
            del manifest.shards[name]
        return manifest

    def _claim_together(self, path: Path) -> Manifest:
        """The same for all ranks: one looks, each gets a manifest of its own, as does what it finishes."""
        manifest = distributed.from_writer(lambda: self._claim_store(path))
        self._median_norm = manifest.provenance["median_norm"]
        return replace(manifest, rank=distributed.rank())

    def _fill_store(
        self,
        path: Path,
        manifest: Manifest,
        batch_rows: int = BATCH_ROWS,
        progress: Callable[[int], None] = lambda rows_done: None,
    ) -> None:
        """Compute the rows of every shard that the manifest lacks; of several ranks each its share of the shards.

        A forward pass stays inside a shard, so that the rows which keep each other company there, on which the last bit
        may depend, are the same whoever computes the shard and whatever was there before.
        """
        first = self._rows_of_median()
        lacking = [n for n, name in enumerate(manifest.shard_names) if name not in manifest.shards]
        own, done = distributed.mine(lacking), 0
        n_lacking, n_own = (sum(len(manifest.rows_of(number)) for number in numbers) for numbers in (lacking, own))
        with StoreWriter(path, manifest) as writer:
            for number in own:
                rows = np.asarray(manifest.rows_of(number))
                for start in range(0, len(rows), batch_rows):
                    part = rows[start : start + batch_rows]
                    if self._first_rows is None and np.isin(part, first).all():
                        self._first_rows = first, self._activations(first)
                    writer.put(part, *self.compute(part))
                    done += len(part)
                    progress(self.n_rows - n_lacking + n_lacking * done // n_own)

    def _provenance(self) -> dict[str, Any]:
        return {
            "model": self.language_model.name,
            "model_sha256": self.language_model.fingerprint(),
            "tokens_sha256": self.tokens.fingerprint(),
            "layer": self.layer,
            "site": self.site,
            "module_path": self.language_model.module_path(self.layer, self.site),
            "outlier_factor": self.outlier_factor,
            "median_norm": self.median_norm,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def harvest(
    language_model: LanguageModel,
    tokens: TokenSet,
    *,
    layer: int,
    site: str = "resid_post",
    path: str | Path | None = None,
    batch_rows: int = BATCH_ROWS,
    outlier_factor: float = OUTLIER_FACTOR,
    progress: Callable[[int], None] = lambda rows_done: None,
) -> ActivationStore:
    """A store with the activations of every row; what an earlier call left there whole is used, not made again.

    path: folder of the store; by default one in the cache, named by what determines the activations. An fsspec URL
        (s3://bucket/folder): the store is harvested into the cache, unless it lies there already, and put there whole.
    batch_rows: rows a forward pass. outlier_factor: positions whose norm exceeds that many median norms are masked.
    progress: told the number of rows done. Of several ranks each computes its share of the shards; they must see the
    same folder.
    Raises UsageError for a folder with other content and for a layer or site that does not exist, LegatoError for
    activations that are not finite, rows without text and a disk that cannot be written.
    """
    stream = ActivationStream(language_model, tokens, layer=layer, site=site, outlier_factor=outlier_factor)
    if is_url(path):
        if (there := key_at(path, MANIFEST)) is None:
            folder = local_copy_of(path)
        elif there == stream.key():
            return ActivationStore.open(path)
        else:
            raise UsageError(f"{path} holds other activations: choose another place")
    else:
        folder = cache_dir() / "activations" / stream.key()[:32] if path is None else Path(path)
    with distributed.held_by_writer(_locked(folder)):
        manifest = stream._claim_together(folder)
        stream._fill_store(folder, manifest, batch_rows, progress)
        distributed.barrier()
        distributed.from_writer(lambda: Manifest.united(folder))
        if is_url(path):
            distributed.from_writer(lambda: put_store(folder, path, MANIFEST))
    return ActivationStore.open(folder, verify=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time writes a store; its death frees the lock."""
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path / LOCK))
        except OSError as error:
            raise LegatoError(f"cannot write activations to {path}: {error.strerror}") from error
        yield


def _finite_norms(acts_BLD: Tensor) -> Tensor:
    norms_BL = torch.linalg.vector_norm(acts_BLD, dim=-1, dtype=torch.float32)
    if not norms_BL.isfinite().all():
        raise LegatoError("the model's activations are not finite: load it in float32 (--dtype float32)")
    return norms_BL


def _description(provenance: dict[str, Any]) -> str:
    return f"{provenance['model']} {provenance['module_path']} (text {provenance['tokens_sha256'][:8]})"
