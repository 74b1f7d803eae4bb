"""Interactive plots of curves: training, and how codes hold over lag against both nulls."""

from typing import Any

import numpy as np

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import ArmStyle, arm_styles
from legato.report.figures.training import ceiling, log_panels, thin, token_unit
from legato.report.plots.spec import (
    FAINT,
    MUTED,
    Panel,
    Plot,
    Trace,
    View,
    keys_of,
    line_of,
    marker_of,
    plain,
    significant,
)
from legato.results.saved_run import Arm, SavedRun

_BACKGROUND_POINTS = 120
_NULLS = {"within_null": ("shuffled in the document", "6px,3px"), "cross_null": ("same position only", "2px,3px")}
_MEASURES = {"kappa": "Kappa of firing", "ac": "Autocorrelation"}


def training_plot(run: SavedRun) -> Plot:
    """A panel per logged quantity, a line per arm."""
    panels = log_panels(run)
    styles = arm_styles(run.highlighted)
    unit, divisor = token_unit(run)
    found = []
    for key, title in panels:
        traces, ceilings = [], []
        for arm in (*run.background, *reversed(run.highlighted)):
            columns = run.log.get(arm.name, {})
            if key not in columns:
                continue
            x = columns.get("tokens", columns.get("step", np.arange(len(columns[key])))) / divisor
            ceilings.append(ceiling(columns[key]))
            traces.append(_curve(arm, thin(x), thin(columns[key]), styles.get(arm.name)))
        top = 1.06 * max(ceilings) if max(ceilings) > 0 else 1.0
        low = min(min(v for v in trace["y"] if v is not None) for trace in traces) if key == "loss" else 0.0
        found.append(
            Panel(
                traces, {"xaxis": {"title": {"text": unit}, "showgrid": False}, "yaxis": {"range": [low, top]}}, title
            )
        )
    return Plot([View("", found)], height=230, keys=keys_of(run.highlighted, styles), note=_others(run))


def _curve(arm: Arm, x: np.ndarray, y: np.ndarray, style: ArmStyle | None) -> Trace:
    if style is None:
        step = max(1, -(-len(x) // _BACKGROUND_POINTS))
        x, y = x[::step], y[::step]
        line = {"color": FAINT, "width": 0.9}
    else:
        line = line_of(style, 1.8)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(arm.name),
        "x": significant(x, 4),
        "y": significant(y, 4),
        "line": line,
        "opacity": 0.75 if style is None else 1,
        "hovertemplate": "%{y:.4g}<extra>%{fullData.name}</extra>",
    }


def _others(run: SavedRun) -> str:
    return f"Thin grey lines: {len(run.background)} further arms." if run.background else ""


def over_lag_plot(run: SavedRun) -> Plot:
    """Kappa and autocorrelation over lag: a panel per arm with both nulls, and one of all excesses."""
    views = [View(label, panels) for measure, label in _MEASURES.items() if (panels := _lag_panels(run, measure))]
    if not views:
        raise MissingResult("no arm has consistency.kappa or consistency.ac over lags in metrics.json")
    nulls = "Dashed: tokens shuffled inside their document. Dotted: shuffled across documents at the same position."
    columns = 2 if len(views[0].panels) in (2, 4) else 3
    return Plot(
        views, height=230, columns=columns, keys=keys_of(run.highlighted, arm_styles(run.highlighted)), note=nulls
    )


def _lag_panels(run: SavedRun, measure: str) -> list[Panel]:
    key, styles = f"consistency.{measure}", arm_styles(run.highlighted)
    measured = [(arm, mean) for arm in run.highlighted if (mean := arm.series(f"{key}.mean")) is not None]
    measured = [(arm, mean) for arm, mean in measured if arm.series("consistency.lags") is not None]
    if not measured:
        return []
    top = 1.08 * max(float(np.nanmax(mean)) for _, mean in measured)
    low = min(0.0, 1.15 * min(float(np.nanmin(mean)) for _, mean in measured))
    panels, excesses = [], []
    for arm, mean in measured:
        style, lags = styles[arm.name], arm.series("consistency.lags")
        traces = []
        for null, (label, dash) in _NULLS.items():
            values = arm.series(f"{key}.{null}")
            if values is not None:
                traces.append(_over(lags, values, label, {"color": MUTED, "dash": dash, "width": 1.4}))
        traces.append(_over(lags, mean, "measured", line_of(style), marker_of(style)))
        panels.append(Panel(traces, _lag_layout(lags, [low, top]), arm.name))
        excess = arm.series(f"consistency.{measure}_excess_within")
        if excess is not None:
            excesses.append(_over(lags, excess, plain(arm.name), line_of(style), marker_of(style)))
    if len(excesses) > 1:
        panels.append(Panel(excesses, _lag_layout(measured[0][0].series("consistency.lags")), "Measured minus dashed"))
    return panels


def _over(lags: Any, values: np.ndarray, name: str, line: Trace, marker: Trace | None = None) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers" if marker else "lines",
        "name": name,
        "x": significant(lags),
        "y": significant(values),
        "line": line,
        "hovertemplate": "%{y:.3f}<extra>%{fullData.name}</extra>",
        **({"marker": marker} if marker else {}),
    }


def _lag_layout(lags: Any, span: list[float] | None = None) -> dict[str, Any]:
    x = {
        "type": "log",
        "showgrid": False,
        "tickvals": significant(lags),
        "ticktext": [f"{lag:g}" for lag in lags],
        "title": {"text": "lag in tokens"},
    }
    return {"hovermode": "x unified", "xaxis": x, "yaxis": {"range": span} if span else {"zeroline": True}}
