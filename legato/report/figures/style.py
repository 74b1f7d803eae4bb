"""The look of every figure: one palette, one set of sizes, one way to tell arms apart without colour.

Colours are Okabe & Ito's colour-blind safe set in an order of falling contrast; line styles and markers differ as well,
so that a figure reads in greyscale.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from legato.results.saved_run import Arm

INK = "#1a1c1f"
MUTED = "#676c73"
RULE = "#dfe2e5"
FAINT = "#b4b9bf"
SURFACE = "#fefefe"
SEQUENTIAL: Literal["cividis"] = "cividis"  # perceptually uniform, the same to the colour-blind, monotone in greyscale

WIDTH = 760  # of a PNG in pixels, before SCALE
SCALE = 1.5


@dataclass(frozen=True)
class ArmStyle:
    """dash: lengths of strokes and gaps in pixels, empty for a solid line. marker: a shape of Vega's or its path."""

    colour: str
    dash: tuple[float, ...] = ()
    marker: str = "circle"


_X = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", _X)
_COLOURS = (INK, "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (9, 2.5),
    (3.5, 2),
    (9, 2, 2, 2),
    (1.6, 1.6),
    (14, 3),
    (6, 2, 1.6, 2, 1.6, 2),
)
_ARM_STYLES = tuple(map(ArmStyle, _COLOURS, _DASHES, MARKERS))

# The figures' colours become the page's, so that they follow its light or dark scheme.
PAGE_COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", FAINT: "faint", SURFACE: "surface"} | {
    colour: f"c{i}" for i, colour in enumerate(_COLOURS) if i
}

_AXIS = {
    "domainColor": FAINT,
    "tickColor": FAINT,
    "tickSize": 4,
    "gridColor": RULE,
    "labelColor": MUTED,
    "labelFontSize": 11,
    "labelLimit": 260,
    "titleColor": MUTED,
    "titleFontSize": 11.5,
    "titleFontWeight": "normal",
    "titleLimit": 0,
}
CONFIG: dict[str, Any] = {
    "font": "DejaVu Sans, sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": _AXIS,
    "axisX": {"grid": False, "labelOverlap": True, "labelSeparation": 6},
    "axisY": {"ticks": False, "domain": False},
    "legend": {
        "labelColor": MUTED,
        "labelFontSize": 10.5,
        "titleColor": MUTED,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titleLimit": 0,
    },
    "title": {"color": INK, "fontSize": 12.5, "anchor": "start", "offset": 8, "limit": 0},
    "concat": {"spacing": 18},
    "line": {"strokeCap": "butt"},
}

# In the page a panel may be too narrow for the names beside its points: they are left to the legend and the pointer.
PAGE_CONFIG = {**CONFIG, "style": {"label": {"opacity": {"expr": "width < 420 ? 0 : 1"}}}}


def page_colour(colour: str) -> str:
    """The page's name for a colour of the figures."""
    return f"var(--{PAGE_COLOURS[colour]})"


def run_styles(labels: Sequence[str]) -> dict[str, ArmStyle]:
    """A style per run; from the eighth on they repeat."""
    return {label: _ARM_STYLES[i % len(_ARM_STYLES)] for i, label in enumerate(labels)}


def arm_colours() -> list[str]:
    """The colours arms are drawn in, the baseline's first."""
    return list(_COLOURS)


def arm_styles(arms: Iterable[Arm]) -> dict[str, ArmStyle]:
    """A style per arm name; the baseline always has the first, which is the colour of the text."""
    ordered = sorted(arms, key=lambda arm: arm.role != "baseline")
    has_baseline = bool(ordered) and ordered[0].role == "baseline"
    styles = _ARM_STYLES if has_baseline else _ARM_STYLES[1:]
    return {arm.name: styles[i % len(styles)] for i, arm in enumerate(ordered)}
