"""Figures that set several runs side by side, a colour per run, drawn from their saved results."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from legato.report.figures.chart import APART, curves, dots, hover, joined_tables, lag_axis, number, rule, table
from legato.report.figures.drawn import Figure, draw
from legato.report.figures.labels import PointLabel, label_points
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import MUTED, SURFACE, ArmStyle, run_styles
from legato.report.figures.training import ceiling
from legato.report.runs.recipes import Recipe, recipes_of, shortened
from legato.report.text.verdict import KAPPA_EXCESS
from legato.results.matched.comparability import places
from legato.results.saved_run import SavedRun

_COLUMNS = (
    ("core.fvu", "FVU \u2193"),
    ("core.l0", "L0"),
    ("core.ce_loss_score", "CE loss score \u2191"),
    (KAPPA_EXCESS, "Kappa excess \u2191"),
    ("consistency.ac1_excess_within", "AC excess \u2191"),
)
_OVER_LAG = (
    ("Autocorrelation", "AC excess", "consistency.ac_excess_within", "consistency.raw_stream.ac.excess_within"),
    ("Kappa", "kappa excess", "consistency.kappa_excess_within", ""),
)
_FVU = "fraction of variance unexplained"


def _run_keys(runs: Mapping[str, SavedRun], *parts: str) -> list[Key]:
    parts = parts or ("line", "marker")
    return [Key(shortened(label), style, parts) for label, style in run_styles(list(runs)).items()]


_HOLLOW = Key("hollow: baseline", ArmStyle(MUTED), ("marker",), hollow=True)


def _overview(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Plot:
    """A row per run and recipe, a column per metric; whiskers are standard errors over seeds."""
    measures = [(key, title) for key, title in _COLUMNS if any(r.estimate(key) for r in recipes)]
    if not measures:
        raise MissingResult("no run has metrics to compare")
    several = len(runs) > 1
    names = [shortened(f"{r.run}: {r.name}" if several else r.name) for r in recipes]
    panels = []
    for number_of, (key, title) in enumerate(measures):
        rows: list[dict[str, Any]] = []
        for name, recipe in zip(names, recipes, strict=True):
            if (estimate := recipe.estimate(key)) is None:
                continue
            value, error = estimate
            rows.append(
                {
                    "run": recipe.run,
                    "arm": recipe.name,
                    "row": name,
                    "x": float(f"{value:.5g}"),
                    "low": value - error,
                    "high": value + error,
                    "error": float(f"{error:.3g}"),
                    "colour": recipe.style.colour,
                    "fill": SURFACE if recipe.baseline else recipe.style.colour,
                    "shape": recipe.style.marker,
                }
            )
        ends = [row[end] for row in rows for end in ("low", "high")]
        room = 0.15 * (max(ends) - min(ends)) or 0.1 * abs(max(ends)) or 0.1
        if key == "core.l0":  # runs of one budget differ in L0 by nothing that matters
            room = max(room, 0.1 * max(ends) - (max(ends) - min(ends)) / 2)
        scale = {"domain": [min(ends) - room, max(ends) + room]}
        first = number_of == 0
        side = alt.Axis(labels=True, labelLimit=190, grid=True) if first else alt.Axis(labels=False, grid=True)
        y = alt.Y("row:N", sort=None, title=None, scale=alt.Scale(domain=names), axis=side)
        axis = alt.Axis(tickCount=3, grid=True)
        base = alt.Chart(Rows(values=rows)).encode(y=y)
        colour = alt.Color("colour:N", scale=None)
        tooltip = hover("run", "arm", f"x:{title}:.4~g", "error:standard error:.2~g")
        layers = [
            base.mark_rule().encode(x=alt.X(**number("low", None, scale=scale, axis=axis)), x2="high:Q", color=colour),
            base.mark_point(size=60, opacity=1, strokeWidth=1.5).encode(
                x=alt.X(**number("x", None, scale=scale, axis=axis)),
                stroke=colour,
                fill=alt.Fill("fill:N", scale=None),
                shape=alt.Shape("shape:N", scale=None),
                tooltip=tooltip,
            ),
        ]
        panels.append(Panel(alt.layer(*layers), title))
    keys = [*_run_keys(runs, "marker"), _HOLLOW]
    return Plot([View("", panels)], 24 * len(names) + 20, columns=len(panels), keys=keys, beside=64)


def _lag_plot(
    runs: Mapping[str, SavedRun], recipes: Sequence[Recipe], measures: Sequence[tuple[str, str, str, str]], what: str
) -> Plot:
    """Excesses over lag, a view per measure; the still shows the first."""
    views = [View(label, panels) for label, *measure in measures if (panels := _lag_panels(runs, recipes, *measure))]
    if not views:
        raise MissingResult(f"no run has {what} over lags")
    note = "Thin: the language model's own activations, mean over dimensions." if views[0].label != "Kappa" else ""
    return Plot(views, columns=min(3, len(views[0].panels)), keys=_run_keys(runs), note=note, still=views[0].panels)


def _lag_panels(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe], what: str, key: str, raw: str) -> list[Panel]:
    found: dict[str, list[tuple[Recipe, np.ndarray, np.ndarray, np.ndarray | None]]] = {}
    for recipe in recipes:
        lags = recipe.arms[0].series("consistency.lags")
        series = [values for arm in recipe.arms if (values := arm.series(key)) is not None]
        if lags is not None and series:
            stream = recipe.arms[0].series(raw) if raw else None
            found.setdefault(recipe.name, []).append((recipe, lags, np.mean(series, axis=0), stream))
    if not found:
        return []
    drawn_values = [v for lines in found.values() for _, _, *both in lines for v in both if v is not None]
    heights = np.concatenate([v[np.isfinite(v)] for v in drawn_values])
    low, high = min(0.0, float(heights.min())), float(heights.max())
    room = 0.08 * (high - low) or 0.1
    y = alt.Y(**number("y", what, scale={"domain": [low - room if low < 0 else 0.0, high + room]}))
    styles = run_styles(list(runs))
    panels = []
    for name, lines in found.items():
        x = lag_axis(lines[0][1])
        layers: list[Any] = [rule(y=0)]
        for recipe, lags, _, stream in lines:
            if stream is not None:
                faint = alt.Chart(table(x=lags, y=stream, run=f"activations of {recipe.run}"))
                line = faint.mark_line(color=recipe.style.colour, strokeWidth=0.9, opacity=0.5)
                layers.append(line.encode(x=x, y=y, tooltip="run:N"))
        rows = [table(x=lags, y=values, arm=recipe.run) for recipe, lags, values, _ in lines]
        tooltip = hover("arm:run", "x:lag:~g", f"y:{what}:.3f")
        layers += curves(joined_tables(rows), styles, x, y, tooltip, markers=True)
        panels.append(Panel(alt.layer(*layers), shortened(name)))
    return panels


def _cost(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Plot:
    """Kappa excess against FVU, a panel per model, layer and text; lines lead from each run's baseline to its arms,
    small dots are the arms of its ablation and sweeps."""
    groups = []
    for labels in places(runs):
        points = [
            (recipe, fvu, excess)
            for recipe in recipes
            if recipe.run in labels
            and (fvu := recipe.estimate("core.fvu")) is not None
            and (excess := recipe.estimate(KAPPA_EXCESS)) is not None
        ]
        if points:
            groups.append((labels, points))
    if not groups:
        raise MissingResult("no run has both FVU and kappa excess")
    columns = min(2, len(groups))
    size = (560.0, 380.0) if columns == 1 else (312.0, 380.0)
    panels = [_cost_panel({label: runs[label] for label in labels}, points, size) for labels, points in groups]
    note = "Hollow: baselines, with a line to each arm of their run. Small: ablation, sweeps, seeds and controls; "
    note += "those far off are outside of the axes (shift and wheel or drag move the view, or see the table)."
    return Plot([View("", panels)], 380, columns=columns, keys=[*_run_keys(runs), _HOLLOW], note=note)


def _cost_panel(
    runs: Mapping[str, SavedRun],
    points: Sequence[tuple[Recipe, tuple[float, float], tuple[float, float]]],
    size: tuple[float, float],
) -> Panel:
    limits = _padded([fvu[0] for _, fvu, _ in points]), _padded([excess[0] for _, _, excess in points])
    axis = alt.Axis(grid=True, tickCount=5)
    x = alt.X(**number("x", _FVU, scale={"domain": limits[0]}, axis=axis))
    y = alt.Y(**number("y", "kappa excess, lag 1", scale={"domain": limits[1]}))
    tooltip = hover("run", "arm", "x:FVU:.4f", "y:kappa excess:.3f")
    bases = {recipe.run: (fvu[0], excess[0]) for recipe, fvu, excess in points if recipe.baseline}
    layers = []
    for label, style in {recipe.run: recipe.style for recipe, _, _ in points}.items():
        others = [
            (arm.name, fvu, excess)
            for arm in (*runs[label].background, *(arm for arm in runs[label].arms if not arm.trained))
            if (fvu := arm.value("core.fvu")) is not None and (excess := arm.value(KAPPA_EXCESS)) is not None
        ]
        if others:
            names, xs, ys = zip(*others, strict=True)
            rows = table(x=list(xs), y=list(ys), arm=list(names), run=label)
            layers.append(dots(rows, style, 22, tooltip, opacity=0.45, clip=True).encode(x=x, y=y))
    for recipe, (fvu, d_fvu), (excess, d_excess) in points:
        colour, hollow = recipe.style.colour, {"stroke": recipe.style.colour, "strokeWidth": 1.8}
        if not recipe.baseline and recipe.run in bases:
            x0, y0 = bases[recipe.run]
            spoke = alt.Chart(table(x=[x0, fvu], y=[y0, excess])).mark_line(color=colour, strokeWidth=0.9, opacity=0.5)
            layers.append(spoke.encode(x=x, y=y))
        if len(recipe.arms) > 1:
            ends = {"x": fvu, "y": excess, "x1": fvu - d_fvu, "x2": fvu + d_fvu}
            ends |= {"y1": excess - d_excess, "y2": excess + d_excess}
            whisker = alt.Chart(Rows(values=[ends])).mark_rule(color=colour)
            layers.append(whisker.encode(x=alt.X("x1:Q"), x2="x2:Q", y=y))
            layers.append(whisker.encode(x=x, y=alt.Y("y1:Q"), y2="y2:Q"))
        style = ArmStyle(SURFACE, (), recipe.style.marker) if recipe.baseline else recipe.style
        point = table(x=[fvu], y=[excess], arm=[shortened(recipe.name)], run=recipe.run)
        layers.append(dots(point, style, 85, tooltip, **(hollow if recipe.baseline else {})).encode(x=x, y=y))
    labels = [
        PointLabel(
            (fvu[0], excess[0]), "" if recipe.baseline else shortened(recipe.name), recipe.style.colour, required=False
        )
        for recipe, fvu, excess in points
    ]
    layers += label_points(labels, limits, size)
    return Panel(alt.layer(*layers, resolve=APART), shortened(", ".join(runs)), zoom=True)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.16 * (high - low) or 0.1 * abs(high) or 0.1
    return float(low - room), float(high + room)


def _training(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Plot:
    """FVU over training tokens, a line per run and recipe (first seed)."""
    layers: list[alt.Chart] = []
    logged = [(recipe, runs[recipe.run].log.get(recipe.arms[0].name, {})) for recipe in recipes]
    logged = [(recipe, columns) for recipe, columns in logged if "fvu" in columns and "tokens" in columns]
    if not logged:
        raise MissingResult("no run has a training log")
    ceilings = [ceiling(columns["fvu"]) for _, columns in logged]
    x = alt.X(**number("x", "million tokens"))
    y = alt.Y(**number("y", _FVU, scale={"domain": [0, 1.06 * max(ceilings) or 1.0]}))
    tooltip = hover("run", "arm", "x:million tokens:.3~g", "y:FVU:.4f")
    for recipe, columns in logged:
        rows = table(x=columns["tokens"] / 1e6, y=columns["fvu"], arm=recipe.name, run=recipe.run)
        width = 0.9 if recipe.baseline else 1.8
        layers += curves(rows, {recipe.name: recipe.style}, x, y, tooltip, width=width)
    keys = [*_run_keys(runs, "line"), Key("thin: baseline", ArmStyle(MUTED), ("line",))]
    return Plot([View("", [Panel(alt.layer(*layers, resolve=APART))])], height=300, columns=1, keys=keys)


# What the page says of each stands in figures.yaml.
_FIGURES: dict[str, Callable[..., Plot]] = {
    "compare_fvu_kappa": _cost,
    "compare_overview": _overview,
    "compare_ac": partial(_lag_plot, measures=_OVER_LAG, what="AC excess or kappa excess"),
    "compare_kappa_excess": partial(_lag_plot, measures=_OVER_LAG[1:], what="kappa excess"),
    "compare_training": _training,
}


def draw_comparison(runs: Mapping[str, SavedRun]) -> list[Figure]:
    """Each figure over the runs, by label, or what it lacks. A run takes part with its baseline and named arms."""
    return draw(_FIGURES, Path(__file__).parent / "figures.yaml", runs, recipes_of(runs))
