"""The user's cache folder, and files that are either whole or absent, and known to be what was written."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from legato.common.errors import LegatoError

LOCK_PATIENCE_SECONDS = 1.0
HASH_BLOCK_BYTES = 4 * 2**20
MANIFEST = "checksums.json"
SCRATCH = ".tmp"


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


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder, which becomes `path`, on the disk, when the block ends without an error.

    A reader, or a crash at any moment, sees the old content or the new, never a part. What a killed process leaves is
    hidden beside `path`, for `sweep` to delete. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=SCRATCH, dir=path.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        yield new
        for written in [*new.rglob("*"), new]:
            sync_to_disk(written)
        if new.is_dir() and path.exists():  # only a file takes the place of another by itself
            path.replace(old)
        try:
            new.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        sync_to_disk(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(leftovers: Iterable[Path]) -> None:
    """Delete what `whole` left of processes that were killed. Only who alone writes there may do so."""
    for leftover in leftovers:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file of a folder that exists, as `whole` does. Raises OSError that names it."""
    try:
        path.parent.stat()
        with whole(path) as new:
            new.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True)
class Manifest:
    """SHA-256 of files, by their names in a folder. How a manifest is kept is up to who keeps it."""

    folder: Path
    sha256: dict[str, str]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str] | None = None) -> "Manifest":
        """Hash these files, or all of the folder, as they are now; one thread a processor. Raises OSError."""
        names = files_in(folder) if names is None else list(names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return cls(folder, dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True)))

    def damaged(self, names: Iterable[str] | None = None) -> list[str]:
        """List the files, of these or of all, that are missing or not what they were.

        A device or a FIFO, which may never end, counts as missing.
        """

        def is_sound(name: str) -> bool:
            path = self.folder / name
            try:
                return path.is_file() and sha256_file(path) == self.sha256.get(name)
            except OSError:
                return False

        names = list(self.sha256 if names is None else names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [name for name, sound in zip(names, pool.map(is_sound, names), strict=True) if not sound]

    def rebuilt(self, names: Iterable[str]) -> "Manifest":
        """With these files as they are now, whatever they were."""
        return Manifest(self.folder, {**self.sha256, **Manifest.of(self.folder, names).sha256})


def files_in(folder: Path) -> list[str]:
    """Names of all files in a folder and in the folders there, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled by `fill(empty folder)` unless a whole and unaltered earlier result is there.

    Whole means: a manifest with the SHA-256 of every file, all of which still match. The result appears under its name
    at once (rename); of several processes that want it, one fills it and the others wait.
    """
    if _is_unaltered(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_unaltered(folder):
                sweep(folder.parent.glob(f".{folder.name}-*"))
                with whole(folder) as new:
                    new.mkdir()
                    fill(new)
                    (new / MANIFEST).write_text(json.dumps(Manifest.of(new).sha256, indent=1))
    except OSError as error:
        raise LegatoError(f"cannot write {folder} ({error.strerror}): make room, or set LEGATO_CACHE") from error
    return folder


def _is_unaltered(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(checksums, dict) or not checksums or sorted([*checksums, MANIFEST]) != files_in(folder):
        return False
    return not Manifest(folder, checksums).damaged()
