"""Figures of the window x coefficient ablation and of what consistency costs in reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import INK, MUTED, SEQUENTIAL, WIDTH, PointLabel
from legato.report.figures.tradeoff import cost_scene, outside_in_words
from legato.report.figures.training import along, draw_arm_points, name_outside
from legato.results.saved_run import Arm, SavedRun


@dataclass(frozen=True)
class Quantity:
    key: str
    title: str
    digits: int
    better: str  # "lower", "higher", or "match" where a comparison wants the baseline's value


QUANTITIES = (
    Quantity("core.fvu", "FVU", 3, "lower"),
    Quantity("consistency.kappa1_excess_within", "Kappa excess", 3, "higher"),
    Quantity("consistency.ac1_excess_within", "AC excess", 3, "higher"),
    Quantity("core.ce_loss_score", "CE loss score", 3, "higher"),
    Quantity("silent", "Silent latents, %", 1, "lower"),
    Quantity("core.l0", "L0", 1, "match"),
)


def quantity_of(arm: Arm, quantity: Quantity) -> float | None:
    if quantity.key != "silent":
        return arm.value(quantity.key)
    alive = arm.value("core.frac_alive")
    return None if alive is None else 100 * (1 - alive)


def grid_arms(run: SavedRun) -> list[Arm]:
    return [a for a in run.arms if a.in_grid and a.window is not None and a.coefficient is not None]


def ablation_heat_maps(run: SavedRun) -> Figure:
    """Window x coefficient heat maps of the six quantities, a block of six per temporal term; seeds are averaged."""
    members = grid_arms(run)
    if not members:
        raise MissingResult("this run has no window x coefficient ablation")
    terms = list(dict.fromkeys(arm.term or "temporal term" for arm in members))
    figure = Figure(figsize=(WIDTH, 4.9 * len(terms)))
    blocks = figure.subfigures(len(terms), 1, squeeze=False)[:, 0]
    for block, term in zip(blocks, terms, strict=True):
        arms = [arm for arm in members if (arm.term or "temporal term") == term]
        if len(terms) > 1:
            block.suptitle(term, x=0.01, ha="left", fontsize=10, fontweight="bold")
        for ax, quantity in zip(block.subplots(2, 3).flatten(), QUANTITIES, strict=True):
            _draw_heat_map(ax, arms, quantity, run.baseline)
    return figure


def _draw_heat_map(ax: Axes, arms: Sequence[Arm], quantity: Quantity, baseline: Arm | None) -> None:
    windows = sorted({arm.window for arm in arms if arm.window is not None})
    coefficients = sorted({arm.coefficient for arm in arms if arm.coefficient is not None})
    values = np.full((len(coefficients), len(windows)), np.nan)
    for row, coefficient in enumerate(coefficients):
        for column, window in enumerate(windows):
            cell = [quantity_of(a, quantity) for a in arms if (a.coefficient, a.window) == (coefficient, window)]
            finite = [value for value in cell if value is not None]
            if finite:
                values[row, column] = np.mean(finite)
    reference = None if baseline is None else quantity_of(baseline, quantity)
    ax.set_title(quantity.title + _DIRECTIONS[quantity.better], pad=19)
    if reference is not None:
        text = f"baseline {reference:.{quantity.digits}f}"
        ax.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=MUTED)
    ax.set_xticks(range(len(windows)), [str(window) for window in windows])
    ax.set_yticks(range(len(coefficients)), [f"{coefficient:g}" for coefficient in coefficients])
    ax.set_xlabel("window (tokens)")
    ax.set_ylabel("coefficient")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if not np.isfinite(values).any():
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        return
    scores, scale = _goodness(values, quantity, reference)
    colours = colormaps[f"{SEQUENTIAL}_r"]
    ax.imshow(scores, cmap=colours, norm=scale, aspect="auto", origin="lower", interpolation="nearest")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if np.isfinite(value):
            r, g, b, _ = colours(scale(scores[row, column]))
            ink = "#ffffff" if 0.299 * r + 0.587 * g + 0.114 * b < 0.52 else "#111111"
            text = f"{value:.{quantity.digits}f}"
            ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=7.5)


_DIRECTIONS = {"lower": " \u2193", "higher": " \u2191", "match": ""}


def _goodness(values: np.ndarray, quantity: Quantity, reference: float | None) -> tuple[np.ndarray, Normalize]:
    """What a cell's darkness stands for, and its limits: the better the darker, the baseline's value among the limits.

    The limits span at least 4 % of the values (10 % where they should match): noise must not look like a trend.
    """
    typical = float(np.nanmean(values))
    if quantity.better == "match":
        target = typical if reference is None else reference
        scores, seen, span = -np.abs(values - target), np.zeros(1), 0.1 * abs(typical)
    else:
        sign = -1.0 if quantity.better == "lower" else 1.0
        scores, span = sign * values, 0.04 * abs(typical)
        seen = np.array([] if reference is None else [sign * reference])
    seen = np.append(seen, scores[np.isfinite(scores)])
    low, high = float(seen.min()), float(seen.max())
    slack = max(span - (high - low), 1e-9)
    above = 0.0 if quantity.better == "match" else slack / 2
    return scores, Normalize(low - (slack - above), high + above)


def consistency_cost(run: SavedRun) -> Figure:
    """Kappa excess against FVU, a point per arm, the front that no arm beats in both, each arm's sweep over k."""
    found = cost_scene(run)
    points = {name: point for name, point in found.inside.items() if run.arm(name).trained}
    if len(points) < 2:
        raise MissingResult("fewer than two arms have both core.fvu and consistency.kappa1_excess_within")
    figure = Figure(figsize=(0.86 * WIDTH, 4.1))
    ax = figure.subplots()
    front = pareto_front(points)
    corners = [points[front[0]]]
    for name in front[1:]:
        corners += [(points[name][0], corners[-1][1]), points[name]]
    stairs = np.array(corners)
    ax.plot(stairs[:, 0], stairs[:, 1], color=MUTED, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1)
    members = [arm for arm in map(run.arm, front) if arm.in_grid and arm.window is not None]
    labels = [
        PointLabel(points[arm.name], f"window {arm.window}, coeff. {arm.coefficient:g}", MUTED, required=False)
        for arm in reversed(members)
    ]
    for arm in members:
        ax.scatter(*points[arm.name], s=18, c=INK, linewidths=0, zorder=3)
    ax.set_xlabel("fraction of variance unexplained (lower is better)")
    ax.set_title("Kappa excess over the within-document null, lag 1")
    draw_arm_points(ax, run, found, further_labels=labels, lines=along(stairs))
    name_outside(figure, outside_in_words(run, found, ("FVU", "kappa excess"), (2, 2)))
    return figure


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other point beats in both low x and high y, by rising x."""
    front: list[str] = []
    best = -np.inf
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if y > best:
            front.append(name)
            best = y
    return front
