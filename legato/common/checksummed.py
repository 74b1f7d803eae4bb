"""JSON with tensors beside it, in files that are known to be whole and unaltered when they are read.

A sealed file is JSON that holds the SHA-256 of its own content and of the .safetensors files that belong to it. It is
written last, so files beside it that it does not name are leftovers of a write that was cut off.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.files import Manifest, sha256_json, sync_to_disk, write_atomically

Tensors = Mapping[str, Tensor]
SUFFIX = ".safetensors"


class DamagedError(LegatoError):
    """A file that is not what was written, or that another version wrote."""


def write_checksummed(
    path: Path,
    content: Any,
    tensors: Mapping[str, Tensors] | None = None,
    *,
    kind: str,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Write `path` (JSON: content, which may hold NaN) and `<name>.safetensors` beside it for each name in tensors.

    kind: what such a file is and its version; one of another kind is not read. files: what `file_hashes` said of files
    that are there already. Raises OSError and SafetensorError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [write_tensors(path.with_name(name + SUFFIX), named) for name, named in (tensors or {}).items()]
    body = {"kind": kind, "files": {**(files or {}), **file_hashes(path, written)}, "content": content}
    write_atomically(path, json.dumps({"sha256": sha256_json(body), **body}).encode())


def write_tensors(file: Path, tensors: Tensors) -> Path:
    """A .safetensors file that is on the disk, and means something once a sealed file names it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    sync_to_disk(file)
    return file


def file_hashes(path: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Hash .safetensors files beside `path` or in folders there, as `write_checksummed` takes them."""
    hashed = Manifest.of(path.parent, [file.relative_to(path.parent).as_posix() for file in files]).sha256
    return {name.removesuffix(SUFFIX): {"sha256": digest} for name, digest in hashed.items()}


def read_sealed(path: Path, *, kind: str) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """(content, tensors by name) of `write_checksummed`. Raises DamagedError, naming the file; FileNotFoundError."""
    content, manifest = _sealed(path, kind)
    _check(manifest, manifest.sha256)
    # Copies, so that the memory is torch's own: aligned, and not a view of the file.
    return content, {
        name.removesuffix(SUFFIX): {key: tensor.clone() for key, tensor in load_file(path.parent / name).items()}
        for name in manifest.sha256
    }


def verify_checksummed(path: Path, *, kind: str, folders: Collection[str] | None = None) -> Any:
    """Check every file and return the content of `path`; no other file is read.

    A folder beside `path` that holds files of it must hold no others. folders: only files in these are checked.
    """
    content, manifest = _sealed(path, kind)
    files = [path.parent / name for name in manifest.sha256]
    for place in {file.parent for file in files} - {path.parent}:
        for other in set(place.glob(f"*{SUFFIX}")).difference(files):
            raise DamagedError(f"{other} does not belong there")
    _check(manifest, [name for name in manifest.sha256 if folders is None or Path(name).parent.name in folders])
    return content


def _check(manifest: Manifest, names: Iterable[str]) -> None:
    for name in manifest.damaged(names):
        raise DamagedError(f"{manifest.folder / name} is missing or damaged")


def _sealed(path: Path, kind: str) -> tuple[Any, Manifest]:
    """The content of a sealed file, and the files that it names."""
    try:
        body = json.loads(path.read_text())
        sealed = body.pop("sha256") == sha256_json(body)
        found = body["kind"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged") from error
    if not sealed:
        raise DamagedError(f"{path} is damaged")
    if found != kind:
        raise DamagedError(f"{path} was written by another version of legato ({found}, not {kind})")
    return body["content"], Manifest(path.parent, {n + SUFFIX: file["sha256"] for n, file in body["files"].items()})
