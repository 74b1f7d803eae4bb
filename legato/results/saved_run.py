"""The saved results of a run folder, as the notes, the report and `plot.py` read them.

Nothing here computes a metric; values that a run did not save are None.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from legato.common.errors import LegatoError, UsageError
from legato.common.safe_read import read_arrays, read_json, read_table, read_yaml
from legato.results.integrity import check_one, check_read
from legato.results.older import older_identities
from legato.results.run_dir import RunDir, leaves
from legato.results.schema import read_metrics

MAX_HIGHLIGHTED = 7  # a reader can tell so many apart by colour, line style and marker


@dataclass(frozen=True)
class Arm:
    """One SAE of a run and its options.

    role: `baseline`, `named` (an arm the reader asked for by name), `grid` (a member of the window x coefficient
        ablation alone), `sweep` (the recipe of the arm `method` at another k) or `control` (made of a trained SAE
        without training). in_grid: whether it is a point of the ablation, asked for by name or not.
    metrics: this arm's part of metrics.json.
    method: the recipe's name whatever its k and its seed. group: with its k, shared by arms that differ
        only in their seed.
    """

    name: str
    role: str
    metrics: Mapping[str, Any]
    method: str
    group: str
    in_grid: bool = False
    term: str | None = None
    window: int | None = None
    coefficient: float | None = None
    k: float | None = None
    seed: int | None = None

    @property
    def trained(self) -> bool:
        return self.role != "control"

    @property
    def rate_bins(self) -> dict[tuple[float, float], tuple[float, int]]:
        """(kappa excess at lag 1, number of latents) by firing-rate bin (low, high), measured bins only."""
        return {
            (float(row["bin"][0]), float(row["bin"][1])): (float(row["kappa1_excess_within"]), int(row["latents"]))
            for row in _at(self.metrics, "consistency.by_rate_bin") or ()
            if is_number(row.get("kappa1_excess_within")) and row.get("latents")
        }

    def value(self, key: str) -> float | None:
        """Return the number at a dotted key such as `core.fvu`; None where it is absent or not finite."""
        return float(found) if is_number(found := _at(self.metrics, key)) else None

    def series(self, key: str) -> np.ndarray | None:
        """Return the list of numbers at a dotted key as float64, gaps as nan; None where there is no number."""
        found = _at(self.metrics, key)
        if not isinstance(found, Sequence) or isinstance(found, str):
            return None
        values = np.array([float(v) if is_number(v) else math.nan for v in found])
        return values if np.isfinite(values).any() else None


@dataclass(frozen=True)
class SavedRun:
    """A run folder opened for reading.

    log: per arm and logged quantity a float64 array over logged steps (loss terms as `loss_terms.<name>`).
    config: the resolved configuration, empty where none was saved.
    """

    path: Path
    arms: tuple[Arm, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> "SavedRun":
        """Open a run folder. Raises UsageError where it is none, LegatoError where its metrics cannot be read."""
        path = Path(path)
        metrics_path = RunDir(path).metrics
        if not os.path.isfile(metrics_path):
            raise UsageError(f"{path} is not a finished run: it has no metrics.json")
        check_read(path)
        metrics = read_metrics(metrics_path)
        config_path = RunDir(path).config
        config: Any = {}
        if config_path.is_file():
            config = read_yaml(config_path)
            sections = config if isinstance(config, dict) else {}
            if any(not isinstance(sections.get(part) or {}, dict) for part in ("config", "resolved", "environment")):
                raise LegatoError(f"{config_path} is damaged: its parts are no sections")
        try:
            arms = arms_of(metrics)
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise LegatoError(f"{metrics_path} is damaged: the recipe of an arm cannot be read ({error})") from error
        return cls(path, arms, config if isinstance(config, dict) else {})

    @classmethod
    def of(cls, run: "SavedRun | str | Path") -> "SavedRun":
        """Return a run unchanged; open it if a folder is given."""
        return run if isinstance(run, SavedRun) else cls.open(run)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def setting(self, stage: str, name: str) -> Any:
        """Return a value of config.yaml as it was used (`resolved` before `config`); None where it was not saved."""
        for part in (self.config.get("resolved"), (self.config.get("config") or {}).get(stage)):
            if isinstance(part, Mapping) and part.get(name) is not None:
                return part[name]
        return None

    @property
    def baseline(self) -> Arm | None:
        return next((arm for arm in self.arms if arm.role == "baseline"), None)

    @property
    def highlighted(self) -> tuple[Arm, ...]:
        """The arms a figure draws in colour: the baseline and the named ones, one seed of each; else the first few."""
        groups = {arm.group: arm for arm in reversed(self.arms)}
        firsts = tuple(arm for arm in self.trained if groups[arm.group] is arm)
        chosen = tuple(arm for arm in firsts if arm.role in ("baseline", "named"))
        return (chosen if len(chosen) > 1 else firsts)[:MAX_HIGHLIGHTED]

    @property
    def trained(self) -> tuple[Arm, ...]:
        """Every arm but the controls, whose costs would stretch the axes of figures."""
        return tuple(arm for arm in self.arms if arm.trained)

    @property
    def background(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.trained if arm not in self.highlighted)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @cached_property
    def log(self) -> dict[str, dict[str, np.ndarray]]:
        path = RunDir(self.path).log
        return read_log(path) if path.is_file() else {}

    @cached_property
    def timings(self) -> dict[str, float]:
        run = RunDir(self.path)
        if run.timings.is_file():
            check_one(self.path, run.timings)
        return run.read_timings()

    @cached_property
    def matched(self) -> dict[str, Any] | None:
        """The matched comparison; None where none was saved."""
        path = RunDir(self.path).matched
        if not path.is_file():
            return None
        check_one(self.path, path)
        return read_json(path)

    def arrays(self, arm: str) -> dict[str, np.ndarray]:
        """Read the arrays saved for an arm (`position_matrix` (L, L), ...); empty where none were saved."""
        return self._stored(RunDir(self.path).arrays / f"{arm}.npz")

    def redundancy_map(self, arm: str) -> dict[str, np.ndarray]:
        """Read the clustered map of lagged correlations (`latents`, `lags`, `c`, `excess`); empty without one."""
        return self._stored(RunDir(self.path).redundancy / f"{arm}.npz")

    def redundant_pairs(self, arm: str, most: int) -> dict[str, list[dict[str, Any]]]:
        """Read the strongest pairs of latents of each class, at most `most`; empty where no table was saved."""
        path = RunDir(self.path).redundancy / f"{arm}.parquet"
        if not path.is_file():
            return {}
        try:
            table = read_table(path)
            classes = table["class"].to_numpy(zero_copy_only=False)
            return {
                name: table.take(np.flatnonzero(classes == name)[:most]).to_pylist() for name in dict.fromkeys(classes)
            }
        except (ValueError, OSError, KeyError) as error:
            raise LegatoError(f"{path} is damaged: {error}") from error

    @staticmethod
    def _stored(path: Path) -> dict[str, np.ndarray]:
        if not path.is_file():
            return {}
        arrays = read_arrays(path)
        if strange := [name for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
            raise LegatoError(f"{path} is damaged: {strange[0]} holds no numbers")
        return arrays

    def latent_column(self, arm: str, column: str) -> np.ndarray | None:
        """Read a column of an arm's feature table as float64; None where the table or the column is absent."""
        path = RunDir(self.path).features / f"{arm}.parquet"
        if not path.is_file():
            return None
        table = read_table(path, [column])
        try:
            return table[column].to_numpy().astype(np.float64) if column in table.column_names else None
        except ValueError as error:
            raise LegatoError(f"{path} is damaged: {column} holds no numbers") from error


def arms_of(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[Arm, ...]:
    """Read the arms of a metrics.json in its order, each from its `training.recipe`.

    In older runs without role, method and group these follow from the recipes, see `older_identities`.
    """
    recipes = {
        name: {key: value for key, value in (_at(of_arm, "training.recipe") or {}).items() if value is not None}
        for name, of_arm in metrics.items()
    }
    if any("group" not in recipe for recipe in recipes.values()):
        recipes = {name: {**known, **recipes[name]} for name, known in older_identities(metrics).items()}
    return tuple(_arm_of(name, recipes[name], arm_metrics) for name, arm_metrics in metrics.items())


def _arm_of(name: str, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> Arm:
    return Arm(
        name=name,
        role=recipe["role"],
        metrics=metrics,
        method=recipe["method"],
        group=recipe["group"],
        in_grid=bool(recipe.get("in_grid", recipe["role"] == "grid")),
        term=recipe.get("term"),
        window=int(recipe["window"]) if "window" in recipe else None,
        coefficient=float(recipe["coefficient"]) if "coefficient" in recipe else None,
        k=float(recipe["k"]) if "k" in recipe else None,
        seed=int(recipe["seed"]) if "seed" in recipe else None,
    )


def read_log(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read log.jsonl as columns per arm, rows in order of writing, absent values nan; skip a broken last line."""
    rows: dict[str, list[dict[str, float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise LegatoError(f"{path} cannot be read: {error.strerror}") from error
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("arm"), str):
            numbers = {key: float(value) for key, value in leaves(record) if is_number(value)}
            rows.setdefault(record["arm"], []).append(numbers)
    columns = {}
    for arm, records in rows.items():
        names = dict.fromkeys(name for record in records for name in record)
        columns[arm] = {name: np.array([record.get(name, math.nan) for record in records]) for name in names}
    return columns


def _at(tree: Any, key: str) -> Any:
    """Follow a dotted key down nested mappings; None where it leads nowhere."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1023  # a larger one is no float
    return isinstance(value, float) and math.isfinite(value)


def seed_groups(run: SavedRun) -> dict[str, list[Arm]]:
    """Group arms by recipe, the seeds of each in the order they were saved."""
    groups: dict[str, list[Arm]] = {}
    for arm in run.arms:
        groups.setdefault(arm.group, []).append(arm)
    return groups


def mean(arms: Sequence[Arm], key: str) -> float | None:
    """Average what the arms saved under a dotted key; None where none did."""
    values = [value for arm in arms if (value := arm.value(key)) is not None]
    return float(np.mean(values)) if values else None


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Compute the standard error of the mean, sd with n - 1 over sqrt(n), of at least two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def joined(names: Sequence[str]) -> str:
    """Join names to `a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
