"""checksums.json of a finished run: the SHA-256 of its files, written last and checked by whatever reads the run.

A run without one is read as it is: an earlier version made it, or it did not finish.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from legato.common.errors import LegatoError, UsageError
from legato.common.files import Manifest, files_in, sha256_json, write_atomically
from legato.common.safe_read import one_line, read_json

FILENAME = "checksums.json"  # RunDir.checksums
FORMAT = "legato-run-1"
# What a person may edit, what only TensorBoard reads, and what has checksums of its own; hidden files too.
EXEMPT = ("notes.txt", "tensorboard", "wandb", "checkpoint", FILENAME)
# `legato report` builds these from the others.
DERIVED = ("report.html", "figures", "matched.json", "ablation.parquet", "ablation.csv", "final_info.json")
# Nothing that reads a run reads these, and they may be large: an SAE is checked when it is opened.
UNREAD = ("saes", "failed")


def write_checksums(root: Path) -> None:
    """Vouch for every file of a run as it is now."""
    _write(Manifest.of(root, _files(root)))


def check_read(root: Path) -> None:
    """LegatoError where a file that readers of the run build on is not as the run wrote it; one hash of each."""
    if (manifest := _read(root)) is not None:
        _check(manifest, lambda name: not is_derived(name) and not _is_in(name, UNREAD))


def check_one(root: Path, path: Path) -> None:
    """LegatoError where this file is not as the run wrote it; for a derived file, which `check_read` leaves out."""
    manifest, name = _read(root), path.relative_to(root).as_posix()
    if manifest is not None and name in manifest.sha256:
        _check(manifest, lambda other: other == name)


def check_all(root: Path) -> int:
    """Check every file of a run and return their number. LegatoError where one is not as the run wrote it."""
    manifest = _read(root)
    if manifest is None:
        raise UsageError(f"{root} has no {FILENAME}: it is no run, did not finish or was made by an earlier version")
    _check(manifest, lambda name: True)
    return len(manifest.sha256)


@contextmanager
def rebuilding(root: Path, places: Sequence[str] = DERIVED) -> Iterator[None]:
    """Within it these derived files and folders are not vouched for; afterwards they are, as they are then."""
    manifest = _read(root)
    if manifest is None:
        yield
        return
    kept = Manifest(root, {name: sha256 for name, sha256 in manifest.sha256.items() if not _is_in(name, places)})
    _write(kept)
    yield
    _write(kept.rebuilt(name for name in _files(root) if _is_in(name, places)))


def _read(root: Path) -> Manifest | None:
    """None where the run has none. Raises LegatoError where it is damaged itself."""
    path = root / FILENAME
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        files, digest = content["files"], content["sha256"]
        sound = content["format"] == FORMAT and digest == sha256_json(files) and isinstance(files, dict)
    except (KeyError, TypeError, RecursionError) as error:
        raise LegatoError(f"{path} is damaged: delete it to read the run unchecked") from error
    if not sound:
        raise LegatoError(f"{path} is damaged, or of another version: delete it to read the run unchecked")
    if strange := [name for name in files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]:
        raise LegatoError(f"{path} names {strange[0]}, which is not in the run: delete it to read the run unchecked")
    return Manifest(root, files)


def _write(manifest: Manifest) -> None:
    content = {"format": FORMAT, "sha256": sha256_json(manifest.sha256), "files": manifest.sha256}
    write_atomically(manifest.folder / FILENAME, json.dumps(content, indent=1).encode())


def _check(manifest: Manifest, wanted: Callable[[str], bool]) -> None:
    """LegatoError that names the first file of those that are wanted which is not as the run wrote it."""
    root, known = manifest.folder, manifest.sha256
    bad = manifest.damaged(name for name in known if wanted(name))
    bad += [name for name in _files(root) if wanted(name) and name not in known]
    if not bad:
        return
    if is_derived(bad[0]):
        fault = "is missing, damaged or was changed after the run: build it again with `legato report`"
    elif bad[0] not in known:
        fault = "was not written by this run: move it elsewhere"
    elif not (root / bad[0]).is_file():
        fault = "is missing: restore it from a copy of the run"
    else:
        fault = f"is damaged or was changed after the run: restore it, or delete {FILENAME} to read it as it is"
    more = f" ({len(bad)} such files)" if len(bad) > 1 else ""
    raise LegatoError(f"{root / bad[0]} {fault}{more}")


@contextmanager
def blame_unverified_files(roots: Sequence[Path]) -> Iterator[None]:
    """Within it the content of runs is relied on: where nothing vouches for one of them, an error is its files' fault,
    and becomes a LegatoError; where all are sealed it is Legato's own, and passes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        unsealed = [root for root in roots if not (root / FILENAME).is_file()]
        if not unsealed:
            raise
        raise LegatoError(
            f"{unsealed[0]} holds results that no run writes ({type(error).__name__}: {one_line(error)}): "
            "restore its files, or run it again"
        ) from error


def is_derived(name: str) -> bool:
    return _is_in(name, DERIVED)


def _files(root: Path) -> list[str]:
    return [n for n in files_in(root) if not _is_in(n, EXEMPT) and not any(p.startswith(".") for p in n.split("/"))]


def _is_in(name: str, places: Sequence[str]) -> bool:
    return name.partition("/")[0] in places
