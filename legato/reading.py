"""Reading what was written before: files may be damaged, cut or hostile, and are bounded in size and depth.

Every function raises LegatoError, in one line that names the file, where it is not what it should be.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from legato.errors import LegatoError

MAX_JSON_BYTES = 64 * 2**20  # metrics.json of 60 arms has 3 MB, cfg.json of an SAE some kilobytes
MAX_YAML_BYTES = 2**20  # config.yaml has 3 kB; the parser takes a second for this much


def read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LegatoError(f"{path} has {path.stat().st_size:,} bytes: no JSON that Legato or its peers write")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LegatoError(f"{path} is damaged: {one_line(error)}") from error


class _PlainLoader(yaml.SafeLoader):
    """Values only: an alias, which Legato never writes, can make a few lines an endless tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise LegatoError(f"{path} has {path.stat().st_size:,} bytes: no configuration that Legato writes")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise LegatoError(f"{path} is damaged: {one_line(error)}") from error


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a NumPy archive, compressed or not; object arrays, which NumPy pickles, are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_fits(path, sum(entry.file_size for entry in archive.infolist()))
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except LegatoError:
        raise
    except Exception as error:  # a damaged archive raises what zipfile, zlib, ast and NumPy stumble over
        raise LegatoError(f"{path} is damaged: {one_line(error)}") from error
    if strangers := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise LegatoError(f"{path} is damaged: {strangers[0]} is no array")
    return arrays


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet table; columns: those of them that it has."""
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            check_fits(path, 8 * file.metadata.num_rows * max(1, len(names)))
            return file.read(columns=names)
    except LegatoError:
        raise
    except Exception as error:  # damaged thrift and pages raise most of what pyarrow has
        raise LegatoError(f"{path} is damaged: {one_line(error)}") from error


def check_fits(path: Path, needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise LegatoError(
            f"{path} needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: open it on a larger machine"
        )


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
