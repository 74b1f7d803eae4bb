"""JSON with tensors beside it, in files that are known to be whole and unaltered when they are read.

A sealed file is JSON that holds the SHA-256 of its own content and of the .safetensors files that belong to it. It is
written last, so files beside it that it does not name are leftovers of a write that was cut off.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.files import sha256_file, sha256_json, sync_to_disk, write_atomically

Tensors = Mapping[str, Tensor]


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
    written = {name: _write_tensors(path, name, named) for name, named in (tensors or {}).items()}
    body = {"kind": kind, "files": {**(files or {}), **written}, "content": content}
    write_atomically(path, json.dumps({"sha256": sha256_json(body), **body}).encode())


def file_hashes(path: Path, files: Collection[Path]) -> dict[str, Any]:
    """What `write_checksummed` needs to know of .safetensors files beside `path` or in folders there."""
    return {file.relative_to(path.parent).with_suffix("").as_posix(): {"sha256": sha256_file(file)} for file in files}


def _write_tensors(path: Path, name: str, named: Tensors) -> dict[str, Any]:
    file = _tensor_file(path, name)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, file)
    sync_to_disk(file)
    return {"sha256": sha256_file(file), "tensors": list(named)}


def read_sealed(
    path: Path, *, kind: str, names: Collection[str] | None = None
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """(content, tensors by name) of `write_checksummed`. Raises DamagedError, naming the file; FileNotFoundError.

    names: of the tensor files only these are checked and read.
    """
    body = _sealed_body(path, kind)
    tensors = {}
    for name, file in body["files"].items():
        if names is not None and name not in names:
            continue
        _check_file(path, name, file)
        with safe_open(_tensor_file(path, name), framework="pt") as stored:
            # Copies, so that the memory is torch's own: aligned, and not a view of the file.
            tensors[name] = {key: stored.get_tensor(key).clone() for key in file["tensors"]}
    return body["content"], tensors


def verify_checksummed(path: Path, *, kind: str, folders: Collection[str] | None = None) -> Any:
    """As read_sealed, with every file checked and none but `path` read: the content.

    A folder beside `path` that holds files of it must hold no others. folders: only files in these are checked.
    """
    body = _sealed_body(path, kind)
    files = {_tensor_file(path, name): file for name, file in body["files"].items()}
    for place in {place.parent for place in files} - {path.parent}:
        for other in set(place.glob("*.safetensors")) - files.keys():
            raise DamagedError(f"{other} does not belong there")
    for name, file in body["files"].items():
        if folders is None or _tensor_file(path, name).parent.name in folders:
            _check_file(path, name, file)
    return body["content"]


def _check_file(path: Path, name: str, file: Mapping[str, Any]) -> None:
    place = _tensor_file(path, name)
    if not place.is_file() or sha256_file(place) != file["sha256"]:
        raise DamagedError(f"{place} is missing or damaged")


def _sealed_body(path: Path, kind: str) -> dict[str, Any]:
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
    return body


def _tensor_file(path: Path, name: str) -> Path:
    return path.parent / f"{name}.safetensors"
