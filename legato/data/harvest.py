"""Compute the activations of a token set once and keep them in a store.

Several ranks compute a share of the shards each, with the same bytes as one process.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError
from legato.common.files import SCRATCH, cache_dir, locked, sweep
from legato.data.activations import BATCH_ROWS, OUTLIER_FACTOR, ActivationStream
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore, StoreWriter, is_url, key_at, local_copy_of, put_store
from legato.data.store_manifest import DTYPES, LOCK, MANIFEST, StoreManifest
from legato.data.tokens import TokenSet


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
    """Make a store with the activations of every row; complete shards of an earlier call are used again.

    path: folder of the store; by default one in the cache, named by the hash of all that determines the activations. An
        fsspec URL (s3://bucket/folder): harvest into the cache, unless it is there already, and copy the store to it.
    batch_rows: rows a forward pass. outlier_factor: positions whose norm exceeds that many median norms are masked.
    progress: called with the number of rows done. Several ranks share the shards; they must see the same folder.
    Raises UsageError for a folder with other content and for a layer or site that does not exist, LegatoError for
    activations that are not finite, rows without text and a disk that cannot be written.
    """
    stream = ActivationStream(language_model, tokens, layer=layer, site=site, outlier_factor=outlier_factor)
    if is_url(path):
        if (there := key_at(path)) is None:
            folder = local_copy_of(path)
        elif there == stream.key():
            return ActivationStore.open(path)
        else:
            raise UsageError(f"{path} holds other activations: choose another place")
    else:
        folder = cache_dir() / "activations" / stream.key()[:32] if path is None else Path(path)
    with distributed.held_by_rank0(_locked(folder)):
        manifest = distributed.broadcast_from_rank0(lambda: _claim(stream, folder))
        stream.median_norm = manifest.provenance["median_norm"]
        _fill(stream, folder, replace(manifest, rank=distributed.rank()), batch_rows, progress)
        distributed.barrier()
        distributed.broadcast_from_rank0(lambda: StoreManifest.united(folder))
        if is_url(path):
            distributed.broadcast_from_rank0(lambda: put_store(folder, path))
    return ActivationStore.open(folder, verify=False)


def _claim(stream: ActivationStream, path: Path) -> StoreManifest:
    """The manifest of the stream's store at `path`, less what is damaged there; a new one in an empty folder."""
    key = stream.key()
    manifest = StoreManifest.united(path)
    if manifest is None:
        if any(entry.name != LOCK and entry.suffix != SCRATCH for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no activations: choose another folder")
        manifest = StoreManifest.new(
            key,
            n_rows=stream.n_rows,
            context_length=stream.context_length,
            d_in=stream.d_in,
            dtype=stream.dtype,
            provenance=stream.provenance(),
        )
        manifest.write(path)
    elif manifest.key != key:
        raise UsageError(
            f"{path} holds activations of {_description(manifest.provenance)}, not of "
            f"{_description(stream.provenance())}: choose another folder"
        )
    elif (manifest.n_rows, manifest.context_length, manifest.d_in, DTYPES[manifest.dtype]) != (
        stream.n_rows,
        stream.context_length,
        stream.d_in,
        stream.dtype,
    ):
        raise LegatoError(f"{path / MANIFEST} is damaged: delete {path} and harvest again")
    sweep([*path.glob(f".*{SCRATCH}"), *path.glob("*.partial")])  # the latter of an earlier version
    for name in manifest.damaged_shards(path):
        print(f"{path / name} is missing or damaged: it is harvested again", file=sys.stderr, flush=True)
        del manifest.shards[name]
    return manifest


def _fill(
    stream: ActivationStream, path: Path, manifest: StoreManifest, batch_rows: int, progress: Callable[[int], None]
) -> None:
    """Compute the rows of every shard that the manifest lacks; several ranks compute a share each.

    A forward pass stays inside a shard. So the same rows are in one pass, on which the last bit may depend, for any
    rank that computes the shard and any shards that exist already.
    """
    lacking = [n for n, name in enumerate(manifest.shard_names) if name not in manifest.shards]
    own, done = distributed.shard(lacking), 0
    n_lacking, n_own = (sum(len(manifest.rows_of(number)) for number in numbers) for numbers in (lacking, own))
    with StoreWriter(path, manifest) as writer:
        for number in own:
            in_shard = np.asarray(manifest.rows_of(number))
            for start in range(0, len(in_shard), batch_rows):
                rows = in_shard[start : start + batch_rows]
                writer.put(number, *stream.compute_in_order(rows))
                done += len(rows)
                progress(stream.n_rows - n_lacking + n_lacking * done // n_own)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the store's lock: one process at a time writes. The end of the process frees it."""
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path / LOCK))
        except OSError as error:
            raise LegatoError(f"cannot write activations to {path}: {error.strerror}") from error
        yield


def _description(provenance: dict[str, Any]) -> str:
    return f"{provenance['model']} {provenance['module_path']} (text {provenance['tokens_sha256'][:8]})"
