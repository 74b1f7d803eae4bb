"""The interactive plots of the page that compares runs: a colour per run, a panel per place or per recipe."""

from collections.abc import Mapping, Sequence

import numpy as np

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import page_colour, run_styles
from legato.report.plots.spec import (
    MUTED,
    SURFACE,
    Key,
    Panel,
    Plot,
    Trace,
    View,
    line_of,
    marker_of,
    plain,
    significant,
)
from legato.report.runs.recipes import Recipe, shortened
from legato.report.text.verdict import KAPPA_EXCESS
from legato.results.matched.comparability import places
from legato.results.saved_run import SavedRun

_MEASURES = (
    ("Autocorrelation", "AC excess", "consistency.ac_excess_within", "consistency.raw_stream.ac.excess_within"),
    ("Kappa", "kappa excess", "consistency.kappa_excess_within", ""),
)
_SIDES = {"top center": (0, 1), "bottom center": (0, -1), "middle right": (1, 0), "middle left": (-1, 0)}
_HOVER = "<b>%{text}</b><br>FVU %{x:.4f}, kappa excess %{y:.3f}<extra>%{fullData.name}</extra>"


def cost_plot(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Plot:
    """Kappa excess against FVU, a panel per model, layer and text."""
    panels = []
    for labels in places(runs):
        here = [(recipe, at) for recipe in recipes if recipe.run in labels and (at := _place(recipe)) is not None]
        if here:
            panels.append(_cost_panel({label: runs[label] for label in labels}, here))
    if not panels:
        raise MissingResult("no run has both FVU and kappa excess")
    note = "Hollow: baselines, with a line to each arm of their run. Small: ablation, sweeps, seeds and controls; "
    note += "those far off are outside of the axes (zoom out, or see the table)."
    return Plot([View("", panels)], height=400, columns=min(2, len(panels)), keys=_keys(runs), note=note)


def _place(recipe: Recipe) -> tuple[float, float] | None:
    fvu, excess = recipe.estimate("core.fvu"), recipe.estimate(KAPPA_EXCESS)
    return None if fvu is None or excess is None else (fvu[0], excess[0])


def _cost_panel(runs: Mapping[str, SavedRun], here: Sequence[tuple[Recipe, tuple[float, float]]]) -> Panel:
    traces: list[Trace] = []
    sides = _label_sides([at for _, at in here])
    for label, run in runs.items():
        own = [(*placed, side) for placed, side in zip(here, sides, strict=True) if placed[0].run == label]
        if not own:
            continue
        style = own[0][0].style
        dots = [
            (arm.name, fvu, excess)
            for arm in (*run.background, *(arm for arm in run.arms if not arm.trained))
            if (fvu := arm.value("core.fvu")) is not None and (excess := arm.value(KAPPA_EXCESS)) is not None
        ]
        traces.append(_points(label, dots) | {"marker": marker_of(style, 5), "opacity": 0.45})
        base = next((at for recipe, at, _ in own if recipe.baseline), None)
        for recipe, at, _ in own:
            if base is not None and not recipe.baseline:
                traces.append(_spoke(base, at, page_colour(style.colour)))
        for recipe, at, side in own:
            marker = marker_of(style, 10)
            if recipe.baseline:
                marker |= {"color": SURFACE, "line": {"color": page_colour(style.colour), "width": 2}}
            traces.append(_named(recipe, at, side) | {"marker": marker})
    ranges = [_padded(values) for values in zip(*(at for _, at in here), strict=True)]
    layout = {
        "xaxis": {"title": {"text": "fraction of variance unexplained"}, "range": ranges[0], "nticks": 6},
        "yaxis": {"title": {"text": "kappa excess, lag 1"}, "range": ranges[1]},
    }
    return Panel(traces, layout, ", ".join(runs))


def _points(run: str, points: Sequence[tuple[str, float, float]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(run),
        "text": [plain(name) for name, _, _ in points],
        "x": significant([x for _, x, _ in points], 5),
        "y": significant([y for _, _, y in points], 5),
        "hovertemplate": _HOVER,
    }


def _named(recipe: Recipe, at: tuple[float, float], side: str) -> Trace:
    trace = _points(recipe.run, [(shortened(recipe.name), *at)])
    colour = page_colour(recipe.style.colour)
    if not recipe.baseline:
        trace |= {"mode": "markers+text", "textposition": side, "textfont": {"color": colour, "size": 11.5}}
    if len(recipe.arms) > 1:
        for axis, key in (("x", "core.fvu"), ("y", KAPPA_EXCESS)):
            estimate = recipe.estimate(key)
            assert estimate is not None
            error = {"type": "data", "array": significant([estimate[1]]), "color": colour}
            trace[f"error_{axis}"] = error | {"thickness": 1, "width": 0}
    return trace


def _spoke(start: tuple[float, float], end: tuple[float, float], colour: str) -> Trace:
    x, y = zip(start, end, strict=True)
    line = {"color": colour, "width": 0.9}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": significant(x, 5),
        "y": significant(y, 5),
        "line": line,
        "opacity": 0.5,
        "hoverinfo": "skip",
    }


def _label_sides(places_: Sequence[tuple[float, float]]) -> list[str]:
    """Where each point's name stands: on the side where fewest points and names already placed are near."""
    at = np.array(places_, np.float64)
    at = (at - at.min(0)) / np.maximum(np.ptp(at, axis=0), 1e-9)
    taken, sides = at.tolist(), []
    for point in at:
        reach = {side: point + np.array([0.11, 0.055]) * step for side, step in _SIDES.items()}
        crowd = {
            side: sum(max(0.0, 1 - np.hypot((x - sx) / 0.16, (y - sy) / 0.07)) for x, y in taken)
            for side, (sx, sy) in reach.items()
        }
        best = min(crowd, key=lambda side: crowd[side])
        taken.append(reach[best].tolist())
        sides.append(best)
    return sides


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    room = 0.16 * (high - low) or 0.1 * abs(high) or 0.1
    return [float(low - room), float(high + room)]


def over_lag_plot(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Plot:
    """AC and kappa excess over lag: a panel per recipe with a line per run, mean over seeds."""
    views = [
        View(name, panels) for name, what, key, raw in _MEASURES if (panels := _lag_panels(recipes, what, key, raw))
    ]
    if not views:
        raise MissingResult("no run has AC excess or kappa excess over lags")
    columns = min(3, max(len(view.panels) for view in views))
    note = "Thin: the language model's own activations, mean over dimensions." if views[0].label != "Kappa" else ""
    return Plot(views, height=230, columns=columns, keys=_keys(runs), note=note)


def _lag_panels(recipes: Sequence[Recipe], what: str, key: str, raw: str) -> list[Panel]:
    traces: dict[str, list[Trace]] = {}
    for recipe in recipes:
        lags = recipe.arms[0].series("consistency.lags")
        series = [values for arm in recipe.arms if (values := arm.series(key)) is not None]
        if lags is None or not series:
            continue
        own = traces.setdefault(recipe.name, [])
        stream = recipe.arms[0].series(raw) if raw else None
        if stream is not None:
            faint = {"mode": "lines", "line": {"color": page_colour(recipe.style.colour), "width": 0.9}, "opacity": 0.5}
            own.append(_line(f"activations of {recipe.run}", lags, stream) | faint)
        mean = np.mean(series, axis=0)
        style = {"line": line_of(recipe.style), "marker": marker_of(recipe.style, 5)}
        own.append(_line(recipe.run, lags, mean) | style)
    heights = [v for lines in traces.values() for trace in lines for v in trace["y"] if v is not None]
    layout = {
        "xaxis": {"type": "log", "title": {"text": "lag in tokens"}, "tickvals": [1, 2, 4, 8, 16, 32, 64]},
        "yaxis": {
            "title": {"text": what},
            "zeroline": True,
            "zerolinecolor": MUTED,
            "range": _padded([min(0.0, *heights), max(heights)]) if heights else [0.0, 1.0],
        },
    }
    return [Panel(lines, layout, shortened(name)) for name, lines in traces.items()]


def _line(name: str, lags: np.ndarray, values: np.ndarray) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(name),
        "x": significant(lags),
        "y": significant(values),
        "hovertemplate": "%{y:.3f} at lag %{x}<extra>%{fullData.name}</extra>",
    }


def _keys(runs: Mapping[str, SavedRun]) -> list[Key]:
    return [Key(label, style) for label, style in run_styles(list(runs)).items()]
