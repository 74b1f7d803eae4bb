"""Figures of what latents are like: the map of kinds, the share of each kind, the map of redundant latents."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from legato.report.figures.latent_data import clusters_of, kind_style, latents_of
from legato.report.figures.missing import MissingResult
from legato.report.figures.style import MUTED, SURFACE, WIDTH, arm_styles
from legato.results.saved_run import SavedRun

_SHOWN = 3  # arms: the baseline and the first named ones
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "--")
SIGNED = LinearSegmentedColormap.from_list("signed", ["#0072b2", SURFACE, "#d55e00"])
SATURATED = 0.6  # excess from which the colour stays the same


def kind_map(run: SavedRun) -> Figure:
    """A panel per arm: its latents on the common map, a colour and marker per cluster."""
    tables = {
        arm.name: (clusters_of(arm), latents_of(run, arm, ("map_x", "map_y", "cluster"))) for arm in run.highlighted
    }
    found = {name: (clusters, table) for name, (clusters, table) in tables.items() if clusters and table}
    if not found:
        raise MissingResult("no arm has clusters in its feature table (map_x, map_y, cluster)")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.6 * WIDTH, 2.6 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    handles: dict[str, Line2D] = {}
    styles = arm_styles(run.highlighted)
    for ax, (name, (clusters, table)) in zip(axes, found.items(), strict=False):
        x, y, number = table.columns
        for cluster in clusters:
            inside, style = number == cluster.number, cluster.style
            ax.scatter(x[inside], y[inside], s=5, c=style.colour, marker=style.marker, alpha=0.5, linewidths=0)
            dot = Line2D([], [], color=style.colour, marker=style.marker, linestyle="", markersize=6)
            handles.setdefault(cluster.label, dot)
        ax.set_title(name, color=styles[name].colour)
        ax.set_xticklabels([])
        ax.set_yticklabels([])
        ax.tick_params(length=0)
        ax.grid(False)
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=6, columnspacing=1.2)
    return figure


def kinds_of_latents(run: SavedRun) -> Figure:
    """Share of each kind among an arm's latents and in all of its firing, by the rule on each latent alone."""
    sections = {
        arm.name: kinds
        for arm in run.highlighted
        if (kinds := (arm.metrics.get("specialisation") or {}).get("by_latent"))
    }
    if not sections:
        raise MissingResult("the latents were not described (no `specialisation.by_latent` in metrics.json)")
    kinds = list(next(iter(sections.values())))
    figure = Figure(figsize=(WIDTH, 0.34 * len(sections) + 1.0))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (key, title) in zip(
        axes, {"share_of_latents": "Share of latents", "share_of_firing": "Share of all firing"}.items(), strict=True
    ):
        left = np.zeros(len(sections))
        for kind, hatch in zip(kinds, _HATCHES, strict=False):
            share = np.array([section[kind][key] for section in sections.values()])
            colour = kind_style(kind).colour
            ax.barh(
                range(len(sections)), share, 0.72, left, color=colour, hatch=hatch, edgecolor=SURFACE, linewidth=0.6
            )
            for row, (start, width) in enumerate(zip(left, share, strict=True)):
                if width > 0.08:
                    text = f"{width:.0%}"
                    box = {"facecolor": SURFACE, "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
                    ax.text(start + width / 2, row, text, ha="center", va="center", fontsize=7.5, bbox=box)
            left += share
        ax.set_title(title)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(sections)), list(sections))
    axes[0].invert_yaxis()
    handles = [axes[0].containers[i][0] for i in range(len(axes[0].containers))]
    figure.legend(handles, kinds, loc="outside upper left", ncols=6, columnspacing=1.4, handlelength=1.6)
    return figure


def redundancy_map(run: SavedRun) -> Figure:
    """Excess correlation of the latents most involved in pairs, clustered: at lag 0 above, one token later below."""
    saved = {arm.name: run.redundancy_map(arm.name) for arm in run.highlighted}
    maps = {name: stored for name, stored in saved.items() if len(stored.get("latents", ())) > 1}
    maps = dict(list(maps.items())[:_SHOWN])
    if not maps:
        raise MissingResult("no arm has saved a map of correlated latents with something in it (redundancy/<arm>.npz)")
    panel = WIDTH / max(2.4, len(maps))
    figure = Figure(figsize=(max(panel * len(maps), 4.0), 2 * panel + 0.9))
    axes = figure.subplots(2, len(maps), squeeze=False)
    image, styles = None, arm_styles(run.highlighted)
    for column, (name, stored) in zip(axes.T, maps.items(), strict=True):
        for ax, lag in zip(column, (0, 1), strict=True):
            (excess,) = stored["excess"][stored["lags"] == lag]
            image = ax.imshow(excess, cmap=SIGNED, vmin=-SATURATED, vmax=SATURATED, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_color(MUTED)
            ax.spines[:].set_visible(True)
        column[0].set_title(name, color=styles[name].colour)
    for ax, label in zip(axes[:, 0], ("latent, same token", "latent, row now, column 1 token later"), strict=True):
        ax.set_ylabel(label, fontsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes.flatten()), orientation="horizontal", aspect=50, pad=0.03, extend="both")
    bar.set_label("correlation in excess of the null that keeps position")
    bar.outline.set_visible(False)
    return figure
