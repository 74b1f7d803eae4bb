"""Interactive plots of latents, a view per arm: half-life against firing rate, position measures, the map of kinds."""

from collections.abc import Callable
from typing import Any

import numpy as np

from legato.report.figures.latent_data import Cluster, Latents, clusters_of, latents_of, running_median
from legato.report.figures.missing import MissingResult
from legato.report.figures.style import ArmStyle, arm_styles
from legato.report.plots.spec import FAINT, INK, Panel, Plot, Trace, View, marker_of, rounded, significant
from legato.results.saved_run import Arm, SavedRun

MOST_POINTS = 4000  # of one SAE: beyond that a browser is slow to redraw

Ranges = tuple[tuple[float, float], tuple[float, float]]


def half_life_plot(run: SavedRun) -> Plot:
    """One scale in every view, the baseline's median faint beside the arm's own."""
    found = _tables(run, ("density", "half_life"), "half_life", positive=True)
    (x0, x1), (y0, y1) = _ranges(found, np.log10)
    layout = {
        "xaxis": {"type": "log", "title": {"text": "firing rate"}, "dtick": 1, "tickformat": "~e", "range": [x0, x1]},
        "yaxis": {
            "type": "log",
            "title": {"text": "half-life in tokens"},
            "tickvals": [0.5, 1, 2, 4, 8, 16, 32, 64],
            "range": [y0, y1],
        },
    }
    hover = "latent %{text}<br>fires on %{x:.2%} of tokens<br>half-life %{y:.2f} tokens<extra></extra>"
    base = next((latents for arm, latents in found if arm is run.baseline), None)
    styles = arm_styles(run.highlighted)

    def panel(arm: Arm, latents: Latents) -> Panel:
        traces = [_points(latents, styles[arm.name], hover)]
        if base is not None and latents is not base:
            traces.append(_median(base, FAINT, "baseline, median"))
        traces.append(_median(latents, INK, "median"))
        return Panel(traces, layout)

    return _views(found, panel)


def position_measures_plot(run: SavedRun) -> Plot:
    """Both measures are corrected for chance, so that about half of the latents lie at or below zero: not drawn."""
    found = _tables(run, ("eta2", "mi"), "eta2 and mi", positive=True)
    (x0, x1), (y0, y1) = _ranges(found, np.log10)
    logarithmic = {"type": "log", "dtick": 1, "tickformat": "~e"}
    layout = {
        "xaxis": {
            **logarithmic,
            "title": {"text": "eta²: share of variance explained by position"},
            "range": [max(x0, _SMALLEST), x1],
        },
        "yaxis": {
            **logarithmic,
            "title": {"text": "mutual information with position, nats"},
            "range": [max(y0, _SMALLEST), y1],
        },
    }
    hover = "latent %{text}<br>eta² %{x:.2g}<br>%{y:.2g} nats<extra></extra>"
    styles = arm_styles(run.highlighted)
    return _views(found, lambda arm, latents: Panel([_points(latents, styles[arm.name], hover)], layout))


_SMALLEST = -6.0  # log10; below it no latent is told from one that does not depend on position


def map_plot(run: SavedRun) -> Plot:
    """The map of kinds: its axes and clusters are the same in every arm."""
    found = _tables(run, ("map_x", "map_y", "cluster"), "map_x, map_y and cluster")
    found = [(arm, latents) for arm, latents in found if clusters_of(arm)]
    if not found:
        raise MissingResult("no arm has clusters (specialisation.clusters in metrics.json)")
    (x0, x1), (y0, y1) = _ranges(found, np.asarray)
    layout = {
        "xaxis": {"title": {"text": "first principal component of the descriptors"}, "range": [x0, x1]},
        "yaxis": {"title": {"text": "second"}, "range": [y0, y1]},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
    }

    def panel(arm: Arm, latents: Latents) -> Panel:
        return Panel([_members(cluster, latents.thinned(MOST_POINTS)) for cluster in clusters_of(arm)], layout)

    return _views(found, panel, height=460)


def _tables(run: SavedRun, names: tuple[str, ...], what: str, *, positive: bool = False) -> list[tuple[Arm, Latents]]:
    tables = [(arm, latents_of(run, arm, names, positive=positive)) for arm in run.highlighted]
    found = [(arm, latents) for arm, latents in tables if latents is not None]
    if not found:
        raise MissingResult(f"no feature table (features/<arm>.parquet) with {what} was saved")
    return found


def _ranges(found: list[tuple[Arm, Latents]], scale: Callable[[np.ndarray], np.ndarray]) -> Ranges:
    """Of x and of y over all arms, so that switching between them compares."""
    ranges = []
    for axis in (0, 1):
        values = scale(np.concatenate([latents.columns[axis] for _, latents in found]))
        margin = 0.04 * float(np.ptp(values)) or 0.1
        ranges.append((round(float(values.min()) - margin, 4), round(float(values.max()) + margin, 4)))
    return ranges[0], ranges[1]


def _views(found: list[tuple[Arm, Latents]], panel: Callable[[Arm, Latents], Panel], height: int = 380) -> Plot:
    views = []
    for arm, latents in found:
        note = f"{len(latents)} latents."
        if len(latents) > MOST_POINTS:
            note = f"{MOST_POINTS} of {len(latents)} latents, evenly over the dictionary."
        views.append(View(arm.name, [panel(arm, latents)], note))
    return Plot(views, height=height, columns=1)


def _points(latents: Latents, style: ArmStyle, hover: str) -> Trace:
    shown = latents.thinned(MOST_POINTS)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": significant(shown.columns[0]),
        "y": significant(shown.columns[1]),
        "text": shown.latent.tolist(),
        "marker": {**marker_of(style, 4.5), "opacity": 0.35},
        "hovertemplate": hover,
    }


def _median(latents: Latents, colour: str, name: str) -> Trace:
    x, y = running_median(latents)
    line: dict[str, Any] = {"color": colour, "width": 2.2}
    trace = {"type": "scatter", "mode": "lines", "x": significant(x), "y": significant(y), "line": line, "name": name}
    return {**trace, "hovertemplate": "%{y:.2f} tokens<extra>%{fullData.name}</extra>"}


def _members(cluster: Cluster, latents: Latents) -> Trace:
    x, y, number = latents.columns
    inside = number == cluster.number
    return {
        "type": "scatter",
        "mode": "markers",
        "name": cluster.label,
        "x": rounded(x[inside], 2),
        "y": rounded(y[inside], 2),
        "text": latents.latent[inside].tolist(),
        "marker": {**marker_of(cluster.style, 5), "opacity": 0.65},
        "hovertemplate": "latent %{text}<extra>%{fullData.name}</extra>",
    }
