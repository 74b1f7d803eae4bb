"""Flat table of a run, one row per SAE: ablation.parquet, and the same as ablation.csv."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from legato.common.files import write_atomically
from legato.results.run_dir import RunDir
from legato.results.saved_run import Arm, SavedRun

# Column and the key in metrics.json that it holds; what an arm did not save is null.
MEASURED = {
    "fvu": "core.fvu",
    "l0": "core.l0",
    "ce_loss_score": "core.ce_loss_score",
    "frac_alive": "core.frac_alive",
    "kappa1_excess_within": "consistency.kappa1_excess_within",
    "kappa1_excess_cross": "consistency.kappa1_excess_cross",
    "ac1_excess_within": "consistency.ac1_excess_within",
    "ac1_excess_cross": "consistency.ac1_excess_cross",
    "half_life_median": "consistency.half_life_median",
    "eta2_mean": "position.eta2_mean",
    "final_loss": "training.final_loss",
    "wall_seconds": "training.wall_seconds",
}
COUNTED = {
    "dense": "core.dense",
    "dead_at_end": "training.dead_at_end",
    "training_steps": "training.training_steps",
    "training_tokens": "training.tokens",
}
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "role", "sparsity", "term")),
        ("window", pa.int64()),
        ("coefficient", pa.float64()),
        ("k", pa.int64()),
        ("release", pa.float64()),
        ("groups", pa.string()),
        ("seed", pa.int64()),
        *((name, pa.float64()) for name in MEASURED),
        *((name, pa.int64()) for name in COUNTED),
    ]
)


def ablation_table(run: SavedRun) -> pa.Table:
    """Make a row per arm from the saved metrics, in their order: the arm's options and its results."""
    return pa.Table.from_pylist([_row(arm) for arm in run.arms], schema=_SCHEMA)


def write_ablation(run: SavedRun | str | Path) -> Path:
    """Write ablation.parquet and ablation.csv in a run folder from its metrics.json; return the path of the former."""
    run = SavedRun.of(run)
    table = ablation_table(run)
    path = RunDir(run.path).ablation
    for target, write in ((path, pq.write_table), (path.with_suffix(".csv"), csv.write_csv)):
        content = pa.BufferOutputStream()
        write(table, content)
        write_atomically(target, content.getvalue().to_pybytes())
    return path


def _row(arm: Arm) -> dict[str, Any]:
    training = arm.metrics.get("training") or {}
    sparsity = (training.get("recipe") or {}).get("sparsity")
    counts = {column: arm.value(key) for column, key in COUNTED.items()}
    groups = (training.get("recipe") or {}).get("groups")
    nested = groups if isinstance(groups, list) and len(groups) > 1 else []  # of a Matryoshka SAE
    return {
        "arm": arm.name,
        "role": arm.role,
        "sparsity": sparsity.get("type") if isinstance(sparsity, Mapping) else None,
        "term": arm.term,
        "window": arm.window,
        "coefficient": arm.coefficient,
        "k": None if arm.k is None else int(arm.k),
        "release": arm.value("training.recipe.sparsity.release"),
        "groups": " ".join(f"{share:g}:{weight:g}" for share, weight in nested) or None,
        "seed": arm.seed,
        **{column: arm.value(key) for column, key in MEASURED.items()},
        **{column: None if value is None else int(value) for column, value in counts.items()},
    }
