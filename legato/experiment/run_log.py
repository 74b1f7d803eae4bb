"""Logs of a running stage for people and trackers. Nothing here changes training.

With --wandb training steps also go to Weights & Biases: one run with the curves of every arm.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from legato.common import distributed
from legato.common.errors import LegatoError, UsageError


class Tracker(Protocol):
    """A receiver of the records of log.jsonl."""

    def __call__(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Append one record per logged step to log.jsonl, to TensorBoard where it is installed, and pass it to `also`.

    steps_done: steps before this attempt; TensorBoard then forgets its records of later ones.
    """

    def __init__(self, log: Path, tensorboard: Path, *, steps_done: int = 0, also: Tracker | None = None) -> None:
        self._steps_done = steps_done
        self._stack = ExitStack()
        self._file = self._stack.enter_context(log.open("a", buffering=1))
        self._writers: dict[str, Any] = {}
        self._tensorboard = tensorboard if find_spec("tensorboard") else None
        self._also = also

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._also is not None:
            self._also.close()
        self._stack.close()

    def sync(self) -> int:
        """Write all records to the disk; return the length of log.jsonl."""
        for writer in self._writers.values():
            writer.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._also is not None:
            self._also(record)
        if self._tensorboard is not None:
            writer = self._writer(record["arm"])
            for name, value in record.items():
                if name == "loss_terms":
                    for term, share in value.items():
                        writer.add_scalar(f"loss/{term}", share, record["step"])
                elif isinstance(value, (int, float)) and name != "step":
                    writer.add_scalar(name, value, record["step"])

    def _writer(self, arm: str) -> Any:
        if arm not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = self._steps_done + 1 if self._steps_done else None
            folder = f"{self._tensorboard}/{arm}"
            self._writers[arm] = SummaryWriter(folder, purge_step=purge_step)  # type: ignore[operator]
        return self._writers[arm]


class SharedLog:
    """Log of all ranks, kept by the writer: `flush` adds the records of all ranks, in the order of the steps, then of
    `arms`. All ranks must call flush and sync together."""

    def __init__(self, log: Callable[[], RunLog], arms: Sequence[str]) -> None:
        """Open the log by calling `log`, on the writer only."""
        self._log = log() if distributed.is_rank0() else None
        self._place = {name: place for place, name in enumerate(arms)}
        self._records: list[Mapping[str, Any]] = []

    def __enter__(self) -> "SharedLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.__exit__(*exception)

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._records.append(record)

    def flush(self) -> None:
        ranks = distributed.gather(self._records)
        self._records = []
        if self._log is not None:
            records = [record for rank in ranks for record in rank]
            for record in sorted(records, key=lambda one: (one["step"], self._place[one["arm"]])):
                self._log(record)

    def sync(self) -> int:
        """Write all records to the disk; return the length of log.jsonl, on the writer."""
        self.flush()
        return 0 if self._log is None else self._log.sync()


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
        terms = {f"loss/{term}": share for term, share in record.get("loss_terms", {}).items()}
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._run.log({f"{arm}/{name}": value for name, value in {**numbers, **terms}.items()})

    def close(self) -> None:
        self._run.finish()
