"""Results of a study as text and as one figure, drawn from synthetic.json alone."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from legato.report.figures.style import FAINT, INK, MARKERS, MUTED, RULE, run_styles
from legato.synthetic.ranking import METRICS
from legato.synthetic.study import BASELINE

SECTIONS = ("0 to .3", ".3 to .6", ".6 to 1")  # bins of planted persistence that do not overlap
MISLED = 0.1  # weight from which a property is said to mislead a metric
_COLUMNS = 160
_WIDTH = 7.4  # inches
_SHAPES = dict(zip(MARKERS, "os^DvPX", strict=True))
_LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def tables(results: Mapping[str, Any]) -> str:
    """Write recovery, metrics and sweep as plain text."""
    bed, difficulty = results["bed"], results["difficulty"]
    lines = [
        f"{bed['sources']} sources in {bed['d_in']} dimensions, L0 {bed['l0']:.2f}, noise {bed['noise']:g}: with the "
        f"true directions, one token finds {difficulty['single_token']:.0%} of the firings, hysteresis "
        f"{difficulty['held']:.0%}. A random",
        f"dictionary has MCC {difficulty['chance_mcc']:.2f}. Brackets: 95 %, bootstrap over seeds and sources. "
        "Persistent: planted correlation of .5 or more.",
        "",
        "",
    ]
    shown = [_recovery(results), _ranking(results)]
    if results["sweep"]:
        shown.append(_sweep(results))
    return "\n".join(lines) + "\n".join(map(_text, shown))


def _recovery(results: Mapping[str, Any]) -> Table:
    headings = ("arm", "L0", "FVU", "MCC", "persistent", "gain", "transient", "gain", "code MCC", "gain, persistent")
    table = _table("Recovery: MCC of decoder directions and of codes, and the gain over the baseline", headings)
    for name, arm in results["arms"].items():
        mcc, gain = arm["mcc"], arm["advantage"]
        is_baseline = name == BASELINE
        table.add_row(
            name,
            f"{arm['core']['l0']:.2f}",
            f"{arm['core']['fvu']:.3f}",
            _number(mcc, "all"),
            _number(mcc, "persistent"),
            "" if is_baseline else _interval(gain["decoder"], "persistent"),
            _number(mcc, "transient"),
            "" if is_baseline else _interval(gain["decoder"], "transient"),
            _number(arm["code_mcc"], "all"),
            "" if is_baseline else _interval(gain["code"], "persistent"),
        )
    return table


def _ranking(results: Mapping[str, Any]) -> Table:
    title = "Metrics: Spearman with the planted value they are read as, and what else moves them (weights)"
    headings = ("metric", "read as", "true codes", *results["arms"], "misled, on true codes, by")
    table = _table(title, headings)
    true = results["true_codes"]
    for metric, meant in METRICS.items():
        if meant not in true["spearman"].get(metric, {}):
            continue
        weights = sorted(true["weight"][metric].items(), key=lambda item: -abs(item[1]))
        table.add_row(
            metric,
            meant,
            f"{true['spearman'][metric][meant]:+.3f}",
            *(_spearman(arm["metrics"]["spearman"].get(metric, {}).get(meant)) for arm in results["arms"].values()),
            ", ".join(f"{name} {value:+.2f}" for name, value in weights if name != meant and abs(value) >= MISLED),
        )
    return table


def _sweep(results: Mapping[str, Any]) -> Table:
    others = [name for name in results["sweep"][0]["arms"] if name != BASELINE]
    headings = ("noise", "its persistence", "sources' persistence", "one token finds", "baseline MCC", *others)
    table = _table("Sweep: all sources alike. Gain in MCC over the baseline", headings)
    for point in results["sweep"]:
        table.add_row(
            f"{point['noise']:.3g}",
            f"{point['noise_persistence']:g}",
            f"{point['persistence']:g}",
            f"{point['difficulty']['single_token']:.0%}",
            f"{point['arms'][BASELINE]['mcc']['mean']:.3f}",
            *(_interval(point["arms"][name]["advantage"], "decoder") for name in others),
        )
    return table


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Recovery by persistence, the sweep, and the metrics' weights, as a PNG."""
    with mpl.rc_context(_LOOK):
        has_sweep = bool(results["sweep"])
        figure = Figure(figsize=(_WIDTH, 8.6 if has_sweep else 8.0))
        grid = figure.add_gridspec(2, 2 if has_sweep else 1, height_ratios=[1, 1.45])
        _draw_recovery(figure.add_subplot(grid[0, 0]), results)
        if has_sweep:
            _draw_sweep(figure.add_subplot(grid[0, 1]), results)
        _draw_weights(figure.add_subplot(grid[1, :]), results)
        figure.savefig(path)


def _draw_recovery(ax: Axes, results: Mapping[str, Any]) -> None:
    arms = results["arms"]
    sections = [name for name in SECTIONS if name in arms[BASELINE]["mcc"]]
    others = [name for name in arms if name != BASELINE]
    for place, name in enumerate(others):
        scores = [arms[name]["advantage"]["decoder"][section] for section in sections]
        at = np.arange(len(sections)) + 0.15 * (place - (len(others) - 1) / 2)
        _points(ax, arms, name, at, scores, "y")
    ax.axhline(0, color=INK, linewidth=0.8)
    labels = [f"{section}\n({arms[BASELINE]['mcc'][section]['mean']:.2f})" for section in sections]
    ax.set_xticks(range(len(sections)), labels)
    ax.set_xlabel("planted persistence (baseline’s MCC)")
    ax.set_ylabel("MCC gained over the baseline")
    ax.set_title("Sources of all kinds")
    if others:
        ax.get_figure(root=True).legend(loc="outside upper left", ncols=len(others), fontsize=8.5)  # type: ignore[union-attr]


def _points(
    ax: Axes, arms: Mapping[str, Any], name: str, at: NDArray[Any], scores: Sequence[Mapping[str, Any]], along: str
) -> None:
    """Draw means with their intervals, `along` y or x."""
    style = run_styles(list(arms))[name]
    means = np.array([score["mean"] for score in scores])
    error = np.abs(np.array([score["interval95"] for score in scores]).T - means)
    x, y = (at, means) if along == "y" else (means, at)
    bars: dict[str, Any] = {f"{along}err": error}
    label = name if along == "y" else None
    ax.errorbar(
        x, y, **bars, color=style.colour, marker=_SHAPES[style.marker], linestyle="none", capsize=2, label=label
    )


def _draw_sweep(ax: Axes, results: Mapping[str, Any]) -> None:
    points = results["sweep"]
    others = [name for name in points[0]["arms"] if name != BASELINE]
    for place, name in enumerate(others):
        scores = [point["arms"][name]["advantage"]["decoder"] for point in points]
        at = np.arange(len(points)) + 0.18 * (place - (len(others) - 1) / 2)
        _points(ax, results["arms"], name, at, scores, "x")
    ax.axvline(0, color=INK, linewidth=0.8)
    labels = [
        f"ρ {point['persistence']:g}, noise {point['noise']:.2g}" + ("*" * bool(point["noise_persistence"]))
        for point in points
    ]
    ax.set_yticks(range(len(points)), labels)
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.set_xlabel("MCC gained (*: persistent noise)")
    ax.locator_params(axis="x", nbins=4)
    ax.set_title("Sources all alike")


def _draw_weights(ax: Axes, results: Mapping[str, Any]) -> None:
    weights = results["true_codes"]["weight"]
    metrics = [name for name in METRICS if name in weights]
    if not metrics:
        ax.axis("off")
        return
    properties = list(weights[metrics[0]])
    table = np.array([[weights[metric][name] for name in properties] for metric in metrics])
    ax.imshow(table, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    for i, metric in enumerate(metrics):
        for j, name in enumerate(properties):
            value = table[i, j]
            weight = "bold" if METRICS[metric] == name else "normal"
            colour = "white" if abs(value) > 0.55 else INK if abs(value) >= MISLED else MUTED
            ax.text(j, i, f"{value:+.2f}", ha="center", va="center", color=colour, fontsize=8, fontweight=weight)
    ax.set_xticks(range(len(properties)), [name.replace("_", "\n") for name in properties])
    ax.set_yticks(range(len(metrics)), metrics)
    ax.grid(False)
    ax.set_xlabel("weight of each planted property in the metric’s ranks (bold: what the metric is read as)")
    ax.set_title("What moves each metric on the true codes")


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in headings:
        is_text = name in ("arm", "metric", "read as", "misled, on true codes, by")
        table.add_column(name, justify="left" if is_text else "right")
    return table


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=_COLUMNS, record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _number(scores: Mapping[str, Any], key: str) -> str:
    return f"{scores[key]['mean']:.3f}" if key in scores else "-"


def _interval(scores: Mapping[str, Any], key: str) -> str:
    if key not in scores:
        return "-"
    low, high = scores[key]["interval95"]
    mean, low, high = (f"{value:+.3f}".replace("0.", ".") for value in (scores[key]["mean"], low, high))
    return f"{mean} [{low}, {high}]"


def _spearman(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
