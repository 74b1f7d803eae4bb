"""The user's cache folder, and files that are either whole or absent.

Putting a saved SAE in its place, whole or not at all.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from legato.common.errors import LegatoError

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


MANIFEST = "checksums.json"


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled by `fill(empty folder)` unless a whole and unaltered earlier result is there.

    Whole means: a manifest with the SHA-256 of every file, all of which still match. The result appears under its name
    at once (rename); of several processes that want it, one fills it and the others wait.
    """
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                _fill(folder, fill)
    except OSError as error:
        raise LegatoError(f"cannot write {folder} ({error.strerror}): make room, or set LEGATO_CACHE") from error
    return folder


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        fill(fresh)
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        names = [path.relative_to(fresh).as_posix() for path in files]
        checksums = dict(zip(names, sha256_files(files), strict=True))
        Path(fresh, MANIFEST).write_text(json.dumps(checksums, indent=1))
        for path in [*files, fresh / MANIFEST]:
            sync_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)


def _is_whole(folder: Path) -> bool:
    try:
        checksums = json.loads(Path(folder, MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not isinstance(checksums, dict) or not checksums or {*checksums, MANIFEST} != files:
        return False
    return sha256_files(folder / name for name in checksums) == list(checksums.values())


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_folder(path: Path, marker: str) -> Iterator[Path]:
    """An empty folder to write into, which becomes `path` when the block ends without an error.

    A folder with a file called marker, an SAE saved before, is replaced; any other that is not empty is refused.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / marker).is_file()):
        raise LegatoError(f"{path} exists and is not a SAE folder; choose another place to save to")
    try:
        with _staging(path) as staging:
            new = staging / "new"
            new.mkdir()
            yield new
            if path.exists():
                os.replace(path, staging / "old")
            try:
                os.replace(new, path)
            except OSError:
                if (staging / "old").exists():
                    os.replace(staging / "old", path)
                raise
    except OSError as error:
        raise LegatoError(f"cannot save the SAE in {path}: {error.strerror or error}") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` when the block ends without an error."""
    if path.is_dir():
        raise LegatoError(f"{path} is a folder; name a file in it to save to")
    try:
        with _staging(path) as staging:
            yield staging / path.name
            os.replace(staging / path.name, path)
    except OSError as error:
        raise LegatoError(f"cannot save the SAE in {path}: {error.strerror or error}") from error
