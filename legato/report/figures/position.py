"""Figures of position: the position x position matrix, profiles, eta² against mutual information, the offset test."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from legato.evaluation.position.attachment import wilson
from legato.report.figures.consistency import density_panels, label_outer
from legato.report.figures.latent_data import latents_of
from legato.report.figures.missing import MissingResult
from legato.report.figures.style import MUTED, SEQUENTIAL, WIDTH, arm_styles
from legato.results.saved_run import Arm, SavedRun

_MOST_BOUND = 3  # latents with the largest eta² whose profiles are shown
_FEWEST_FIRINGS = 40  # a rarer one has no profile to speak of


def position_matrix(run: SavedRun) -> Figure:
    """Correlation over sequences of a latent at position t with itself at t', mean over latents, a panel per arm."""
    matrices = position_matrices(run)
    low, high = matrix_range(list(matrices.values()))
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    panel = WIDTH / max(2.4, columns)
    figure = Figure(figsize=(max(panel * columns, 1.2 * panel), panel * rows + 0.75))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image = None
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=False):
        image = ax.imshow(matrix, vmin=low, vmax=high, cmap=SEQUENTIAL, interpolation="nearest")
        ax.set_title(name)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        last = len(matrix) - 1
        ticks = [0, round(last / 2), last]
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        ax.set_xlabel("position t'")
    for ax in axes[::columns]:
        ax.set_ylabel("position t")
    for ax in axes[len(matrices) :]:
        ax.set_visible(False)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), orientation="horizontal", aspect=50, pad=0.03, extend="max")
    bar.set_label("mean correlation over sequences (diagonal left out)")
    bar.outline.set_visible(False)
    return figure


def position_profiles(run: SavedRun) -> Figure:
    """L0 over position, and the firing rate over position of the latents most bound to it; bands are 95 %."""
    curves = {arm.name: arm for arm in run.highlighted if arm.series("position.l0_by_position") is not None}
    bound = {arm.name: found for arm in run.highlighted if (found := _most_bound(run, arm))}
    bound = dict(list(bound.items())[:4])
    if not curves and not bound:
        raise MissingResult("neither L0 by position (metrics.json) nor profiles (arrays/<arm>.npz) were saved")
    panels = bool(curves) + len(bound)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.6 * WIDTH, 2.5 * rows + 0.35))
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    styles = arm_styles(run.highlighted)
    if curves:
        for name, arm in curves.items():
            _draw_l0(axes[0], arm, styles[name].colour, styles[name].line)
        axes[0].set_title("L0")
        axes[0].set_ylim(bottom=0)
    for ax, (name, profiles) in zip(axes[bool(curves) :], bound.items(), strict=False):
        for (latent, rate_L, low_L, high_L), line in zip(profiles, _LINES, strict=False):
            at = np.arange(len(rate_L))
            ax.fill_between(at, low_L, high_L, color=styles[name].colour, alpha=0.15, linewidth=0)
            ax.plot(at, rate_L, color=styles[name].colour, linestyle=line, linewidth=1.1, label=f"latent {latent}")
        ax.set_title(name, color=styles[name].colour)
        ax.set_ylim(0, 1.02)
        ax.legend(fontsize=7.5, loc="upper right")
    for ax in axes[panels:]:
        ax.set_visible(False)
    for ax in axes[max(0, panels - columns) : panels]:
        ax.set_xlabel("position in the context")
    if bound:
        axes[int(bool(curves))].set_ylabel("firing rate")
    return figure


_LINES = ("-", (0, (4, 1.4)), (0, (1, 1)))


def _draw_l0(ax: Axes, arm: Arm, colour: str, line: object) -> None:
    mean_L, low_L, high_L = (arm.series(f"position.l0_by_position{end}") for end in ("", "_low", "_high"))
    assert mean_L is not None
    if low_L is not None and high_L is not None:
        ax.fill_between(np.arange(len(mean_L)), low_L, high_L, color=colour, alpha=0.15, linewidth=0)
    ax.plot(mean_L, color=colour, linestyle=line, linewidth=1.2)


def _most_bound(run: SavedRun, arm: Arm) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(latent, rate, low, high by position) of those with the largest eta² that fire often enough."""
    stored, latents = run.arrays(arm.name), latents_of(run, arm, ("eta2",))
    if latents is None or not {"rate_FL", "tokens_L"} <= stored.keys():
        return []
    tokens_L = stored["tokens_L"].astype(np.float64)
    n_L = np.where(tokens_L > 0, tokens_L, np.nan)
    firings = np.nansum(stored["rate_FL"][latents.latent] * n_L, axis=1)
    eta2 = np.where(firings >= _FEWEST_FIRINGS, latents.columns[0], -np.inf)
    found = []
    for i in np.argsort(-eta2)[:_MOST_BOUND]:
        if np.isfinite(eta2[i]):
            rate_L = stored["rate_FL"][latents.latent[i]].astype(np.float64)
            found.append((int(latents.latent[i]), rate_L, *wilson(rate_L, n_L)))
    return found


def position_measures(run: SavedRun) -> Figure:
    """Mutual information of firing with position against eta², a panel per highlighted arm."""
    tables = {arm.name: latents_of(run, arm, ("eta2", "mi"), positive=True) for arm in run.highlighted}
    found = {name: latents for name, latents in tables.items() if latents is not None}
    if not found:
        raise MissingResult("no feature table (features/<arm>.parquet) with eta2 and mi was saved")
    figure, axes = density_panels(found, run)
    label_outer(axes, len(found), "eta² (share of variance)", "mutual information (nats)")
    return figure


def offset_test(run: SavedRun) -> Figure:
    """Support Jaccard and code cosine of the same text at another offset, over the size of the shift."""
    arms = [arm for arm in run.highlighted if _offset_rows(arm, "prefix") or _offset_rows(arm, "position_ids")]
    if not arms:
        raise MissingResult("the offset test was not run (no `offset` in metrics.json)")
    modes = {mode: label for mode, label in _MODES.items() if any(_offset_rows(arm, mode) for arm in arms)}
    figure = Figure(figsize=(WIDTH, 3.1))
    axes = figure.subplots(1, 2 * len(modes), squeeze=False, sharex=True)[0]
    styles = arm_styles(run.highlighted)
    for column, (mode, label) in enumerate(modes.items()):
        for ax, (key, what) in zip(axes[2 * column :], _AGREEMENT.items(), strict=False):
            for arm in arms:
                rows = _offset_rows(arm, mode)
                style = styles[arm.name]
                line = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 4}
                ax.plot(*_over_shift(rows, key), **line)
                if key == "jaccard":
                    ax.plot(*_over_shift(rows, "jaccard_null"), color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.4)))
            ax.set_title(f"{label}:\n{what}", fontsize=8.5)
            ax.set_ylim(0, 1.04)
            ax.set_xscale("log", base=2)
            shifts = _over_shift(_offset_rows(arms[0], mode), key)[0]
            ax.set_xticks(shifts, [f"{shift:g}" for shift in shifts])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("shift in tokens")
    handles = [
        Line2D([], [], color=styles[a.name].colour, linestyle=styles[a.name].line, marker=styles[a.name].marker)
        for a in arms
    ]
    handles.append(Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.4))))
    labels = [*(arm.name for arm in arms), "another token of the document"]
    figure.legend(handles, labels, loc="outside upper left", ncols=4, columnspacing=1.4)
    return figure


_MODES = {"prefix": "Neutral prefix", "position_ids": "Shifted position ids"}
_AGREEMENT = {"jaccard": "same latents active", "cosine": "cosine of the codes"}


def _offset_rows(arm: Arm, mode: str) -> list[Mapping[str, float]]:
    return (arm.metrics.get("offset") or {}).get(mode) or []


def _over_shift(rows: list[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["shift"] for row in kept], [row[key] for row in kept]


def position_matrices(run: SavedRun) -> dict[str, np.ndarray]:
    """By highlighted arm, the diagonal nan."""
    matrices = {
        arm.name: stored["position_matrix"].astype(np.float64)
        for arm in run.highlighted
        if "position_matrix" in (stored := run.arrays(arm.name))
    }
    if not matrices:
        raise MissingResult("no position x position matrix (arrays/<arm>.npz) was saved")
    for matrix in matrices.values():
        np.fill_diagonal(matrix, np.nan)
    return matrices


def matrix_range(matrices: list[np.ndarray]) -> tuple[float, float]:
    """Of the colour scale, without the most extreme cells, which would leave the rest one colour."""
    low, high = np.nanquantile(np.concatenate([matrix.ravel() for matrix in matrices]), [0.01, 0.995])
    return min(0.0, round(float(low), 4)), round(float(high), 4)
