"""A plot of the report: panels of Altair charts, drawn as a PNG without a browser and by plots.js in the page."""

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert
from altair.utils.schemapi import debug_mode

from legato.report.figures.style import CONFIG, INK, MUTED, SCALE, WIDTH, ArmStyle

Chart = alt.Chart | alt.LayerChart | alt.FacetChart  # the last only by Altair's types: nothing here is split up


def drawing() -> AbstractContextManager[None]:
    """Altair does not check each piece of a chart against Vega-Lite's schema, which takes four fifths of its time."""
    return debug_mode(False)


class MissingResult(Exception):
    """The saved results do not hold what a figure needs; the message says what is missing, for the reader."""


class Rows(alt.InlineData):
    """Data of a chart. Altair copies a chart at every step of its making; rows never change and are not copied."""

    _class_is_valid_at_instantiation = False

    def __deepcopy__(self, memo: Any) -> "Rows":
        return self


_KEY_ROW, _KEY_LINE = 20, 26  # pixels


@dataclass(frozen=True)
class Panel:
    """One set of axes without a size. steps: the charts that stand in its place along the plot's slider.
    zoom: whether a reader may move and magnify it (shift with drag and wheel)."""

    chart: Chart
    title: str = ""
    colour: str = INK
    steps: Sequence[Chart] = ()
    zoom: bool = False


@dataclass(frozen=True)
class View:
    """Panels that are seen at once; the reader switches between views by their labels."""

    label: str
    panels: Sequence[Panel]
    note: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of the legend above a plot. parts: which of `line` and `marker` it shows; hollow: only the outline."""

    label: str
    style: ArmStyle
    parts: tuple[str, ...] = ("line", "marker")
    hollow: bool = False


@dataclass(frozen=True)
class Plot:
    """views: at least one. height: of a panel, in pixels, unless it is square. steps: labels of the slider's places.

    still: the panels of the PNG, by default those of all views, titled by their view; so many in a row, so high.
    beside: pixels that an axis takes beside its panel there.
    """

    views: Sequence[View]
    height: int = 220
    columns: int = 2
    square: bool = False
    keys: Sequence[Key] = ()
    steps: Sequence[str] = ()
    step_name: str = ""
    note: str = ""
    still: Sequence[Panel] = ()
    still_columns: int = 0
    still_height: int = 0
    beside: int = 62

    @property
    def rows(self) -> int:
        """Count the rows of panels if all columns have room: the page keeps that height until the plot is drawn."""
        return -(-max(len(view.panels) for view in self.views) // self.columns)

    def content(self) -> dict[str, Any]:
        """Return the content that plots.js reads."""
        with drawing():
            views = [
                {
                    "note": view.note,
                    "panels": [
                        {"title": p.title, "charts": [_spec(c, zoom=p.zoom) for c in p.steps or [p.chart]]}
                        for p in view.panels
                    ],
                }
                for view in self.views
            ]
        return {"views": views, "height": self.height, "columns": self.columns, "square": self.square}

    def png(self) -> bytes:
        """The plot as a picture."""
        with drawing():
            return vl_convert.vegalite_to_png(self._whole(), scale=2 if self.square else SCALE)

    def _whole(self) -> dict[str, Any]:
        """Legend, panels and note as one specification of Vega-Lite."""
        panels = list(self.still) or [
            panel if panel.title else Panel(panel.chart, view.label) for view in self.views for panel in view.panels
        ]
        columns = self.still_columns or min(max(self.columns, 3 if len(self.views) > 1 else 1), len(panels))
        width = min(WIDTH / columns - self.beside - 6, 560.0)
        height = width if self.square else self.still_height or self.height
        body: dict[str, Any] = {
            "concat": [
                {**_unframed(panel.chart), "width": width, "height": height}
                | ({"title": {"text": panel.title, "color": panel.colour}} if panel.title else {})
                for panel in panels
            ],
            "columns": columns,
            "resolve": _APART,
        }
        parts = [keys_chart(self.keys)] if self.keys else []
        parts += [body, _words(self.note)] if self.note else [body]
        spec = {"vconcat": parts, "resolve": _APART, "config": {**CONFIG, "background": "white"}}
        # Only a whole specification may hold data by name.
        charts = [part for part in parts if part is not body] + body["concat"]
        spec["datasets"] = {name: rows for chart in charts for name, rows in chart.pop("datasets", {}).items()}
        return spec


_APART = {"scale": dict.fromkeys(("color", "shape", "strokeDash", "fill", "stroke"), "independent")}


def _unframed(chart: Chart) -> dict[str, Any]:
    """A chart's own part of a specification, without what a whole one has once."""
    spec = chart.to_dict()
    del spec["config"], spec["$schema"]
    return spec


def _spec(chart: Chart, *, zoom: bool) -> dict[str, Any]:
    autosize = {"type": "fit", "contains": "padding"}
    spec = {**_unframed(chart), "width": "container", "height": "container", "autosize": autosize}
    if zoom:
        unit = spec["layer"][0] if "layer" in spec else spec
        unit["params"] = [
            {
                "name": "zoom",
                "bind": "scales",
                "select": {
                    "type": "interval",
                    "zoom": "wheel![event.shiftKey]",
                    "translate": "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
                },
            }
        ]
    return spec


def keys_chart(keys: Sequence[Key]) -> dict[str, Any]:
    """The legend above a PNG: entries side by side, in as many rows as they need."""
    x, y, rows = 0.0, 0.0, []
    for key in keys:
        needed = _KEY_LINE + 8 + 7.4 * len(key.label)
        if x and x + needed > WIDTH:
            x, y = 0.0, y + _KEY_ROW
        style = key.style
        rows.append(
            {
                "x": x,
                "x2": x + _KEY_LINE,
                "middle": x + _KEY_LINE / 2,
                "text": x + _KEY_LINE + 6,
                "y": y + _KEY_ROW / 2,
                "label": key.label,
                "colour": style.colour,
                "fill": None if key.hollow else style.colour,
                "dash": list(style.dash),
                "shape": style.marker,
                "line": "line" in key.parts,
                "marker": "marker" in key.parts,
            }
        )
        x += needed + 16
    base = alt.Chart(Rows(values=rows)).encode(y=alt.Y("y:Q", scale=None, axis=None))
    at = {name: alt.X(f"{name}:Q", scale=None, axis=None) for name in ("x", "middle", "text")}
    colour = alt.Color("colour:N", scale=None)
    lines = base.transform_filter("datum.line").mark_rule(strokeWidth=2)
    dots = base.transform_filter("datum.marker").mark_point(size=60, opacity=1)
    chart = alt.layer(
        lines.encode(at["x"], x2="x2:Q", color=colour, strokeDash=alt.StrokeDash("dash:N", scale=None)),
        dots.encode(
            at["middle"], stroke=colour, fill=alt.Fill("fill:N", scale=None), shape=alt.Shape("shape:N", scale=None)
        ),
        base.mark_text(align="left", baseline="middle", fontSize=11.5, color=INK).encode(at["text"], text="label:N"),
    )
    return {**_unframed(chart), "width": WIDTH, "height": y + _KEY_ROW}


def _words(note: str) -> dict[str, Any]:
    lines = textwrap.wrap(note, 118)
    data = Rows(values=[{"text": line, "y": 14 * i + 7} for i, line in enumerate(lines)])
    mark = alt.Chart(data).mark_text(align="left", baseline="middle", fontSize=10.5, color=MUTED, x=0)
    chart = mark.encode(y=alt.Y("y:Q", scale=None, axis=None), text="text:N")
    return {**_unframed(chart), "width": WIDTH, "height": 14 * len(lines)}
