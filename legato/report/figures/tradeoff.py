"""Arms of a run between a cost and a gain, and those that would stretch the view."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import altair as alt
import numpy as np

from legato.report.figures.chart import dots, hover, number, significant, table
from legato.report.figures.labels import PointLabel, label_points
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import FAINT, INK, MUTED, SURFACE, ArmStyle, arm_styles
from legato.report.figures.training import arm_keys
from legato.results.saved_run import Arm, SavedRun

_HEIGHT, _STILL = 380, (560.0, 380.0)
_FVU = "fraction of variance unexplained"
_MOST_LABELLED = 4

Points = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Scene:
    """Arms by name with their place. inside: what the view shows; outside: what it would be stretched by."""

    inside: Points
    outside: Points
    limits: tuple[tuple[float, float], tuple[float, float]]  # of x, of y


def scene(run: SavedRun, x_key: str, y_key: str, *, farthest: tuple[float, float]) -> Scene:
    """The arms that have both values. farthest: how many times the baseline's x and y are still shown.

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

    def near(name: str, point: tuple[float, float]) -> bool:
        within = (c / factor <= at <= factor * c for c, at, factor in zip(centre, point, farthest, strict=True))
        return run.arm(name).role == "sweep" or all(within)

    inside = {name: point for name, point in points.items() if near(name, point)}
    corners = np.array(list(inside.values()) or [tuple(centre)])
    low, high = corners.min(0), corners.max(0)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2 * 1.16, 0.05 * np.abs(corners.mean(0)) + 1e-9)
    limits = [(float(m - h), float(m + h)) for m, h in zip(middle, half, strict=True)]
    outside = {name: point for name, point in points.items() if name not in inside}
    return Scene(inside, outside, (limits[0], limits[1]))


def cost_scene(run: SavedRun) -> Scene:
    """Kappa excess over FVU; a gain is shown however large."""
    return scene(run, "core.fvu", "consistency.kappa1_excess_within", farthest=(1.35, np.inf))


def outside_in_words(run: SavedRun, found: Scene, names: tuple[str, str], digits: tuple[int, int]) -> str:
    """The arms outside the view with their values, a recipe's seeds as one; empty where there are none."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, point in found.outside.items():
        groups.setdefault(run.arm(name).group, []).append(point)
    told = []
    for group, points in groups.items():
        x, y = np.mean(points, axis=0)
        told.append(f"{group} ({names[0]} {x:.{digits[0]}f}, {names[1]} {y:.{digits[1]}f})")
    return f"Outside this view, where the arrows point: {'; '.join(told)}." if told else ""


def sparsity_fidelity(run: SavedRun) -> Plot:
    """FVU against L0 on held-out text, a point per arm; a line along each arm's sweep over k."""
    found = scene(run, "core.l0", "core.fvu", farthest=(1.6, 1.35))
    if not found.inside:
        raise MissingResult("no arm has both core.l0 and core.fvu in metrics.json")
    note = outside_in_words(run, found, ("L0", "FVU"), (1, 2))
    return _plot(run, found, ("active latents per token (L0)", _FVU), hover("arm", "x:L0:.1f", "y:FVU:.3f"), note)


def consistency_cost(run: SavedRun) -> Plot:
    """Kappa excess against FVU, a point per arm, the front that no arm beats in both, each arm's sweep over k."""
    found = cost_scene(run)
    points = {name: point for name, point in found.inside.items() if run.arm(name).trained}
    if len(points) < 2:
        raise MissingResult("fewer than two arms have both core.fvu and consistency.kappa1_excess_within")
    front = pareto_front(points)
    corners = [points[front[0]]]
    for name in front[1:]:
        corners += [(points[name][0], corners[-1][1]), points[name]]
    members = [arm for arm in map(run.arm, front) if arm.in_grid and arm.window is not None]
    labels = [
        PointLabel(points[arm.name], f"window {arm.window}, coeff. {arm.coefficient:g}", MUTED, required=False)
        for arm in reversed(members)
    ]
    x, y = np.array(corners).T
    steps = alt.Chart(table(x=x, y=y, order=np.arange(len(x)))).mark_line(color=MUTED, strokeDash=[6, 4], clip=True)
    under: list[alt.Chart] = [steps.encode(x="x:Q", y="y:Q", order="order:Q")]
    if members:
        places = _rows(members, found)
        under.append(dots(places, ArmStyle(INK), 30, []).encode(x="x:Q", y="y:Q"))
    note = outside_in_words(run, found, ("FVU", "kappa excess"), (2, 2))
    tooltip = hover("arm", "x:FVU:.3f", "y:kappa excess:.3f")
    titles = (_FVU, "kappa excess over the within-document null, lag 1")
    return _plot(run, found, titles, tooltip, note, under, labels, along(corners))


def pareto_front(points: Points) -> list[str]:
    """Names of the points that no other point beats in both low x and high y, by rising x."""
    front: list[str] = []
    best = -np.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if y > best:
            front.append(name)
            best = y
    return front


def sweeps(run: SavedRun, points: Points) -> dict[str, dict[float, tuple[str, tuple[float, float]]]]:
    """By method that was trained at several k, and by k: the role there and the point, the mean over its seeds."""
    swept = {arm.method for arm in run.trained if arm.role == "sweep"}
    members: dict[str, dict[float, list[Arm]]] = {}
    for arm in run.trained:
        if arm.method in swept and arm.name in points and arm.k is not None:
            members.setdefault(arm.method, {}).setdefault(arm.k, []).append(arm)
    return {
        method: {
            k: (arms[0].role, tuple(np.mean([points[arm.name] for arm in arms], axis=0))) for k, arms in by_k.items()
        }
        for method, by_k in members.items()
        if len(by_k) > 1
    }


def along(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points along the line through the corners, close enough to keep labels off it."""
    pieces = [np.linspace(a, b, 60) for a, b in itertools.pairwise(corners)]
    return [(float(x), float(y)) for piece in pieces for x, y in piece]


def _rows(arms: Sequence[Arm], found: Scene) -> Rows:
    x, y = np.array([found.inside[arm.name] for arm in arms]).T
    return table(x=x, y=y, arm=[arm.name for arm in arms])


def _plot(
    run: SavedRun,
    found: Scene,
    titles: tuple[str, str],
    tooltip: list[alt.Tooltip],
    note: str,
    under: Sequence[alt.Chart] = (),
    further_labels: Sequence[PointLabel] = (),
    lines: Sequence[tuple[float, float]] = (),
) -> Plot:
    """Points of a scene: grid members faint, controls hollow, each sweep over k joined.

    The named arms are labelled where they are few; the legend tells them apart and says what the other dots are. What
    lies outside is an arrow at the edge.
    """
    styles = arm_styles(run.highlighted)
    of_group = {arm.group: styles[arm.name] for arm in run.highlighted}
    x = alt.X(**number("x", titles[0], scale={"domain": found.limits[0]}, axis=alt.Axis(grid=True, tickCount=7)))
    y = alt.Y(**number("y", titles[1], scale={"domain": found.limits[1]}))
    layers = [layer.encode(x=x, y=y) for layer in under]
    covered = list(lines)
    for method, by_k in sweeps(run, {n: p for n, p in found.inside.items() if run.arm(n).trained}).items():
        line = sorted(point for _, point in by_k.values())
        covered += along(line)
        colour = of_group[method].colour if method in of_group else MUTED
        at_x, at_y = np.array(line).T
        point = alt.OverlayMarkDef(size=24, color=colour, filled=True)
        joined = alt.Chart(table(x=at_x, y=at_y)).mark_line(color=colour, strokeWidth=1.2, point=point, clip=True)
        layers.append(joined.encode(x=x, y=y))
    others = [run.arm(name) for name in found.inside if run.arm(name) not in run.highlighted]
    grey = [arm for arm in others if arm.trained and arm.group not in of_group]
    seeds = [arm for arm in others if arm.trained and arm.group in of_group]
    controls = [arm for arm in others if not arm.trained]
    if grey:
        layers.append(dots(_rows(grey, found), ArmStyle(FAINT), 30, tooltip).encode(x=x, y=y))
    for arm in seeds:
        layers.append(dots(_rows([arm], found), of_group[arm.group], 28, tooltip).encode(x=x, y=y))
    if controls:
        hollow = dots(_rows(controls, found), ArmStyle(SURFACE), 50, tooltip, stroke=MUTED, strokeWidth=1.5)
        layers.append(hollow.encode(x=x, y=y))
    shown = [arm for arm in run.highlighted if arm.name in found.inside]
    for arm in shown:
        layers.append(dots(_rows([arm], found), styles[arm.name], 110, tooltip).encode(x=x, y=y))
    if found.outside:
        layers.append(_arrows(found).encode(x=x, y=y))
    labels = [*_labels(run, found, of_group), *further_labels]
    faint = [found.inside[arm.name] for arm in (*grey, *seeds, *controls) if arm.role != "sweep"]
    layers += label_points(labels, found.limits, _STILL, lines=covered, faint=faint)
    keys = [key for key in arm_keys(run, "marker") if key.label in found.inside]
    if seeds:
        keys.append(Key("small: another seed", ArmStyle(MUTED), ("marker",)))
    if grey:
        roles = {arm.role for arm in grey}
        label = (
            "ablation members" if roles == {"grid"} else "arms at another k" if roles == {"sweep"} else "further arms"
        )
        keys.append(Key(f"{len(grey)} {label}", ArmStyle(FAINT), ("marker",)))
    if controls:
        keys.append(Key("controls (no training)", ArmStyle(MUTED), ("marker",), hollow=True))
    return Plot([View("", [Panel(alt.layer(*layers), zoom=True)])], _HEIGHT, columns=1, keys=keys, note=note)


def _labels(run: SavedRun, found: Scene, of_group: Mapping[str, ArmStyle]) -> list[PointLabel]:
    points = found.inside
    named = [arm for arm in run.highlighted if arm.name in points]
    few = len(named) <= _MOST_LABELLED
    # A point without text is one that no other label may cover.
    labels = [PointLabel(points[arm.name], arm.name if few else "", of_group[arm.group].colour) for arm in named]
    for arm in run.arms:
        if arm.name in points and not arm.trained and arm.group == arm.name:
            labels.append(PointLabel(points[arm.name], f"{arm.name} (control)", MUTED, required=False))
    for method, by_k in sweeps(run, {n: p for n, p in points.items() if run.arm(n).trained}).items():
        for k, (role, point) in by_k.items():
            if role == "sweep":
                labels.append(PointLabel(point, f"{method}, k={k:g}", MUTED, required=method == "baseline"))
    for group in dict.fromkeys(arm.group for arm in run.arms if arm.role == "named" and arm.group not in of_group):
        if seeds := [points[arm.name] for arm in run.arms if arm.group == group and arm.name in points]:
            x, y = np.mean(seeds, axis=0)
            labels.append(PointLabel((float(x), float(y)), group, MUTED, required=False))
    return labels


def _arrows(found: Scene) -> alt.Chart:
    """A mark at the edge of the view for each arm outside, that points to it."""
    (left, right), (low, high) = found.limits
    x, y = np.array(list(found.outside.values())).T
    side = np.select([x > right, x < left, y > high], ["right", "left", "up"], "down")
    data = table(
        x=np.clip(x, left, right),
        y=np.clip(y, low, high),
        arm=list(found.outside),
        place=["outside, at {}, {}".format(*significant(point)) for point in found.outside.values()],
        side=[f"triangle-{each}" for each in side],
    )
    arrows = dots(data, ArmStyle(MUTED), 70, hover("arm", "place"))
    return arrows.encode(shape=alt.Shape("side:N", scale=None))
