"""The matched comparison: how consistent each method is at the baseline's L0, and at the baseline's FVU.

An SAE that spends more latents per token, or reconstructs worse, can buy consistency with that. So each method is read
where its L0 (its FVU) equals the baseline's: as it is where the budget makes them equal, else by interpolation along
its own sweep over k, else along the baseline's. Outside of the sweeps nothing is said. Seeds are matched one by one,
method against the baseline of the same seed, and averaged afterwards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from legato.cache import write_atomically
from legato.comparison_points import ALL, BINS, COSTS, MEASURES, Point, Sweep, along, bin_key, groups_of, point_of
from legato.comparison_statistics import absent, between, estimate
from legato.errors import UsageError
from legato.results import Arm, SavedRun
from legato.run_dir import RunDir, changes

EQUAL = 0.02  # L0 (FVU) this close, relative to the baseline's, counts as equal
MIN_LATENTS_IN_BIN = 20  # fewer, on either side, say nothing about a bin

# What the best method is meant to reach at the baseline's L0 (definitions: "Comparing methods").
KAPPA_RATIO, AC_RATIO = 4.0, 3.0
MOST_FVU, LEAST_CE = 0.02, -0.02  # relative to the baseline's
ABSENT_WHEN_SHUFFLED = 0.75

_AXES = {"at_l0": "l0", "at_fvu": "fvu"}
HOW = {
    "equal": f"equal by construction, within {EQUAL:.0%}",
    "method": "along the method's sweep",
    "baseline": "along the baseline's sweep",
}


@dataclass(frozen=True)
class Method:
    """A recipe with its seeds; groups: the parts of the dictionary that are compared on their own."""

    name: str
    role: str
    groups: tuple[str, ...]
    sweeps: dict[int, Sweep] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A method and the baseline where they are compared, for one seed."""

    method: Point
    baseline: Point


def compare_runs(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """The matched comparison of all methods in one or several runs, as it is saved in matched.json.

    Members of a window x coefficient ablation take no part. Raises UsageError where the runs were not made in the same
    way, or hold no baseline.
    """
    methods = methods_of(runs)
    baseline = next((method for method in methods.values() if method.role == "baseline"), None)
    if baseline is None:
        raise UsageError(f"{' and '.join(run.name for run in runs)}: no baseline to compare with")
    return {
        "runs": [run.name for run in runs],
        "equal_within": EQUAL,
        "left_out": ["CE loss score: the runs measured it on different contexts"] if _unequal_ce(runs) else [],
        "baseline": _as_trained(baseline),
        "methods": {
            name: {"role": method.role, **_as_trained(method), **_compared(method, baseline)}
            for name, method in methods.items()
            if method is not baseline
        },
    }


def write_matched(run_dir: str | Path) -> Path | None:
    """Write matched.json in a run folder; None, and no file, where there is no baseline or nothing to compare with."""
    run = SavedRun.open(run_dir)
    if run.baseline is None or all(arm.method == run.baseline.method for arm in run.arms):
        return None
    path = RunDir(run_dir).matched
    write_json(path, compare_runs([run]))
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def methods_of(runs: Sequence[SavedRun]) -> dict[str, Method]:
    """The methods of all runs by name. An SAE that several runs hold counts once; one name for different recipes is
    told apart by the run."""
    for run in runs[1:]:
        if difference := changes(_settings(run), _settings(runs[0])):
            raise UsageError(f"{run.name} differs from {runs[0].name} ({difference}): compare them one at a time")
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
                points[place] = point_of(run, arm, without=("ce_loss_score",) if _unequal_ce(runs) else ())
    return {
        name: Method(name, arm.role, groups, _sweeps(seeds))
        for name, (arm, groups, seeds) in found.items()
        if _sweeps(seeds)
    }


def _sweeps(seeds: Mapping[int, Mapping[tuple[str, float | None], Point]]) -> dict[int, Sweep]:
    sweeps = {}
    for seed, points in sorted(seeds.items()):
        mains = [point for (place, _), point in points.items() if place == "main"]
        if mains:
            sweeps[seed] = Sweep(mains[0], tuple(point for (place, _), point in points.items() if place == "sweep"))
    return sweeps


def _settings(run: SavedRun) -> dict[str, Any]:
    """What two runs must share so that their numbers may stand in one table."""
    config = run.config.get("config") or {}
    stages = {stage: dict(config.get(stage) or {}) for stage in ("model", "data", "training", "evaluation")}
    stages["training"].pop("seeds", None)
    for name in ("controls", "ce_rows"):
        stages["evaluation"].pop(name, None)
    return stages


def _unequal_ce(runs: Sequence[SavedRun]) -> bool:
    """Whether the runs measured the language model's loss on different contexts, so that it does not compare."""
    return len({run.setting("evaluation", "ce_rows") for run in runs}) > 1


def _fingerprint(arm: Arm) -> Any:
    """An arm's recipe apart from its budget and its seed."""
    training = arm.metrics.get("training") or {}
    recipe = {key: value for key, value in (training.get("recipe") or {}).items() if key not in ("k", "seed", "role")}
    recipe["sparsity"] = {key: value for key, value in (recipe.get("sparsity") or {}).items() if key != "k"}
    post_hoc = {key: value for key, value in (training.get("post_hoc") or {}).items() if key != "of"}
    return recipe, post_hoc


def _as_trained(method: Method) -> dict[str, Any]:
    """Every number at the run's own budget, mean and standard error over seeds."""
    points = [sweep.main for sweep in method.sweeps.values()]
    keys = [key for key in points[0].values if key in COSTS or key.startswith((f"{ALL}/", "shuffled/"))]
    at_all = [key for key in keys if all(key in point.values for point in points) and key.count("/") < 2]
    return {
        "seeds": list(method.sweeps),
        "swept": max(len(sweep.others) for sweep in method.sweeps.values()),
        "as_trained": {key.removeprefix(f"{ALL}/"): estimate(points, key) for key in at_all},
    }


def _compared(method: Method, baseline: Method) -> dict[str, Any]:
    compared: dict[str, Any] = {place: _at(method, baseline, axis) for place, axis in _AXES.items()}
    compared["verdict"] = _verdict(compared["at_l0"]) if compared["at_l0"]["matched"] else None
    return compared


def _at(method: Method, baseline: Method, axis: str) -> dict[str, Any]:
    how, matches, reasons = matched_seeds(method, baseline, axis)
    if not matches:
        return {"matched": False, "reasons": reasons}
    return {
        "matched": True,
        "along": how,
        "seeds": list(matches),
        "reasons": reasons,
        **{cost: found for cost in COSTS if (found := _entry(matches, cost)) is not None},
        "populations": {name: _population(matches, name) for name in (ALL, *method.groups)},
        "shuffled": {
            measure: found
            for measure in MEASURES
            if (found := absent(*_sides(matches), f"{ALL}/{measure}", f"shuffled/{measure}")) is not None
        },
    }


def matched_seeds(method: Method, baseline: Method, axis: str) -> tuple[str, dict[int, Match], dict[str, str]]:
    """(how, matches by seed, reason by seed that is not matched): the first way that matches most seeds.

    L0 is set by the budget, so SAEs of equal L0 are compared as they are. FVU is an outcome: it is interpolated first.
    """
    shared = [seed for seed in method.sweeps if seed in baseline.sweeps]
    reasons = {str(seed): "the baseline has no such seed" for seed in method.sweeps if seed not in shared}
    ways = ("equal", "method", "baseline") if axis == "l0" else ("method", "baseline", "equal")
    tried = {
        way: {
            seed: found for seed in shared if (found := _match(method.sweeps[seed], baseline.sweeps[seed], axis, way))
        }
        for way in ways
    }
    how = max(ways, key=lambda way: len(tried[way]))
    for seed in shared:
        if seed not in tried[how]:
            reasons[str(seed)] = _why_not(method.sweeps[seed], baseline.sweeps[seed], axis)
    return how, tried[how], reasons


def _match(method: Sweep, baseline: Sweep, axis: str, way: str) -> Match | None:
    ours, theirs = method.main.values.get(axis), baseline.main.values.get(axis)
    if ours is None or theirs is None:
        return None
    if way == "equal":
        return Match(method.main, baseline.main) if abs(ours / theirs - 1) <= EQUAL else None
    if way == "method":
        found = along((method.main, *method.others), axis, theirs)
        return None if found is None else Match(found, baseline.main)
    found = along((baseline.main, *baseline.others), axis, ours)
    return None if found is None else Match(method.main, found)


def _why_not(method: Sweep, baseline: Sweep, axis: str) -> str:
    ours, theirs = method.main.values.get(axis), baseline.main.values.get(axis)
    if ours is None or theirs is None:
        return f"{axis} was not saved"
    digits = 1 if axis == "l0" else 3
    what = f"{'L0' if axis == 'l0' else 'FVU'} {ours:.{digits}f} against {theirs:.{digits}f}"
    if not method.others and not baseline.others:
        return f"{what}, and neither was swept over k"
    return f"{what}, which no sweep reaches; nothing is extrapolated"


def _entry(matches: Mapping[int, Match], key: str, baseline_key: str | None = None) -> dict[str, Any] | None:
    """A number of the method beside the baseline's, with their ratio; None where it was not saved for every seed."""
    return between(*_sides(matches), key, baseline_key or key)


def _sides(matches: Mapping[int, Match]) -> tuple[list[Point], list[Point]]:
    return [match.method for match in matches.values()], [match.baseline for match in matches.values()]


def _population(matches: Mapping[int, Match], name: str) -> dict[str, Any]:
    """Measures over a part of the method's latents, against all of the baseline's; overall and by firing-rate bin."""

    def of(prefix: str, baseline_prefix: str) -> dict[str, Any]:
        found = {key: _entry(matches, f"{prefix}/{key}", f"{baseline_prefix}/{key}") for key in (*MEASURES, "latents")}
        return {key: entry for key, entry in found.items() if entry is not None}

    rows = [{"bin": list(edges), **of(f"{name}/{bin_key(edges)}", f"{ALL}/{bin_key(edges)}")} for edges in BINS]
    return {**of(name, ALL), "by_rate_bin": [row for row in rows if MEASURES[0] in row]}


def _verdict(at_l0: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Criterion by criterion, whether the method reaches what the best is meant to reach at the baseline's L0."""
    everything = at_l0["populations"][ALL]

    def ratio(entry: Mapping[str, Any] | None) -> float | None:
        return None if entry is None else entry["ratio"]

    def above(name: str, value: float | None, target: float, low: float | None = None) -> dict[str, Any]:
        met = None if value is None else value >= target
        certain = None if low is None else low >= target
        return {"criterion": name, "target": target, "value": value, "met": met, "beyond_intervals": certain}

    verdict = []
    for name, measure, target in (
        ("kappa ratio", "kappa1_excess_within", KAPPA_RATIO),
        ("AC ratio", "ac1_excess_within", AC_RATIO),
    ):
        entry = everything.get(measure)
        interval = widest(entry)
        verdict.append(above(name, ratio(entry), target, None if interval is None else interval[0]))
    fvu, ce, alive = (ratio(at_l0.get(cost)) for cost in ("fvu", "ce_loss_score", "frac_alive"))
    met = None if fvu is None else fvu - 1 <= MOST_FVU
    verdict.append({"criterion": "FVU", "target": MOST_FVU, "value": None if fvu is None else fvu - 1, "met": met})
    verdict.append(above("CE score", None if ce is None else ce - 1, LEAST_CE))
    verdict.append(above("alive latents", None if alive is None else alive - 1, 0.0))
    ahead, bins = bins_ahead(everything)
    verdict.append(above("bins ahead", ahead / bins if bins else None, 1.0))
    shares = [at_l0["shuffled"].get(measure, {}).get("absent") for measure in MEASURES[:2]]
    least = None if None in shares else min(shares)
    verdict.append(above("absent when shuffled", least, ABSENT_WHEN_SHUFFLED))
    return verdict


def bins_ahead(population: Mapping[str, Any]) -> tuple[int, int]:
    """(firing-rate bins where both kappa and AC excess exceed the baseline's, bins with enough latents on both
    sides)."""
    rows = [
        row
        for row in population["by_rate_bin"]
        if "latents" in row and min(row["latents"]["value"], row["latents"]["baseline"]) >= MIN_LATENTS_IN_BIN
    ]
    ahead = [all(row[m]["value"] > row[m]["baseline"] for m in MEASURES[:2] if m in row) for row in rows]
    return sum(ahead), len(rows)


def widest(entry: Mapping[str, Any] | None) -> list[float] | None:
    """The ratio's interval that covers both, over documents and over seeds; None where there is neither."""
    if entry is None:
        return None
    ends = [interval for key in ("interval95_documents", "interval95_seeds") if (interval := entry[key]) is not None]
    return [min(low for low, _ in ends), max(high for _, high in ends)] if ends else None
