"""Figures that set several runs side by side, a colour per run, drawn from their saved results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from legato.report.figures.missing import MissingResult
from legato.report.figures.style import FAINT, MUTED, RULE, WIDTH, PointLabel, figure_style, label_points, run_styles
from legato.report.plots.spec import Plot
from legato.report.runs.plots import cost_plot, over_lag_plot
from legato.report.runs.recipes import Recipe, dot, recipes_of, run_legend, shortened
from legato.report.text.verdict import KAPPA_EXCESS
from legato.results.matched.comparability import places
from legato.results.saved_run import SavedRun

_MEASURES = (
    ("core.fvu", "FVU \u2193"),
    ("core.l0", "L0"),
    ("core.ce_loss_score", "CE loss score \u2191"),
    (KAPPA_EXCESS, "Kappa excess \u2191"),
    ("consistency.ac1_excess_within", "AC excess \u2191"),
)


Draw = Callable[[Mapping[str, SavedRun], Sequence[Recipe]], Figure]


@dataclass(frozen=True)
class ComparisonFigure:
    """name: of its PNG file. section: of the page that compares runs, empty where a plot there shows the same.
    plot: what the page shows instead of the drawing."""

    name: str
    section: str
    title: str
    caption: str
    draw: Draw
    plot: Callable[[Mapping[str, SavedRun], Sequence[Recipe]], Plot] | None = None


def drawn(runs: Mapping[str, SavedRun]) -> Iterator[tuple[ComparisonFigure, Figure | MissingResult, Plot | None]]:
    """Each figure over the runs, by label, or what it lacks; the caller saves a figure before asking for the next.

    A run takes part with its baseline and named arms.
    """
    recipes = recipes_of(runs)
    for spec in FIGURES:
        with figure_style():
            try:
                yield spec, spec.draw(runs, recipes), spec.plot(runs, recipes) if spec.plot else None
            except MissingResult as missing:
                yield spec, missing, None


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
                dot(ax, (estimate[0], rows[i]), recipe, xerr=estimate[1])
        ax.set_title(title)
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.margins(x=0.15)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if key == "core.l0":
            _widen(ax)
        ax.spines["left"].set_visible(False)
        for height in rows:
            ax.axhline(height, color=RULE, linewidth=0.6, zorder=0)
    axes[0].set_yticks(rows, [recipe.label for recipe in recipes])
    axes[0].set_ylim(max(rows) + 0.7, 0.6)
    for label, height in headings.items():
        axes[0].annotate(
            shortened(label),
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


def _widen(ax: Axes) -> None:
    """Room of a tenth around the values at the least: runs of one budget differ in L0 by nothing that matters."""
    low, high = ax.get_xlim()
    if high > 0:
        room = max(0.0, 0.1 * high - (high - low) / 2)
        ax.set_xlim(low - room, high + room)


def _over_lag(key: str, what: str, raw: str = "") -> Draw:
    """A panel per recipe with a line per run (mean over seeds), one scale; raw: the activations' own, thin."""

    def draw(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
        panels: dict[str, list[tuple[Recipe, np.ndarray, np.ndarray]]] = {}
        for recipe in recipes:
            lags = recipe.arms[0].series("consistency.lags")
            series = [values for arm in recipe.arms if (values := arm.series(key)) is not None]
            if lags is not None and series:
                panels.setdefault(recipe.name, []).append((recipe, lags, np.mean(series, axis=0)))
        if not panels:
            raise MissingResult(f"no run has {what} over lags")
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(max(WIDTH / 3 * columns, WIDTH / 2), 2.1 * rows + 0.5))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, (name, lines) in zip(axes, panels.items(), strict=False):
            for recipe, lags, values in lines:
                style = recipe.style
                if raw and (stream := recipe.arms[0].series(raw)) is not None:
                    ax.plot(lags, stream, color=style.colour, linewidth=0.8, alpha=0.5, zorder=1)
                ax.plot(lags, values, color=style.colour, linestyle=style.line, marker=style.marker, markersize=4)
            ax.axhline(0, color=FAINT, linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xticks(lines[0][1], [f"{lag:g}" for lag in lines[0][1]])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_title(shortened(name))
        for i, ax in enumerate(axes):
            ax.set_visible(i < len(panels))
            if i + columns >= len(panels):
                ax.tick_params(labelbottom=True)
                ax.set_xlabel("lag in tokens")
        for ax in axes[::columns]:
            ax.set_ylabel(what, fontsize=8)
        faint = Line2D([], [], color=MUTED, linewidth=0.8, alpha=0.5)
        run_legend(figure, runs, [(faint, "thin: the activations themselves")] if raw else [])
        return figure

    return draw


def _cost(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """Kappa excess against FVU, a panel per model, layer and text; lines lead from each run's baseline to its arms,
    small dots are the arms of its ablation and sweeps."""
    panels = []
    for labels in places(runs):
        points = [
            (recipe, fvu, excess)
            for recipe in recipes
            if recipe.run in labels
            and (fvu := recipe.estimate("core.fvu")) is not None
            and (excess := recipe.estimate(KAPPA_EXCESS)) is not None
        ]
        if points:
            panels.append((labels, points))
    if not panels:
        raise MissingResult("no run has both FVU and kappa excess")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH if columns == 2 else 0.86 * WIDTH, (3.1 if columns == 2 else 3.8) * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (labels, points) in zip(axes, panels, strict=False):
        _cost_panel(ax, {label: runs[label] for label in labels}, points)
        ax.set_xlabel("fraction of variance unexplained (lower is better)", fontsize=8)
        if len(panels) > 1:
            ax.set_title(shortened(", ".join(labels)))
    for ax in axes[::columns]:
        ax.set_ylabel("kappa excess at lag 1, within-document null", fontsize=8)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    hollow = Line2D([], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="none")
    dots = Line2D([], [], color=MUTED, marker=".", markersize=4, linestyle="none", alpha=0.6)
    run_legend(figure, runs, [(hollow, "hollow: baseline"), (dots, "dots: ablation, sweeps, seeds")])
    for ax, (_, points) in zip(axes, panels, strict=False):
        names = [(recipe, (fvu[0], excess[0])) for recipe, fvu, excess in points if not recipe.baseline]
        label_points(ax, [PointLabel(at, recipe.label, recipe.style.colour, required=False) for recipe, at in names])
    return figure


def _cost_panel(
    ax: Axes,
    runs: Mapping[str, SavedRun],
    points: Sequence[tuple[Recipe, tuple[float, float], tuple[float, float]]],
) -> None:
    bases = {recipe.run: (fvu[0], excess[0]) for recipe, fvu, excess in points if recipe.baseline}
    for recipe, (x, dx), (y, dy) in points:
        if not recipe.baseline and recipe.run in bases:
            x0, y0 = bases[recipe.run]
            ax.plot([x0, x], [y0, y], color=recipe.style.colour, linewidth=0.8, alpha=0.5, zorder=2)
        dot(ax, (x, y), recipe, xerr=dx, yerr=dy)
    ax.margins(0.12)
    ax.grid(True, axis="both")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # the arms in colour set the scale
    for label, style in {recipe.run: recipe.style for recipe, _, _ in points}.items():
        dots = [
            (fvu, excess)
            for arm in runs[label].background
            if (fvu := arm.value("core.fvu")) is not None and (excess := arm.value(KAPPA_EXCESS)) is not None
        ]
        if dots:
            ax.plot(*zip(*dots, strict=True), ".", color=style.colour, markersize=4, alpha=0.45, zorder=1)


def _training(runs: Mapping[str, SavedRun], recipes: Sequence[Recipe]) -> Figure:
    """FVU over training tokens, a line per run and recipe (first seed)."""
    figure = Figure(figsize=(0.86 * WIDTH, 3.4))
    ax = figure.subplots()
    ceilings = []
    for recipe in recipes:
        columns = runs[recipe.run].log.get(recipe.arms[0].name, {})
        if "fvu" in columns and "tokens" in columns:
            width = 0.8 if recipe.baseline else 1.6
            x, y = columns["tokens"] / 1e6, columns["fvu"]
            ax.plot(x, y, color=recipe.style.colour, linestyle=recipe.style.line, linewidth=width)
            ceilings.append(np.nanmax(y[len(y) // 25 :]))
    if not ceilings:
        raise MissingResult("no run has a training log")
    ax.set_ylim(0, 1.06 * max(ceilings))
    ax.margins(x=0)
    ax.set_xlabel("million tokens")
    ax.set_title("Fraction of variance unexplained in training")
    run_legend(figure, runs, [(Line2D([], [], color=MUTED, linewidth=0.8), "thin: baseline")])
    return figure


FIGURES = (
    ComparisonFigure(
        "compare_fvu_kappa",
        "tradeoff",
        "What consistency costs",
        "Up and left is better. Lines lead from a run's baseline to its arms; whiskers are standard errors over seeds. "
        "Runs that read other activations or were judged on other text stand in a panel of their own: compare inside "
        "a panel only.",
        _cost,
        cost_plot,
    ),
    ComparisonFigure(
        "compare_overview",
        "tradeoff",
        "Every measure, arm by arm",
        "Means over seeds with standard errors; hollow marks are baselines. Kappa and AC excess: at lag 1, over the "
        "null that shuffles tokens inside a document.",
        _overview,
    ),
    ComparisonFigure(
        "compare_ac",
        "consistency",
        "How codes hold over lag",
        "A panel per recipe. Autocorrelation: mean over latents of the correlation between a latent's activation and "
        "itself some tokens later. Kappa: the same for whether it fires at all. Both in excess of what a shuffle "
        "inside each document leaves.",
        _over_lag("consistency.ac_excess_within", "AC excess", raw="consistency.raw_stream.ac.excess_within"),
        over_lag_plot,
    ),
    ComparisonFigure("compare_kappa_excess", "", "", "", _over_lag("consistency.kappa_excess_within", "kappa excess")),
    ComparisonFigure(
        "compare_training",
        "training",
        "FVU in training",
        "On training batches, first seed; thin lines are baselines.",
        _training,
    ),
)
