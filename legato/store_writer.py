"""Writing a store of activations, shard by shard, while the next rows are computed."""

import queue
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from legato.activations import ActivationBatch
from legato.cache import sha256_file, sync_to_disk
from legato.errors import LegatoError
from legato.store_format import Manifest, Shard, ShardLayout, bytes_of

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
