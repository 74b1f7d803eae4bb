"""The user's cache folder, and files that are either whole or absent."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs

HASH_BLOCK_BYTES = 4 * 2**20


def cache_dir() -> Path:
    """$LEGATO_CACHE where it is set, else the platform's cache folder of the user; made on first use."""
    path = Path(os.environ.get("LEGATO_CACHE") or platformdirs.user_cache_path("legato"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        block = bytearray(HASH_BLOCK_BYTES)
        while n_read := stream.readinto(block):
            digest.update(memoryview(block)[:n_read])
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> list[str | None]:
    """SHA-256 of each file in the order given, None for one that cannot be read; one thread a processor."""

    def digest(path: Path) -> str | None:
        try:
            return sha256_file(path)
        except OSError:
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, paths))


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
    temporary.write_bytes(content)
    sync_to_disk(temporary)
    temporary.replace(path)
