"""Interactive heat maps: position by position, and the clustered lagged correlation of redundant latents."""

import numpy as np

from legato.report.figures.missing import MissingResult
from legato.report.figures.position import matrix_range, position_matrices
from legato.report.plots.spec import Panel, Plot, Trace, View, rounded
from legato.results.saved_run import SavedRun

_SIGNED = [[0, "var(--c2)"], [0.5, "var(--surface)"], [1, "var(--c1)"]]


def position_matrix_plot(run: SavedRun) -> Plot:
    """A panel per highlighted arm on one colour scale, the diagonal left out."""
    matrices = position_matrices(run)
    low, high = matrix_range(list(matrices.values()))
    panels = []
    for name, matrix in matrices.items():
        heat = {
            "type": "heatmap",
            "z": rounded(matrix),
            "zmin": low,
            "zmax": high,
            "colorscale": "Cividis",
            "colorbar": {"orientation": "h", "thickness": 8, "len": 1, "outlinewidth": 0, "y": -0.16, "yanchor": "top"},
            "hovertemplate": "positions %{y} and %{x}<br>correlation %{z:.3f}<extra></extra>",
        }
        layout = _square("", "position")
        layout["margin"]["b"] = 64
        panels.append(Panel([heat], layout, name))
    return Plot([View("", panels)], columns=3, square=True)


def redundancy_plot(run: SavedRun) -> Plot:
    """The excess over the null at each lag, a view per arm; the lag is the slider's."""
    views, lags = [], np.array([])
    for arm in run.highlighted:
        stored = run.redundancy_map(arm.name)
        if not stored or len(stored["latents"]) < 2:
            continue
        kept = stored["lags"] >= 0
        lags = stored["lags"][kept]
        steps: list[Trace] = [{"z": rounded(excess, 2)} for excess in stored["excess"][kept]]
        latents = [str(latent) for latent in stored["latents"]]
        heat = {
            "type": "heatmap",
            "x": latents,
            "y": latents,
            "zmin": -0.6,
            "zmax": 0.6,
            "colorscale": _SIGNED,
            "colorbar": {
                "title": {"text": "excess", "side": "right"},
                "thickness": 10,
                "outlinewidth": 0,
                "len": 0.8,
            },
            "hovertemplate": "latent %{y} now, latent %{x} later<br>excess %{z:.2f}<extra></extra>",
        }
        layout = _square("latent, so many tokens later", "latent now", type="category", nticks=8)
        panel = Panel([heat], layout, "", steps)
        views.append(View(arm.name, [panel], f"The {len(latents)} latents most involved in pairs."))
    if not views:
        raise MissingResult("no clustered correlation map (redundancy/<arm>.npz) was saved")
    labels = [f"{lag} token" + "s" * int(lag != 1) for lag in lags.tolist()]
    return Plot(views, columns=1, square=True, steps=labels, step_name="lag")


def _square(x: str, y: str, **settings: object) -> Trace:
    side = {"constrain": "domain", "showgrid": False, "ticks": "", **settings}
    return {
        "xaxis": {**side, "title": {"text": x}},
        "yaxis": {**side, "title": {"text": y}, "scaleanchor": "x", "autorange": "reversed"},
        "margin": {"l": 40, "r": 6, "t": 6, "b": 36},
    }
