"""Training steps to Weights & Biases, where --wandb asks for it: one run with the curves of every arm."""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from legato.errors import LegatoError, UsageError

FOLDER = "wandb"  # what its client writes into
_ID = "legato_run_id"


class WandbLog:
    """Takes the records of log.jsonl. WANDB_MODE=offline keeps them in the run's folder, for `wandb sync`."""

    def __init__(self, project: str, root: Path) -> None:
        """root: the run's folder; its name is the run's. Training that goes on goes on in the same run.

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
