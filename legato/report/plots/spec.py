"""What an interactive plot of the page is made of; plots.js draws it with plotly.js.

Colours are the page's (`var(--c1)`), so that a plot follows its light or dark scheme. Names come from the user: they
enter a trace through `plain`.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from legato.report.figures.style import ArmStyle, page_colour
from legato.results.saved_run import Arm

Trace = dict[str, Any]

_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
}
MUTED, FAINT, INK, SURFACE = (f"var(--{name})" for name in ("muted", "faint", "ink", "surface"))


@dataclass(frozen=True)
class Panel:
    """One set of axes. steps: what replaces the first trace's values at each step of the plot's slider."""

    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    steps: Sequence[Trace] = ()


@dataclass(frozen=True)
class View:
    """What is seen at once; the reader switches between views by their labels."""

    label: str
    panels: Sequence[Panel]
    note: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of the legend above a plot."""

    label: str
    style: ArmStyle


@dataclass(frozen=True)
class Plot:
    """views: at least one. height: of a panel, in pixels, unless it is square. steps: labels of the slider's places."""

    views: Sequence[View]
    height: int = 300
    columns: int = 2
    square: bool = False
    keys: Sequence[Key] = ()
    steps: Sequence[str] = ()
    step_name: str = ""
    note: str = ""

    @property
    def rows(self) -> int:
        """Of panels, where there is room for all columns: what the page keeps free until the plot is drawn."""
        return -(-max(len(view.panels) for view in self.views) // self.columns)

    def content(self) -> dict[str, Any]:
        """What plots.js reads."""
        return {
            "views": [
                {
                    "label": view.label,
                    "note": view.note,
                    "panels": [
                        {"title": p.title, "traces": list(p.traces), "layout": p.layout, "steps": list(p.steps)}
                        for p in view.panels
                    ],
                }
                for view in self.views
            ],
            "height": self.height,
            "columns": self.columns,
            "square": self.square,
            "steps": list(self.steps),
        }


def plain(text: str) -> str:
    """A name as plotly.js shows it letter by letter: it reads tags and %{...} in what it is given."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def significant(values: Any, digits: int = 3) -> list[Any]:
    """Numbers rounded to significant digits, None for what is not finite; nested for two axes."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [significant(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def rounded(values: Any, decimals: int = 3) -> list[Any]:
    """Numbers rounded to decimals, None for what is not finite; nested for two axes."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [rounded(row, decimals) for row in values]
    return [round(value, decimals) if np.isfinite(value) else None for value in values.tolist()]


def line_of(style: ArmStyle, width: float = 2.0) -> dict[str, Any]:
    dash = "solid" if isinstance(style.line, str) else ",".join(f"{1.6 * length:.3g}px" for length in style.line[1])
    return {"color": page_colour(style.colour), "dash": dash, "width": width}


def marker_of(style: ArmStyle, size: float = 7.0) -> dict[str, Any]:
    return {"color": page_colour(style.colour), "symbol": _SYMBOLS[style.marker], "size": size}


def keys_of(arms: Sequence[Arm], styles: Mapping[str, ArmStyle]) -> list[Key]:
    return [Key(arm.name, styles[arm.name]) for arm in arms]


def axis(title: str = "", **settings: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **settings} if title else settings
