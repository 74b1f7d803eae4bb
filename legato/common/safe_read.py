"""Reading what was written before: files may be damaged, cut or hostile, and are bounded in size and depth.

Nothing is executed, and nothing outgrows the memory that is free. Every function raises LegatoError, in one line that
names the file, where it is not what it should be; those for files that others wrote UsageError where it is missing.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from legato.common.errors import LegatoError, UsageError, one_line

MAX_JSON_BYTES = 64 * 2**20  # metrics.json of 60 arms has 3 MB, cfg.json of an SAE some kilobytes
MAX_YAML_BYTES = 2**20  # config.yaml has 3 kB; the parser takes a second for this much


@contextmanager
def _damaged_by(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """LegatoError in place of what the readers of a damaged file raise."""
    try:
        yield
    except LegatoError:
        raise
    except errors as error:
        raise LegatoError(f"{path} is damaged: {one_line(error)}") from error


def _text(path: Path, most_bytes: int, what: str) -> str:
    if path.stat().st_size > most_bytes:
        raise LegatoError(f"{path} has {path.stat().st_size:,} bytes: no {what}")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    with _damaged_by(path, ValueError, OSError, RecursionError):
        return json.loads(_text(path, MAX_JSON_BYTES, "JSON that Legato or its peers write"))


class _PlainLoader(yaml.SafeLoader):
    """Values only: an alias, which Legato never writes, can make a few lines an endless tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    with _damaged_by(path, yaml.YAMLError, ValueError, OSError, RecursionError):
        return yaml.load(_text(path, MAX_YAML_BYTES, "configuration that Legato writes"), Loader=_PlainLoader)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a NumPy archive, compressed or not; object arrays, which NumPy pickles, are refused."""
    with _damaged_by(path, Exception):  # a damaged archive raises what zipfile, zlib, ast and NumPy stumble over
        with zipfile.ZipFile(path) as archive:
            check_fits(path, sum(entry.file_size for entry in archive.infolist()))
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    if strangers := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise LegatoError(f"{path} is damaged: {strangers[0]} is no array")
    return arrays


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet table; columns: those of them that it has."""
    # Damaged thrift and pages raise most of what pyarrow has.
    with _damaged_by(path, Exception), pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        check_fits(path, 8 * file.metadata.num_rows * max(1, len(names)))
        return file.read(columns=names)


def check_fits(path: Path, needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise LegatoError(
            f"{path} needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: open it on a larger machine"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    _check_is_file(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise LegatoError(f"{path} is damaged: expected an object")
    return content


def as_dict(content: Any) -> dict[str, Any]:
    """content where it is an object, as it should be; {} where it is anything else."""
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; its header is checked against its length before anything is read."""
    _check_is_file(path)
    with _damaged_by(path, SafetensorError, OSError, ValueError):
        return as_float32(load_file(path), path)


def safetensors_header(path: Path) -> dict[str, str]:
    _check_is_file(path)
    with _damaged_by(path, SafetensorError, OSError, ValueError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote (PyTorch 1.6 or later), unpickled as plain tensors only.

    The archive must be uncompressed, as torch.save writes it: then no tensor is larger than its bytes in the file.
    """
    _check_is_file(path)
    advice = "save the state dict again with torch.save, or convert it to safetensors"
    errors = (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with _damaged_by(path, *errors):
        if not zipfile.is_zipfile(path):
            raise LegatoError(f"{path} is not in torch.save's zip format: {advice}")
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise LegatoError(f"{path} is compressed, which torch.save never does: {advice}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise LegatoError(f"{path} holds more than tensors and was not opened: {advice}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise LegatoError(f"{path} is not a state dict of tensors: {advice}")
    return as_float32(loaded, path)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a NumPy archive, compressed or not; object arrays, which NumPy pickles, are refused."""
    _check_is_file(path)
    with _damaged_by(path, TypeError):  # of a type that torch does not have, such as text
        tensors = {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    return as_float32(tensors, path)


def as_float32(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """float32 copies that own their memory; whole numbers stay as they are."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex():
            raise LegatoError(f"{path}: {name} is not a dense tensor of real numbers")
    check_fits(path, sum(max(4, tensor.element_size()) * tensor.numel() for tensor in tensors.values()))
    return {
        name: tensor.to(torch.float32, copy=True).contiguous() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
