"""A finished store of activations, read row by row.

Shape legend: B rows (contexts), L positions, D width.

Activation stores at an fsspec URL (s3://bucket/folder, memory://, file://): kept there, read from a copy here.

A store at a URL has the same files as one in a folder. It is complete once its manifest lies there, which is written
last; what an interrupted transfer has brought over already is not brought again.

How a store of activations lies on disk: safetensors shards of whole rows, and a manifest with the SHA-256 of each.

A folder holds `manifest.json` and `shard_00000.safetensors`, ...; every shard but the last has the same number of rows,
with the tensors `tokens` (int32), `doc` (int32), `acts` (the model's dtype) and `mask` (bool). A shard gets its name,
and then its line in the manifest, only when it is whole and on the disk.

Writing a store of activations, shard by shard, while the next rows are computed.
"""

import hashlib
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.files import (
    cache_dir,
    locked,
    sha256_file,
    sha256_files,
    sha256_json,
    sync_to_disk,
    write_atomically,
)
from legato.data.activations import FORMAT, ActivationBatch, ActivationSource

OPEN_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """What the manifest says of a finished shard: its positions that are text and no outliers, and its outliers."""

    sha256: str
    n_valid: int
    n_outliers: int


@dataclass(frozen=True)
class Manifest:
    """key: SHA-256 of everything that determines the activations. provenance: the same for people, json-able.

    dtype: a key of DTYPES. shards: the finished ones, by file name.
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
        """Of a store without shards yet, which are to have some 64 MiB each, or a row where that is more."""
        rows_per_shard = max(1, SHARD_BYTES // _row_bytes(context_length, d_in, dtype))
        name = next(name for name, known in DTYPES.items() if known == dtype)
        return cls(key, n_rows, context_length, d_in, name, rows_per_shard, provenance, {})

    @classmethod
    def read(cls, path: Path, rank: int = 0) -> "Manifest | None":
        """The manifest of a store, None where there is none yet; LegatoError for one that cannot be understood."""
        place = path / _manifest_name(rank)
        try:
            if place.exists() and (not place.is_file() or place.stat().st_size > MAX_MANIFEST_BYTES):
                raise LegatoError(f"{place} is no manifest: delete {path} and harvest again")
            content = json.loads(place.read_text())
            digest = content.pop("sha256", None)  # earlier versions wrote none
            if content["format"] != FORMAT:
                raise LegatoError(f"{path} was written by another version of legato: delete it and harvest again")
            if digest not in (None, sha256_json(content)):
                raise LegatoError(f"{path / MANIFEST} is damaged: delete {path} and harvest again")
            del content["format"]
            shards = {name: Shard(**shard) for name, shard in content.pop("shards").items()}
            manifest = cls(**content, shards=shards, rank=rank)
            manifest._check()
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LegatoError(f"{path / MANIFEST} cannot be read ({error}): delete {path} and harvest again") from error

    def _check(self) -> None:
        """Raises ValueError where these cannot be the numbers of a store, which are taken for sizes and file names."""
        for name in ("n_rows", "context_length", "d_in", "rows_per_shard"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
        row_bytes = _row_bytes(self.context_length, self.d_in, DTYPES[self.dtype])
        if row_bytes > MAX_ROW_BYTES or -(-self.n_rows // self.rows_per_shard) > MAX_SHARDS:
            raise ValueError(f"{self.n_rows} rows of {row_bytes} bytes, {self.rows_per_shard} a shard")
        if type(self.key) is not str or type(self.provenance) is not dict:
            raise ValueError("it does not say what it holds")
        if strangers := self.shards.keys() - self.shard_names:
            raise ValueError(f"it names {min(strangers)!r}")
        for name, shard in self.shards.items():
            counts = (shard.n_valid, shard.n_outliers)
            if any(type(count) is not int or count < 0 for count in counts):
                raise ValueError(f"{name} has {shard.n_valid!r} valid positions and {shard.n_outliers!r} outliers")

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
        """File names of all shards, finished or not, in the order of their rows."""
        return [f"shard_{number:05d}.safetensors" for number in range(-(-self.n_rows // self.rows_per_shard))]

    def rows_of(self, number: int) -> range:
        """The rows that lie in shard `number`."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.n_rows))

    def damaged_shards(self, path: Path) -> list[str]:
        """Shards named here whose file is missing or not what was written."""
        digests = sha256_files(path / name for name in self.shards)
        bad = {name for name, digest in zip(self.shards, digests, strict=True) if digest != self.shards[name].sha256}
        return [name for name in self.shards if name in bad or not self.is_laid_out(path / name)]

    def is_laid_out(self, shard: Path) -> bool:
        """Whether a file has the size of a shard of this store and begins as one."""
        layout = ShardLayout.of(self, len(self.rows_of(int(shard.stem.removeprefix("shard_")))))
        if not shard.is_file() or shard.stat().st_size != layout.size:
            return False
        with shard.open("rb") as file:
            return file.read(len(layout.header)) == layout.header


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
        manifest = Manifest.read(folder)
        assert manifest is not None
        for name in manifest.damaged_shards(folder):
            part = folder / f"{name}.partial"
            files.get_file(f"{root}/{name}", str(part))
            if sha256_file(part) != manifest.shards[name].sha256:
                part.unlink()
                raise LegatoError(f"{url}/{name} is damaged: harvest again to make it anew")
            part.replace(folder / name)
    return folder


def put_store(folder: Path, url: str) -> None:
    """Put a finished store at a URL: the shards that are not there in full, then the manifest."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    with _filesystem(url) as (files, root):
        files.makedirs(root, exist_ok=True)
        for name in manifest.shards:
            size = (folder / name).stat().st_size
            if not files.exists(f"{root}/{name}") or files.size(f"{root}/{name}") != size:
                files.put_file(str(folder / name), f"{root}/{name}")
        files.put_file(str(folder / MANIFEST), f"{root}/{MANIFEST}")


def key_at(url: str) -> str | None:
    """What determines the activations of the store at a URL (Manifest.key); None where there is none yet."""
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


MANIFEST = "manifest.json"
LOCK = ".lock"  # who writes a store holds it
SHARD_BYTES = 64 * 2**20
MAX_SHARDS = 2**20  # 64 TiB
MAX_ROW_BYTES = 2**40
MAX_MANIFEST_BYTES = 2**28  # MAX_SHARDS of them have 140 bytes each
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _row_bytes(context_length: int, d_in: int, dtype: torch.dtype) -> int:
    """Of the four tensors: an activation, two int32 and a bool a position."""
    return context_length * (d_in * dtype.itemsize + 9)


def _manifest_name(rank: int | str) -> str:
    return f"manifest_{rank}.json" if rank else MANIFEST


@dataclass(frozen=True)
class ShardLayout:
    """Where the tensors lie in a shard of so many rows.

    header: what the file begins with. fields: by tensor, its first byte in the file and its bytes a row. size: of the
    file, in bytes.
    """

    header: bytes
    fields: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, manifest: Manifest, n_rows: int) -> "ShardLayout":
        L, D = manifest.context_length, manifest.d_in
        shapes = {
            "tokens": ("I32", [L], 4 * L),
            "doc": ("I32", [L], 4 * L),
            "acts": (manifest.dtype, [L, D], DTYPES[manifest.dtype].itemsize * L * D),
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


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, to read into or to write from."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


QUEUED_BATCHES = 4


class StoreWriter:
    """Writes shards of a store, one after the other; a thread of its own does the work, and notes them in `manifest`.

    Use as a context manager: leaving it waits until every row handed in is on the disk, and raises what went wrong
    there. A shard that never became whole is dropped.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._open: _OpenShard | None = None
        self._queue: queue.Queue[tuple[int, ActivationBatch, np.ndarray] | None] = queue.Queue(QUEUED_BATCHES)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="activation-store-writer", daemon=True)

    def __enter__(self) -> "StoreWriter":
        self._thread.start()
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        self._hand_over(None)
        self._thread.join()
        if self._open is not None:
            self._open.discard()
        if exception_type is None:
            self._raise_failure()

    def put(self, number: int, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        """Hand in the next rows of shard `number`, the one in work or a new one. Waits while the disk is behind."""
        self._hand_over((number, batch, n_outliers_B))
        self._raise_failure()

    def _hand_over(self, item: tuple[int, ActivationBatch, np.ndarray] | None) -> None:
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

    def _write(self, number: int, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        if self._open is None:
            self._open = _OpenShard(self._path, self._manifest, number)
        self._open.write(number, batch, n_outliers_B)
        if self._open.is_whole:
            self._manifest.shards[self._open.name] = self._open.finish()
            self._open = None
            self._manifest.write(self._path)


class _OpenShard:
    """A shard that still lacks rows, under a name that no reader looks at."""

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.name = manifest.shard_names[number]
        self._number = number
        self._final = folder / self.name
        self._partial = self._final.with_suffix(".partial")
        self._n_rows = len(manifest.rows_of(number))
        self._layout = ShardLayout.of(manifest, self._n_rows)
        self._n_written = self._n_valid = self._n_outliers = 0
        self._partial.write_bytes(self._layout.header)

    @property
    def is_whole(self) -> bool:
        return self._n_written == self._n_rows

    def write(self, number: int, batch: ActivationBatch, n_outliers_B: np.ndarray) -> None:
        n_rows = len(batch.mask_BL)
        assert number == self._number, f"rows of shard {number} before shard {self._number} is whole"
        assert self._n_written + n_rows <= self._n_rows, f"more rows than shard {number} has"
        tensors = {
            "tokens": batch.tokens_BL.int(),
            "doc": batch.doc_BL.int(),
            "acts": batch.acts_BLD,
            "mask": batch.mask_BL,
        }
        with self._partial.open("r+b", buffering=0) as file:
            for name, (offset, row_bytes) in self._layout.fields.items():
                file.seek(offset + self._n_written * row_bytes)
                view = bytes_of(tensors[name].contiguous())
                while len(view):
                    view = view[file.write(view) :]
        self._n_written += n_rows
        self._n_valid += int(batch.mask_BL.sum())
        self._n_outliers += int(n_outliers_B.sum())

    def finish(self) -> Shard:
        sync_to_disk(self._partial)
        digest = sha256_file(self._partial)
        self._partial.replace(self._final)
        sync_to_disk(self._final.parent)
        return Shard(digest, self._n_valid, self._n_outliers)

    def discard(self) -> None:
        self._partial.unlink(missing_ok=True)
