"""Layout of a store on the disk: safetensors shards of whole rows, and a manifest with their SHA-256.

A folder holds `manifest.json` and `shard_00000.safetensors`, ...; every shard but the last has the same number of rows,
with the tensors `tokens` (int32), `doc` (int32), `acts` (the model's dtype) and `mask` (bool). A shard gets its name,
and then its line in the manifest, only when it is whole and on the disk.

Shape legend: B rows (contexts), L positions, D width.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from legato.common.errors import LegatoError
from legato.common.files import Manifest, sha256_json, write_atomically
from legato.data.activations import FORMAT

MANIFEST = "manifest.json"
LOCK = ".lock"  # who writes a store holds it
SHARD_BYTES = 64 * 2**20
MAX_SHARDS = 2**20  # 64 TiB
MAX_SHARD_BYTES = 2**40  # where a row is larger than SHARD_BYTES
MAX_MANIFEST_BYTES = 2**28  # MAX_SHARDS of them have 140 bytes each
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Shard:
    """A finished shard: the number of its valid positions, and of its outliers."""

    sha256: str
    n_valid: int
    n_outliers: int


@dataclass(frozen=True)
class StoreManifest:
    """key: SHA-256 of everything that determines the activations. provenance: the same for people, json-able.

    dtype: a key of DTYPES. shards: the finished ones, by file name.
    rank: of several that write one store, each notes what it finishes in a manifest of its own, until `united`.
    """

    key: str
    n_rows: int
    context_length: int
    d_in: int
    dtype: str
    rows_per_shard: int
    provenance: dict[str, Any]
    shards: dict[str, Shard]
    rank: int = 0

    @classmethod
    def new(
        cls, key: str, *, n_rows: int, context_length: int, d_in: int, dtype: torch.dtype, provenance: dict[str, Any]
    ) -> "StoreManifest":
        """Describe a store without shards yet; each will have some 64 MiB, or one row where that is more."""
        rows_per_shard = max(1, SHARD_BYTES // _row_bytes(context_length, d_in, dtype))
        name = next(name for name, known in DTYPES.items() if known == dtype)
        return cls(key, n_rows, context_length, d_in, name, rows_per_shard, provenance, {})

    @classmethod
    def read(cls, path: Path, rank: int = 0) -> "StoreManifest | None":
        """The manifest of a store, None where there is none yet; LegatoError for one that cannot be understood."""
        place = path / _manifest_name(rank)
        try:
            if place.exists() and (not place.is_file() or place.stat().st_size > MAX_MANIFEST_BYTES):
                raise LegatoError(f"{place} is no manifest: delete {path} and harvest again")
            content = json.loads(place.read_text())
            digest = content.pop("sha256", None)  # earlier versions wrote none
            if content["format"] != FORMAT:
                raise LegatoError(f"{path} was written by another version of legato: delete it and harvest again")
            if digest not in (None, sha256_json(content)):
                raise LegatoError(f"{path / MANIFEST} is damaged: delete {path} and harvest again")
            del content["format"]
            shards = {name: Shard(**shard) for name, shard in content.pop("shards").items()}
            manifest = cls(**content, shards=shards, rank=rank)
            manifest._check()
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LegatoError(f"{path / MANIFEST} cannot be read ({error}): delete {path} and harvest again") from error

    def _check(self) -> None:
        """Raises ValueError where these cannot be the numbers of a store, which are taken for sizes and file names."""
        for name in ("n_rows", "context_length", "d_in", "rows_per_shard"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
        row_bytes = _row_bytes(self.context_length, self.d_in, DTYPES[self.dtype])
        shard_bytes = row_bytes * min(self.rows_per_shard, self.n_rows)
        if shard_bytes > MAX_SHARD_BYTES or -(-self.n_rows // self.rows_per_shard) > MAX_SHARDS:
            raise ValueError(f"{self.n_rows} rows of {row_bytes} bytes, {self.rows_per_shard} a shard")
        if type(self.key) is not str or type(self.provenance) is not dict:
            raise ValueError("it does not say what it holds")
        if strangers := self.shards.keys() - self.shard_names:
            raise ValueError(f"it names {min(strangers)!r}")
        for name, shard in self.shards.items():
            counts = (shard.n_valid, shard.n_outliers)
            if any(type(count) is not int or count < 0 for count in counts):
                raise ValueError(f"{name} has {shard.n_valid!r} valid positions and {shard.n_outliers!r} outliers")

    @classmethod
    def united(cls, path: Path) -> "StoreManifest | None":
        """Read it, add the shards that other ranks have finished, and delete their manifests."""
        manifest = cls.read(path)
        others = list(path.glob(_manifest_name("*")))
        if manifest is None or not others:
            return manifest
        for other in others:
            found = cls.read(path, rank=int(other.name.split("_")[1].split(".")[0]))
            if found is not None and found.key == manifest.key:
                manifest.shards.update(found.shards)
        manifest.write(path)
        for other in others:
            other.unlink()
        return manifest

    def write(self, path: Path) -> None:
        content = {"format": FORMAT, **asdict(self), "shards": {n: asdict(self.shards[n]) for n in sorted(self.shards)}}
        del content["rank"]
        content["sha256"] = sha256_json(content)
        write_atomically(path / _manifest_name(self.rank), json.dumps(content, indent=1).encode())

    @property
    def is_whole(self) -> bool:
        return len(self.shards) == len(self.shard_names)

    @property
    def shard_names(self) -> list[str]:
        """File names of all shards, finished or not, in the order of their rows."""
        return [f"shard_{number:05d}.safetensors" for number in range(-(-self.n_rows // self.rows_per_shard))]

    def rows_of(self, number: int) -> range:
        """The rows that lie in shard `number`."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.n_rows))

    def damaged_shards(self, path: Path, *, verify: bool = True) -> list[str]:
        """Shards named here whose file is missing or not what was written. verify: hash them all."""
        files = Manifest(path, {name: shard.sha256 for name, shard in self.shards.items()})
        damaged = set(files.damaged() if verify else ())
        return [name for name in self.shards if name in damaged or not self.places(path / name)]

    def rows(self, n_rows: int, device: str = "cpu") -> dict[str, Tensor]:
        """Room for so many rows, by the tensors of a shard."""
        shape = (n_rows, self.context_length)
        acts_BLD = torch.empty(*shape, self.d_in, dtype=DTYPES[self.dtype], device=device)
        mask_BL = torch.empty(shape, dtype=torch.bool, device=device)
        doc_BL, tokens_BL = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
        return {"acts": acts_BLD, "mask": mask_BL, "doc": doc_BL, "tokens": tokens_BL}

    def places(self, shard: Path) -> dict[str, tuple[int, int]]:
        """By tensor, its first byte in a shard's file and its bytes a row; empty where it is no shard of this store."""
        room = self.rows(len(self.rows_of(int(shard.stem.removeprefix("shard_")))), "meta")
        if not shard.is_file():
            return {}
        try:
            with safe_open(shard, "pt") as file:  # refuses a file that its tensors do not fill to its end
                names = file.offset_keys()
                found = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError):
            return {}
        dtypes = {"acts": self.dtype, "mask": "BOOL", "doc": "I32", "tokens": "I32"}
        if found != {name: (dtypes[name], list(tensor.shape)) for name, tensor in room.items()}:
            return {}
        places, end = {}, shard.stat().st_size
        for name in reversed(names):
            end -= room[name].nbytes
            places[name] = (end, room[name].nbytes // len(room[name]))
        return places


def _row_bytes(context_length: int, d_in: int, dtype: torch.dtype) -> int:
    """Count the bytes of a row: an activation, two int32 and a bool a position."""
    return context_length * (d_in * dtype.itemsize + 9)


def _manifest_name(rank: int | str) -> str:
    return f"manifest_{rank}.json" if rank else MANIFEST
