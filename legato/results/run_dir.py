"""The folder of one run: all its paths, and the functions that write to it."""

import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.torch import save_file

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError
from legato.common.files import sweep, write_atomically
from legato.common.hardware import fast_matmul_dtype, processor_name, settle_matmul_dtype
from legato.common.safe_read import read_json_object

LOCK = ".lock"
_PACKAGES = ("legato-sae", "torch", "transformers", "numpy", "numba")


class Configuration(Protocol):
    """A configuration that config.yaml can keep, plain values only."""

    def to_dict(self) -> dict[str, Any]: ...


class RunDir:
    """All paths under out_dir (README describes each file)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.log = self.root / "log.jsonl"
        self.metrics = self.root / "metrics.json"
        self.ablation = self.root / "ablation.parquet"  # and .csv
        self.matched = self.root / "matched.json"
        self.eval_results = self.root / "eval_results"
        self.features = self.root / "features"
        self.arrays = self.root / "arrays"
        self.redundancy = self.root / "redundancy"
        self.strips = self.root / "strips"
        self.shown_text = self.strips / "tokens.parquet"
        self.tensorboard = self.root / "tensorboard"
        self.final_info = self.root / "final_info.json"
        self.checkpoint = self.root / "checkpoint"
        self.checksums = self.root / "checksums.json"
        self.timings = self.root / "timings.json"  # seconds of each stage, over all attempts

    def sae(self, arm: str) -> Path:
        return self.root / "saes" / arm

    @property
    def release(self) -> str:
        """Name of this run in SAEBench files."""
        return f"legato_{self.root.resolve().name}"

    @classmethod
    def claim(cls, root: str | Path, config: Configuration, *, resume: bool = False) -> "RunDir":
        """Check the folder for a new run, or for an unfinished one of the same configuration.

        resume: only the latter. Raises UsageError for a finished run, another configuration, a folder that is not a
        run, no write permission.
        """
        run = cls(root)
        try:
            occupied = run.root.exists() and any(entry.name != LOCK for entry in run.root.iterdir())
        except OSError as error:
            raise UsageError(f"--out_dir {root} cannot be used ({error.strerror}): choose another folder") from error
        if occupied:
            if not run.config.is_file():
                raise UsageError(f"--out_dir {root} is not empty and holds no run: choose a new folder")
            if run.final_info.is_file() and not run.is_unfinished:
                shutil.rmtree(run.checkpoint, ignore_errors=True)  # the run was stopped just before it did this
                raise UsageError(f"--out_dir {root} holds a finished run: choose a new folder, or delete it first")
            difference = changes(_read_config(run.config).get("config", {}), config.to_dict())
            if difference:
                raise UsageError(f"--out_dir {root} holds a run with {difference}: use its options or a new folder")
        if resume and not run.is_unfinished:
            raise UsageError(f"--resume: {root} holds no unfinished run: leave --resume out to begin one")
        probe = run.root
        while not probe.exists():
            probe = probe.parent
        try:
            tempfile.TemporaryDirectory(dir=probe).cleanup()
        except OSError as error:
            message = f"--out_dir {root} cannot be written ({error.strerror}): choose a folder you may write to"
            raise UsageError(message) from error
        return run

    @property
    def is_unfinished(self) -> bool:
        """True where an earlier attempt left a checkpoint to continue. A finished run deletes it."""
        return self.checkpoint.is_dir() and not (self.final_info.is_file() and self.checksums.is_file())

    def settle_machine(self, dtype: str) -> None:
        """Fix the matmul dtype: as in an earlier attempt at this run, and the same on all ranks. dtype: bfloat16 or
        float32, or auto for the faster one on this machine."""
        settle_matmul_dtype(dtype)
        if self.is_unfinished or distributed.world_size() > 1:
            settle_matmul_dtype(distributed.broadcast_from_rank0(self._settled))

    def _settled(self) -> str:
        """Return the matmul dtype; print a note where the run began on another machine."""
        now = environment()
        before: dict[str, Any] = {}
        if self.is_unfinished:
            before = _read_config(self.config).get("environment") or {}
        same = {key: now[key] for key in before if key != "matmul_dtype"}
        if difference := changes({key: before[key] for key in same}, same):
            print(f"note: this run began with {difference}; numbers may differ in the last digits", file=sys.stderr)
        return before.get("matmul_dtype", now["matmul_dtype"])

    @contextmanager
    def locked(self, config: Configuration) -> Iterator[None]:
        """Hold the folder's lock: one process at a time. Raises UsageError for a second process, and where another run
        came into the folder since `claim`."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(f"another process works in {self.root}: wait for it, or choose a new --out_dir") from error
        try:
            if self.config.is_file():
                self.claim(self.root, config)
            self._sweep()
            yield
        finally:
            lock.release()

    def forget_log(self, arms: Iterable[str]) -> None:
        """Remove some arms' records from log.jsonl."""
        marks = tuple(f'{{"arm": {json.dumps(arm)},'.encode() for arm in arms)
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.is_file() else []
        if any(line.startswith(marks) for line in lines):
            write_atomically(self.log, b"".join(line for line in lines if not line.startswith(marks)))

    def begin(self, config: Configuration, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml and start the log; delete the files of an unfinished run."""
        self.root.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoint", "saes", "failed", "tensorboard", "wandb", "figures"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        for folder in (self.eval_results, self.features, self.arrays, self.redundancy, self.strips):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.ablation, self.matched, self.final_info, self.checksums, self.timings):
            file.unlink(missing_ok=True)
        for name in ("ablation.csv", "notes.txt", "report.html"):
            (self.root / name).unlink(missing_ok=True)
        content = {"config": config.to_dict(), "resolved": dict(resolved), "environment": environment()}
        write_atomically(self.config, yaml.safe_dump(content, sort_keys=False).encode())
        self.log.write_text("")

    def read_timings(self) -> dict[str, float]:
        """Read the seconds of each stage; {} where none were saved, as in older runs."""
        saved = read_json_object(self.timings) if self.timings.is_file() else {}
        return {str(name): float(seconds) for name, seconds in saved.items() if isinstance(seconds, (int, float))}

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json. Raises LegatoError if any number in it is not finite."""
        numbers = [(key, value) for key, value in leaves(metrics, lists=True) if isinstance(value, float)]
        if bad := [key for key, value in numbers if not math.isfinite(value)]:
            told = ", ".join(bad[:5])
            raise LegatoError(f"the evaluation gave numbers that are not finite ({told}): nothing was saved")
        write_json(self.metrics, metrics)

    def _sweep(self) -> None:
        """Delete what a process that was killed was writing."""
        sweep([*self.root.glob(".*.tmp"), *self.root.glob("saes/.*"), *self.checkpoint.rglob(".*.tmp")])

    def write_failure(self, arm: str, tensors: Mapping[str, torch.Tensor], steps: int, reason: str) -> None:
        """Save the weights of a failed arm after its last good step, and the reason of the failure."""
        folder = self.root / "failed" / arm
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / "weights.safetensors")
        write_atomically(folder / "reason.json", json.dumps({"steps": steps, "reason": reason}).encode())

    def fail_sae(self, arm: str, steps: int, reason: str) -> None:
        """Move a saved SAE that cannot be judged to the failed ones, with the reason; do nothing if done before."""
        if not self.sae(arm).is_dir():
            return
        folder = self.root / "failed" / arm
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        self.sae(arm).rename(folder)
        write_atomically(folder / "reason.json", json.dumps({"steps": steps, "reason": reason}).encode())

    def write_arrays(self, arm: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays.mkdir(exist_ok=True)
        np.savez_compressed(self.arrays / f"{arm}.npz", allow_pickle=False, **dict(arrays))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def environment() -> dict[str, Any]:
    """Return versions, commit and hardware, to be saved with every run."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "matmul_dtype": str(fast_matmul_dtype()).removeprefix("torch."),
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is damaged: choose a new --out_dir") from error
    return content if isinstance(content, dict) else {}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """List the differences of two configurations in words; empty where there are none."""
    before, after = dict(leaves(old, lists=True)), dict(leaves(new, lists=True))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)} instead of {after.get(name)}" for name in changed)


def leaves(tree: Any, path: str = "", *, lists: bool = False) -> list[tuple[str, Any]]:
    """List the leaves of nested mappings by dotted key; with `lists`, those inside lists too, as `key[0]`."""
    if isinstance(tree, Mapping):
        return [leaf for key, entry in tree.items() for leaf in leaves(entry, f"{path}.{key}".lstrip("."), lists=lists)]
    if lists and isinstance(tree, (list, tuple)):
        return [leaf for i, entry in enumerate(tree) for leaf in leaves(entry, f"{path}[{i}]", lists=True)]
    return [(path, tree)]
