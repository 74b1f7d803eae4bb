"""Matched comparison: consistency of each method at the baseline's L0, and at the baseline's FVU.

An SAE can gain consistency by more latents per token, or by a worse reconstruction. So each method is read where its L0
(its FVU) equals the baseline's: unchanged where the budget makes them equal, else by interpolation along its own sweep
over k, else along the baseline's. There is no extrapolation. Seeds are matched one by one, method against the baseline
of the same seed, and averaged afterwards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from legato.common.errors import UsageError
from legato.evaluation.consistency.groups import bin_key
from legato.results.matched.points import (
    ALL,
    BINS,
    COSTS,
    MEASURES,
    Method,
    Point,
    Sweep,
    along,
    methods_of,
    unequal_ce,
)
from legato.results.matched.statistics import absent, between, estimate
from legato.results.run_dir import RunDir, write_json
from legato.results.saved_run import SavedRun
from legato.results.tolerances import SAME

MIN_LATENTS_IN_BIN = 20  # fewer, on either side, say nothing about a bin

# Targets of the best method at the baseline's L0 (definitions: "Comparing methods").
KAPPA_RATIO, AC_RATIO = 4.0, 3.0
ABSENT_SHARE = 0.75

_AXES = {"at_l0": "l0", "at_fvu": "fvu"}
HOW = {
    "equal": f"equal by construction, within {SAME:.0%}",
    "method": "along the method's sweep",
    "baseline": "along the baseline's sweep",
}


Match = tuple[Point, Point]  # a method and the baseline at the place where they are compared, for one seed


def match_methods(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Compare all methods in one or several runs, as saved in matched.json.

    Members of a window x coefficient ablation are left out. Raises UsageError where the runs were not made in the same
    way, or hold no baseline.
    """
    methods = methods_of(runs)
    baseline = next((method for method in methods.values() if method.role == "baseline"), None)
    if baseline is None:
        raise UsageError(f"{' and '.join(run.name for run in runs)}: no baseline to compare with")
    compared = {}
    for name, method in methods.items():
        if method is not baseline:
            found = {place: _at(method, baseline, axis) for place, axis in _AXES.items()}
            verdict = targets_met(found["at_l0"]) if found["at_l0"]["matched"] else None
            compared[name] = {"role": method.role, **_as_trained(method), **found, "verdict": verdict}
    return {
        "runs": [run.name for run in runs],
        "equal_within": SAME,
        "left_out": ["CE loss score: the runs measured it on different contexts"] if unequal_ce(runs) else [],
        "baseline": _as_trained(baseline),
        "methods": compared,
    }


def write_matched(run: SavedRun | str | Path) -> Path | None:
    """Write matched.json in a run folder; None, and no file, where there is no baseline or nothing to compare with."""
    run = SavedRun.of(run)
    if run.baseline is None or all(arm.method == run.baseline.method for arm in run.arms):
        return None
    path = RunDir(run.path).matched
    write_json(path, match_methods([run]))
    return path


def _as_trained(method: Method) -> dict[str, Any]:
    """Give every number at the run's own budget, mean and standard error over seeds."""
    points = [sweep.main for sweep in method.sweeps.values()]
    keys = [key for key in points[0].values if key in COSTS or key.startswith((f"{ALL}/", "shuffled/"))]
    at_all = [key for key in keys if all(key in point.values for point in points) and key.count("/") < 2]
    return {
        "seeds": list(method.sweeps),
        "swept": max(len(sweep.others) for sweep in method.sweeps.values()),
        "as_trained": {key.removeprefix(f"{ALL}/"): estimate(points, key) for key in at_all},
    }


def _at(method: Method, baseline: Method, axis: str) -> dict[str, Any]:
    how, matches, reasons = matched_seeds(method, baseline, axis)
    if not matches:
        return {"matched": False, "reasons": reasons}
    return {
        "matched": True,
        "along": how,
        "seeds": list(matches),
        "reasons": reasons,
        **{cost: found for cost in COSTS if (found := between(*_sides(matches), cost, cost)) is not None},
        "populations": {name: _population(matches, name) for name in (ALL, *method.groups)},
        "shuffled": {
            measure: found
            for measure in MEASURES
            if (found := absent(*_sides(matches), f"{ALL}/{measure}", f"shuffled/{measure}")) is not None
        },
    }


def matched_seeds(method: Method, baseline: Method, axis: str) -> tuple[str, dict[int, Match], dict[str, str]]:
    """Return (way, matches by seed, reason by seed that is not matched) of the first way that matches most seeds.

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
        return (method.main, baseline.main) if abs(ours / theirs - 1) <= SAME else None
    if way == "method":
        found = along((method.main, *method.others), axis, theirs)
        return None if found is None else (found, baseline.main)
    found = along((baseline.main, *baseline.others), axis, ours)
    return None if found is None else (method.main, found)


def _why_not(method: Sweep, baseline: Sweep, axis: str) -> str:
    ours, theirs = method.main.values.get(axis), baseline.main.values.get(axis)
    if ours is None or theirs is None:
        return f"{axis} was not saved"
    digits = 1 if axis == "l0" else 3
    what = f"{'L0' if axis == 'l0' else 'FVU'} {ours:.{digits}f} against {theirs:.{digits}f}"
    if not method.others and not baseline.others:
        return f"{what}, and neither was swept over k"
    return f"{what}, which no sweep reaches; nothing is extrapolated"


def _sides(matches: Mapping[int, Match]) -> tuple[list[Point], list[Point]]:
    return [method for method, _ in matches.values()], [baseline for _, baseline in matches.values()]


def _population(matches: Mapping[int, Match], name: str) -> dict[str, Any]:
    """Compare a part of the method's latents with all of the baseline's; overall and by firing-rate bin."""

    def of(place: str = "") -> dict[str, Any]:
        keys = {key: f"{place}/{key}" for key in (*MEASURES, "latents")}
        found = {key: between(*_sides(matches), name + end, ALL + end) for key, end in keys.items()}
        return {key: entry for key, entry in found.items() if entry is not None}

    rows = [{"bin": list(edges), **of(f"/{bin_key(edges)}")} for edges in BINS]
    return {**of(), "by_rate_bin": [row for row in rows if MEASURES[0] in row]}


def targets_met(at_l0: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tell for each target whether the method reaches it at the baseline's L0.

    value: a ratio to the baseline, a share, or for costs the change relative to the baseline. met: None where it was
    not measured. beyond_intervals: whether the lower end of the ratio's interval reaches the target too.
    """
    everything, shuffled = at_l0["populations"][ALL], at_l0["shuffled"]
    ahead, bins = bins_ahead(everything)
    shares = [found["absent"] for m in MEASURES[:2] if (found := shuffled.get(m)) and found["absent"] is not None]
    verdict = [
        _criterion("kappa", f">= {KAPPA_RATIO:g}x", _ratio(everything.get(MEASURES[0])), KAPPA_RATIO),
        _criterion("AC", f">= {AC_RATIO:g}x", _ratio(everything.get(MEASURES[1])), AC_RATIO),
        _criterion("FVU", f"<= {SAME:+.0%}", _ratio(at_l0.get("fvu"), less=1), SAME, below=True),
        _criterion("CE", f">= {-SAME:+.0%}", _ratio(at_l0.get("ce_loss_score"), less=1), -SAME),
        _criterion("alive", ">= 0%", _ratio(at_l0.get("frac_alive"), less=1), 0.0),
        _criterion("bins", "all", ahead / bins if bins else None, 1.0),
        _criterion("absent", f">= {ABSENT_SHARE:.0%}", min(shares) if len(shares) == 2 else None, ABSENT_SHARE),
    ]
    for row, measure in zip(verdict, MEASURES[:2], strict=False):
        interval = widest(everything.get(measure))
        row["beyond_intervals"] = None if interval is None else interval[0] >= row["target"]
    return verdict


def _criterion(name: str, bound: str, value: float | None, target: float, below: bool = False) -> dict[str, Any]:
    met = None if value is None else bool(value <= target if below else value >= target)
    row = {"criterion": name, "bound": bound, "target": target, "value": value, "met": met}
    return {**row, "beyond_intervals": None}


def _ratio(entry: Mapping[str, Any] | None, less: float = 0.0) -> float | None:
    return None if entry is None or entry["ratio"] is None else entry["ratio"] - less


def bins_ahead(population: Mapping[str, Any]) -> tuple[int, int]:
    """Count (firing-rate bins where both kappa and AC excess exceed the baseline's, bins with enough latents on both
    sides)."""
    rows = [
        row
        for row in population["by_rate_bin"]
        if "latents" in row and min(row["latents"]["value"], row["latents"]["baseline"]) >= MIN_LATENTS_IN_BIN
    ]
    ahead = [all(row[m]["value"] > row[m]["baseline"] for m in MEASURES[:2] if m in row) for row in rows]
    return sum(ahead), len(rows)


def widest(entry: Mapping[str, Any] | None) -> list[float] | None:
    """Return the interval that covers the ratio's intervals over documents and over seeds; None without any."""
    if entry is None:
        return None
    ends = [interval for key in ("interval95_documents", "interval95_seeds") if (interval := entry[key]) is not None]
    return [min(low for low, _ in ends), max(high for _, high in ends)] if ends else None
