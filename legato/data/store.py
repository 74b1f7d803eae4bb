"""A store of activations on the disk, or at a URL: read row by row, and written shard by shard.

A store at an fsspec URL (s3://bucket/folder, memory://, file://) has the same files; it is read from a copy here. It is
complete once its manifest lies there, which is written last; what an interrupted transfer has brought over already is
not brought again.

Shape legend: B rows (contexts), L positions, D width.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from legato.common.errors import LegatoError, UsageError, one_line
from legato.common.files import cache_dir, locked, sha256_file, whole
from legato.data.activations import ActivationBatch, ActivationSource
from legato.data.store_manifest import DTYPES, LOCK, MANIFEST, Shard, StoreManifest

OPEN_SHARDS = 64


class ActivationStore(ActivationSource):
    """A finished store; rows are read from the files as they are asked for, so memory does not grow with its size."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
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
        self._shards = [path / name for name in manifest.shard_names]
        self._places = [manifest.places(shard) for shard in self._shards]
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "ActivationStore":
        """A store that `harvest` finished.

        path: its folder, or an fsspec URL (s3://bucket/folder): it is then read from a copy in the cache.
        verify: check the SHA-256 of every shard (some 3 GB a second), else only their headers and sizes.
        Raises LegatoError, naming the shard, for one that is missing or damaged, and for an unfinished store.
        """
        path = fetch_store(path) if is_url(path) else Path(path)
        manifest = StoreManifest.read(path)
        if manifest is None:
            raise UsageError(f"{path} holds no activations: there is no {MANIFEST}")
        if not manifest.is_whole:
            done = f"{len(manifest.shards)} of {len(manifest.shard_names)} shards"
            raise LegatoError(f"{path} is unfinished ({done}): harvest again to go on there")
        if damaged := manifest.damaged_shards(path, verify=verify):
            raise LegatoError(
                f"{path / damaged[0]} is missing or damaged ({len(damaged)} such): harvest again to make it anew"
            )
        return cls(path, manifest)

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
        read = self._manifest.rows(len(rows))
        self._read(rows, read)
        return ActivationBatch(read["acts"], read["mask"], read["doc"], read["tokens"].long())

    def first_tokens(self, n_rows: int) -> Tensor:
        """int64 input ids [n_rows, L] of the first rows, or of all there are, without their activations."""
        rows = np.arange(min(n_rows, self.n_rows))
        tokens_BL = torch.empty(len(rows), self.context_length, dtype=torch.int32)
        self._read(rows, {"tokens": tokens_BL})
        return tokens_BL.long()

    def batches_of(self, rows: Iterable[np.ndarray]) -> Iterator[ActivationBatch]:
        return map(self.read_rows, rows)

    def _read(self, rows: np.ndarray, into: dict[str, Tensor]) -> None:
        """Read these tensors of these rows.

        By offset, not by safetensors' slices: those map the file, so that what was read stays in the process' memory
        (a shard that is opened for each row instead takes 0.4 ms), and copy 0.7 GB a second where this copies 2.6.
        """
        views = {name: memoryview(_bytes_of(tensor)) for name, tensor in into.items()}
        for at, n_run, shard, first in _runs(rows, self._manifest.rows_per_shard):
            descriptor = self._descriptor(shard)
            for name, view in views.items():
                start, row_bytes = self._places[shard][name]
                part, offset = view[at * row_bytes : (at + n_run) * row_bytes], start + first * row_bytes
                while len(part):
                    n_read = os.preadv(descriptor, [part], offset)
                    if n_read == 0:
                        raise LegatoError(f"{self._shards[shard]} ends too early: harvest again to make it anew")
                    part, offset = part[n_read:], offset + n_read

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._shards[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, as an array of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _runs(rows: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, int, int, int]]:
    """(place in `rows`, length, shard, first row in the shard) of each stretch of consecutive rows of one shard."""
    if not len(rows):
        return
    shard_of = rows // rows_per_shard
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard_of) != 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for start, end in pairwise(edges):
        yield start, end - start, int(shard_of[start]), int(rows[start] % rows_per_shard)


class StoreWriter:
    """Writes shards of a store, one after the other, and notes them in `manifest`.

    The rows of a shard are collected, and written by a thread of its own while the next ones are computed: two shards
    are in memory. Use as a context manager: leaving it waits until every whole shard is on the disk, and raises what
    went wrong there. A shard that never became whole is dropped.
    """

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self._path = path
        self._manifest = manifest
        # The shard in work, of which n_rows are there, and that which is being written: memory is asked for once.
        self._shard, self._other = (manifest.rows(manifest.rows_per_shard) for _ in range(2))
        self._n_rows = self._n_outliers = 0
        self._thread = ThreadPoolExecutor(1, "activation-store-writer")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        self._thread.shutdown()
        if exception_type is None:
            self._wait()

    def put(self, number: int, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        """Hand in the next rows of shard `number`, the one in work or a new one. Waits while the disk is behind."""
        in_shard = len(self._manifest.rows_of(number))
        start, end = self._n_rows, self._n_rows + len(batch.mask_BL)
        assert end <= in_shard, f"shard {number} has {in_shard} rows, and not {end}"
        if batch.acts_BLD.dtype != self._shard["acts"].dtype:
            raise LegatoError(f"activations of {batch.acts_BLD.dtype} for a store of {self._shard['acts'].dtype}")
        rows = {"acts": batch.acts_BLD, "mask": batch.mask_BL, "doc": batch.doc_BL, "tokens": batch.tokens_BL}
        for name, tensor in rows.items():
            room = self._shard[name][start:end]
            _bytes_of(room)[:] = _bytes_of(tensor.to(room.dtype).contiguous())  # a copy by torch wakes all threads
        self._n_rows, self._n_outliers = end, self._n_outliers + int(n_outliers_B.sum())
        if end == in_shard:
            self._wait()
            name, whole_shard = self._manifest.shard_names[number], {n: t[:end] for n, t in self._shard.items()}
            self._writing = self._thread.submit(self._write, name, whole_shard, self._n_outliers)
            self._shard, self._other = self._other, self._shard
            self._n_rows = self._n_outliers = 0

    def _wait(self) -> None:
        """Until the last whole shard is on the disk."""
        error = None if self._writing is None else self._writing.exception()
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or one_line(error)
            raise LegatoError(f"cannot write activations to {self._path}: {reason}") from error
        if isinstance(error, Exception):
            raise error
        if error is not None:
            raise LegatoError(
                f"the thread that writes activations to {self._path} was stopped "
                f"({type(error).__name__}): harvest again to go on there"
            ) from error

    def _write(self, name: str, tensors: dict[str, Tensor], n_outliers: int) -> None:
        with whole(self._path / name) as new:
            save_file(tensors, new)
            sha256 = sha256_file(new)
        self._manifest.shards[name] = Shard(sha256, int(tensors["mask"].sum()), n_outliers)
        self._manifest.write(self._path)


def is_url(path: str | Path | None) -> TypeGuard[str]:
    return isinstance(path, str) and "://" in path


def local_copy_of(url: str) -> Path:
    """The folder in the cache where the store at a URL is kept on this machine."""
    return cache_dir() / "activations" / f"copy_{hashlib.sha256(url.encode()).hexdigest()[:24]}"


def fetch_store(url: str) -> Path:
    """Bring a store here, or what of it is missing or damaged here; return its folder.

    Raises UsageError where there is none, LegatoError where it cannot be read or is damaged at its place.
    """
    folder = local_copy_of(url)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK), _filesystem(url) as (files, root):
        if not files.exists(f"{root}/{MANIFEST}"):
            raise UsageError(f"{url} holds no activations: there is no {MANIFEST}")
        files.get_file(f"{root}/{MANIFEST}", str(folder / MANIFEST))
        manifest = StoreManifest.read(folder)
        assert manifest is not None
        for name in manifest.damaged_shards(folder):
            with whole(folder / name) as new:
                files.get_file(f"{root}/{name}", str(new))
                if sha256_file(new) != manifest.shards[name].sha256:
                    raise LegatoError(f"{url}/{name} is damaged: harvest again to make it anew")
    return folder


def put_store(folder: Path, url: str) -> None:
    """Put a finished store at a URL: the shards that are not there in full, then the manifest."""
    manifest = StoreManifest.read(folder)
    assert manifest is not None
    with _filesystem(url) as (files, root):
        files.makedirs(root, exist_ok=True)
        for name in manifest.shards:
            size = (folder / name).stat().st_size
            if not files.exists(f"{root}/{name}") or files.size(f"{root}/{name}") != size:
                files.put_file(str(folder / name), f"{root}/{name}")
        files.put_file(str(folder / MANIFEST), f"{root}/{MANIFEST}")


def key_at(url: str) -> str | None:
    """Read the key of the store at a URL (StoreManifest.key); None where there is none yet."""
    with _filesystem(url) as (files, root):
        if not files.exists(f"{root}/{MANIFEST}"):
            return None
        try:
            return str(json.loads(files.cat_file(f"{root}/{MANIFEST}"))["key"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LegatoError(f"{url}/{MANIFEST} is damaged: delete it and harvest again") from error


@contextmanager
def _filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """(fsspec's file system of a URL, the path in it); its errors in one line."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
        yield files, str(PurePosixPath(root))
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise UsageError(f"{url} cannot be used: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise LegatoError(f"{url} cannot be reached: {' '.join(str(error).split())}") from error
