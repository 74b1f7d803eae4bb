"""Figures of how the arms trained and what they reconstruct at which sparsity."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from legato.report.missing import MissingResult
from legato.report.style import FAINT, MUTED, WIDTH, ArmStyle, PointLabel, arm_styles, label_points
from legato.results import Arm, SavedRun

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
    if not run.log:
        raise MissingResult("no training log (log.jsonl) was saved")
    panels = [(key, title) for key, title in _PANELS if any(key in columns for columns in run.log.values())]
    if not panels:
        raise MissingResult("the training log (log.jsonl) holds none of loss, fvu, l0, dead")
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.45))
    axes = np.atleast_1d(figure.subplots(rows, 2, squeeze=False)).flatten()
    styles = arm_styles(run.highlighted)
    unit, divisor = _token_unit(run)
    for ax, (key, title) in zip(axes, panels, strict=False):
        ceilings = []
        for arm in (*run.background, *reversed(run.highlighted)):
            columns = run.log.get(arm.name, {})
            if key not in columns:
                continue
            x = columns.get("tokens", columns.get("step", np.arange(len(columns[key])))) / divisor
            draw_arm_line(ax, _thin(x), _thin(columns[key]), styles.get(arm.name))
            settled = columns[key][int(_SETTLED * len(columns[key])) :]
            ceilings.append(np.nanmax(settled) if np.isfinite(settled).any() else 0.0)
        ax.set_title(title)
        ax.set_ylim(None if key == "loss" else 0.0, 1.06 * max(ceilings) if max(ceilings) > 0 else 1.0)
        ax.margins(x=0)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel(unit)
    arm_legend(figure, run)
    return figure


def sparsity_fidelity(run: SavedRun) -> Figure:
    """FVU against L0 on held-out text, a point per arm; a line along each arm's sweep over k."""
    points = {
        arm.name: (x, y)
        for arm in run.trained
        if (x := arm.value("core.l0")) is not None and (y := arm.value("core.fvu")) is not None
    }
    if not points:
        raise MissingResult("no arm has both core.l0 and core.fvu in metrics.json")
    figure = Figure(figsize=(0.72 * WIDTH, 3.4))
    ax = figure.subplots()
    span_at_least(ax, list(points.values()), 0.1)
    draw_arm_points(ax, run, points)
    ax.set_xlabel("active latents per token (L0)")
    ax.set_title("Fraction of variance unexplained")
    return figure


def draw_arm_points(
    ax: Axes,
    run: SavedRun,
    points: dict[str, tuple[float, float]],
    *,
    further_labels: Sequence[PointLabel] = (),
    lines: Sequence[tuple[float, float]] = (),
) -> None:
    """Scatter the arms: grid members faint, each sweep over k joined, baseline, named and sweep arms labelled."""
    styles = arm_styles(run.highlighted)
    of_group = {arm.group: styles[arm.name] for arm in run.highlighted}
    for arm in run.background:
        if arm.name in points and arm.role != "sweep":
            style = of_group.get(arm.group, ArmStyle(FAINT, "-", "o"))
            ax.scatter(*points[arm.name], s=16, c=style.colour, marker=style.marker, linewidths=0, zorder=2)
    labels, covered = [], list(lines)
    for arm in run.highlighted:
        if arm.name in points:
            style = styles[arm.name]
            x, y = points[arm.name]
            ax.scatter(x, y, s=46, c=style.colour, marker=style.marker, linewidths=0, zorder=4)
            labels.append(PointLabel((x, y), arm.name, style.colour))
    for method, by_k in _sweeps(run, points).items():
        style = of_group.get(method, ArmStyle(MUTED, "-", "o"))
        line = np.array(sorted(point for _, point in by_k.values()))
        ax.plot(line[:, 0], line[:, 1], color=style.colour, linewidth=1, marker="o", markersize=3.5, zorder=3)
        covered += along(line)
        labels += [
            PointLabel(point, f"{method}, k={k:g}", MUTED, required=method == "baseline")
            for k, (role, point) in by_k.items()
            if role == "sweep"
        ]
    ax.margins(0.12)
    ax.grid(True, axis="both")
    faint = [points[arm.name] for arm in run.background if arm.name in points and arm.role != "sweep"]
    label_points(ax, [*labels, *further_labels], lines=covered, faint=faint)


def _sweeps(
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


def span_at_least(ax: Axes, points: Sequence[tuple[float, float]], relative: float) -> None:
    """Keep both axes at least this wide relative to the points' mean: a difference of a percent must look small."""
    centre = np.mean(points, axis=0)
    ax.update_datalim([(1 - relative) * centre, (1 + relative) * centre])


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


def _token_unit(run: SavedRun) -> tuple[str, float]:
    tokens = [float(np.nanmax(columns["tokens"])) for columns in run.log.values() if "tokens" in columns]
    if not tokens:
        return "training step", 1.0
    return ("million tokens", 1e6) if max(tokens) >= 1e6 else ("thousand tokens", 1e3)


def _thin(values: np.ndarray) -> np.ndarray:
    if len(values) <= _MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, _MAX_POINTS).round().astype(int)]
