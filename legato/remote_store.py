"""Activation stores at an fsspec URL (s3://bucket/folder, memory://, file://): kept there, read from a copy here.

A store at a URL has the same files as one in a folder. It is complete once its manifest lies there, which is written
last; what an interrupted transfer has brought over already is not brought again.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from legato.cache import cache_dir, locked, sha256_file
from legato.errors import LegatoError, UsageError
from legato.store_format import LOCK, MANIFEST, Manifest


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
