"""Points of a matched comparison, read from saved SAEs, and interpolation along a sweep.

Shape legend: F latents, R bootstrap replicates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from legato.common.errors import UsageError
from legato.evaluation.consistency.groups import bin_key, dictionary_parts
from legato.evaluation.consistency.persistence import RATE_BINS, rate_bins
from legato.evaluation.sums.accumulators import DENSE_RATE
from legato.evaluation.sums.lag_pairs import Floats
from legato.results.run_dir import changes
from legato.results.saved_run import Arm, SavedRun

MEASURES = ("kappa1_excess_within", "ac1_excess_within", "kappa1_excess_cross", "ac1_excess_cross")
COSTS = ("l0", "fvu", "ce_loss_score", "frac_alive")
ALL = "all latents"
BINS = (*RATE_BINS, (DENSE_RATE, 1.0))


@dataclass(frozen=True)
class Point:
    """The numbers of one SAE, or of a place between two SAEs of a sweep.

    values: by COSTS; `shuffled/<measure>` on position-shuffled activations; `<population>/<measure>` and
        `<population>/<low>-<high>/<measure>` (and `/latents`) for all latents and for each group, by firing-rate bin.
    replicates: [R] by `<population>/<measure>` and `<population>/<low>-<high>/<measure>`; paired between SAEs judged on
        the same rows.
    """

    values: Mapping[str, float]
    replicates: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """One seed of a method: the SAE at the run's own budget, and those at other budgets."""

    main: Point
    others: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Method:
    """A recipe with its seeds; groups: the parts of the dictionary that are compared on their own."""

    name: str
    role: str
    groups: tuple[str, ...]
    sweeps: dict[int, Sweep] = field(default_factory=dict)


def methods_of(runs: Sequence[SavedRun]) -> dict[str, Method]:
    """Collect the methods of all runs by name. An SAE that several runs hold counts once; where one name stands for
    different recipes, the run is added to it."""
    if apart := what_sets_apart(runs):
        raise UsageError(f"{apart}: compare them one at a time")
    recipes: dict[str, Any] = {}
    found: dict[str, tuple[Arm, tuple[str, ...], dict[int, dict[tuple[str, float | None], Point]]]] = {}
    for run in runs:
        for arm in run.arms:
            if arm.role == "grid":
                continue
            fingerprint, name = _fingerprint(arm), arm.method
            if recipes.setdefault(name, fingerprint) != fingerprint:
                name = f"{arm.method} ({run.name})"
            _, _, seeds = found.setdefault(name, (arm, tuple(groups_of(arm)), {}))
            place = ("sweep" if arm.role == "sweep" else "main", arm.k)
            points = seeds.setdefault(arm.seed or 0, {})
            if place not in points:
                points[place] = point_of(run, arm, without=("ce_loss_score",) if unequal_ce(runs) else ())
    return {
        name: Method(name, arm.role, groups, _sweeps(seeds))
        for name, (arm, groups, seeds) in found.items()
        if _sweeps(seeds)
    }


def what_sets_apart(runs: Sequence[SavedRun]) -> str:
    """Say why the runs' numbers may not stand in one table; empty where they may."""
    judged = any(run.setting("judged", "saes") for run in runs)

    def settings(run: SavedRun) -> dict[str, Any]:
        if judged:  # SAEs from anywhere: the same place, and as many tokens of one text
            keys = ("model", "layer", "site", "dtype", "dataset", "context_length", "bos", "held_out_tokens")
            return {key: (run.config.get("resolved") or {}).get(key) for key in keys}
        config, free = run.config.get("config") or {}, {"training": ("seeds",), "evaluation": ("controls", "ce_rows")}
        return {
            stage: {key: value for key, value in (config.get(stage) or {}).items() if key not in free.get(stage, ())}
            for stage in ("model", "data", "training", "evaluation")
        }

    for run in runs[1:]:
        if difference := changes(settings(run), settings(runs[0])):
            return f"{run.name} differs from {runs[0].name} ({difference})"
    return ""


def _sweeps(seeds: Mapping[int, Mapping[tuple[str, float | None], Point]]) -> dict[int, Sweep]:
    sweeps = {}
    for seed, points in sorted(seeds.items()):
        mains = [point for (place, _), point in points.items() if place == "main"]
        if mains:
            sweeps[seed] = Sweep(mains[0], tuple(point for (place, _), point in points.items() if place == "sweep"))
    return sweeps


def unequal_ce(runs: Sequence[SavedRun]) -> bool:
    """Tell whether the runs measured the model's loss on different contexts, so that it does not compare."""
    return len({run.setting("evaluation", "ce_rows") for run in runs}) > 1


def _fingerprint(arm: Arm) -> Any:
    """Return an arm's recipe without budget and seed; an absent value equals one that is off."""
    training = arm.metrics.get("training") or {}
    ignored = ("k", "seed", "role", "method", "group", "in_grid")
    recipe = {key: value for key, value in (training.get("recipe") or {}).items() if value and key not in ignored}
    recipe["sparsity"] = {key: value for key, value in (recipe.get("sparsity") or {}).items() if key != "k"}
    post_hoc = {key: value for key, value in (training.get("post_hoc") or {}).items() if key != "of"}
    return recipe, post_hoc


def point_of(run: SavedRun, arm: Arm, *, without: Sequence[str] = ()) -> Point:
    """Read an arm's numbers for the comparison, without the costs `without`; unsaved numbers are absent."""
    keys = {cost: f"core.{cost}" for cost in COSTS if cost not in without}
    keys |= {f"{ALL}/{measure}": f"consistency.{measure}" for measure in MEASURES}
    keys |= {f"shuffled/{measure}": f"consistency.position_shuffled.{measure}" for measure in MEASURES}
    keys[f"{ALL}/latents"] = "consistency.latents"
    values = {name: value for name, key in keys.items() if (value := arm.value(key)) is not None}
    for row in (arm.metrics.get("consistency") or {}).get("by_rate_bin") or ():
        prefix = f"{ALL}/{bin_key(row['bin'])}"
        values |= {f"{prefix}/{name}": row[name] for name in (*MEASURES, "latents") if row.get(name) is not None}
    for name, latents in groups_of(arm).items():
        values |= _group_values(run, arm, name, latents)
    return Point(values, _replicates(run.arrays(arm.name)))


def _replicates(arrays: Mapping[str, Floats]) -> dict[str, Floats]:
    """Rename `bootstrap_<measure>`, `bootstrap_<bin>/<measure>` and `bootstrap_<group>/...` to
    `<population>/<measure>`."""
    replicates = {}
    for key, values_R in arrays.items():
        kind, _, name = key.partition("_")
        if kind == "bootstrap":
            population, _, _ = name.rpartition("/")
            of_all = population in ("", *map(bin_key, BINS))
            replicates[f"{ALL}/{name}" if of_all else name] = values_R
    return replicates


def groups_of(arm: Arm) -> dict[str, slice]:
    """Return the parts of the dictionary that the arm's objective treats differently; empty for an ordinary SAE."""
    return dictionary_parts((arm.metrics.get("training") or {}).get("recipe") or {})


def _group_values(run: SavedRun, arm: Arm, name: str, latents: slice) -> dict[str, float]:
    rate_F = run.latent_column(arm.name, "density")
    if rate_F is None:
        return {}
    rate_F = rate_F[latents]
    chosen = {name: rate_F > 0}
    chosen |= {f"{name}/{bin_key(edges)}": in_bin_F for edges, in_bin_F in rate_bins(rate_F)}
    values = {f"{prefix}/latents": float(in_F.sum()) for prefix, in_F in chosen.items()}
    for measure in MEASURES:
        column_F = run.latent_column(arm.name, measure)
        if column_F is None:
            continue
        column_F = column_F[latents]
        for prefix, in_F in chosen.items():
            use_F = in_F & np.isfinite(column_F)
            if use_F.any():
                values[f"{prefix}/{measure}"] = float(column_F[use_F].mean())
    return values


def along(points: Iterable[Point], axis: str, target: float) -> Point | None:
    """Find the place on a sweep where `axis` has the value `target`: piecewise linear in it between neighbours.

    None where the target lies outside of the sweep: nothing is extrapolated.
    """
    ordered = sorted((point for point in points if axis in point.values), key=lambda point: point.values[axis])
    for low, high in pairwise(ordered):
        start, end = low.values[axis], high.values[axis]
        if start <= target <= end:
            return mixed(low, high, (target - start) / (end - start) if end > start else 0.0)
    return None


def mixed(low: Point, high: Point, share: float) -> Point:
    """Compute (1 - share) * low + share * high of all that both have."""
    values = {
        key: (1 - share) * value + share * high.values[key] for key, value in low.values.items() if key in high.values
    }
    replicates = {
        key: (1 - share) * values_R + share * high.replicates[key]
        for key, values_R in low.replicates.items()
        if key in high.replicates and high.replicates[key].shape == values_R.shape
    }
    return Point(values, replicates)
