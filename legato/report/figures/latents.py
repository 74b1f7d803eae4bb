"""Figures of what latents are like: the map of kinds, the share of each kind, the map of redundant latents."""

import altair as alt
import numpy as np

from legato.report.figures.chart import dots, heat_map, hover, number, table
from legato.report.figures.consistency import MOST_POINTS, latent_tables, latent_views
from legato.report.figures.latent_data import Latents, clusters_of, kind_style
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, Rows, View
from legato.report.figures.style import INK, SURFACE, ArmStyle, arm_styles
from legato.results.saved_run import Arm, SavedRun

_SHOWN = 3  # arms in the PNG: the baseline and the first named ones
SATURATED = 0.6  # excess from which the colour stays the same
SIGNED = alt.Scale(
    domain=[-SATURATED, 0, SATURATED], range=["#0072b2", SURFACE, "#d55e00"], clamp=True, interpolate="rgb"
)


def kind_map(run: SavedRun) -> Plot:
    """A view per arm: its latents on the common map, a colour and marker per cluster."""
    found = latent_tables(run, ("map_x", "map_y", "cluster"), "map_x, map_y and cluster")
    found = [(arm, latents) for arm, latents in found if clusters_of(arm)]
    if not found:
        raise MissingResult("no arm has clusters in its feature table (map_x, map_y, cluster)")
    ends = []
    for axis in (0, 1):
        values = np.concatenate([latents.columns[axis] for _, latents in found])
        margin = 0.04 * float(np.ptp(values)) or 0.1
        ends.append([float(values.min()) - margin, float(values.max()) + margin])
    bare = {"axis": alt.Axis(grid=False, labels=False, ticks=False)}
    x = alt.X(**number("x", "first principal component", scale={"domain": ends[0]}, **bare))
    y = alt.Y(**number("y", "second", scale={"domain": ends[1]}, **bare))
    keys: dict[str, Key] = {}

    def panel(arm: Arm, latents: Latents) -> Panel:
        shown, layers = latents.thinned(MOST_POINTS), []
        for cluster in clusters_of(arm):
            keys.setdefault(cluster.label, Key(cluster.label, cluster.style, ("marker",)))
            map_x, map_y, number_of = shown.columns
            inside = number_of == cluster.number
            if inside.any():
                data = table(3, x=map_x[inside], y=map_y[inside], latent=shown.latent[inside], kind=cluster.label)
                tooltip = hover("latent", "kind")
                layers.append(dots(data, cluster.style, 22, tooltip, opacity=0.6, clip=True).encode(x=x, y=y))
        return Panel(alt.layer(*layers), zoom=True)

    return latent_views(found, panel, keys=keys.values(), height=460)


def kinds_of_latents(run: SavedRun) -> Plot:
    """Share of each kind among an arm's latents and in all of its firing, by the rule on each latent alone."""
    sections = {
        arm.name: kinds
        for arm in run.highlighted
        if (kinds := (arm.metrics.get("specialisation") or {}).get("by_latent"))
    }
    if not sections:
        raise MissingResult("the latents were not described (no `specialisation.by_latent` in metrics.json)")
    kinds = list(next(iter(sections.values())))
    colours = alt.Scale(domain=kinds, range=[kind_style(kind).colour for kind in kinds])
    x = alt.X(**number("start", None, scale={"domain": [0, 1]}, axis=alt.Axis(values=[0, 0.5, 1], format="%")))
    panels = []
    for key, title in {"share_of_latents": "Share of latents", "share_of_firing": "Share of all firing"}.items():
        rows = []
        for name, section in sections.items():
            start = 0.0
            for kind in kinds:
                share = float(section[kind][key])
                text = f"{share:.0%}" if share > 0.08 else ""
                ends = {"start": start, "end": start + share, "middle": start + share / 2}
                rows.append({"arm": name, "kind": kind, "share": share, "text": text, **ends})
                start += share
        axis = alt.Axis(labelLimit=165, domain=False, ticks=False, grid=False)
        y = alt.Y("arm:N", sort=None, title=None, scale=alt.Scale(paddingInner=0.25), axis=axis)
        base = alt.Chart(Rows(values=rows)).encode(y=y)
        tooltip = hover("arm", "kind", "share:share:.1%")
        bars = base.mark_bar(stroke=SURFACE, strokeWidth=1).encode(
            x=x, x2="end:Q", color=alt.Color("kind:N", scale=colours, legend=None), tooltip=tooltip
        )
        told = base.transform_filter("datum.text != ''").encode(x="middle:Q")
        plate = told.mark_point(shape="M-1.3,-.6h2.6v1.2h-2.6z", size=420, filled=True, color=SURFACE, style="label")
        ink = told.mark_text(fontSize=10, color=INK, style="label").encode(text="text:N")
        panels.append(Panel(alt.layer(bars, plate, ink), title))
    keys = [Key(kind, ArmStyle(kind_style(kind).colour, (), "square"), ("marker",)) for kind in kinds]
    return Plot([View("", panels)], height=34 * len(sections) + 10, beside=172, keys=keys)


def redundancy_map(run: SavedRun) -> Plot:
    """Excess correlation of the latents most involved in pairs, clustered: a view per arm, a step per lag."""
    views, lags, still = [], np.array([]), []
    styles = arm_styles(run.highlighted)
    for arm in run.highlighted:
        stored = run.redundancy_map(arm.name)
        if not stored or len(stored["latents"]) < 2:
            continue
        kept = stored["lags"] >= 0
        lags = stored["lags"][kept]
        steps = [
            _excess(stored["latents"], excess, lag) for excess, lag in zip(stored["excess"][kept], lags, strict=True)
        ]
        note = f"The {len(stored['latents'])} latents most involved in pairs."
        views.append(View(arm.name, [Panel(steps[0], "", steps=steps)], note))
        chosen = {int(lag): step for lag, step in zip(lags, steps, strict=True)}
        still.append([Panel(chosen[lag], f"{arm.name}, lag {lag}", styles[arm.name].colour) for lag in (0, 1)])
    if not views:
        raise MissingResult("no arm has saved a map of correlated latents with something in it (redundancy/<arm>.npz)")
    return Plot(
        views,
        columns=1,
        square=True,
        steps=[_told(int(lag)) for lag in lags],
        step_name="lag",
        still=[pair[row] for row in (0, 1) for pair in still[:_SHOWN]],
        still_columns=min(_SHOWN, len(still)),
    )


def _excess(latents: np.ndarray, excess: np.ndarray, lag: int) -> alt.Chart:
    tooltip = hover("y:latent now", f"x:latent {_told(int(lag))} later", "z:excess:.2f")
    axes = ("latent, so many tokens later", "latent now")
    ticks = latents[:: max(1, len(latents) // 8)].tolist()
    title = "excess correlation"
    return heat_map(excess, latents, SIGNED, title, tooltip, axes=axes, ticks=ticks, digits=2)


def _told(lag: int) -> str:
    return f"{lag} token" + "s" * (lag != 1)
