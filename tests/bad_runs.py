"""Run folders that cannot be read, and command lines of `legato` and plot.py that cannot be meant."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_input import Case, World, flags

from legato.results.integrity import write_checksums


def _run(change: Callable[[Path], object], *given: str, sealed: bool = False) -> Callable[[World], list[object]]:
    """`given` and a copy of the sound run, changed; sealed: changed after the run."""

    def prepared(world: World) -> list[object]:
        folder = shutil.copytree(world.run, world.folder / "run_1")
        if sealed:
            write_checksums(folder)
        change(folder)
        return [*given, folder]

    return prepared


def _write(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _metrics(**arms: object) -> Callable[[Path], object]:
    return _write("metrics.json", json.dumps(arms))


def _recipe(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["contrastive"]["training"]["recipe"] |= changes
        path.write_text(json.dumps(metrics))

    return change


def _set(value: object, *keys: str | int) -> Callable[[Path], object]:
    """One entry of the arm contrastive in metrics.json."""

    def change(folder: Path) -> None:
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text())
        node = metrics["contrastive"]
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        path.write_text(json.dumps(metrics))

    return change


def _flipped(name: str, at: int = -20) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return change


def _fifo(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def _symlink(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("gone")

    return change


def _arrays(**arrays: object) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / "arrays" / "baseline.npz", **arrays)


def _features(**columns: list[object]) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "features" / "baseline.parquet")


def _nested(depth: int) -> object:
    return [_nested(depth - 1)] if depth else 1


# Nine lists of the list before, nine times over.
_LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_NPZ, _PARQUET = "arrays/baseline.npz", "features/baseline.parquet"
_DAMAGED: list[tuple[str, Callable[[Path], object], tuple[str, ...], int]] = [
    ("without metrics.json", lambda f: (f / "metrics.json").unlink(), ("not a finished run", "metrics.json"), 2),
    ("metrics.json empty", _write("metrics.json", ""), ("metrics.json is damaged",), 1),
    ("metrics.json cut", _write("metrics.json", '{"baseline": {"core'), ("metrics.json is damaged",), 1),
    ("metrics.json a list", _write("metrics.json", "[1]"), ("metrics.json holds no arm",), 1),
    ("metrics.json of nothing", _metrics(), ("metrics.json holds no arm",), 1),
    ("metrics.json of numbers", _metrics(baseline=3), ("metrics.json holds no arm",), 1),
    ("metrics.json nested", _write("metrics.json", '{"a":' * 10**5), ("metrics.json is damaged",), 1),
    ("metrics.json not UTF-8", _write("metrics.json", b'{"\xff": {}}'), ("metrics.json is damaged",), 1),
    ("metrics.json of 65 MB", lambda f: os.truncate(f / "metrics.json", 65 * 2**20), ("has 68,157,440 bytes",), 1),
    ("metrics.json a FIFO", _fifo("metrics.json"), ("not a finished run",), 2),
    ("metrics.json a broken symlink", _symlink("metrics.json"), ("not a finished run",), 2),
    ("an arm above it", _metrics(**{"../../etc/passwd": {}}), ("names an arm '../../etc/passwd', which is a path",), 1),
    ("an arm that is a path", _metrics(**{"/etc/passwd": {}}), ("'/etc/passwd', which is a path",), 1),
    ("an arm called ..", _metrics(**{"..": {}}), ("names an arm '..', which is a path",), 1),
    ("an arm without a name", _metrics(**{"": {}}), ("names an arm '', which is a path",), 1),
    ("a window of words", _recipe(window="wide"), ("metrics.json is damaged: the recipe of an arm",), 1),
    ("a coefficient of words", _recipe(coefficient=[1]), ("metrics.json is damaged: the recipe of an arm",), 1),
    ("a seed without end", _recipe(seed=1e999), ("metrics.json is damaged: the recipe of an arm",), 1),
    (
        "a section of words",
        _set("all of it", "core"),
        ("metrics.json is damaged: contrastive.core is 'all of it'",),
        1,
    ),
    ("a section that is a list", _set([1], "training"), ("metrics.json is damaged: contrastive.training is [1]",), 1),
    ("a recipe that is a number", _set(3, "training", "recipe"), ("contrastive.training.recipe is 3",), 1),
    (
        "a role that is a list",
        _recipe(role=["named"]),
        ("contrastive.training.recipe.role is ['named'], not a valid string",),
        1,
    ),
    (
        "a method that is a number",
        _recipe(method=3),
        ("contrastive.training.recipe.method is 3, not a valid string",),
        1,
    ),
    ("more tokens than are", _set(10**30, "core", "tokens"), ("contrastive.core.tokens is 1000000000",), 1),
    ("bins that are a number", _set(3, "consistency", "by_rate_bin"), ("by_rate_bin is 3, not a valid list",), 1),
    ("bins of nothing", _set([{}], "consistency", "by_rate_bin"), ("by_rate_bin.0.bin is {}: Field required",), 1),
    (
        "a bin of words",
        _set("a", "consistency", "by_rate_bin", 0, "bin"),
        ("by_rate_bin.0.bin is 'a', not a valid list",),
        1,
    ),
    (
        "a bin with one edge",
        _set([0.1], "consistency", "by_rate_bin", 0, "bin"),
        ("by_rate_bin.0.bin is [0.1]: List should have at least 2 items",),
        1,
    ),
    ("a nested entry", _set(_nested(600), "core", "fvu"), ("metrics.json is damaged",), 1),
    ("config.yaml damaged", _write("config.yaml", "config: [1, 2"), ("config.yaml is damaged",), 1),
    ("config.yaml with code", _write("config.yaml", "a: !!python/object/apply:os.system [ls]"), ("config.yaml",), 1),
    ("config.yaml of laughs", _write("config.yaml", _LAUGHS), ("config.yaml is damaged: it holds an alias",), 1),
    ("config.yaml nested", _write("config.yaml", "[" * 10**4), ("config.yaml is damaged",), 1),
    ("config.yaml not UTF-8", _write("config.yaml", b"\xff\xfe"), ("config.yaml is damaged",), 1),
    ("config.yaml of 2 MB", _write("config.yaml", "a: " + "b" * 2**21), ("config.yaml has 2,097,155 bytes",), 1),
    (
        "config.yaml of wrong types",
        _write("config.yaml", "config: 3\nresolved: [1]\n"),
        ("config.yaml is damaged: its parts",),
        1,
    ),
    ("arrays empty", _write(_NPZ, ""), ("baseline.npz is damaged",), 1),
    ("arrays of rubbish", _write(_NPZ, "rubbish"), ("baseline.npz is damaged",), 1),
    ("arrays of objects", _arrays(position_matrix=np.array([{}], dtype=object)), ("npz is damaged: Object arrays",), 1),
    ("arrays of text", _arrays(position_matrix=np.array(["a"])), ("position_matrix holds no numbers",), 1),
    ("features empty", _write(_PARQUET, ""), ("baseline.parquet is damaged",), 1),
    ("features of rubbish", _write(_PARQUET, b"PAR1rubbishPAR1"), ("baseline.parquet is damaged",), 1),
    ("features of text", _features(kappa1_excess_within=["a", "b"]), ("baseline.parquet is damaged",), 1),
]
_CHANGED: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("metrics.json", _flipped("metrics.json"), ("metrics.json is damaged or was changed", "restore it")),
    ("log.jsonl", _flipped("log.jsonl"), ("log.jsonl is damaged or was changed", "restore it")),
    ("an array lost", lambda f: (f / _NPZ).unlink(), ("baseline.npz is missing", "restore it")),
    ("an array of another run", _arrays(position_matrix=np.eye(3)), ("baseline.npz is damaged or was changed",)),
    ("an array more", lambda f: shutil.copy(f / _NPZ, f / "arrays" / "more.npz"), ("more.npz was not written by",)),
    ("checksums.json cut", lambda f: os.truncate(f / "checksums.json", 99), ("checksums.json is damaged",)),
    ("checksums.json flipped", _flipped("checksums.json"), ("checksums.json is damaged",)),
    ("checksums.json a list", _write("checksums.json", "[]"), ("checksums.json is damaged",)),
    ("checksums.json of later", _write("checksums.json", '{"format": "9", "sha256": "", "files": {}}'), ("version",)),
]

_FLAGS = flags(
    "legato",
    [
        ("comapre", "No such command 'comapre'", "see legato --help"),
        ("--verbose", "see legato --help", ""),
        ("compare", "Missing argument 'RUN...'", "see legato compare --help"),
        ("report", "Missing argument 'RUN...'", "see legato report --help"),
        ("check", "Missing argument 'RUN...'", "see legato check --help"),
        ("check nowhere", "nowhere has no checksums.json", "earlier version"),
        ("compare nowhere", "nowhere is not a finished run", "metrics.json"),
        ("report nowhere", "nowhere is not a finished run", "metrics.json"),
        (f"report {'long' * 100}", "is not a finished run", "metrics.json"),
        ("evaluate", "Missing argument '[NAME=]SAE...'", "see legato evaluate --help"),
        ("import nowhere", "Missing argument 'FOLDER'", "see legato import --help"),
        ("import ./nowhere out", "nowhere does not exist", ""),
        ("export ./nowhere --to=saelens --out=out", "nowhere does not exist", ""),
        ("export ./nowhere --to=onnx --out=out", "--to onnx is unknown", "choose one of saelens, "),
        ("synthetic", "Missing option '--out_dir'", "see legato synthetic --help"),
        ("synthetic --out_dir=out --seeds=0", "--seeds 0 must be greater than or equal to 1", ""),
        ("synthetic --out_dir=out --sources=iid:0", "--sources 'iid:0' is not FAMILY[:COUNT]", ""),
        ("synthetic --out_dir=out --sources=noise:9", "--sources 'noise:9' is not FAMILY[:COUNT]", ""),
        ("synthetic --out_dir=out --sources=", "--sources names no family", "choose of"),
        ("synthetic --out_dir=out --arms=slow", "--temporal slow is unknown", "choose one of"),
        ("synthetic --out_dir=out --k=0", "--k 0 must be greater than or equal to 1", ""),
        ("synthetic --out_dir=out --k=300", "--k 300 exceeds --d_sae 256", "lower k"),
        ("synthetic --out_dir=out --release=2", "--release 2.0 must be less than or equal to 1", ""),
        ("synthetic --out_dir=out --d_in=0", "d_in 0 must be greater than or equal to 2", ""),
        ("synthetic --out_dir=out --rows=0", "rows 0 must be greater than or equal to 1", ""),
        ("synthetic --out_dir=out --steps=0", "--steps 0 must be greater than or equal to 1", ""),
        ("synthetic --out_dir=out --lr=0", "--lr 0.0 must be greater than 0", ""),
        ("synthetic --out_dir=out --lr=nan", "--lr nan must be a finite number", ""),
        ("synthetic --out_dir=out --noise=-1", "--noise -1.0 must be greater than or equal to 0", ""),
        ("synthetic --out_dir=out --noise=inf", "--noise inf must be a finite number", ""),
        ("synthetic --out_dir=out --noise_persistence=1", "--noise_persistence 1.0 must be less than 1", ""),
    ],
)
_PLOT = flags(
    "plot",
    [
        ("nowhere", "nowhere is not a finished run", "metrics.json"),
        ("--outt=x", "No such option", "see plot.py --help"),
    ],
)


def _flat_out(world: World) -> list[object]:
    (world.folder / "file").write_text("")
    return [world.run, f"--out={world.folder / 'file' / 'out'}"]


CASES = [
    *(Case(f"report: {name}", "legato", _run(change, "report"), says, code) for name, change, says, code in _DAMAGED),
    *(
        Case(f"report: changed {name}", "legato", _run(change, "report", sealed=True), says, 1)
        for name, change, says in _CHANGED
    ),
    *_FLAGS,
    *_PLOT,
    Case("a place that is a file", "plot", _flat_out, ("cannot be written",)),
    Case("plot: changed", "plot", _run(_flipped("metrics.json"), sealed=True), ("metrics.json is damaged or was",), 1),
    Case("compare: changed", "legato", _run(_flipped(_NPZ), "compare", sealed=True), ("baseline.npz is damaged",), 1),
    Case("check: changed", "legato", _run(_flipped(_PARQUET), "check", sealed=True), ("baseline.parquet is dam",), 1),
]
