"""The matched comparison as a figure: ratios to the baseline with their intervals, at its L0 and at its FVU."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import FAINT, MUTED, SURFACE, WIDTH, ArmStyle, arm_styles
from legato.results.matched.compare import AC_RATIO, KAPPA_RATIO, widest
from legato.results.matched.points import ALL, MEASURES
from legato.results.saved_run import SavedRun

_PANELS = ((MEASURES[0], "Kappa excess, times the baseline's", KAPPA_RATIO), (MEASURES[1], "AC excess", AC_RATIO))
_PLACES = {"at_l0": -0.13, "at_fvu": 0.17}
_FLOOR = 0.2  # a smaller ratio is an arrow at the edge
# Ticks for an axis that spans up to so many times its lowest value: more would run into each other.
_TICKS = ((12.0, (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12)), (300.0, (0.3, 1, 3, 10, 30, 100)), (np.inf, (1, 10, 100, 1000)))


def matched_comparison(run: SavedRun) -> Figure:
    """A row per method; filled: at the baseline's L0, hollow: at its FVU; dashed: the target."""
    methods = {} if run.matched is None else run.matched["methods"]
    shown = {
        name: found
        for name, method in methods.items()
        if (found := {place: entry for place in _PLACES if (entry := _ratios(method, place))})
    }
    if not shown:
        raise MissingResult("no method could be matched with a baseline (matched.json)")
    styles = {arm.group: style for arm in run.highlighted for style in [arm_styles(run.highlighted)[arm.name]]}
    figure = Figure(figsize=(WIDTH, 0.3 * len(shown) + 1.15))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (measure, title, target) in zip(axes, _PANELS, strict=True):
        ends, beyond = [1.0, target], []
        for row, (name, found) in enumerate(shown.items()):
            style = styles.get(name, ArmStyle(MUTED, "-", "o"))
            for place, entry in found.items():
                if measure not in entry:
                    continue
                ratio, (low, high) = entry[measure]
                y = row + _PLACES[place]
                if ratio < _FLOOR:
                    beyond.append((y, style.colour))
                    continue
                ends += [low, high]
                ax.plot([low, high], [y, y], color=style.colour, linewidth=1.3, solid_capstyle="butt")
                face = style.colour if place == "at_l0" else SURFACE
                ax.plot(ratio, y, style.marker, color=style.colour, markerfacecolor=face, markersize=5.5)
        ax.axvline(1, color=FAINT, linewidth=1)
        ax.axvline(target, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        ax.set_xscale("log")
        left, right = 0.9 * max(min(ends), _FLOOR), 1.12 * max(ends)
        ax.set_xlim(left, right)
        for y, colour in beyond:
            ax.plot(left, y, "<", color=colour, markersize=5, clip_on=False)
        ticks = [tick for tick in next(few for span, few in _TICKS if right / left <= span) if left <= tick <= right]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{tick:g}×" for tick in ticks])
        ax.set_title(title)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
    axes[0].set_yticks(range(len(shown)), list(shown))
    axes[0].set_ylim(len(shown) - 0.5, -0.6)
    for tick, name in zip(axes[0].get_yticklabels(), shown, strict=True):
        tick.set_color(styles[name].colour if name in styles else MUTED)
    handles = [
        Line2D([], [], color=MUTED, marker="o", linestyle="-", linewidth=1.3),
        Line2D([], [], color=MUTED, marker="o", linestyle="-", linewidth=1.3, markerfacecolor=SURFACE),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 2)), linewidth=1),
    ]
    labels = ["at the baseline's L0, 95 % interval", "at its FVU", "target"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.6)
    return figure


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
