"""Where the arms of a run lie between a cost and a gain, and which of them would stretch the view."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from legato.results.saved_run import SavedRun

Points = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    """Arms by name with their place. inside: what the view shows; outside: what it would be stretched by."""

    inside: Points
    outside: Points
    limits: tuple[tuple[float, float], tuple[float, float]]  # of x, of y

    def at_edge(self, name: str) -> tuple[float, float, str]:
        """Where an arm outside meets the edge of the view, and the side it lies on: left, right, below or above."""
        (x, y), (xs, ys) = self.outside[name], self.limits
        side = "right" if x > xs[1] else "left" if x < xs[0] else "above" if y > ys[1] else "below"
        return float(np.clip(x, *xs)), float(np.clip(y, *ys)), side


def scene(run: SavedRun, x_key: str, y_key: str, *, farthest: Mapping[str, float]) -> Scene:
    """The arms that have both values. farthest: by axis ("x", "y"), how many times the baseline's cost is still shown.

    Members of a sweep are always inside: their cost is meant to differ. A view is at least a tenth of its values wide:
    a difference of a percent must look small.
    """
    points: Points = {
        arm.name: (x, y)
        for arm in run.arms
        if (x := arm.value(x_key)) is not None and (y := arm.value(y_key)) is not None
    }
    trained = {name: point for name, point in points.items() if run.arm(name).trained}
    if not trained:
        return Scene({}, points, ((0.0, 1.0), (0.0, 1.0)))
    base = run.baseline
    centre = trained[base.name] if base and base.name in trained else np.median(list(trained.values()), axis=0)
    bounds = {i: farthest[axis] for i, axis in enumerate(("x", "y")) if axis in farthest}

    def near(name: str, point: tuple[float, float]) -> bool:
        return run.arm(name).role == "sweep" or all(
            centre[i] / factor <= point[i] <= factor * centre[i] for i, factor in bounds.items()
        )

    inside = {name: point for name, point in points.items() if near(name, point)}
    corners = np.array(list(inside.values()) or [tuple(centre)])
    low, high = corners.min(0), corners.max(0)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2 * 1.16, 0.05 * np.abs(corners.mean(0)) + 1e-9)
    limits = [(float(m - h), float(m + h)) for m, h in zip(middle, half, strict=True)]
    outside = {name: point for name, point in points.items() if name not in inside}
    return Scene(inside, outside, (limits[0], limits[1]))


def fidelity_scene(run: SavedRun) -> Scene:
    """FVU over L0."""
    return scene(run, "core.l0", "core.fvu", farthest={"x": 1.6, "y": 1.35})


def cost_scene(run: SavedRun) -> Scene:
    """Kappa excess over FVU."""
    return scene(run, "core.fvu", "consistency.kappa1_excess_within", farthest={"x": 1.35})


def outside_in_words(run: SavedRun, found: Scene, names: tuple[str, str], digits: tuple[int, int]) -> str:
    """The arms outside the view with their values, a recipe's seeds as one; empty where there are none."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, point in found.outside.items():
        groups.setdefault(run.arm(name).group, []).append(point)
    if not groups:
        return ""
    told = []
    for group, points in groups.items():
        x, y = np.mean(points, axis=0)
        told.append(f"{group} ({names[0]} {x:.{digits[0]}f}, {names[1]} {y:.{digits[1]}f})")
    return f"Outside this view, where the arrows point: {'; '.join(told)}."
