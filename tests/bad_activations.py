"""Stores of activations that are not what `harvest` wrote, and batches that no model gives.

A store's case changes a copy of a sound store of 3 shards; `opened` is what opening it says, `harvested` what
harvesting there again does: a message, or None where the bad shard is made anew.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from legato.common.files import sha256_file, sha256_json
from legato.data.activations import ActivationBatch

FIRST, SECOND, LAST = (f"shard_0000{number}.safetensors" for number in range(3))
Change = Callable[[Path], object]


@dataclass(frozen=True)
class BadStore:
    name: str
    change: Change
    opened: str
    harvested: str | None


def _manifest(**changes: Any) -> Change:
    """Numbers of the manifest, which vouches for them; None leaves one out."""

    def change(store: Path) -> None:
        path = store / "manifest.json"
        content = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
        content.pop("sha256")
        path.write_text(json.dumps(content | {"sha256": sha256_json(content)}))

    return change


def _shards(act: Callable[[dict[str, Any]], object]) -> Change:
    def change(store: Path) -> None:
        shards = json.loads((store / "manifest.json").read_text())["shards"]
        act(shards)
        _manifest(shards=shards)(store)

    return change


def _vouched(act: Change, name: str = SECOND) -> Change:
    """A change of a shard that the manifest vouches for."""

    def change(store: Path) -> None:
        act(store / name)
        _shards(lambda shards: shards[name].update(sha256=sha256_file(store / name)))(store)

    return change


def _tensors(act: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(shard: Path) -> None:
        tensors = load_file(shard)
        act(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard)

    return change


def _cut(bytes_left: int) -> Change:
    return lambda shard: os.truncate(shard, bytes_left)


def _write(name: str, content: str | bytes) -> Change:
    return lambda store: (store / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _loop(name: str) -> Change:
    def change(store: Path) -> None:
        (store / name).unlink()
        (store / name).symlink_to(name)

    return change


def _fifo(name: str) -> Change:
    def change(store: Path) -> None:
        (store / name).unlink()
        os.mkfifo(store / name)

    return change


def _folder(name: str) -> Change:
    def change(store: Path) -> None:
        (store / name).unlink()
        (store / name).mkdir()

    return change


def _swapped(store: Path) -> None:
    (store / FIRST).rename(store / "other")
    (store / SECOND).rename(store / FIRST)
    (store / "other").rename(store / SECOND)


_READ, _BAD = "manifest.json cannot be read", "is missing or damaged"
_NO_MANIFEST = "manifest.json is no manifest"
STORES = [
    BadStore("no manifest", lambda s: (s / "manifest.json").unlink(), "holds no activations", "is not empty and holds"),
    BadStore("a manifest that is empty", _write("manifest.json", ""), _READ, _READ),
    BadStore("a manifest that is cut", _write("manifest.json", '{"key": "a'), _READ, _READ),
    BadStore("a manifest that is a list", _write("manifest.json", "[1]"), _READ, _READ),
    BadStore("a manifest nested", _write("manifest.json", '{"a":' * 10**5), _READ, _READ),
    BadStore("a manifest not UTF-8", _write("manifest.json", b"\xff\xfe{}"), _READ, _READ),
    BadStore("a manifest of 1 GiB", lambda s: os.truncate(s / "manifest.json", 2**30), _NO_MANIFEST, _NO_MANIFEST),
    BadStore("a manifest that is a FIFO", _fifo("manifest.json"), _NO_MANIFEST, _NO_MANIFEST),
    BadStore("a manifest that is a folder", _folder("manifest.json"), _NO_MANIFEST, _NO_MANIFEST),
    BadStore("a manifest that is its own link", _loop("manifest.json"), _READ, _READ),
    BadStore("a later version", _manifest(format="legato-activations-9"), "another version", "another version"),
    BadStore("a number more", _manifest(shape=3), _READ, _READ),
    BadStore("a number less", _manifest(d_in=None), _READ, _READ),
    BadStore("a width of words", _manifest(d_in="wide"), "d_in is 'wide'", "d_in is 'wide'"),
    BadStore("a width below 1", _manifest(d_in=-48), "d_in is -48", "d_in is -48"),
    BadStore("no rows", _manifest(n_rows=0), "n_rows is 0", "n_rows is 0"),
    BadStore("rows by half", _manifest(n_rows=2.5), "n_rows is 2.5", "n_rows is 2.5"),
    BadStore("no rows a shard", _manifest(rows_per_shard=0), "rows_per_shard is 0", "rows_per_shard is 0"),
    BadStore("rows without end", _manifest(n_rows=10**15), "1000000000000000 rows of", "1000000000000000 rows of"),
    BadStore("a shard without end", _manifest(n_rows=10**15, rows_per_shard=10**15), "rows of", "rows of"),
    BadStore("a context without end", _manifest(context_length=2**50), "rows of", "rows of"),
    BadStore("another dtype of numbers", _manifest(dtype="F64"), _READ, _READ),
    BadStore("a dtype that is a list", _manifest(dtype=["F32"]), _READ, _READ),
    BadStore("another width", _manifest(d_in=24), _BAD, "manifest.json is damaged"),
    BadStore("another dtype", _manifest(dtype="F16"), _BAD, "manifest.json is damaged"),
    BadStore("another length", _manifest(context_length=8), _BAD, "manifest.json is damaged"),
    BadStore("without a key", _manifest(key=7), "does not say what it holds", "does not say what it holds"),
    BadStore("another key", _manifest(key="0" * 64), "", "choose another folder"),
    BadStore("fewer valid than none", _shards(lambda s: s[FIRST].update(n_valid=-3)), f"{FIRST} has -3 valid", _READ),
    BadStore("outliers of words", _shards(lambda s: s[FIRST].update(n_outliers="no")), "'no' outliers", _READ),
    BadStore("shards that are a list", _manifest(shards=[1, 2]), _READ, _READ),
    BadStore("a shard that is a number", _shards(lambda s: s.update({FIRST: 3})), _READ, _READ),
    BadStore("a shard above it", _shards(lambda s: s.update({f"../../{FIRST}": s[FIRST]})), "it names '../../", _READ),
    BadStore("a shard more", _shards(lambda s: s.update({"shard_00003.safetensors": s[FIRST]})), "it names 'sh", _READ),
    BadStore("a shard not noted", _shards(lambda s: s.pop(SECOND)), "is unfinished (2 of 3 shards)", None),
    BadStore("a shard lost", lambda s: (s / SECOND).unlink(), f"{SECOND} {_BAD}", None),
    BadStore("a shard that is empty", _write(SECOND, ""), f"{SECOND} {_BAD}", None),
    BadStore("a shard that is its own link", _loop(SECOND), f"{SECOND} {_BAD}", None),
    BadStore("a shard that is a FIFO", _fifo(SECOND), f"{SECOND} {_BAD}", None),
    BadStore("two shards swapped", _swapped, f"{FIRST} {_BAD}", None),
    BadStore("the last in place of the second", lambda s: shutil.copy(s / LAST, s / SECOND), f"{SECOND} {_BAD}", None),
    BadStore("cut, and vouched for", _vouched(_cut(999)), f"{SECOND} {_BAD}", None),
    BadStore(
        "narrower, and vouched for",
        _vouched(_tensors(lambda t: t.update(acts=t["acts"][..., :24]))),
        f"{SECOND} {_BAD}",
        None,
    ),
    BadStore(
        "of another dtype, and vouched for",
        _vouched(_tensors(lambda t: t.update(acts=t["acts"].half()))),
        f"{SECOND} {_BAD}",
        None,
    ),
    BadStore(
        "a mask of another length, and vouched for",
        _vouched(_tensors(lambda t: t.update(mask=t["mask"][:, :-1]))),
        f"{SECOND} {_BAD}",
        None,
    ),
    BadStore(
        "without documents, and vouched for", _vouched(_tensors(lambda t: t.pop("doc"))), f"{SECOND} {_BAD}", None
    ),
]


def set_number(store: Path, value: float, row: int = 0) -> None:
    """One number of the first shard's activations, which the manifest vouches for: what a broken memory may leave."""
    _vouched(_tensors(lambda tensors: tensors["acts"][row, :, 0].fill_(value)), FIRST)(store)


def sound_batch(width: int = 48) -> ActivationBatch:
    draw = torch.Generator().manual_seed(0)
    doc_BL = torch.zeros(3, 8, dtype=torch.int32)
    return ActivationBatch(
        torch.randn(3, 8, width, generator=draw), torch.ones(3, 8, dtype=torch.bool), doc_BL, doc_BL.long()
    )


BATCHES: dict[str, tuple[Callable[[ActivationBatch], ActivationBatch], str]] = {
    "too narrow": (lambda b: replace(b, acts_BLD=b.acts_BLD[..., :24]), "24"),
    "flat": (lambda b: replace(b, acts_BLD=b.acts_BLD.view(24, 48)), "acts_BLD"),
    "whole numbers": (lambda b: replace(b, acts_BLD=b.acts_BLD.int()), "acts_BLD"),
    "a mask of another length": (lambda b: replace(b, mask_BL=b.mask_BL[:, :-1]), "mask_BL"),
    "a mask of other rows": (lambda b: replace(b, mask_BL=b.mask_BL[:2]), "mask_BL"),
    "a mask of numbers": (lambda b: replace(b, mask_BL=b.mask_BL.float()), "mask_BL"),
    "documents of another length": (lambda b: replace(b, doc_BL=b.doc_BL[:, :-1]), "doc_BL"),
    "tokens of another length": (lambda b: replace(b, tokens_BL=b.tokens_BL[:, 1:]), "tokens_BL"),
    "no valid position": (lambda b: replace(b, mask_BL=~b.mask_BL), "no position is valid"),
    "a number that is none": (lambda b: replace(b, acts_BLD=b.acts_BLD / b.acts_BLD.gt(9)), "not finite"),
}
