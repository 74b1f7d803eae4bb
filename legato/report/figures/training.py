"""Figures of how the arms trained and what they reconstruct at which sparsity."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import FAINT, MUTED, SURFACE, WIDTH, ArmStyle, PointLabel, arm_styles, label_points
from legato.report.figures.tradeoff import Scene, fidelity_scene, outside_in_words
from legato.results.saved_run import Arm, SavedRun

_PANELS = (
    ("loss", "Loss, all terms"),
    ("fvu", "Fraction of variance unexplained"),
    ("l0", "Active latents per token (L0)"),
    ("dead", "Dead latents"),
)
_MAX_POINTS = 300
_SETTLED = 0.04  # the first steps, where every curve falls from 1, would squeeze the rest of the axis flat


def training_curves(run: SavedRun) -> Figure:
    """Loss, FVU, L0 and dead latents over tokens, one line per arm."""
    panels = log_panels(run)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.45))
    axes = np.atleast_1d(figure.subplots(rows, 2, squeeze=False)).flatten()
    styles = arm_styles(run.highlighted)
    unit, divisor = token_unit(run)
    for ax, (key, title) in zip(axes, panels, strict=False):
        ceilings = []
        for arm in (*run.background, *reversed(run.highlighted)):
            columns = run.log.get(arm.name, {})
            if key not in columns:
                continue
            x = columns.get("tokens", columns.get("step", np.arange(len(columns[key])))) / divisor
            draw_arm_line(ax, thin(x), thin(columns[key]), styles.get(arm.name))
            ceilings.append(ceiling(columns[key]))
        ax.set_title(title)
        ax.set_ylim(None if key == "loss" else 0.0, 1.06 * max(ceilings) if max(ceilings) > 0 else 1.0)
        ax.margins(x=0)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel(unit)
    arm_legend(figure, run)
    return figure


def log_panels(run: SavedRun) -> list[tuple[str, str]]:
    """(logged quantity, title) of each panel that the log allows."""
    if not run.log:
        raise MissingResult("no training log (log.jsonl) was saved")
    panels = [(key, title) for key, title in _PANELS if any(key in columns for columns in run.log.values())]
    if not panels:
        raise MissingResult("the training log (log.jsonl) holds none of loss, fvu, l0, dead")
    return panels


def ceiling(values: np.ndarray) -> float:
    """The largest value of a curve once it has settled; 0 where there is none."""
    settled = values[int(_SETTLED * len(values)) :]
    return float(np.nanmax(settled)) if np.isfinite(settled).any() else 0.0


def sparsity_fidelity(run: SavedRun) -> Figure:
    """FVU against L0 on held-out text, a point per arm; a line along each arm's sweep over k."""
    found = fidelity_scene(run)
    if not found.inside:
        raise MissingResult("no arm has both core.l0 and core.fvu in metrics.json")
    figure = Figure(figsize=(0.86 * WIDTH, 3.9))
    ax = figure.subplots()
    draw_arm_points(ax, run, found)
    ax.set_xlabel("active latents per token (L0)")
    ax.set_title("Fraction of variance unexplained")
    name_outside(figure, outside_in_words(run, found, ("L0", "FVU"), (1, 2)))
    return figure


def name_outside(figure: Figure, text: str) -> None:
    """Below the axes, what lies outside them."""
    if text:
        wrapped = textwrap.fill(text, int(16 * figure.get_figwidth()))
        figure.supxlabel(wrapped, fontsize=7.5, color=MUTED, x=0.02, ha="left")


def draw_arm_points(
    ax: Axes,
    run: SavedRun,
    found: Scene,
    *,
    further_labels: Sequence[PointLabel] = (),
    lines: Sequence[tuple[float, float]] = (),
) -> None:
    """Scatter the arms of a scene: grid members faint, controls hollow, each sweep over k joined.

    The named arms are labelled where they are few, else told apart in the legend, which also says what the other dots
    are. What lies outside is an arrow at the edge.
    """
    styles, points = arm_styles(run.highlighted), found.inside
    of_group = {arm.group: styles[arm.name] for arm in run.highlighted}
    labels, covered = [], list(lines)
    few = sum(arm.name in points for arm in run.highlighted) <= _MOST_LABELLED
    for arm in run.highlighted:
        if arm.name in points:
            style = styles[arm.name]
            x, y = points[arm.name]
            ax.scatter(x, y, s=46, c=style.colour, marker=style.marker, linewidths=0, zorder=4)
            # A point without text is one that no other label may cover.
            labels.append(PointLabel((x, y), arm.name if few else "", style.colour))
    _point_legend(ax, run, found, named=not few)
    faint = []
    for arm in run.arms:
        if arm.name not in points or arm in run.highlighted or arm.role == "sweep":
            continue
        faint.append(points[arm.name])
        if arm.trained:
            style = of_group.get(arm.group, ArmStyle(FAINT, "-", "o"))
            ax.scatter(*points[arm.name], s=16, c=style.colour, marker=style.marker, linewidths=0, zorder=2)
        else:
            ax.scatter(*points[arm.name], s=26, c=SURFACE, edgecolors=MUTED, linewidths=1, zorder=3)
            if arm.group == arm.name:
                labels.append(PointLabel(points[arm.name], f"{arm.name} (control)", MUTED, required=False))
    for method, by_k in sweeps(run, {name: p for name, p in points.items() if run.arm(name).trained}).items():
        style = of_group.get(method, ArmStyle(MUTED, "-", "o"))
        line = np.array(sorted(point for _, point in by_k.values()))
        ax.plot(line[:, 0], line[:, 1], color=style.colour, linewidth=1, marker="o", markersize=3.5, zorder=3)
        covered += along(line)
        labels += [
            PointLabel(point, f"{method}, k={k:g}", MUTED, required=method == "baseline")
            for k, (role, point) in by_k.items()
            if role == "sweep"
        ]
    for group in dict.fromkeys(arm.group for arm in run.arms if arm.role == "named" and arm.group not in of_group):
        seeds = [points[arm.name] for arm in run.arms if arm.group == group and arm.name in points]
        if seeds:
            x, y = np.mean(seeds, axis=0)
            labels.append(PointLabel((float(x), float(y)), group, MUTED, required=False))
    for name in found.outside:
        x, y, side = found.at_edge(name)
        ax.scatter(x, y, s=30, c=MUTED, marker=_ARROWS[side], linewidths=0, clip_on=False, zorder=5)
    ax.set(xlim=found.limits[0], ylim=found.limits[1])
    ax.grid(True, axis="both")
    label_points(ax, [*labels, *further_labels], lines=covered, faint=faint)


_MOST_LABELLED = 4


def _point_legend(ax: Axes, run: SavedRun, found: Scene, *, named: bool) -> None:
    """What the dots of a scene are, above the figure. named: the highlighted arms too, which then bear no labels."""
    styles = arm_styles(run.highlighted)
    groups = {arm.group for arm in run.highlighted}
    shown = [arm for arm in run.arms if arm.name in found.inside and arm not in run.highlighted]
    grey = [arm for arm in shown if arm.trained and arm.group not in groups and arm.role != "sweep"]
    entries: dict[str, dict[str, Any]] = {
        arm.name: {"color": styles[arm.name].colour, "marker": styles[arm.name].marker, "markersize": 6.5}
        for arm in run.highlighted
        if named and arm.name in found.inside
    }
    if any(arm.trained and arm.group in groups for arm in shown):
        entries["small: another seed"] = {"color": MUTED, "marker": "o", "markersize": 3.5}
    if grey:
        entries[_background_label(grey)] = {"color": FAINT, "marker": "o", "markersize": 4}
    if any(not arm.trained for arm in shown):
        entries["controls (no training)"] = {"color": MUTED, "marker": "o", "markerfacecolor": SURFACE}
    figure = ax.get_figure(root=True)
    if entries and figure is not None:
        handles = [Line2D([], [], linestyle="", **look) for look in entries.values()]
        columns = max(1, min(4, len(entries), int(WIDTH / (0.5 + 0.08 * max(map(len, entries))))))
        figure.legend(
            handles, list(entries), loc="outside upper left", ncols=columns, columnspacing=1.4, handlelength=1
        )


_ARROWS = {"right": ">", "left": "<", "above": "^", "below": "v"}


def sweeps(
    run: SavedRun, points: dict[str, tuple[float, float]]
) -> dict[str, dict[float, tuple[str, tuple[float, float]]]]:
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


def along(corners: np.ndarray) -> list[tuple[float, float]]:
    """Points along the line through the corners (n, 2), close enough to keep labels off it."""
    pieces = [np.linspace(a, b, 60) for a, b in itertools.pairwise(corners)]
    return [(float(x), float(y)) for piece in pieces for x, y in piece]


def draw_arm_line(ax: Axes, x: np.ndarray, y: np.ndarray, style: ArmStyle | None) -> None:
    """One arm's curve: in its style where it is highlighted, thin and grey otherwise."""
    if style is None:
        ax.plot(x, y, color=FAINT, linewidth=0.7, alpha=0.8, zorder=2)
    else:
        ax.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.5, zorder=3)


def arm_legend(figure: Figure, run: SavedRun, *, markers: bool = False) -> None:
    """One legend above the figure: the highlighted arms, and one entry for all others."""
    styles = arm_styles(run.highlighted)
    handles: list[Line2D] = [
        Line2D(
            [], [], color=styles[a.name].colour, linestyle=styles[a.name].line, marker=styles[a.name].marker * markers
        )
        for a in run.highlighted
    ]
    labels = [arm.name for arm in run.highlighted]
    if run.background:
        handles.append(Line2D([], [], color=FAINT, linewidth=0.8))
        labels.append(_background_label(run.background))
    columns = max(1, min(4, len(labels), int(WIDTH / (0.7 + 0.075 * max(map(len, labels))))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.6)


def _background_label(arms: Sequence[Arm]) -> str:
    roles = {arm.role for arm in arms}
    what = {"grid": "ablation members", "sweep": "arms at another k"}.get(roles.pop()) if len(roles) == 1 else None
    return f"{len(arms)} {what or 'further arms'}"


def token_unit(run: SavedRun) -> tuple[str, float]:
    tokens = [float(np.nanmax(columns["tokens"])) for columns in run.log.values() if "tokens" in columns]
    if not tokens:
        return "training step", 1.0
    return ("million tokens", 1e6) if max(tokens) >= 1e6 else ("thousand tokens", 1e3)


def thin(values: np.ndarray) -> np.ndarray:
    if len(values) <= _MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, _MAX_POINTS).round().astype(int)]
