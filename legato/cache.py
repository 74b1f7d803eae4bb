"""The user's cache folder, and files that are either whole or absent."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from legato.errors import LegatoError

LOCK_PATIENCE_SECONDS = 1.0
HASH_BLOCK_BYTES = 4 * 2**20


def cache_dir() -> Path:
    """$LEGATO_CACHE where it is set, else the platform's cache folder of the user; made on first use."""
    path = Path(os.environ.get("LEGATO_CACHE") or platformdirs.user_cache_path("legato"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LegatoError(
            f"the cache {path} cannot be made ({error.strerror}): set LEGATO_CACHE to a folder"
        ) from error
    return path


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One process at a time is within it, whichever dies first; says so where it has to wait. Raises OSError."""
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=LOCK_PATIENCE_SECONDS)
    except Timeout:
        print(f"waiting for another process that writes {lock.parent}", file=sys.stderr, flush=True)
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        block = bytearray(HASH_BLOCK_BYTES)
        while n_read := stream.readinto(block):
            digest.update(memoryview(block)[:n_read])
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> list[str | None]:
    """SHA-256 of each file in the order given, None for one that cannot be read; one thread a processor.

    A device or a FIFO, which may never end, counts as one that cannot be read.
    """

    def digest(path: Path) -> str | None:
        try:
            return sha256_file(path) if path.is_file() else None
        except OSError:
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, paths))


def sha256_json(content: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Return once the file's (or folder's) content is on the disk and would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        sync_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
