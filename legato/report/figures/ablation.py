"""The window x coefficient ablation as heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from legato.report.figures.chart import hover
from legato.report.figures.plot import MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import INK, SEQUENTIAL, SURFACE
from legato.results.saved_run import Arm, SavedRun


@dataclass(frozen=True)
class Quantity:
    key: str
    title: str
    digits: int
    better: str  # "lower", "higher", or "match" where a comparison wants the baseline's value


QUANTITIES = (
    Quantity("core.fvu", "FVU", 3, "lower"),
    Quantity("consistency.kappa1_excess_within", "Kappa excess", 3, "higher"),
    Quantity("consistency.ac1_excess_within", "AC excess", 3, "higher"),
    Quantity("core.ce_loss_score", "CE loss score", 3, "higher"),
    Quantity("silent", "Silent latents, %", 1, "lower"),
    Quantity("core.l0", "L0", 1, "match"),
)


def quantity_of(arm: Arm, quantity: Quantity) -> float | None:
    if quantity.key != "silent":
        return arm.value(quantity.key)
    alive = arm.value("core.frac_alive")
    return None if alive is None else 100 * (1 - alive)


def ablation_heat_maps(run: SavedRun) -> Plot:
    """Window x coefficient heat maps of the six quantities, a view of six per temporal term; seeds are averaged."""
    members = [a for a in run.arms if a.in_grid and a.window is not None and a.coefficient is not None]
    if not members:
        raise MissingResult("this run has no window x coefficient ablation")
    terms = list(dict.fromkeys(arm.term or "temporal term" for arm in members))
    views = []
    for term in terms:
        arms = [arm for arm in members if (arm.term or "temporal term") == term]
        views.append(View(term, [_heat_map(arms, quantity, run.baseline) for quantity in QUANTITIES]))
    still = [
        Panel(panel.chart, panel.title if len(views) == 1 else f"{view.label}: {panel.title}")
        for view in views
        for panel in view.panels
    ]
    return Plot(views, height=170, columns=3, still=still)


def _heat_map(arms: Sequence[Arm], quantity: Quantity, baseline: Arm | None) -> Panel:
    windows = sorted({arm.window for arm in arms if arm.window is not None})
    coefficients = sorted({arm.coefficient for arm in arms if arm.coefficient is not None}, reverse=True)
    values = np.full((len(coefficients), len(windows)), np.nan)
    for row, coefficient in enumerate(coefficients):
        for column, window in enumerate(windows):
            cell = [quantity_of(a, quantity) for a in arms if (a.coefficient, a.window) == (coefficient, window)]
            finite = [value for value in cell if value is not None]
            if finite:
                values[row, column] = np.mean(finite)
    reference = None if baseline is None else quantity_of(baseline, quantity)
    title = quantity.title + _DIRECTIONS[quantity.better]
    if reference is not None:
        title += f", baseline {reference:.{quantity.digits}f}"
    if not np.isfinite(values).any():
        return Panel(alt.Chart(Rows(values=[{"text": "not measured"}])).mark_text().encode(text="text:N"), title)
    scores, (low, high) = _goodness(values, quantity, reference)
    rows = [
        {
            "window": str(windows[column]),
            "coefficient": f"{coefficients[row]:g}",
            "text": f"{values[row, column]:.{quantity.digits}f}",
            "value": float(f"{values[row, column]:.5g}"),
            "score": float((scores[row, column] - low) / (high - low)),
        }
        for row, column in np.argwhere(np.isfinite(values)).tolist()
    ]
    side: dict[str, Any] = {"ticks": False, "domain": False, "grid": False}
    base = alt.Chart(Rows(values=rows)).encode(
        x=alt.X("window:O", sort=None, title="window (tokens)", axis=alt.Axis(labelAngle=0, **side)),
        y=alt.Y("coefficient:O", sort=[f"{c:g}" for c in coefficients], title="coefficient", axis=alt.Axis(**side)),
    )
    scale = alt.Scale(scheme=SEQUENTIAL, reverse=True, domain=[0, 1])
    cells = base.mark_rect().encode(
        color=alt.Color("score:Q", scale=scale, legend=None),
        tooltip=hover("window", "coefficient", f"value:{quantity.title}:.5~g"),
    )
    # The numbers stand on plates of the page's colour: no one ink can be read on all of the scale.
    plate = base.mark_point(shape="M-1.5,-.6h3v1.2h-3z", size=420, filled=True, opacity=0.85, color=SURFACE)
    text = base.mark_text(fontSize=10, color=INK).encode(text="text:N")
    return Panel(alt.layer(cells, plate, text), title)


_DIRECTIONS = {"lower": " \u2193", "higher": " \u2191", "match": ""}


def _goodness(
    values: np.ndarray, quantity: Quantity, reference: float | None
) -> tuple[np.ndarray, tuple[float, float]]:
    """Scores for a cell's darkness, and their limits: better is darker, the baseline's value is within the limits.

    The limits span at least 4 % of the values (10 % where they should match): noise must not look like a trend.
    """
    typical = float(np.nanmean(values))
    if quantity.better == "match":
        target = typical if reference is None else reference
        scores, seen, span = -np.abs(values - target), np.zeros(1), 0.1 * abs(typical)
    else:
        sign = -1.0 if quantity.better == "lower" else 1.0
        scores, span = sign * values, 0.04 * abs(typical)
        seen = np.array([] if reference is None else [sign * reference])
    seen = np.append(seen, scores[np.isfinite(scores)])
    low, high = float(seen.min()), float(seen.max())
    slack = max(span - (high - low), 1e-9)
    above = 0.0 if quantity.better == "match" else slack / 2
    return scores, (low - (slack - above), high + above)
