"""Pieces of charts: rows of data, axes, and marks in the styles of arms."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from legato.report.figures.plot import Rows
from legato.report.figures.style import FAINT, MUTED, ArmStyle

APART = alt.Resolve(scale={"color": "independent", "shape": "independent", "strokeDash": "independent"})


def table(digits: int = 5, **columns: Any) -> Rows:
    """Rows of a chart: arrays, lists or one value for all rows; numbers to so many significant digits."""
    lengths = [len(column) for column in columns.values() if not isinstance(column, str | float | int)]
    length = lengths[0] if lengths else 1
    listed = [
        [column] * length if isinstance(column, str | float | int) else significant(column, digits)
        for column in columns.values()
    ]
    return Rows(values=[dict(zip(columns, row, strict=True)) for row in zip(*listed, strict=True)])


def joined_tables(tables: Sequence[Rows]) -> Rows:
    return Rows(values=[row for one in tables for row in one.values])


def significant(values: Any, digits: int = 3) -> list[Any]:
    """Numbers rounded to significant digits, None for what is not finite; texts as they are."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        return values.tolist()
    if values.dtype.kind != "f":
        return values.astype(int).tolist()
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def number(name: str, title: str | None = None, **settings: Any) -> dict[str, Any]:
    """Arguments of a quantitative axis: its domain as it is given, values as they are."""
    scale = {"nice": False} | settings.pop("scale", {})
    if scale.get("type") != "log":
        scale["zero"] = False
    return {"shorthand": f"{name}:Q", "title": title, "scale": alt.Scale(**scale), **settings}


def lag_axis(lags: Sequence[float] | np.ndarray, title: str = "lag in tokens", name: str = "x") -> alt.X:
    ends = [float(np.min(lags)) * 0.9, float(np.max(lags)) * 1.1]
    axis = alt.Axis(values=[float(lag) for lag in lags], format="~g", labelOverlap=True)
    return alt.X(**number(name, title, scale={"type": "log", "base": 2, "domain": ends}, axis=axis))


def log_axis(kind: type, name: str, title: str, domain: Sequence[float]) -> Any:
    """An axis of decades."""
    decades = range(int(np.ceil(np.log10(domain[0]))), int(np.floor(np.log10(domain[1]))) + 1)
    axis = alt.Axis(
        values=[10.0**power for power in decades], format="~e", grid=True, labelOverlap="greedy", labelSeparation=8
    )
    return kind(**number(name, title, scale={"type": "log", "domain": list(domain), "clamp": True}, axis=axis))


def hover(*fields: str) -> list[alt.Tooltip]:
    """Tooltips given as "field", "field:title" or "field:title:format"."""
    found = []
    for given in fields:
        name, title, form = (*given.split(":"), "", "")[:3]
        if form:
            found.append(alt.Tooltip(f"{name}:Q", title=title or name, format=form))
        else:
            found.append(alt.Tooltip(f"{name}:N", title=title or name))
    return found


def styled(styles: Mapping[str, ArmStyle], field: str = "arm", *parts: str) -> dict[str, Any]:
    """Encodings that give each arm of a field its style. parts: of `color`, `strokeDash`, `shape`."""
    names = list(styles)
    ranges: dict[str, list[Any]] = {
        "color": [style.colour for style in styles.values()],
        "strokeDash": [list(style.dash) or [1, 0] for style in styles.values()],
        "shape": [style.marker for style in styles.values()],
    }
    kinds: dict[str, Any] = {"color": alt.Color, "strokeDash": alt.StrokeDash, "shape": alt.Shape}
    return {
        part: kinds[part](f"{field}:N", scale=alt.Scale(domain=names, range=ranges[part]), legend=None)
        for part in parts or ("color", "strokeDash")
    }


def curves(
    data: Rows,
    styles: Mapping[str, ArmStyle],
    x: alt.X,
    y: alt.Y,
    tooltip: Sequence[alt.Tooltip],
    *,
    markers: bool = False,
    width: float = 1.8,
) -> list[alt.Chart]:
    """A line per arm, its points under the pointer; drawn where markers is set, else unseen."""
    base = alt.Chart(data).encode(x=x, y=y)
    line = base.mark_line(strokeWidth=width, clip=True).encode(**styled(styles))
    points = base.mark_point(size=40, filled=True, opacity=1.0 if markers else 0.0, clip=not markers).encode(
        **styled(styles, "arm", "color", "shape"), tooltip=list(tooltip)
    )
    return [line, points]


def rule(*, x: float | None = None, y: float | None = None, colour: str = FAINT, dash: Sequence[float] = ()) -> Any:
    """A line across the panel at a value."""
    data = Rows(values=[{"at": x if x is not None else y}])
    mark = alt.Chart(data).mark_rule(color=colour, strokeDash=list(dash) or [1, 0], clip=True)
    return mark.encode(x="at:Q") if x is not None else mark.encode(y="at:Q")


def band(data: Rows, x: alt.X, colour: str, opacity: float = 0.15) -> alt.Chart:
    """The area between the columns low and high."""
    return alt.Chart(data).mark_area(color=colour, opacity=opacity, clip=True).encode(x=x, y="low:Q", y2="high:Q")


def dots(data: Rows, style: ArmStyle, size: float, tooltip: Sequence[alt.Tooltip], **mark: Any) -> alt.Chart:
    """Filled marks of one style."""
    settings = {"shape": style.marker, "color": style.colour, "size": size, "filled": True, "opacity": 1.0, **mark}
    return alt.Chart(data).mark_point(**settings).encode(tooltip=list(tooltip))


def words(data: Rows, colour: str = MUTED, **mark: Any) -> alt.Chart:
    """The column `text` at its place."""
    return alt.Chart(data).mark_text(**{"color": colour, "fontSize": 10.5, **mark}).encode(text="text:N")


def heat_map(
    values: np.ndarray,
    labels: Sequence[Any] | np.ndarray,
    scale: alt.Scale,
    title: str,
    tooltip: Sequence[alt.Tooltip],
    *,
    axes: tuple[str, str],
    ticks: Sequence[Any],
    digits: int = 3,
) -> alt.Chart:
    """A square matrix, its first row above; y and x are the labels of row and column, z the value.

    The data hold a row of the matrix as one list: a row per cell would be many times larger.
    """
    names = np.asarray(labels).tolist()
    rounded = np.round(np.asarray(values, np.float64), digits)
    cells = [[value if np.isfinite(value) else None for value in row] for row in rounded.tolist()]
    data = Rows(values=[{"y": name, "x": names, "z": row} for name, row in zip(names, cells, strict=True)])
    side: dict[str, Any] = {"labelOverlap": True, "ticks": False, "domain": False, "grid": False, "values": list(ticks)}
    # The order is said: a missing first value would else be put last. Whole pixels: no seams between cells.
    places = alt.Scale(domain=names, round=True)
    legend = alt.Legend(title=title, orient="bottom", gradientLength=200, gradientThickness=9)
    return (
        alt.Chart(data)
        .transform_flatten(["x", "z"])
        .mark_rect()
        .encode(
            x=alt.X("x:N", sort=None, scale=places, title=axes[0], axis=alt.Axis(labelAngle=0, **side)),
            y=alt.Y("y:N", sort=None, scale=places, title=axes[1], axis=alt.Axis(**side)),
            color=alt.Color("z:Q", scale=scale, legend=legend),
            tooltip=list(tooltip),
        )
    )
