"""The matched comparison as a figure: ratios to the baseline with their intervals, at its L0 and at its FVU."""

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np

from legato.report.figures.chart import hover, number, rule
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import FAINT, MUTED, SURFACE, ArmStyle, arm_styles
from legato.results.matched.compare import AC_RATIO, KAPPA_RATIO, widest
from legato.results.matched.points import ALL, MEASURES
from legato.results.saved_run import SavedRun

_PANELS = ((MEASURES[0], "Kappa excess, times the baseline's", KAPPA_RATIO), (MEASURES[1], "AC excess", AC_RATIO))
_PLACES = {"at_l0": "at the baseline's L0", "at_fvu": "at its FVU"}
_FLOOR = 0.2  # a smaller ratio is an arrow at the edge
# Ticks for an axis that spans up to so many times its lowest value: more would run into each other.
_TICKS = ((12.0, (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12)), (300.0, (0.3, 1, 3, 10, 30, 100)), (np.inf, (1, 10, 100, 1000)))


def matched_comparison(run: SavedRun) -> Plot:
    """A row per method; filled: at the baseline's L0, hollow: at its FVU; dashed: the target."""
    methods = {} if run.matched is None else run.matched["methods"]
    shown = {
        name: found
        for name, method in methods.items()
        if (found := {place: entry for place in _PLACES if (entry := _ratios(method, place))})
    }
    if not shown:
        raise MissingResult("no method could be matched with a baseline (matched.json)")
    styles = {arm.group: arm_styles(run.highlighted)[arm.name] for arm in run.highlighted}
    looks = {name: styles.get(name, ArmStyle(MUTED)) for name in shown}
    panels = [_panel(shown, looks, *panel) for panel in _PANELS]
    keys = [
        Key("at the baseline's L0, 95 % interval", ArmStyle(MUTED)),
        Key("at its FVU", ArmStyle(MUTED), hollow=True),
        Key("target", ArmStyle(MUTED, (5.0, 3.0)), ("line",)),
    ]
    return Plot([View("", panels)], height=34 * len(shown) + 10, beside=172, keys=keys)


def _panel(shown: Mapping[str, Any], looks: Mapping[str, ArmStyle], measure: str, title: str, target: float) -> Panel:
    ends: list[float] = [1.0, target]
    rows: list[dict[str, Any]] = []
    beyond: list[dict[str, Any]] = []
    for name, found in shown.items():
        for place, entry in found.items():
            if measure not in entry:
                continue
            ratio, (low, high) = entry[measure]
            row = {"arm": name, "place": place, "at": _PLACES[place], "ratio": float(f"{ratio:.4g}")}
            row |= {"low": low, "high": high, "colour": looks[name].colour, "shape": looks[name].marker}
            row["fill"] = looks[name].colour if place == "at_l0" else SURFACE
            row["told"] = f"{low:.2f} to {high:.2f}"
            (rows if ratio >= _FLOOR else beyond).append(row)
            ends += [low, high] if ratio >= _FLOOR else []
    left, right = 0.9 * max(min(ends), _FLOOR), 1.12 * max(ends)
    ticks = [tick for tick in next(few for span, few in _TICKS if right / left <= span) if left <= tick <= right]
    axis = alt.Axis(values=list(ticks), labelExpr="format(datum.value, '~g') + '×'", grid=True, title=None)
    scale = {"type": "log", "domain": [left, right]}
    side = alt.Axis(labelLimit=165, domain=False, ticks=False, grid=False, offset=6)
    y = alt.Y("arm:N", sort=None, title=None, scale=alt.Scale(domain=list(shown), padding=0.3), axis=side)
    offset = alt.YOffset("place:N", scale=alt.Scale(domain=list(_PLACES), paddingInner=0.4))
    colour = alt.Color("colour:N", scale=None)
    shape = alt.Shape("shape:N", scale=None)
    tooltip = hover("arm", "at", "ratio:ratio:.3~g", "told:95 %")
    base = alt.Chart(Rows(values=rows)).encode(y=y, yOffset=offset)
    layers = [
        rule(x=1, colour=FAINT),
        rule(x=target, colour=MUTED, dash=(5, 3)),
        base.mark_rule(strokeWidth=1.4).encode(
            x=alt.X(**number("low", None, scale=scale, axis=axis)), x2="high:Q", color=colour
        ),
        base.mark_point(size=55, opacity=1, strokeWidth=1.4).encode(
            x=alt.X(**number("ratio", None, scale=scale, axis=axis)),
            stroke=colour,
            fill=alt.Fill("fill:N", scale=None),
            shape=shape,
            tooltip=tooltip,
        ),
    ]
    if beyond:
        arrows = alt.Chart(Rows(values=[row | {"edge": left} for row in beyond])).encode(y=y, yOffset=offset)
        arrow = arrows.mark_point(shape="triangle-left", size=50, filled=True, opacity=1)
        layers.append(
            arrow.encode(x=alt.X(**number("edge", None, scale=scale, axis=axis)), color=colour, tooltip=tooltip)
        )
    return Panel(alt.layer(*layers), title)


def _ratios(method: Mapping[str, Any], place: str) -> dict[str, tuple[float, tuple[float, float]]]:
    """(ratio, interval) by measure, the interval a point where there is none; empty where it is not matched."""
    at = method[place]
    if not at["matched"]:
        return {}
    found = {}
    for measure, _, _ in _PANELS:
        entry = at["populations"][ALL].get(measure)
        if entry is not None and entry["ratio"] is not None:
            low, high = widest(entry) or (entry["ratio"], entry["ratio"])
            found[measure] = (entry["ratio"], (max(low, _FLOOR), high))
    return found
