"""Training curves: logged values over the tokens that the arms read."""

import altair as alt
import numpy as np

from legato.report.figures.chart import curves, hover, joined_tables, number, table
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import FAINT, arm_styles
from legato.results.saved_run import Arm, SavedRun

_PANELS = (
    ("loss", "Loss, all terms"),
    ("fvu", "Fraction of variance unexplained"),
    ("l0", "Active latents per token (L0)"),
    ("dead", "Dead latents"),
)
_MAX_POINTS, _BACKGROUND_POINTS = 300, 100
_SETTLED = 0.04  # the first steps, where every curve falls from 1, would squeeze the rest of the axis flat


def training_curves(run: SavedRun) -> Plot:
    """Loss, FVU, L0 and dead latents over tokens: a panel each, a line per arm."""
    if not run.log:
        raise MissingResult("no training log (log.jsonl) was saved")
    panels = [(key, title) for key, title in _PANELS if any(key in columns for columns in run.log.values())]
    if not panels:
        raise MissingResult("the training log (log.jsonl) holds none of loss, fvu, l0, dead")
    note = f"Thin grey lines: {len(run.background)} further arms." if run.background else ""
    drawn = [_panel(run, key, title) for key, title in panels]
    return Plot([View("", drawn)], keys=arm_keys(run, "line"), note=note)


def _panel(run: SavedRun, key: str, title: str) -> Panel:
    tokens = max(
        (float(np.nanmax(columns["tokens"])) for columns in run.log.values() if "tokens" in columns), default=0
    )
    unit, divisor = ("million tokens", 1e6) if tokens >= 1e6 else ("thousand tokens", 1e3)
    unit, divisor = (unit, divisor) if tokens else ("training step", 1.0)
    styles = arm_styles(run.highlighted)
    logged = {arm.name: columns for arm in run.trained if key in (columns := run.log.get(arm.name, {}))}

    def rows(arm: Arm, points: int) -> Rows:
        columns = logged[arm.name]
        x = columns.get("tokens", columns.get("step", np.arange(len(columns[key])))) / divisor
        return table(x=_thin(x, points), y=_thin(columns[key], points), arm=arm.name)

    top = max((ceiling(columns[key]) for columns in logged.values()), default=0.0)
    low = min(float(np.nanmin(columns[key])) for columns in logged.values()) if key == "loss" else 0.0
    x = alt.X(**number("x", unit, scale={}))
    y = alt.Y(**number("y", None, scale={"domain": [low, 1.06 * top if top > 0 else 1.0]}))
    tooltip = hover("arm", f"x:{unit}:.4~g", f"y:{title}:.4~g")
    layers = []
    if grey := [rows(arm, _BACKGROUND_POINTS) for arm in run.background if arm.name in logged]:
        line = alt.Chart(joined_tables(grey)).mark_line(color=FAINT, strokeWidth=0.9, opacity=0.75, clip=True)
        layers.append(line.encode(x=x, y=y, detail="arm:N"))
    if named := [rows(arm, _MAX_POINTS) for arm in reversed(run.highlighted) if arm.name in logged]:
        layers += curves(joined_tables(named), styles, x, y, tooltip)
    return Panel(alt.layer(*layers), title)


def arm_keys(run: SavedRun, *parts: str) -> list[Key]:
    """An entry of the legend per highlighted arm."""
    styles = arm_styles(run.highlighted)
    return [Key(arm.name, styles[arm.name], parts or ("line", "marker")) for arm in run.highlighted]


def ceiling(values: np.ndarray) -> float:
    """The largest value of a curve once it has settled; 0 where there is none."""
    settled = values[int(_SETTLED * len(values)) :]
    return float(np.nanmax(settled)) if np.isfinite(settled).any() else 0.0


def _thin(values: np.ndarray, most: int) -> np.ndarray:
    return values if len(values) <= most else values[np.linspace(0, len(values) - 1, most).round().astype(int)]
