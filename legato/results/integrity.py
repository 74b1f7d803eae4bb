"""checksums.json of a finished run: the SHA-256 of its files, written last and checked by whatever reads the run.

A run without one is read as it is: an earlier version made it, or it did not finish.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from legato.common.errors import LegatoError, UsageError
from legato.common.files import sha256_file, sha256_files, sha256_json, write_atomically
from legato.common.safe_read import one_line, read_json

FILENAME = "checksums.json"  # RunDir.checksums
FORMAT = "legato-run-1"
# What a person may edit, what only TensorBoard reads, and what has checksums of its own; hidden files too.
EXEMPT = ("notes.txt", "tensorboard", "wandb", "checkpoint", FILENAME)
# `legato report` builds these from the others.
DERIVED = ("report.html", "figures", "matched.json", "ablation.parquet", "ablation.csv", "final_info.json")
# Nothing that reads a run reads these, and they may be large: an SAE is checked when it is opened.
UNREAD = ("saes", "failed")


@dataclass(frozen=True)
class Checksums:
    """of: SHA-256 by path, relative to the run's folder."""

    root: Path
    of: Mapping[str, str]

    @classmethod
    def read(cls, root: Path) -> "Checksums | None":
        """None where the run has none. Raises LegatoError where they are damaged themselves."""
        path = root / FILENAME
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            files, digest = content["files"], content["sha256"]
            whole = content["format"] == FORMAT and digest == sha256_json(files) and isinstance(files, dict)
        except (KeyError, TypeError, RecursionError) as error:
            raise LegatoError(f"{path} is damaged: delete it to read the run unchecked") from error
        if not whole:
            raise LegatoError(f"{path} is damaged, or of another version: delete it to read the run unchecked")
        if strange := [name for name in files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]:
            raise LegatoError(
                f"{path} names {strange[0]}, which is not in the run: delete it to read the run unchecked"
            )
        return cls(root, files)

    def write(self) -> None:
        content = {"format": FORMAT, "sha256": sha256_json(dict(self.of)), "files": dict(self.of)}
        write_atomically(self.root / FILENAME, json.dumps(content, indent=1).encode())

    def check(self, wanted: Callable[[str], bool]) -> None:
        """LegatoError that names the first file of those that are wanted which is not as the run wrote it."""
        names = [name for name in self.of if wanted(name)]
        digests = sha256_files(self.root / name for name in names)
        bad = [name for name, digest in zip(names, digests, strict=True) if digest != self.of[name]]
        bad += [name for name in _files(self.root) if wanted(name) and name not in self.of]
        if not bad:
            return
        more = f" ({len(bad)} such files)" if len(bad) > 1 else ""
        raise LegatoError(f"{self.root / bad[0]} {self._fault(bad[0])}{more}")

    def _fault(self, name: str) -> str:
        if is_derived(name):
            return "is missing, damaged or was changed after the run: build it again with `legato report`"
        if name not in self.of:
            return "was not written by this run: move it elsewhere"
        if not (self.root / name).is_file():
            return "is missing: restore it from a copy of the run"
        return f"is damaged or was changed after the run: restore it, or delete {FILENAME} to read it as it is"


def write_checksums(root: Path) -> None:
    """Vouch for every file of a run as it is now."""
    names = list(_files(root))
    Checksums(root, _hashed(root, names)).write()


def check_read(root: Path) -> None:
    """LegatoError where a file that readers of the run build on is not as the run wrote it; one hash of each."""
    if (sums := Checksums.read(root)) is not None:
        sums.check(lambda name: not is_derived(name) and not _is_in(name, UNREAD))


def check_one(root: Path, path: Path) -> None:
    """LegatoError where this file is not as the run wrote it; for a derived file, which `check_read` leaves out."""
    sums, name = Checksums.read(root), path.relative_to(root).as_posix()
    if sums is not None and name in sums.of:
        sums.check(lambda other: other == name)


def check_all(root: Path) -> int:
    """How many files a run has that are vouched for. LegatoError where one is not as the run wrote it."""
    sums = Checksums.read(root)
    if sums is None:
        raise UsageError(f"{root} has no {FILENAME}: it is no run, did not finish or was made by an earlier version")
    sums.check(lambda name: True)
    return len(sums.of)


@contextmanager
def rebuilding(root: Path, places: Sequence[str] = DERIVED) -> Iterator[None]:
    """Within it these derived files and folders are not vouched for; afterwards they are, as they are then."""
    sums = Checksums.read(root)
    if sums is None:
        yield
        return
    kept = {name: digest for name, digest in sums.of.items() if not _is_in(name, places)}
    Checksums(root, kept).write()
    yield
    rebuilt = [name for name in _files(root) if _is_in(name, places)]
    Checksums(root, {**kept, **_hashed(root, rebuilt)}).write()


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


def _files(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not _is_in(name.as_posix(), EXEMPT) and not any(p.startswith(".") for p in name.parts):
            yield name.as_posix()


def _is_in(name: str, places: Sequence[str]) -> bool:
    return name.partition("/")[0] in places


def _hashed(root: Path, names: list[str]) -> dict[str, str]:
    return {name: sha256_file(root / name) for name in names}
