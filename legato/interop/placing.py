"""Putting a saved SAE in its place, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from legato.errors import LegatoError


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


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
