"""Figures of position: the position x position matrix, profiles, eta² against mutual information, the offset test."""

from collections.abc import Mapping

import altair as alt
import numpy as np

from legato.evaluation.position.attachment import wilson
from legato.report.figures import chart
from legato.report.figures.consistency import latent_dots, latent_tables, latent_views, log_limits
from legato.report.figures.latent_data import latents_of
from legato.report.figures.plot import Key, MissingResult, Panel, Plot, View
from legato.report.figures.style import MUTED, SEQUENTIAL, ArmStyle, arm_styles
from legato.report.figures.training import arm_keys
from legato.results.saved_run import Arm, SavedRun

_MOST_BOUND = 3  # latents with the largest eta² whose profiles are shown
_FEWEST_FIRINGS = 40  # a rarer one has no profile to speak of
_MOST_CELLS = 160  # along a side of the matrix: a longer context is shown in blocks of positions


def position_matrix(run: SavedRun) -> Plot:
    """Correlation over sequences of a latent at position t with itself at t', mean over latents, a panel per arm."""
    matrices = position_matrices(run)
    low, high = matrix_range(list(matrices.values()))
    scale = alt.Scale(scheme=SEQUENTIAL, domain=[low, high], clamp=True)
    title = "mean correlation, diagonal left out"
    block = -(-max(map(len, matrices.values())) // _MOST_CELLS)
    tooltip = chart.hover("y:position", "x:and position", "z:correlation:.3f")
    panels = []
    for name, matrix in matrices.items():
        starts = np.arange(0, len(matrix), block)
        counts = np.add.reduceat(np.add.reduceat(np.isfinite(matrix), starts, 0, dtype=int), starts, 1)
        sums = np.add.reduceat(np.add.reduceat(np.nan_to_num(matrix), starts, 0), starts, 1)
        with np.errstate(invalid="ignore"):
            means = sums / counts
        ticks = starts[[0, len(starts) // 2, -1]].tolist()
        sides = {"axes": ("position t'", "position t"), "ticks": ticks}
        panels.append(Panel(chart.heat_map(means, starts, scale, title, tooltip, **sides), name))
    note = f"Each cell is the mean over {block} x {block} positions." if block > 1 else ""
    return Plot([View("", panels)], columns=3, square=True, note=note)


def position_profiles(run: SavedRun) -> Plot:
    """L0 over position, and the firing rate over position of the latents most bound to it; bands are 95 %."""
    curved = {arm.name: arm for arm in run.highlighted if arm.series("position.l0_by_position") is not None}
    bound = {arm.name: found for arm in run.highlighted if (found := _most_bound(run, arm))}
    bound = dict(list(bound.items())[:4])
    if not curved and not bound:
        raise MissingResult("neither L0 by position (metrics.json) nor profiles (arrays/<arm>.npz) were saved")
    styles = arm_styles(run.highlighted)
    x = alt.X(**chart.number("x", "position in the context"))
    panels = []
    if curved:
        bands, lines, top = [], [], 0.0
        for name, arm in curved.items():
            mean_L, low_L, high_L = (arm.series(f"position.l0_by_position{end}") for end in ("", "_low", "_high"))
            assert mean_L is not None
            at = np.arange(len(mean_L))
            lines.append(chart.table(x=at, y=mean_L, arm=name))
            top = max(top, float(np.nanmax(mean_L if high_L is None else high_L)))
            if low_L is not None and high_L is not None:
                bands.append(chart.band(chart.table(x=at, low=low_L, high=high_L), x, styles[name].colour))
        y = alt.Y(**chart.number("y", None, scale={"domain": [0, 1.06 * top or 1.0]}))
        drawn = chart.curves(
            chart.joined_tables(lines), styles, x, y, chart.hover("arm", "x:position:~g", "y:L0:.2f"), width=1.3
        )
        panels.append(Panel(alt.layer(*bands, *drawn), "L0"))
    y = alt.Y(**chart.number("y", "firing rate", scale={"domain": [0, 1]}))
    for name, profiles in bound.items():
        colour = styles[name].colour
        bands, lines, looks = [], [], {}
        for (latent, rate_L, low_L, high_L), dash in zip(profiles, _DASHES, strict=False):
            at = np.arange(len(rate_L))
            looks[f"latent {latent}"] = ArmStyle(colour, dash)
            lines.append(chart.table(x=at, y=rate_L, arm=f"latent {latent}"))
            bands.append(chart.band(chart.table(x=at, low=low_L, high=high_L), x, colour))
        tooltip = chart.hover("arm:of " + name.replace(":", " "), "x:position:~g", "y:firing rate:.3f")
        drawn = chart.curves(chart.joined_tables(lines), looks, x, y, tooltip, width=1.2)
        title = f"{name}: {', '.join(look.removeprefix('latent ') for look in looks)}"
        panels.append(Panel(alt.layer(*bands, *drawn), title, colour))
    keys = arm_keys(run, "line")
    if bound:
        ranks = zip(("latent most bound to position", "second", "third"), _DASHES, strict=True)
        keys += [Key(label, ArmStyle(MUTED, dash), ("line",)) for label, dash in ranks]
    return Plot([View("", panels)], columns=min(3, len(panels)), keys=keys)


_DASHES: tuple[tuple[float, ...], ...] = ((), (6.0, 2.0), (1.5, 1.5))


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


def position_measures(run: SavedRun) -> Plot:
    """Mutual information of firing with position against eta², a view per highlighted arm.

    Both measures are corrected for chance, so that about half of the latents lie at or below zero: not drawn.
    """
    found = latent_tables(run, ("eta2", "mi"), "eta2 and mi", positive=True)
    limits = log_limits(found)
    x = chart.log_axis(alt.X, "x", "eta² (share of variance)", limits[0])
    y = chart.log_axis(alt.Y, "y", "mutual information (nats)", limits[1])
    tooltip = chart.hover("latent", "x:eta²:.2~g", "y:nats:.2~g")
    styles = arm_styles(run.highlighted)
    return latent_views(
        found,
        lambda arm, latents: Panel(latent_dots(latents, styles[arm.name], tooltip).encode(x=x, y=y), zoom=True),
    )


def offset_test(run: SavedRun) -> Plot:
    """Support Jaccard and code cosine of the same text at another offset, over the size of the shift."""
    arms = [arm for arm in run.highlighted if _offset_rows(arm, "prefix") or _offset_rows(arm, "position_ids")]
    if not arms:
        raise MissingResult("the offset test was not run (no `offset` in metrics.json)")
    styles = arm_styles(run.highlighted)
    y = alt.Y(**chart.number("y", None, scale={"domain": [0, 1.04]}))
    panels = []
    for mode, label in _MODES.items():
        if not any(_offset_rows(arm, mode) for arm in arms):
            continue
        for key, what in _AGREEMENT.items():
            lines = {arm.name: _over_shift(_offset_rows(arm, mode), key) for arm in arms}
            x = chart.lag_axis(next(shifts for shifts, _ in lines.values() if shifts), "shift in tokens")
            tooltip = chart.hover("arm", "x:shift:~g", f"y:{what}:.3f")
            rows = [chart.table(x=shifts, y=values, arm=name) for name, (shifts, values) in lines.items() if shifts]
            layers = chart.curves(chart.joined_tables(rows), styles, x, y, tooltip, markers=True)
            if key == "jaccard":
                chance = {arm.name: _over_shift(_offset_rows(arm, mode), "jaccard_null") for arm in arms}
                null = [chart.table(x=at, y=values, arm=name) for name, (at, values) in chance.items() if at]
                if null:
                    dotted = alt.Chart(chart.joined_tables(null)).mark_line(
                        color=MUTED, strokeDash=[2, 3], strokeWidth=1
                    )
                    layers.append(dotted.encode(x=x, y=y, detail="arm:N"))
            panels.append(Panel(alt.layer(*layers, resolve=chart.APART), f"{label}: {what}"))
    keys = [key for key in arm_keys(run) if key.label in {arm.name for arm in arms}]
    keys.append(Key("another token of the document", ArmStyle(MUTED, (2.0, 3.0)), ("line",)))
    return Plot([View("", panels)], columns=2, keys=keys)


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
    """Choose the range of the colour scale, without the most extreme cells, which would leave the rest one colour."""
    low, high = np.nanquantile(np.concatenate([matrix.ravel() for matrix in matrices]), [0.01, 0.995])
    return min(0.0, round(float(low), 4)), round(float(high), 4)
