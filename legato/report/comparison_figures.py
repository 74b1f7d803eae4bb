"""Figures that set several runs side by side, drawn from their saved results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from legato.notes import KAPPA_EXCESS, seed_groups, standard_error
from legato.report.missing import MissingResult
from legato.report.style import (
    FAINT,
    INK,
    MUTED,
    RULE,
    WIDTH,
    ArmStyle,
    PointLabel,
    arm_styles,
    figure_style,
    label_points,
    run_styles,
)
from legato.results import Arm, SavedRun

_MEASURES = (
    ("core.fvu", "FVU \u2193"),
    ("core.l0", "L0"),
    ("core.ce_loss_score", "CE loss score \u2191"),
    (KAPPA_EXCESS, "Kappa excess \u2191"),
    ("consistency.ac1_excess_within", "AC excess \u2191"),
)


@dataclass(frozen=True)
class Recipe:
    """One recipe of one run with its seeds, as a row of the overview and a line of the other figures."""

    run: str
    arms: tuple[Arm, ...]
    style: ArmStyle

    @property
    def name(self) -> str:
        return self.arms[0].group

    @property
    def baseline(self) -> bool:
        return self.arms[0].role == "baseline"

    def estimate(self, key: str) -> tuple[float, float] | None:
        """Mean over seeds and its standard error (0 with one seed); None where no seed has the value."""
        values = [value for arm in self.arms if (value := arm.value(key)) is not None]
        if not values:
            return None
        return float(np.mean(values)), standard_error(values) if len(values) > 1 else 0.0


def write_comparison(runs: Mapping[str, SavedRun], out_dir: str | Path) -> dict[str, Path]:
    """Write the figures that compare the runs, by label, as `<out_dir>/<name>.png`; return the paths by name.

    A run takes part with its baseline and named arms. A figure whose data no run has saved is left out.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    recipes = recipes_of(runs)
    written = {}
    for name, draw in _FIGURES.items():
        with figure_style():
            try:
                figure = draw(runs, recipes)
            except MissingResult:
                continue
            written[name] = out / f"{name}.png"
            figure.savefig(written[name])
    return written


def recipes_of(runs: Mapping[str, SavedRun]) -> list[Recipe]:
    styles = run_styles(list(runs))
    return [
        Recipe(label, tuple(arms), styles[label])
        for label, run in runs.items()
        for arms in seed_groups(run).values()
        if any(arm in run.highlighted for arm in arms)
    ]


def _overview(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """A row per run and recipe, a column per metric; whiskers are standard errors over seeds."""
    measures = [(key, title) for key, title in _MEASURES if any(r.estimate(key) for r in recipes)]
    if not measures:
        raise MissingResult("no run has metrics to compare")
    figure = Figure(figsize=(WIDTH + 0.6, 0.26 * len(recipes) + 0.3 * len(runs) + 0.7))
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    rows: list[float] = []
    headings: dict[str, float] = {}
    y = 0.0
    for recipe in recipes:
        if recipe.run not in headings:
            headings[recipe.run] = y + 1.2
            y += 1.2
        y += 1.0
        rows.append(y)
    for ax, (key, title) in zip(axes, measures, strict=True):
        for i, recipe in enumerate(recipes):
            estimate = recipe.estimate(key)
            if estimate is not None:
                _dot(ax, (estimate[0], rows[i]), recipe, xerr=estimate[1])
        ax.set_title(title)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.margins(x=0.15)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.spines["left"].set_visible(False)
        for height in rows:
            ax.axhline(height, color=RULE, linewidth=0.6, zorder=0)
    axes[0].set_yticks(rows, [recipe.name for recipe in recipes])
    axes[0].set_ylim(max(rows) + 0.7, 0.6)
    for label, height in headings.items():
        axes[0].annotate(
            label,
            (0, height),
            (-7, 0),
            xycoords=axes[0].get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold",
            color=run_styles(list(runs))[label].colour,
            annotation_clip=False,
        )
    return figure


def _dot(ax: Axes, point: tuple[float, float], recipe: Recipe, *, xerr: float = 0.0, yerr: float = 0.0) -> None:
    ax.errorbar(
        *point,
        xerr=xerr or None,
        yerr=yerr or None,
        color=recipe.style.colour,
        marker=recipe.style.marker,
        markersize=6,
        markerfacecolor="white" if recipe.baseline else recipe.style.colour,
        markeredgewidth=1.3,
        elinewidth=1,
        linestyle="none",
        zorder=3,
    )


def _kappa_excess(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """Kappa excess over lag, a panel per run with its recipes (mean over seeds) on one scale."""
    curves: dict[str, list[tuple[Recipe, np.ndarray, np.ndarray]]] = {}
    for recipe in recipes:
        lags = recipe.arms[0].series("consistency.lags")
        series = [s for arm in recipe.arms if (s := arm.series("consistency.kappa_excess_within")) is not None]
        if lags is not None and series:
            curves.setdefault(recipe.run, []).append((recipe, lags, np.mean(series, axis=0)))
    if not curves:
        raise MissingResult("no run has kappa excess over lags")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(WIDTH / 3 * columns, WIDTH / 2), 2.5 * rows))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax, (label, lines) in zip(axes, curves.items(), strict=False):
        styles = arm_styles(runs[label].highlighted)
        for recipe, lags, excess in lines:
            style = next(styles[arm.name] for arm in recipe.arms if arm.name in styles)
            ax.plot(
                lags,
                excess,
                color=style.colour,
                linestyle=style.line,
                marker=style.marker,
                markersize=4,
                label=recipe.name,
            )
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lines[0][1], [f"{lag:g}" for lag in lines[0][1]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("lag in tokens")
        ax.set_title(label)
        ax.legend(loc="upper right", fontsize=7.5, handlelength=2.2, labelspacing=0.3)
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("kappa excess, within-document null", fontsize=8)
    return figure


def _cost(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """Kappa excess against FVU; a line from each run's baseline to its arms shows what was paid for what."""
    points = [
        (recipe, fvu, excess)
        for recipe in recipes
        if (fvu := recipe.estimate("core.fvu")) is not None and (excess := recipe.estimate(KAPPA_EXCESS)) is not None
    ]
    if not points:
        raise MissingResult("no run has both FVU and kappa excess")
    figure = Figure(figsize=(0.86 * WIDTH, 3.8))
    ax = figure.subplots()
    bases = {recipe.run: (fvu[0], excess[0]) for recipe, fvu, excess in points if recipe.baseline}
    for recipe, (x, dx), (y, dy) in points:
        if not recipe.baseline and recipe.run in bases:
            x0, y0 = bases[recipe.run]
            ax.plot([x0, x], [y0, y], color=recipe.style.colour, linewidth=0.8, alpha=0.5, zorder=2)
        _dot(ax, (x, y), recipe, xerr=dx, yerr=dy)
    ax.margins(0.12)
    ax.grid(True, axis="both")
    ax.set_xlabel("fraction of variance unexplained (lower is better)")
    ax.set_title("Kappa excess over the within-document null, lag 1")
    _run_legend(figure, runs)
    names = [
        PointLabel((fvu[0], excess[0]), recipe.name, recipe.style.colour, required=False)
        for recipe, fvu, excess in points
        if not recipe.baseline
    ]
    label_points(ax, names)
    return figure


def _training(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """FVU over training tokens, a line per run and recipe (first seed)."""
    figure = Figure(figsize=(0.86 * WIDTH, 3.4))
    ax = figure.subplots()
    ceilings = []
    for recipe in recipes:
        columns = runs[recipe.run].log.get(recipe.arms[0].name, {})
        if "fvu" in columns and "tokens" in columns:
            width = 1.0 if recipe.baseline else 1.6
            x, y = columns["tokens"] / 1e6, columns["fvu"]
            ax.plot(x, y, color=recipe.style.colour, linestyle=recipe.style.line, linewidth=width)
            ceilings.append(np.nanmax(y[len(y) // 25 :]))
    if not ceilings:
        raise MissingResult("no run has a training log")
    ax.set_ylim(0, 1.06 * max(ceilings))
    ax.margins(x=0)
    ax.set_xlabel("million tokens")
    ax.set_title("Fraction of variance unexplained in training")
    _run_legend(figure, runs)
    return figure


def _run_legend(figure: Figure, runs: Mapping[str, SavedRun]) -> None:
    styles = run_styles(list(runs))
    handles = [Line2D([], [], color=s.colour, linestyle=s.line, marker=s.marker) for s in styles.values()]
    handles.append(Line2D([], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="none"))
    figure.legend(handles, [*styles, "hollow or thin: baseline"], loc="outside upper left", ncols=4, labelcolor=INK)


_FIGURES = {
    "compare_overview": _overview,
    "compare_kappa_excess": _kappa_excess,
    "compare_fvu_kappa": _cost,
    "compare_training": _training,
}
