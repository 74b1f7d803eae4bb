"""Figures of features across tokens: over lag with both nulls, over latents, over firing rate."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import altair as alt
import numpy as np

from legato.report.figures import chart
from legato.report.figures.latent_data import Latents, latents_of, running_median
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import INK, MUTED, ArmStyle, arm_styles
from legato.report.figures.training import arm_keys
from legato.results.saved_run import Arm, SavedRun

_MEASURES = {"kappa": "Kappa of firing", "ac": "Autocorrelation"}
_NULLS = {
    "within_null": ("shuffled within the document", (6.0, 3.0)),
    "cross_null": ("shuffled across documents, same position", (2.0, 3.0)),
}
_BINS_SMOOTHED = 1.6  # standard deviation of the kernel
MOST_POINTS = 4000  # of one SAE: beyond that a browser is slow to redraw


def kappa_over_lag(run: SavedRun) -> Plot:
    """Kappa over lag, and autocorrelation as a second view: a panel per arm with both nulls, one of all excesses."""
    views = [View(label, panels) for measure, label in _MEASURES.items() if (panels := _lag_panels(run, measure))]
    if not views:
        raise MissingResult("no arm has consistency.kappa or consistency.ac over lags in metrics.json")
    return _over_lag(run, views)


def autocorrelation_over_lag(run: SavedRun) -> Plot:
    """Autocorrelation over lag alone."""
    panels = _lag_panels(run, "ac")
    if not panels:
        raise MissingResult("no arm has consistency.ac over lags in metrics.json")
    return _over_lag(run, [View("", panels)])


def _over_lag(run: SavedRun, views: Sequence[View]) -> Plot:
    nulls = [Key(label, ArmStyle(MUTED, dash), ("line",)) for label, dash in _NULLS.values()]
    columns = 2 if len(views[0].panels) in (2, 4) else 3
    return Plot(views, columns=columns, keys=[*arm_keys(run), *nulls], still=views[0].panels)


def _lag_panels(run: SavedRun, measure: str) -> list[Panel]:
    key, styles = f"consistency.{measure}", arm_styles(run.highlighted)
    measured = [(arm, mean) for arm in run.highlighted if (mean := arm.series(f"{key}.mean")) is not None]
    measured = [(arm, mean) for arm, mean in measured if arm.series("consistency.lags") is not None]
    if not measured:
        return []
    top = 1.08 * max(float(np.nanmax(mean)) for _, mean in measured)
    low = min(0.0, 1.15 * min(float(np.nanmin(mean)) for _, mean in measured))
    y = alt.Y(**chart.number("y", _MEASURES[measure].lower(), scale={"domain": [low, top]}))
    panels, excesses = [], []
    for arm, mean in measured:
        lags, style = arm.series("consistency.lags"), styles[arm.name]
        assert lags is not None
        x = chart.lag_axis(lags)
        layers: list[alt.Chart] = []
        for null, (label, dash) in _NULLS.items():
            values = arm.series(f"{key}.{null}")
            if values is None:
                continue
            if null == "within_null":
                above = chart.table(x=lags, low=values, high=np.maximum(mean, values))
                layers.append(chart.band(above, x, style.colour))
            line = chart.curves(
                chart.table(x=lags, y=values, arm=label), {label: ArmStyle(MUTED, dash)}, x, y, _LAG_HOVER
            )
            layers += line
        layers += chart.curves(
            chart.table(x=lags, y=mean, arm="measured"), {"measured": style}, x, y, _LAG_HOVER, markers=True
        )
        panels.append(Panel(alt.layer(*layers, resolve=chart.APART), arm.name, style.colour))
        excess = arm.series(f"consistency.{measure}_excess_within")
        if excess is not None:
            excesses.append(chart.table(x=lags, y=excess, arm=arm.name))
    if len(excesses) > 1:
        lines = chart.curves(
            chart.joined_tables(excesses), styles, x, alt.Y(**chart.number("y")), _LAG_HOVER, markers=True
        )
        panels.append(Panel(alt.layer(chart.rule(y=0), *lines), "Measured minus dashed"))
    return panels


_LAG_HOVER = chart.hover("arm:curve", "x:lag:~g", "y:value:.3f")


def kappa_excess_distribution(run: SavedRun) -> Plot:
    """The distribution over alive latents of the kappa excess at lag 1, a row per highlighted arm."""
    values = {
        arm.name: column[np.isfinite(column)]
        for arm in run.highlighted
        if (column := run.latent_column(arm.name, "kappa1_excess_within")) is not None and np.isfinite(column).any()
    }
    if not values:
        raise MissingResult("no feature table (features/<arm>.parquet) with kappa1_excess_within was saved")
    styles = arm_styles(run.highlighted)
    pooled = np.concatenate(list(values.values()))
    low, high = np.quantile(pooled, [0.002, 0.995])
    low, high = min(low, 0.0), max(high, low + 1e-3)
    edges = np.linspace(low - 0.06 * (high - low), high, 129)
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / _BINS_SMOOTHED) ** 2)
    kernel /= kernel.sum()
    histograms = {name: np.histogram(v, edges)[0] / len(v) for name, v in values.items()}
    densities = {name: np.convolve(histogram, kernel, mode="same") for name, histogram in histograms.items()}
    top = 1.1 * max(float(density.max()) for density in densities.values())
    y = alt.Y(**chart.number("high", None, scale={"domain": [0, top]}, axis=None))
    panels: list[Panel] = []
    for name, density in densities.items():
        last = len(panels) == len(densities) - 1
        title = "kappa excess over the within-document null, lag 1" if last else None
        axis = alt.Axis(labels=last, ticks=last)
        x = alt.X(**chart.number("x", title, scale={"domain": [edges[0], edges[-1]]}, axis=axis))
        colour = styles[name].colour
        mean, median = (round(float(centre), 3) + 0.0 for centre in (np.mean(values[name]), np.median(values[name])))
        text = f"mean {mean:.3f}, median {median:.3f}"
        hill = alt.Chart(chart.table(x=centres, high=density, arm=name))
        area = hill.mark_area(color=colour, opacity=0.22, line={"color": colour, "strokeWidth": 1.2}, clip=True)
        note = chart.words(
            Rows(values=[{"x": float(edges[-1]), "high": 0.6 * top, "text": text}]), colour, align="right"
        )
        layers = [
            chart.rule(x=0),
            area.encode(x=x, y=y, tooltip=chart.hover("arm", "x:kappa excess:.3f", "high:share of latents:.3f")),
            chart.rule(x=float(np.median(values[name])), colour=colour),
            note.encode(x=x, y=y),
        ]
        panels.append(Panel(alt.layer(*layers), name, colour))
    return Plot([View("", panels)], height=64, columns=1)


def excess_by_firing_rate(run: SavedRun) -> Plot:
    """Kappa excess within bins of firing rate, a bar per highlighted arm: a mere shift in rate shows no gain here."""
    tables = {arm.name: found for arm in run.highlighted if (found := arm.rate_bins)}
    if not tables:
        raise MissingResult("no arm has consistency.by_rate_bin in metrics.json")
    bins = sorted({edges for found in tables.values() for edges in found})
    few = len(tables) <= 4
    rows: list[dict[str, Any]] = [
        {
            "bin": _bin_label(edges),
            "arm": name,
            "y": float(f"{value:.4g}"),
            "latents": latents,
            "text": f"{value:.2f}" + f" n={latents}" * few,
        }
        for name, found in tables.items()
        for edges, (value, latents) in found.items()
    ]
    styles = {name: style for name, style in arm_styles(run.highlighted).items() if name in tables}
    values = [row["y"] for row in rows]
    spread = 0.16 * (max(0.0, *values) - min(0.0, *values)) or 0.1
    domain = [min(0.0, *values) - (spread if min(values) < 0 else 0), max(0.0, *values) + spread]
    place: dict[str, Any] = {
        "x": alt.X(
            "bin:N",
            sort=None,
            title="firing rate of the latent",
            scale=alt.Scale(domain=[_bin_label(edges) for edges in bins], paddingInner=0.16),
            axis=alt.Axis(labelAngle=0, ticks=False),
        ),
        "xOffset": alt.XOffset("arm:N", sort=list(tables), scale=alt.Scale(domain=list(tables), paddingInner=0.06)),
        "y": alt.Y(**chart.number("y", "kappa excess, lag 1", scale={"domain": domain})),
    }
    base = alt.Chart(Rows(values=rows)).encode(**place)
    tooltip = chart.hover("arm", "bin:firing rate", "y:kappa excess:.3f", "latents")
    label = base.mark_text(
        fontSize=9.5,
        color=MUTED,
        angle=0 if few else 270,
        align="center" if few else "left",
        baseline=alt.ExprRef("datum.y < 0 ? 'top' : 'bottom'") if few else "middle",
        dy=alt.ExprRef("datum.y < 0 ? 9 : -6") if few else 0,
        dx=0 if few else 8,
        style="label",
    )
    layers = [
        base.mark_bar().encode(**chart.styled(styles, "arm", "color"), tooltip=tooltip),
        chart.rule(y=0),
        base.mark_point(size=36, filled=True, opacity=1).encode(**chart.styled(styles, "arm", "color", "shape")),
        label.encode(text="text:N"),
    ]
    keys = [key for key in arm_keys(run, "marker") if key.label in tables]
    return Plot([View("", [Panel(alt.layer(*layers))])], height=260, columns=1, keys=keys)


def _bin_label(edges: tuple[float, float]) -> str:
    low, high = edges
    return f"dense, above {low:g}" if low >= 0.1 else f"{_power(low)} to {_power(high)}"


def _power(edge: float) -> str:
    exponent = np.log10(edge) if edge > 0 else np.nan
    if not float(exponent).is_integer():
        return f"{edge:g}"
    return "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def half_life_by_rate(run: SavedRun) -> Plot:
    """A view per highlighted arm: its latents by firing rate and half-life, the median over rate, the baseline's."""
    found = latent_tables(run, ("density", "half_life"), "half_life", positive=True)
    limits = log_limits(found)
    x = chart.log_axis(alt.X, "x", "firing rate", limits[0])
    ticks = alt.Axis(values=[0.5, 1, 2, 4, 8, 16, 32, 64], format="~g")
    y = alt.Y(**chart.number("y", "half-life in tokens", scale={"type": "log", "domain": limits[1]}, axis=ticks))
    base = next((latents for arm, latents in found if arm is run.baseline), None)
    styles = arm_styles(run.highlighted)
    tooltip = chart.hover("latent", "x:fires on:.2%", "y:half-life:.2f")

    def panel(arm: Arm, latents: Latents) -> Panel:
        layers = [latent_dots(latents, styles[arm.name], tooltip).encode(x=x, y=y)]
        medians = [(base, MUTED, (6.0, 3.0), "baseline, median")] if base is not None and latents is not base else []
        for some, colour, dash, name in (*medians, (latents, INK, (), "median")):
            middle = chart.table(x=(line := running_median(some))[0], y=line[1], arm=name)
            layers += chart.curves(
                middle, {name: ArmStyle(colour, dash)}, x, y, chart.hover("arm:line", "y:tokens:.2f"), width=2.2
            )
        return Panel(alt.layer(*layers, resolve=chart.APART), zoom=True)

    keys = [Key("median of the arm's latents", ArmStyle(INK), ("line",))]
    if base is not None and len(found) > 1:
        keys.append(Key("the baseline's", ArmStyle(MUTED, (6.0, 3.0)), ("line",)))
    return latent_views(found, panel, keys=keys)


def latent_tables(
    run: SavedRun, names: tuple[str, ...], what: str, *, positive: bool = False
) -> list[tuple[Arm, Latents]]:
    """The latents of each highlighted arm that have every column; MissingResult where none has."""
    tables = [(arm, latents_of(run, arm, names, positive=positive)) for arm in run.highlighted]
    found = [(arm, latents) for arm, latents in tables if latents is not None]
    if not found:
        raise MissingResult(f"no feature table (features/<arm>.parquet) with {what} was saved")
    return found


_SMALLEST = 1e-6  # what is smaller lies at the edge


def log_limits(found: Sequence[tuple[Arm, Latents]]) -> list[list[float]]:
    """Limits of x and y over all arms on a logarithmic scale, so that views of arms can be compared."""
    limits = []
    for axis in (0, 1):
        values = np.log10(np.concatenate([latents.columns[axis] for _, latents in found]))
        margin = 0.04 * float(np.ptp(values)) or 0.1
        low = max(float(values.min()) - margin, np.log10(_SMALLEST))
        limits.append([float(f"{10**end:.4g}") for end in (low, float(values.max()) + margin)])
    return limits


def latent_dots(latents: Latents, style: ArmStyle, tooltip: Sequence[alt.Tooltip]) -> alt.Chart:
    """A faint mark per latent, at most MOST_POINTS of them."""
    shown = latents.thinned(MOST_POINTS)
    data = chart.table(3, x=shown.columns[0], y=shown.columns[1], latent=shown.latent)
    return chart.dots(data, style, 18, tooltip, opacity=0.35, clip=True)


def latent_views(
    found: Sequence[tuple[Arm, Latents]],
    panel: Callable[[Arm, Latents], Panel],
    *,
    keys: Collection[Key] = (),
    height: int = 380,
) -> Plot:
    """A view per arm in the page, a panel per arm in the PNG."""
    views = []
    for arm, latents in found:
        note = f"{len(latents)} latents."
        if len(latents) > MOST_POINTS:
            note = f"{MOST_POINTS} of {len(latents)} latents, evenly over the dictionary."
        views.append(View(arm.name, [panel(arm, latents)], note))
    return Plot(views, height=height, columns=1, keys=list(keys), still_height=200)
