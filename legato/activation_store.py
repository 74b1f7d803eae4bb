"""A finished store of activations, read row by row.

Shape legend: B rows (contexts), L positions, D width.
"""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from legato.activations import ActivationBatch, ActivationSource
from legato.errors import LegatoError, UsageError
from legato.remote_store import fetch_store, is_url
from legato.store_format import DTYPES, MANIFEST, Manifest, ShardLayout, bytes_of

OPEN_SHARDS = 64


class ActivationStore(ActivationSource):
    """A finished store; rows are read from the files as they are asked for, so memory does not grow with its size."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.key = manifest.key
        self.n_rows = manifest.n_rows
        self.context_length = manifest.context_length
        self.d_in = manifest.d_in
        self.provenance = manifest.provenance
        self.n_valid = sum(shard.n_valid for shard in manifest.shards.values())
        self.n_outliers = sum(shard.n_outliers for shard in manifest.shards.values())
        self.dtype = DTYPES[manifest.dtype]
        self._manifest = manifest
        self._shard_names = manifest.shard_names
        last = len(self._shard_names) - 1
        self._layouts = {len(rows): ShardLayout.of(manifest, len(rows)) for rows in map(manifest.rows_of, (0, last))}
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "ActivationStore":
        """A store that `harvest` finished.

        path: its folder, or an fsspec URL (s3://bucket/folder): it is then read from a copy in the cache.
        verify: check the SHA-256 of every shard (some 3 GB a second), else only their sizes.
        Raises LegatoError, naming the shard, for one that is missing or damaged, and for an unfinished store.
        """
        path = fetch_store(path) if is_url(path) else Path(path)
        manifest = Manifest.read(path)
        if manifest is None:
            raise UsageError(f"{path} holds no activations: there is no {MANIFEST}")
        names = manifest.shard_names
        if not manifest.is_whole:
            raise LegatoError(
                f"{path} is unfinished ({len(manifest.shards)} of {len(names)} shards): harvest again to go on there"
            )
        store = cls(path, manifest)
        damaged = manifest.damaged_shards(path) if verify else [n for n in names if not manifest.is_laid_out(path / n)]
        if damaged:
            raise LegatoError(
                f"{path / damaged[0]} is missing or damaged ({len(damaged)} such): harvest again to make it anew"
            )
        return store

    def __len__(self) -> int:
        return self.n_rows

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read_rows(self, index: Sequence[int] | np.ndarray | Tensor) -> ActivationBatch:
        """The rows at `index`, in that order."""
        rows = np.asarray(index, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_rows):
            raise IndexError(f"rows must lie in 0 to {self.n_rows - 1}")
        B, L = len(rows), self.context_length
        fields = {
            "tokens": torch.empty(B, L, dtype=torch.int32),
            "doc": torch.empty(B, L, dtype=torch.int32),
            "acts": torch.empty(B, L, self.d_in, dtype=self.dtype),
            "mask": torch.empty(B, L, dtype=torch.bool),
        }
        views = {name: bytes_of(tensor) for name, tensor in fields.items()}
        for at, n_run, shard, first in _runs(rows, self._manifest.rows_per_shard):
            layout = self._layouts[len(self._manifest.rows_of(shard))]
            descriptor = self._descriptor(shard)
            for name, (offset, row_bytes) in layout.fields.items():
                view = views[name][at * row_bytes : (at + n_run) * row_bytes]
                _read_fully(descriptor, view, offset + first * row_bytes, self._shard_names[shard])
        return ActivationBatch(fields["acts"], fields["mask"], fields["doc"], fields["tokens"].long())

    def first_tokens(self, n_rows: int) -> Tensor:
        """int64 input ids [n_rows, L] of the first rows, or of all there are, without their activations."""
        parts = []
        for shard, name in enumerate(self._shard_names[: -(-n_rows // self._manifest.rows_per_shard)]):
            rows_in_shard = len(self._manifest.rows_of(shard))
            tokens_BL = torch.empty(rows_in_shard, self.context_length, dtype=torch.int32)
            offset, _ = self._layouts[rows_in_shard].fields["tokens"]
            _read_fully(self._descriptor(shard), bytes_of(tokens_BL), offset, name)
            parts.append(tokens_BL.long())
        return torch.cat(parts)[:n_rows]

    def batches_of(self, rows: Iterable[np.ndarray]) -> Iterator[ActivationBatch]:
        return map(self.read_rows, rows)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self.path / self._shard_names[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


def _runs(rows: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, int, int, int]]:
    """(place in `rows`, length, shard, first row in the shard) of each stretch of consecutive rows of one shard."""
    if not len(rows):
        return
    shard_of = rows // rows_per_shard
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard_of) != 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for start, end in pairwise(edges):
        yield start, end - start, int(shard_of[start]), int(rows[start] % rows_per_shard)


def _read_fully(descriptor: int, view: memoryview, offset: int, name: str) -> None:
    while len(view):
        n_read = os.preadv(descriptor, [view], offset)
        if n_read == 0:
            raise LegatoError(f"{name} ends too early: harvest again, only damaged shards are made anew")
        view, offset = view[n_read:], offset + n_read
