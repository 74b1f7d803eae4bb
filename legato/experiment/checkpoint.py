"""Saved state of a run, to go on where it was cut off: <out_dir>/checkpoint/.

    progress.json            what is finished: trained and failed SAEs, with the checksums of their files
    step_00000120/           the SAEs in training after that step: state.json and <arm>/*.safetensors
    evaluation/<part>.json   a finished part of the evaluation, its arrays in <part>.safetensors

Every file is sealed (see checksummed.py). Of the steps the last two are kept; one that is damaged is passed over for
the one before. The folder goes when the run is finished.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from legato.common import distributed
from legato.common.checksummed import DamagedError, file_hashes, read_sealed, verify_checksummed, write_checksummed
from legato.common.command import Interrupted, Interrupts
from legato.common.errors import UsageError
from legato.sae.partition import Sharded
from legato.training.bank import BankState, divided
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import Workspace
from legato.training.trainer import SAETrainer, read_trainer_state, write_trainer_state

KIND = "legato-checkpoint-2"
DEFAULT_MINUTES = 5.0
_KEPT_STEPS = 2


@dataclass
class Progress:
    """Finished parts of a run.

    activations: key of what it trains on. trained: per SAE its part of metrics.json and the SHA-256 of its files.
    failed: the steps it was trained for and the reason, by name. log_bytes: length of log.jsonl when the last pass
    ended. evaluated: whether the results are saved.
    """

    activations: str
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    log_bytes: int = 0
    evaluated: bool = False


class Checkpoint:
    """The checkpoint folder of one run.

    minutes: time between two saved steps of the training. interrupts: a signal that is pending after a step is raised
    once the step is saved.
    """

    def __init__(self, folder: Path, *, minutes: float, interrupts: Interrupts) -> None:
        self.folder = folder
        self.progress = Progress("")
        self.interrupts = interrupts
        self._seconds = 60 * minutes
        self._last_saved = time.monotonic()

    def start(self, activations: str, begin_run: Callable[[], None]) -> None:
        """Go on with the run on the activations of that key, or begin it; all ranks know then what is finished."""

        def found() -> Progress:
            if not self.goes_on(activations):
                begin_run()
                self.begin(activations)
            return self.progress

        self.progress = distributed.broadcast_from_rank0(found)

    def begin(self, activations: str) -> None:
        """For a new run, trained on the activations of that key."""
        self.discard()
        self.progress = Progress(activations)
        self.write_progress()

    def goes_on(self, activations: str) -> bool:
        """Tell if there is a run to go on with; `progress` then holds its finished parts.

        One that is damaged is named and counts as none. Raises UsageError where the run trains on other activations.
        """
        path = self.folder / "progress.json"
        try:
            content, _ = read_sealed(path, kind=KIND)
        except FileNotFoundError:
            return False
        except DamagedError as error:
            _warn(f"{error}: the run begins anew")
            return False
        self.progress = Progress(**content)
        if self.progress.activations != activations:
            raise UsageError(
                f"{self.folder.parent} holds a run on other activations, the text or the model has changed since: "
                "choose a new --out_dir"
            )
        return True

    def write_progress(self) -> None:
        if distributed.is_rank0():
            write_checksummed(self.folder / "progress.json", vars(self.progress), kind=KIND)

    def finish_evaluation(self, failed: Mapping[str, str]) -> None:
        """The results are saved; the SAEs in `failed` (name: reason) could not be judged and are none any more."""
        for name, reason in failed.items():
            trained = self.progress.trained.pop(name, None)
            steps = trained["training"]["training_steps"] if trained else None
            self.progress.failed[name] = {"steps": steps, "reason": reason}
        self.progress.evaluated = True
        self.write_progress()

    def discard(self) -> None:
        if distributed.is_rank0():
            shutil.rmtree(self.folder, ignore_errors=True)

    # Training

    def after_step(self, bank: BankState, log_bytes: Callable[[], int]) -> None:
        """Save the bank where it is time to, or a signal is pending, which is then raised. All ranks do the same.

        log_bytes: brings log.jsonl to the disk and tells its length.
        """
        due = time.monotonic() - self._last_saved >= self._seconds
        ranks = distributed.gather((self.interrupts.pending, due, len(bank.trainers)))
        bank.elsewhere = sum(training for _, _, training in ranks) - len(bank.trainers)
        signals = [pending for pending, _, _ in ranks if pending is not None]
        if signals or ranks[0][1]:
            self.save_bank(bank, log_bytes())
        if signals:
            raise Interrupted(signals[0])

    def save_bank(self, bank: BankState, log_bytes: int) -> None:
        """Raises OSError and SafetensorError where it cannot be written; the step saved before is then still there.

        Every rank writes its own members, the writer what names them all.
        """
        folder = self.folder / f"step_{bank.step:08d}"
        distributed.broadcast_from_rank0(lambda: self._make_room(folder))
        members = [*bank.trainers, *(trainer for trainer, _ in bank.failed)]
        state = folder / "state.json"
        try:
            files = [
                file
                for trainer in members
                for file in write_trainer_state(
                    folder / trainer.arm.name, trainer.tensors(), trainer.partition, trainer.arm.d_sae
                )
            ]
            parts = distributed.gather_dicts(
                {
                    "failed": {trainer.arm.name: reason for trainer, reason in bank.failed},
                    "members": {trainer.arm.name: trainer.numbers() for trainer in members},
                    "files": file_hashes(state, files),
                }
            )
            if distributed.is_rank0():
                content = {"step": bank.step, "log_bytes": log_bytes, "sharded": isinstance(bank.partition, Sharded)}
                content |= {key: parts[key] for key in ("failed", "members")}
                write_checksummed(state, content, kind=KIND, files=parts["files"])
        except BaseException:
            if distributed.is_rank0():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._last_saved = time.monotonic()

    def _make_room(self, folder: Path) -> None:
        for old in self._steps()[_KEPT_STEPS - 1 :]:
            _delete_step(old)
        shutil.rmtree(folder, ignore_errors=True)  # what a write that was cut off left there
        folder.mkdir(parents=True)

    def read_bank(
        self, arms: Sequence[SAEConfig], config: TrainConfig, *, shard_latents: bool = False
    ) -> BankState | None:
        """The newest saved step that is whole, of a bank of any of these arms; None where there is none. Each rank
        gets its share of the members, however many ranks there were when it was saved.

        shard_latents: of several ranks, each gets a part of every member, as it does where that was so when saved.
        Saved steps that are damaged are named, and deleted; so are those of other arms, without a word.
        """
        by_name = {arm.name: arm for arm in arms}
        folder = distributed.broadcast_from_rank0(lambda: self._newest_step(by_name))
        if folder is None:
            return None
        state = folder / "state.json"
        content = verify_checksummed(state, kind=KIND, folders=())
        members = [name for name in by_name if name in content["members"]]
        names, partition = divided(members, sharded=shard_latents or content["sharded"])
        verify_checksummed(state, kind=KIND, folders=names)
        workspace = Workspace()
        trainers = {}
        for name in names:
            arm = by_name[name]
            tensors = read_trainer_state(folder / name, partition, arm.d_sae)
            trainers[name] = SAETrainer(arm, config, tensors["parameters.b_dec_D"].numel(), workspace, partition)
            trainers[name].restore(tensors, content["members"][name])
        failed = [(trainers.pop(name), reason) for name, reason in content["failed"].items() if name in names]
        elsewhere = len(content["members"]) - len(content["failed"]) - len(trainers)
        members_here = list(trainers.values())
        return BankState(members_here, failed, content["step"], elsewhere, partition, content["log_bytes"])

    def _newest_step(self, arms: Collection[str]) -> Path | None:
        for folder in self._steps():
            try:
                content = verify_checksummed(folder / "state.json", kind=KIND)
            except (FileNotFoundError, DamagedError) as error:
                if isinstance(error, DamagedError):
                    _warn(f"{error}: going on from the checkpoint before it")
                _delete_step(folder)
                continue
            if all(name in arms for name in content["members"]):
                return folder
            _delete_step(folder)
        return None

    def drop_steps(self) -> None:
        """For when the bank they belong to is trained."""
        if distributed.is_rank0():
            for folder in self._steps():
                _delete_step(folder)
        self._last_saved = time.monotonic()

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), reverse=True)

    # Evaluation

    def part(self, name: str, compute: Callable[[], Any], *, alone: bool = False) -> Any:
        """Return the result of `compute`, or of an earlier attempt: a tree of dicts, lists, numbers, strings, arrays.

        All ranks compute it together, to one result, which the writer keeps. alone: one rank computes it, and keeps it.
        """
        found = self._kept(name) if alone else distributed.broadcast_from_rank0(lambda: self._kept(name))
        if found is not None:
            return found
        arrays: dict[str, np.ndarray] = {}
        content = json.loads(json.dumps(_flat(compute(), arrays)))
        if alone or distributed.is_rank0():
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
            write_checksummed(self._part_path(name), content, {name: tensors} if arrays else {}, kind=KIND)
        return _tree(content, arrays)  # as it will be read, to the byte order of the arrays

    def _kept(self, name: str) -> Any:
        try:
            content, tensors = read_sealed(self._part_path(name), kind=KIND)
            return _tree(content, {key: tensor.numpy() for key, tensor in tensors.get(name, {}).items()})
        except FileNotFoundError:
            return None
        except DamagedError as error:
            _warn(f"{error}: this part of the evaluation is done again")
            return None

    def _part_path(self, name: str) -> Path:
        return self.folder / "evaluation" / f"{name}.json"


def _delete_step(folder: Path) -> None:
    """Delete a saved step, its state file first: a process killed on the way leaves nothing that looks damaged."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def cut(path: Path, length: int) -> None:
    """Shorten a log to what it was; one that is shorter, which only a power cut or a person can do, is named."""
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        _warn(f"{path} lacks {length - found} bytes that were written: its last records are lost")
    elif found > length:
        os.truncate(path, length)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


_ARRAY = "<array>"


def _flat(tree: Any, arrays: dict[str, np.ndarray], path: str = "") -> Any:
    """The tree with its arrays moved to `arrays`, by path."""
    if isinstance(tree, np.ndarray):
        arrays[path] = np.array(tree, order="C")
        return {_ARRAY: path}
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, Mapping):
        assert all(isinstance(key, str) for key in tree), f"{path}: {list(tree)[:3]}"
        return {key: _flat(entry, arrays, f"{path}/{key}") for key, entry in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_flat(entry, arrays, f"{path}/{i}") for i, entry in enumerate(tree)]
    return tree


def _tree(flat: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(flat, dict):
        return arrays[flat[_ARRAY]] if _ARRAY in flat else {key: _tree(entry, arrays) for key, entry in flat.items()}
    return [_tree(entry, arrays) for entry in flat] if isinstance(flat, list) else flat
