"""Figures of how features hold across tokens: over lag with both nulls, over latents, over firing rate."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from legato.report.figures.latent_data import Latents, latents_of, running_median
from legato.report.figures.missing import MissingResult
from legato.report.figures.style import FAINT, INK, MUTED, SURFACE, WIDTH, ArmStyle, arm_styles
from legato.results.saved_run import Arm, SavedRun

_MEASURES = {"ac": "autocorrelation", "kappa": "kappa of firing"}
_NULL_STYLES = {
    "within_null": ("shuffled within the document", (0, (4, 1.6))),
    "cross_null": ("shuffled across documents, same position", (0, (1, 1.4))),
}


def autocorrelation_over_lag(run: SavedRun) -> Figure:
    return _over_lag(run, "ac")


def kappa_over_lag(run: SavedRun) -> Figure:
    return _over_lag(run, "kappa")


def _over_lag(run: SavedRun, measure: str) -> Figure:
    """A panel per highlighted arm with the measured curve and both nulls, and one with every arm's excess."""
    key = f"consistency.{measure}"
    arms = [
        a for a in run.highlighted if a.series(f"{key}.mean") is not None and a.series("consistency.lags") is not None
    ]
    if not arms:
        raise MissingResult(f"no arm has {key} over lags in metrics.json")
    panels = len(arms) + 1
    columns = 2 if panels in (2, 4) else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, 2.45 * rows + (0.45 if columns == 2 else 0.75)))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    styles = arm_styles(run.highlighted)
    for ax, arm in zip(axes, arms, strict=False):
        _draw_measured_and_nulls(ax, arm, key, styles[arm.name])
        ax.set_title(arm.name, color=styles[arm.name].colour)
    limits = np.array([ax.get_ylim() for ax in axes[: len(arms)]])
    for ax in axes[: len(arms)]:
        ax.set_ylim(min(0.0, limits[:, 0].min()), limits[:, 1].max())
    summary = axes[len(arms)]
    for arm in arms:
        excess = arm.series(f"consistency.{measure}_excess_within")
        if excess is not None:
            style = styles[arm.name]
            summary.plot(
                _lags(arm), excess, color=style.colour, linestyle=style.line, marker=style.marker, label=arm.name
            )
    summary.axhline(0, color=FAINT, linewidth=0.8)
    _lag_axis(summary, _lags(arms[0]))
    summary.set_title("Measured minus dashed")
    if columns == 2:
        summary.legend(loc="upper right", fontsize=8.5)
    else:
        figure.legend(*summary.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    for ax in axes[panels:]:
        ax.set_visible(False)
    for ax in axes[max(0, panels - columns) : panels]:
        ax.set_xlabel("lag in tokens")
    for ax in axes[:panels:columns]:
        ax.set_ylabel(_MEASURES[measure])
    handles = [Line2D([], [], color=INK)]
    handles += [Line2D([], [], color=MUTED, linestyle=line, linewidth=1.2) for _, line in _NULL_STYLES.values()]
    labels = ["measured", *(label for label, _ in _NULL_STYLES.values())]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.6)
    return figure


def _draw_measured_and_nulls(ax: Axes, arm: Arm, key: str, style: ArmStyle) -> None:
    lags, mean = _lags(arm), arm.series(f"{key}.mean")
    assert mean is not None
    within = arm.series(f"{key}.within_null")
    if within is not None:
        ax.fill_between(
            lags, within, mean, where=mean >= within, color=style.colour, alpha=0.13, linewidth=0, interpolate=True
        )
    for null, (_, line) in _NULL_STYLES.items():
        values = arm.series(f"{key}.{null}")
        if values is not None:
            ax.plot(lags, values, color=MUTED, linestyle=line, linewidth=1.2)
    ax.plot(lags, mean, color=style.colour, marker=style.marker, markersize=4.5)
    _lag_axis(ax, lags)


def _lag_axis(ax: Axes, lags: np.ndarray) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(lags, [f"{lag:g}" for lag in lags])
    ax.xaxis.set_minor_locator(NullLocator())


def _lags(arm: Arm) -> np.ndarray:
    lags = arm.series("consistency.lags")
    assert lags is not None
    return lags


def kappa_excess_distribution(run: SavedRun) -> Figure:
    """The distribution over alive latents of the kappa excess at lag 1, a row per highlighted arm."""
    values = {
        arm.name: column[np.isfinite(column)]
        for arm in run.highlighted
        if (column := run.latent_column(arm.name, "kappa1_excess_within")) is not None and np.isfinite(column).any()
    }
    if not values:
        raise MissingResult("no feature table (features/<arm>.parquet) with kappa1_excess_within was saved")
    styles = arm_styles(run.highlighted)
    figure = Figure(figsize=(0.86 * WIDTH, 0.62 * len(values) + 1.15))
    ax = figure.subplots()
    pooled = np.concatenate(list(values.values()))
    low, high = np.quantile(pooled, [0.002, 0.995])
    low, high = min(low, 0.0), max(high, low + 1e-3)
    edges = np.linspace(low - 0.06 * (high - low), high, 129)
    centres = (edges[:-1] + edges[1:]) / 2
    densities = {name: _smooth(np.histogram(v, edges)[0] / len(v)) for name, v in values.items()}
    height = 0.9 / max(float(density.max()) for density in densities.values())
    for row, (name, density) in enumerate(densities.items()):
        base, colour = -row, styles[name].colour
        ax.fill_between(centres, base, base + height * density, color=colour, alpha=0.22, linewidth=0, zorder=2)
        ax.plot(centres, base + height * density, color=colour, linewidth=1.2, zorder=3)
        ax.axhline(base, color=FAINT, linewidth=0.7, zorder=1)
        median = float(np.median(values[name]))
        ax.plot([median, median], [base, base + 0.5], color=colour, linewidth=1.6, zorder=4)
        mean, median = (round(float(centre), 3) + 0.0 for centre in (np.mean(values[name]), median))  # no -0.000
        text = f"mean {mean:.3f}, median {median:.3f}"
        ax.text(edges[-1], base + 0.28, text, color=colour, fontsize=8.5, ha="right", zorder=4)
    ax.set_yticks([-row + 0.04 for row in range(len(values))], list(values), va="bottom")
    for tick, name in zip(ax.get_yticklabels(), values, strict=True):
        tick.set_color(styles[name].colour)
    ax.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_xlabel("kappa excess over the within-document null, lag 1")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    return figure


def _smooth(density: np.ndarray, width: float = 1.6) -> np.ndarray:
    offsets = np.arange(-6, 7)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    return np.convolve(density, kernel / kernel.sum(), mode="same")


def excess_by_firing_rate(run: SavedRun) -> Figure:
    """Kappa excess within bins of firing rate, a bar per highlighted arm: a mere shift in rate shows no gain here."""
    tables = {arm.name: table for arm in run.highlighted if (table := arm.rate_bins)}
    if not tables:
        raise MissingResult("no arm has consistency.by_rate_bin in metrics.json")
    bins = sorted({edges for table in tables.values() for edges in table})
    styles = arm_styles(run.highlighted)
    figure = Figure(figsize=(WIDTH, 3.1))
    ax = figure.subplots()
    width = 0.78 / len(tables)
    for i, (name, table) in enumerate(tables.items()):
        for j, edges in enumerate(bins):
            value, latents = table.get(edges, (float("nan"), 0))
            x = j + (i - (len(tables) - 1) / 2) * width
            ax.bar(
                x,
                value,
                0.92 * width,
                color=styles[name].colour,
                edgecolor=SURFACE,
                linewidth=0,
                hatch=_HATCHES[i % len(_HATCHES)],
                label=name if j == 0 else None,
                zorder=2,
            )
            if np.isfinite(value):
                offset, side = (2, "bottom") if value >= 0 else (-2, "top")
                ax.annotate(
                    f"{value:.2f}\nn={latents}" if len(tables) <= 4 else f"{value:.2f}",
                    (x, value),
                    xytext=(0, offset),
                    textcoords="offset points",
                    ha="center",
                    va=side,
                    rotation=0 if len(tables) <= 4 else 90,
                    fontsize=7,
                    color=MUTED,
                )
    ax.axhline(0, color=FAINT, linewidth=0.8)
    ax.set_xticks(range(len(bins)), [_bin_label(edges) for edges in bins])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("firing rate of the latent")
    ax.set_title("Kappa excess over the within-document null, lag 1")
    ax.margins(y=0.16)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=min(5, len(tables)))
    return figure


_HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "oo")


def _bin_label(edges: tuple[float, float]) -> str:
    low, high = edges
    return f"dense, above {low:g}" if low >= 0.1 else f"{_power(low)} to {_power(high)}"


def _power(edge: float) -> str:
    exponent = np.log10(edge) if edge > 0 else np.nan
    if not float(exponent).is_integer():
        return f"{edge:g}"
    return "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def half_life_by_rate(run: SavedRun) -> Figure:
    """A panel per highlighted arm: how many latents at each firing rate and half-life, with the median over rate."""
    tables = {arm.name: latents_of(run, arm, ("density", "half_life"), positive=True) for arm in run.highlighted}
    found = {name: latents for name, latents in tables.items() if latents is not None}
    if not found:
        raise MissingResult("no feature table (features/<arm>.parquet) with half_life was saved")
    figure, axes = density_panels(found, run)
    base = found.get(run.baseline.name) if run.baseline else None
    for ax, (name, latents) in zip(axes, found.items(), strict=False):
        if base is not None and latents is not base:
            ax.plot(*running_median(base), color=SURFACE, linewidth=3)
            ax.plot(*running_median(base), color=MUTED, linewidth=1.3, linestyle=(0, (4, 1.6)))
        ax.plot(*running_median(latents), color=SURFACE, linewidth=3.6)
        ax.plot(*running_median(latents), color=arm_styles(run.highlighted)[name].colour, linewidth=2)
        limits = ax.get_ylim()
        ax.set_yticks([0.5, 1, 2, 4, 8, 16, 32, 64], ["0.5", "1", "2", "4", "8", "16", "32", "64"])
        ax.set_ylim(limits)
    label_outer(axes, len(found), "firing rate", "half-life in tokens")
    handles = [Line2D([], [], color=INK, linewidth=2)]
    labels = ["median of the arm's latents"]
    if base is not None and len(found) > 1:
        handles.append(Line2D([], [], color=MUTED, linewidth=1.3, linestyle=(0, (4, 1.6))))
        labels.append("the baseline's")
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def density_panels(found: Mapping[str, Latents], run: SavedRun) -> tuple[Figure, list[Axes]]:
    """A panel per arm on one logarithmic scale, shaded by how many latents lie where."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.6 * WIDTH, 2.5 * rows + 0.35))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten())
    x, y = (np.concatenate([latents.columns[i] for latents in found.values()]) for i in (0, 1))
    limits = [max(float(v), _SMALLEST) for values in (x, y) for v in (values.min(), values.max())]
    extent = tuple(np.log10(limits))
    styles = arm_styles(run.highlighted)
    for ax, (name, latents) in zip(axes, found.items(), strict=False):
        ax.hexbin(
            *latents.columns,
            gridsize=(34, 20),
            xscale="log",
            yscale="log",
            extent=extent,
            mincnt=1,
            bins="log",
            cmap="Greys",
            vmin=0.3,
            linewidths=0,
        )
        ax.set_title(name, color=styles[name].colour)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        ax.set(xlim=(0.8 * limits[0], 1.25 * limits[1]), ylim=(0.8 * limits[2], 1.25 * limits[3]))
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    return figure, axes


_SMALLEST = 1e-6  # what is smaller lies at the edge


def label_outer(axes: Sequence[Axes], panels: int, x: str, y: str) -> None:
    """Axis titles below the last and beside the first panels only."""
    columns = min(3, panels)
    for number, ax in enumerate(axes[:panels]):
        if number + columns >= panels:
            ax.set_xlabel(x)
            ax.tick_params(labelbottom=True)
        if number % columns == 0:
            ax.set_ylabel(y)
