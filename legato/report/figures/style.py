"""How every figure looks: one palette, one set of sizes, one way to tell arms apart without colour.

Colours are Okabe & Ito's colour-blind safe set in an order of falling contrast; line styles and markers differ as well,
so that a figure reads in greyscale.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from legato.results.saved_run import Arm

INK = "#1a1c1f"
MUTED = "#676c73"
RULE = "#dfe2e5"
FAINT = "#b4b9bf"
SURFACE = "#fefefe"
SEQUENTIAL = "cividis"  # perceptually uniform, the same to the colour-blind, monotone in greyscale

WIDTH = 7.4  # inches, a full text column

LineStyle = Literal["-"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class ArmStyle:
    colour: str
    line: LineStyle
    marker: str


_ARM_STYLES = (
    ArmStyle(INK, "-", "o"),
    ArmStyle("#d55e00", (0, (6, 1.6)), "s"),
    ArmStyle("#0072b2", (0, (2.2, 1.2)), "^"),
    ArmStyle("#009e73", (0, (6, 1.4, 1.2, 1.4)), "D"),
    ArmStyle("#cc79a7", (0, (1, 1)), "v"),
    ArmStyle("#e69f00", (0, (9, 2)), "P"),
    ArmStyle("#56b4e9", (0, (4, 1.2, 1, 1.2, 1, 1.2)), "X"),
)

_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": cycler(color=[style.colour for style in _ARM_STYLES]),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # names come from the user: a $ in one is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "svg.fonttype": "none",
    "svg.hashsalt": "legato",
}


# The figures' colours become the page's, so that they follow its light or dark scheme.
PAGE_COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", FAINT: "faint", SURFACE: "surface"} | {
    style.colour: f"c{i}" for i, style in enumerate(_ARM_STYLES) if i
}


def page_colour(colour: str) -> str:
    """The page's name for a colour of the figures."""
    return f"var(--{PAGE_COLOURS[colour]})"


def run_styles(labels: Sequence[str]) -> dict[str, ArmStyle]:
    """A style per run; from the eighth on they repeat."""
    return {label: _ARM_STYLES[i % len(_ARM_STYLES)] for i, label in enumerate(labels)}


def arm_colours() -> list[str]:
    """The colours arms are drawn in, the baseline's first."""
    return [style.colour for style in _ARM_STYLES]


@contextmanager
def figure_style() -> Iterator[None]:
    with mpl.rc_context(_RC):
        yield


def arm_styles(arms: Iterable[Arm]) -> dict[str, ArmStyle]:
    """A style per arm name; the baseline always has the first, which is the colour of the text."""
    ordered = sorted(arms, key=lambda arm: arm.role != "baseline")
    has_baseline = bool(ordered) and ordered[0].role == "baseline"
    styles = _ARM_STYLES if has_baseline else _ARM_STYLES[1:]
    return {arm.name: styles[i % len(styles)] for i, arm in enumerate(ordered)}


@dataclass(frozen=True)
class PointLabel:
    point: tuple[float, float]
    text: str
    colour: str
    required: bool = True


def label_points(
    ax: Axes,
    labels: Sequence[PointLabel],
    *,
    lines: Sequence[tuple[float, float]] = (),
    faint: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each label beside its point where it covers least; the first listed choose first.

    A label that would cover another label, a labelled point or a line is left out unless it is `required`; one without
    text only keeps its point free.
    Call it last: it needs the axes' final limits. lines: points along drawn lines; faint: points that may be covered
    where nothing else is left. All in data coordinates.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    frame = ax.get_window_extent()

    def around(points: Sequence[tuple[float, float]], radius: float) -> list[Bbox]:
        at = ax.transData.transform(np.reshape(list(points), (-1, 2)))
        return [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in at]

    taken = around([label.point for label in labels], 3 * pixel)
    strokes, dots = around(lines, pixel), around(faint, 2 * pixel)
    for label in labels:
        if not label.text:
            continue
        [(x, y)] = ax.transData.transform([label.point])
        width, height = 0.62 * len(label.text) * _LABEL_SIZE * pixel, 1.15 * _LABEL_SIZE * pixel

        boxes = [
            Bbox.from_bounds(x + dx * pixel - _SHARE_LEFT[align] * width, y + dy * pixel - height / 2, width, height)
            for dx, dy, align in _LABEL_OFFSETS
        ]
        costs = [
            1000 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            + 100 * box.count_overlaps(taken)
            + 10 * box.count_overlaps(strokes)
            + box.count_overlaps(dots)
            for box in boxes
        ]
        best = costs.index(min(costs))
        if costs[best] >= 10 and not label.required:
            continue
        taken.append(boxes[best])
        dx, dy, align = _LABEL_OFFSETS[best]
        ax.annotate(
            label.text,
            label.point,
            xytext=(dx, dy),
            textcoords="offset points",
            color=label.colour,
            fontsize=_LABEL_SIZE,
            ha=align,
            va="center",
            zorder=6,
        )


_LABEL_SIZE = 8.5
_SHARE_LEFT = {"left": 0.0, "center": 0.5, "right": 1.0}
_LABEL_OFFSETS: tuple[tuple[float, float, Literal["left", "center", "right"]], ...] = (
    (7, 0, "left"),
    (5, 8, "left"),
    (5, -8, "left"),
    (-7, 0, "right"),
    (-5, 8, "right"),
    (-5, -8, "right"),
    (0, 11, "center"),
    (0, -11, "center"),
)
