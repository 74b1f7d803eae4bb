"""Interactive plots of what each arm costs: FVU against L0, consistency against FVU with the Pareto front."""

import numpy as np

from legato.report.figures.ablation import pareto_front
from legato.report.figures.missing import MissingResult
from legato.report.figures.style import ArmStyle, arm_styles, page_colour
from legato.report.figures.tradeoff import Scene, cost_scene, fidelity_scene, outside_in_words
from legato.report.figures.training import sweeps
from legato.report.plots.spec import (
    FAINT,
    MUTED,
    SURFACE,
    Panel,
    Plot,
    Trace,
    View,
    keys_of,
    marker_of,
    plain,
    significant,
)
from legato.results.saved_run import Arm, SavedRun

_SIDES = {"right": "triangle-right", "left": "triangle-left", "above": "triangle-up", "below": "triangle-down"}
_FVU, _KAPPA = "fraction of variance unexplained", "kappa excess, lag 1"


def fidelity_plot(run: SavedRun) -> Plot:
    found = fidelity_scene(run)
    if not found.inside:
        raise MissingResult("no arm has both core.l0 and core.fvu in metrics.json")
    note = outside_in_words(run, found, ("L0", "FVU"), (1, 2))
    return _plot(run, found, ("active latents per token (L0)", _FVU), "L0 %{x:.1f}, FVU %{y:.3f}", note)


def cost_plot(run: SavedRun) -> Plot:
    found = cost_scene(run)
    trained = {name: point for name, point in found.inside.items() if run.arm(name).trained}
    if len(trained) < 2:
        raise MissingResult("fewer than two arms have both core.fvu and consistency.kappa1_excess_within")
    note = outside_in_words(run, found, ("FVU", "kappa excess"), (2, 2))
    front = pareto_front(trained)
    stairs = {
        "type": "scatter",
        "mode": "lines",
        "x": significant([trained[name][0] for name in front], 5),
        "y": significant([trained[name][1] for name in front], 5),
        "line": {"color": MUTED, "dash": "6px,4px", "width": 1.2, "shape": "hv"},
        "hoverinfo": "skip",
    }
    return _plot(run, found, (_FVU, _KAPPA), "FVU %{x:.3f}, kappa excess %{y:.3f}", note, [stairs])


def _plot(
    run: SavedRun, found: Scene, titles: tuple[str, str], hover: str, note: str, under: list[Trace] | None = None
) -> Plot:
    styles = arm_styles(run.highlighted)
    of_group = {arm.group: styles[arm.name] for arm in run.highlighted}
    traces = list(under or [])
    for method, by_k in sweeps(run, {n: p for n, p in found.inside.items() if run.arm(n).trained}).items():
        style = of_group.get(method)
        line = np.array(sorted(point for _, point in by_k.values()))
        colour = page_colour(style.colour) if style else MUTED
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": significant(line[:, 0], 5),
                "y": significant(line[:, 1], 5),
                "line": {"color": colour, "width": 1.2},
                "hoverinfo": "skip",
            }
        )
    others = [run.arm(name) for name in found.inside if run.arm(name) not in run.highlighted]
    for arms, marker in (
        ([arm for arm in others if arm.trained and arm.group not in of_group], {"color": FAINT, "size": 6}),
        (
            [arm for arm in others if not arm.trained],
            {"color": SURFACE, "size": 8, "line": {"color": MUTED, "width": 1.6}},
        ),
    ):
        if arms:
            traces.append(_dots(arms, found, marker, hover))
    for arm in others:
        if arm.trained and arm.group in of_group:
            traces.append(_dots([arm], found, marker_of(of_group[arm.group], 6), hover))
    for arm in run.highlighted:
        if arm.name in found.inside:
            traces.append(_named(arm, found, styles[arm.name], hover))
    if found.outside:
        traces.append(_arrows(run, found))
    (x0, x1), (y0, y1) = found.limits
    layout = {
        "xaxis": {"title": {"text": titles[0]}, "range": [x0, x1]},
        "yaxis": {"title": {"text": titles[1]}, "range": [y0, y1]},
    }
    grey = sum(arm.trained and arm.group not in of_group for arm in others)
    dots = [f"Grey: {grey} further SAEs, named where you point at them."] if grey else []
    dots += ["Small: another seed."] if any(arm.trained and arm.group in of_group for arm in others) else []
    dots += ["Hollow: controls, made of a trained SAE without training."] if any(not a.trained for a in others) else []
    return Plot(
        [View("", [Panel(traces, layout)])],
        height=420,
        columns=1,
        keys=keys_of(run.highlighted, styles),
        note=" ".join([*dots, note]).strip(),
    )


def _dots(arms: list[Arm], found: Scene, marker: Trace, hover: str) -> Trace:
    places = np.array([found.inside[arm.name] for arm in arms])
    return {
        "type": "scatter",
        "mode": "markers",
        "x": significant(places[:, 0], 5),
        "y": significant(places[:, 1], 5),
        "text": [plain(arm.name) for arm in arms],
        "marker": marker,
        "hovertemplate": "<b>%{text}</b><br>" + hover + "<extra></extra>",
    }


def _named(arm: Arm, found: Scene, style: ArmStyle, hover: str) -> Trace:
    return _dots([arm], found, marker_of(style, 11), hover)


def _arrows(run: SavedRun, found: Scene) -> Trace:
    edges = [(name, *found.at_edge(name)) for name in found.outside]
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,
        "x": significant([x for _, x, _, _ in edges], 5),
        "y": significant([y for _, _, y, _ in edges], 5),
        "text": [plain(name) for name, *_ in edges],
        "customdata": [significant(found.outside[name]) for name, *_ in edges],
        "marker": {"color": MUTED, "size": 9, "symbol": [_SIDES[side] for *_, side in edges]},
        "hovertemplate": "<b>%{text}</b><br>outside, at %{customdata[0]}, %{customdata[1]}<extra></extra>",
    }
