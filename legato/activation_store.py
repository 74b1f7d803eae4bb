"""Activations on disk: safetensors shards of whole rows and a manifest with the SHA-256 of each.

A folder holds `manifest.json` and `shard_00000.safetensors`, ...; every shard but the last has the same number of rows,
with the tensors `tokens` (int32), `doc` (int32), `acts` (the model's dtype) and `mask` (bool). A shard gets its name,
and then its line in the manifest, only when it is whole and on the disk.

Shape legend: B rows (contexts), L positions, D width.
"""

import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato.cache import sha256_file, sha256_files, sha256_json, sync_to_disk, write_atomically
from legato.errors import LegatoError, UsageError
from legato.remote_store import fetch_store, is_url

FORMAT = "legato-activations-1"
MANIFEST = "manifest.json"
SHARD_BYTES = 64 * 2**20
OPEN_SHARDS = 64
QUEUED_BATCHES = 4
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class ActivationBatch:
    """Rows of activations with everything a loss or metric needs to know about each position.

    acts_BLD: raw activations in the model's dtype. mask_BL: bool, True where the position is text and no outlier.
    doc_BL: int32, document number, -1 on pad. tokens_BL: int64, input ids.
    """

    acts_BLD: Tensor
    mask_BL: Tensor
    doc_BL: Tensor
    tokens_BL: Tensor


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a finished shard."""

    sha256: str
    n_valid: int
    n_outliers: int


@dataclass(frozen=True)
class Manifest:
    """key: SHA-256 of everything that determines the activations. provenance: the same for people, json-able.

    rank: of several that write one store, each notes what it finishes in a manifest of its own, until `united`.
    """

    key: str
    n_rows: int
    context_length: int
    d_in: int
    dtype: str
    rows_per_shard: int
    provenance: dict[str, Any]
    shards: dict[str, Shard]
    rank: int = 0

    @classmethod
    def new(
        cls, key: str, *, n_rows: int, context_length: int, d_in: int, dtype: torch.dtype, provenance: dict[str, Any]
    ) -> "Manifest":
        row_bytes = context_length * (d_in * dtype.itemsize + 9)
        rows_per_shard = max(1, SHARD_BYTES // row_bytes)
        return cls(key, n_rows, context_length, d_in, _DTYPE_NAMES[dtype], rows_per_shard, provenance, {})

    @classmethod
    def read(cls, path: Path, rank: int = 0) -> "Manifest | None":
        """The manifest of a store, None where there is none yet; LegatoError for one that cannot be understood."""
        try:
            content = json.loads((path / _manifest_name(rank)).read_text())
            digest = content.pop("sha256", None)  # earlier versions wrote none
            if content["format"] != FORMAT:
                raise LegatoError(f"{path} was written by another version of legato: delete it and harvest again")
            if digest not in (None, sha256_json(content)):
                raise LegatoError(f"{path / MANIFEST} is damaged: delete {path} and harvest again")
            del content["format"]
            shards = {name: Shard(**shard) for name, shard in content.pop("shards").items()}
            return cls(**content, shards=shards, rank=rank)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LegatoError(f"{path / MANIFEST} cannot be read ({error}): delete {path} and harvest again") from error

    @classmethod
    def united(cls, path: Path) -> "Manifest | None":
        """As `read`, with what other ranks have finished noted there too, and their own manifests gone."""
        manifest = cls.read(path)
        others = list(path.glob(_manifest_name("*")))
        if manifest is None or not others:
            return manifest
        for other in others:
            found = cls.read(path, rank=int(other.name.split("_")[1].split(".")[0]))
            if found is not None and found.key == manifest.key:
                manifest.shards.update(found.shards)
        manifest.write(path)
        for other in others:
            other.unlink()
        return manifest

    def write(self, path: Path) -> None:
        content = {"format": FORMAT, **asdict(self), "shards": {n: asdict(self.shards[n]) for n in sorted(self.shards)}}
        del content["rank"]
        content["sha256"] = sha256_json(content)
        write_atomically(path / _manifest_name(self.rank), json.dumps(content, indent=1).encode())

    @property
    def is_whole(self) -> bool:
        return len(self.shards) == len(self.shard_names)

    @property
    def shard_names(self) -> list[str]:
        return [f"shard_{number:05d}.safetensors" for number in range(-(-self.n_rows // self.rows_per_shard))]

    def rows_of(self, number: int) -> range:
        """The rows that lie in shard `number`."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.n_rows))

    def damaged_shards(self, path: Path) -> list[str]:
        """Shards named here whose file is missing or not what was written."""
        digests = sha256_files(path / name for name in self.shards)
        return [name for name, digest in zip(self.shards, digests, strict=True) if digest != self.shards[name].sha256]


def _manifest_name(rank: int | str) -> str:
    return f"manifest_{rank}.json" if rank else MANIFEST


@dataclass(frozen=True)
class _ShardLayout:
    """Where the tensors lie in a shard of so many rows: the header, and per field the first byte and bytes a row."""

    header: bytes
    fields: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, manifest: Manifest, n_rows: int) -> "_ShardLayout":
        L, D = manifest.context_length, manifest.d_in
        item_bytes = {"BF16": 2, "F16": 2, "F32": 4}[manifest.dtype]
        shapes = {
            "tokens": ("I32", [L], 4 * L),
            "doc": ("I32", [L], 4 * L),
            "acts": (manifest.dtype, [L, D], item_bytes * L * D),
            "mask": ("BOOL", [L], L),
        }
        entries, places, end = {}, {}, 0
        for name, (dtype, shape, row_bytes) in shapes.items():
            start, end = end, end + n_rows * row_bytes
            entries[name] = {"dtype": dtype, "shape": [n_rows, *shape], "data_offsets": [start, end]}
            places[name] = (start, row_bytes)
        text = json.dumps(entries).encode()
        text += b" " * (-(len(text) + 8) % 64)
        header = len(text).to_bytes(8, "little") + text
        fields = {name: (len(header) + start, row_bytes) for name, (start, row_bytes) in places.items()}
        return cls(header, fields, len(header) + end)


class ActivationStore:
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
        self.dtype = next(dtype for dtype, name in _DTYPE_NAMES.items() if name == manifest.dtype)
        self._manifest = manifest
        self._shard_names = manifest.shard_names
        last = len(self._shard_names) - 1
        self._layouts = {len(rows): _ShardLayout.of(manifest, len(rows)) for rows in map(manifest.rows_of, (0, last))}
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "ActivationStore":
        """A store that `harvest` finished.

        path: its folder, or an fsspec URL (s3://bucket/folder): it is then read from a copy in the cache.
        verify: check the SHA-256 of every shard (some 3 GB a second), else only their sizes.
        Raises LegatoError, naming the shard, for one that is missing or damaged, and for an unfinished store.
        """
        path = fetch_store(path, MANIFEST) if is_url(path) else Path(path)
        manifest = Manifest.read(path)
        if manifest is None:
            raise UsageError(f"{path} holds no activations: there is no {MANIFEST}")
        names = manifest.shard_names
        if not manifest.is_whole:
            raise LegatoError(
                f"{path} is unfinished ({len(manifest.shards)} of {len(names)} shards): harvest again to go on there"
            )
        store = cls(path, manifest)
        damaged = (
            manifest.damaged_shards(path) if verify else [name for name in names if not store._has_right_size(name)]
        )
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
        views = {name: _bytes_of(tensor) for name, tensor in fields.items()}
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
            _read_fully(self._descriptor(shard), _bytes_of(tokens_BL), offset, name)
            parts.append(tokens_BL.long())
        return torch.cat(parts)[:n_rows]

    def batches(
        self,
        rows_per_batch: int,
        *,
        seed: int | None,
        epochs: int | None = 1,
        drop_last: bool = False,
        start_batch: int = 0,
    ) -> Iterator[ActivationBatch]:
        """Batches of rows: in order (seed None), or in an order drawn from `seed` anew for each epoch.

        epochs: passes over the store, None for endless. drop_last: leave out an epoch's last batch if it is smaller.
        start_batch: batches to leave out at the start, without reading them (to go on after an interruption).
        """
        for rows in row_batches(
            self.n_rows, rows_per_batch, seed=seed, epochs=epochs, drop_last=drop_last, start_batch=start_batch
        ):
            yield self.read_rows(rows)

    def _has_right_size(self, name: str) -> bool:
        layout = self._layouts[len(self._manifest.rows_of(self._shard_names.index(name)))]
        file = self.path / name
        return file.is_file() and file.stat().st_size == layout.size

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self.path / self._shard_names[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


class StoreWriter:
    """Writes rows, in any order, into the shards of a store; a thread of its own does the work.

    Use as a context manager: leaving it waits until every row handed in is on the disk, and raises what went wrong
    there. Shards that never became whole are dropped.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._names = manifest.shard_names
        self._open: dict[int, _OpenShard] = {}
        self._queue: queue.Queue[tuple[np.ndarray, ActivationBatch, np.ndarray] | None] = queue.Queue(QUEUED_BATCHES)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="activation-store-writer", daemon=True)

    def __enter__(self) -> "StoreWriter":
        self._thread.start()
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        self._hand_over(None)
        self._thread.join()
        for shard in self._open.values():
            shard.discard()
        if exception_type is None:
            self._raise_failure()

    def put(self, rows: np.ndarray, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        """Hand in rows of the store; rows of a finished shard are passed over. Waits while the disk is behind."""
        self._hand_over((rows, batch, n_outliers_B))
        self._raise_failure()

    def _hand_over(self, item: tuple[np.ndarray, ActivationBatch, np.ndarray] | None) -> None:
        while self._thread.is_alive():  # a thread that has ended takes nothing, and has left the reason
            with suppress(queue.Full):
                return self._queue.put(item, timeout=0.1)

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise LegatoError(f"cannot write activations to {self._path}: {self._failure.strerror}") from self._failure
        if isinstance(self._failure, Exception):
            raise self._failure
        if self._failure is not None:
            raise LegatoError(
                f"the thread that writes activations to {self._path} was stopped "
                f"({type(self._failure).__name__}): harvest again to go on there"
            ) from self._failure

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._write(*item)
        except BaseException as error:  # raised again in the thread that hands in
            self._failure = error

    def _write(self, rows: np.ndarray, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        fields = {
            "tokens": batch.tokens_BL.int(),
            "doc": batch.doc_BL.int(),
            "acts": batch.acts_BLD,
            "mask": batch.mask_BL,
        }
        views = {name: _bytes_of(tensor.contiguous()) for name, tensor in fields.items()}
        n_valid_B = batch.mask_BL.sum(1).numpy()
        for at, n_run, number, first in _runs(rows, self._manifest.rows_per_shard):
            if self._names[number] in self._manifest.shards:
                continue
            if number not in self._open:
                self._open[number] = _OpenShard(self._path / self._names[number], self._manifest, number)
            shard = self._open[number]
            part = slice(at, at + n_run)
            shard.write(first, n_run, at, views, int(n_valid_B[part].sum()), int(n_outliers_B[part].sum()))
            if shard.n_missing == 0:
                self._manifest.shards[self._names[number]] = self._open.pop(number).finish()
                self._manifest.write(self._path)


class _OpenShard:
    """A shard that still lacks rows, under a name that no reader looks at."""

    def __init__(self, path: Path, manifest: Manifest, number: int) -> None:
        self._final = path
        self._partial = path.with_suffix(".partial")
        n_rows = len(manifest.rows_of(number))
        self._layout = _ShardLayout.of(manifest, n_rows)
        self._is_missing = np.ones(n_rows, bool)
        self._n_valid = self._n_outliers = 0
        self._partial.write_bytes(self._layout.header)

    @property
    def n_missing(self) -> int:
        return int(self._is_missing.sum())

    def write(
        self, first: int, n_rows: int, at: int, views: dict[str, memoryview], n_valid: int, n_outliers: int
    ) -> None:
        """Rows [first, first + n_rows) of this shard, which lie from row `at` on in the views."""
        assert self._is_missing[first : first + n_rows].all(), "a row was handed in twice"
        with self._partial.open("r+b", buffering=0) as file:
            for name, (offset, row_bytes) in self._layout.fields.items():
                file.seek(offset + first * row_bytes)
                view = views[name][at * row_bytes : (at + n_rows) * row_bytes]
                while len(view):
                    view = view[file.write(view) :]
        self._is_missing[first : first + n_rows] = False
        self._n_valid += n_valid
        self._n_outliers += n_outliers

    def finish(self) -> Shard:
        sync_to_disk(self._partial)
        digest = sha256_file(self._partial)
        self._partial.replace(self._final)
        sync_to_disk(self._final.parent)
        return Shard(digest, self._n_valid, self._n_outliers)

    def discard(self) -> None:
        self._partial.unlink(missing_ok=True)


def batches_per_epoch(n_rows: int, rows_per_batch: int, drop_last: bool) -> int:
    """LegatoError if there is not one."""
    assert rows_per_batch > 0, rows_per_batch
    n_batches = n_rows // rows_per_batch if drop_last else -(-n_rows // rows_per_batch)
    if n_batches == 0:
        raise LegatoError(f"{n_rows} rows do not fill one batch of {rows_per_batch}: use more text or smaller batches")
    return n_batches


def row_batches(
    n_rows: int, rows_per_batch: int, *, seed: int | None, epochs: int | None, drop_last: bool, start_batch: int
) -> Iterator[np.ndarray]:
    """Row numbers of the batches after the first `start_batch`; see `ActivationStore.batches`."""
    n_batches = batches_per_epoch(n_rows, rows_per_batch, drop_last)
    first_epoch, first_batch = divmod(start_batch, n_batches)
    for epoch in count(first_epoch) if epochs is None else range(first_epoch, epochs):
        order = np.arange(n_rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(n_rows)
        for batch in range(first_batch if epoch == first_epoch else 0, n_batches):
            yield order[batch * rows_per_batch : (batch + 1) * rows_per_batch]


def _runs(rows: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, int, int, int]]:
    """(place in `rows`, length, shard, first row in the shard) of each stretch of consecutive rows of one shard."""
    if not len(rows):
        return
    shard_of = rows // rows_per_shard
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard_of) != 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for start, end in pairwise(edges):
        yield start, end - start, int(shard_of[start]), int(rows[start] % rows_per_shard)


def _bytes_of(tensor: Tensor) -> memoryview:
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _read_fully(descriptor: int, view: memoryview, offset: int, name: str) -> None:
    while len(view):
        n_read = os.preadv(descriptor, [view], offset)
        if n_read == 0:
            raise LegatoError(f"{name} ends too early: harvest again, only damaged shards are made anew")
        view, offset = view[n_read:], offset + n_read
