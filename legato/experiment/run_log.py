"""Logs of a running stage for people and trackers. Nothing here changes training.

With --wandb training steps also go to Weights & Biases: one run with the curves of every arm.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError


class RunLog:
    """The log of all ranks, kept by the writer: `flush` adds the records of all ranks, in the order of the steps, then
    of `arms`, to log.jsonl, to TensorBoard where it is installed, and passes them to `also`. All ranks must call flush
    and sync together.

    steps_done: steps before this attempt; TensorBoard then forgets its records of later ones.
    """

    def __init__(
        self, log: Path, tensorboard: Path, arms: Sequence[str], steps_done: int, also: "WandbLog | None"
    ) -> None:
        self._steps_done = steps_done
        self._place = {name: place for place, name in enumerate(arms)}
        self._records: list[Mapping[str, Any]] = []
        self._file = log.open("a", buffering=1) if distributed.is_rank0() else None
        self._writers: dict[str, Any] = {}
        self._tensorboard = tensorboard if find_spec("tensorboard") else None
        self._also = also

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for open_one in (*self._writers.values(), self._also, self._file):
            if open_one is not None:
                open_one.close()

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._records.append(record)

    def flush(self) -> None:
        ranks = distributed.gather(self._records)
        self._records = []
        if self._file is not None:
            records = [record for rank in ranks for record in rank]
            for record in sorted(records, key=lambda one: (one["step"], self._place[one["arm"]])):
                self._file.write(json.dumps(record) + "\n")
                if self._also is not None:
                    self._also(record)
                if self._tensorboard is not None:
                    for name, value in _numbers(record).items():
                        if name != "step":
                            self._writer(record["arm"]).add_scalar(name, value, record["step"])

    def sync(self) -> int:
        """Write all records to the disk; return the length of log.jsonl, on the writer."""
        self.flush()
        if self._file is None:
            return 0
        for writer in self._writers.values():
            writer.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def _writer(self, arm: str) -> Any:
        if arm not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = self._steps_done + 1 if self._steps_done else None
            folder = f"{self._tensorboard}/{arm}"
            self._writers[arm] = SummaryWriter(folder, purge_step=purge_step)  # type: ignore[operator]
        return self._writers[arm]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a record: its numbers, and its loss terms as loss/<term>."""
    terms = {f"loss/{term}": share for term, share in record.get("loss_terms", {}).items()}
    return {**{name: value for name, value in record.items() if isinstance(value, int | float)}, **terms}


FOLDER = "wandb"  # of its client
_ID = "legato_run_id"


class WandbLog:
    """Send records to Weights & Biases. WANDB_MODE=offline keeps them in the run's folder, for `wandb sync`."""

    def __init__(self, project: str, root: Path) -> None:
        """Open the run. root: the run's folder, whose name it gets. Continued training continues the same run.

        Raises UsageError where wandb is not installed, LegatoError where it cannot log in.
        """
        if find_spec("wandb") is None:
            raise UsageError('--wandb needs its client: pip install "legato-sae[track]"')
        import wandb

        run_id = root / FOLDER / _ID
        if not run_id.is_file():
            run_id.parent.mkdir(parents=True, exist_ok=True)
            run_id.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=root.resolve().name,
                dir=str(root),
                id=run_id.read_text().strip(),
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise LegatoError(f"Weights & Biases: {reason} (or set WANDB_MODE=offline)") from error
        self._arms: set[str] = set()

    def __call__(self, record: Mapping[str, Any]) -> None:
        arm = record["arm"]
        if arm not in self._arms:  # every arm has steps of its own: several passes start from 0
            self._run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")
            self._arms.add(arm)
        self._run.log({f"{arm}/{name}": value for name, value in _numbers(record).items()})

    def close(self) -> None:
        self._run.finish()
