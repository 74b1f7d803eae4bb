"""The frame of every page: colours that follow the light or dark scheme, figures, navigation, sortable tables.

A page carries its data and the plotting library compressed inside itself. It asks nothing of a network.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from legato.report.figures.drawn import Figure
from legato.report.figures.plot import Plot
from legato.report.figures.style import PAGE_COLOURS, PAGE_CONFIG, ArmStyle, page_colour


@dataclass
class Section:
    """short: its title in the navigation, where that is another one. missing: (title, what the run lacks for it)."""

    name: str
    title: str
    short: str = ""
    sentences: Sequence[str] = ()
    figures: list[Figure] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def sections_with(titles: Sequence[tuple[str, str, str]], figures: Sequence[Figure]) -> dict[str, Section]:
    """The sections by name, each with its figures. titles: name, title, and the navigation's title, if another."""
    sections = {name: Section(name, title, short) for name, title, short in titles}
    for figure in figures:
        if figure.section and figure.plot is None:
            sections[figure.section].missing.append((figure.title, figure.missing))
        elif figure.section:
            sections[figure.section].figures.append(figure)
    return sections


def render_page(template: str, sections: Sequence[Section], **values: Any) -> str:
    """A page of these sections with their plots and all it needs inside it, every value in it escaped."""
    plots = {figure.name: figure.plot for section in sections for figure in section.figures if figure.plot is not None}
    return render(template, sections=sections, islands=_plot_islands(plots), **values)


def render(template: str, **values: Any) -> str:
    """A template of the folders below as text, every value in it escaped."""
    return _ENVIRONMENT.get_template(template).render(values)


def island(name: str, packed: bytes) -> Markup:
    """An inert <script> of that id with the bytes in base64; `legato.unpack(name)` in plots.js reads packed text."""
    content = Markup(base64.b64encode(packed).decode())
    return Markup('<script type="application/octet-stream" id="{}">{}</script>').format(name, content)


def packed_json(content: Any) -> bytes:
    """JSON, compressed. Raises ValueError for NaN, which JSON cannot hold."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return gzip.compress(text.encode(), mtime=0)


def _plot_islands(plots: Mapping[str, Plot]) -> list[Markup]:
    """The plots by name with the colours that become the page's, and what draws them; nothing where there are none."""
    if not plots:
        return []
    content = {name: plot.content() for name, plot in plots.items()}
    colours = {colour: f"--{name}" for colour, name in PAGE_COLOURS.items()}
    packed = packed_json({"config": PAGE_CONFIG, "colours": colours, "plots": content})
    return [island("plot-data", packed), island("vega-js", _library())]


@lru_cache(maxsize=1)
def _library() -> bytes:
    """Vega, Vega-Lite and Vega-Embed: 0.9 MB, 0.4 MB packed, run only once a plot comes near the window."""
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks for what is optional
    return gzip.compress(bundle.encode(), mtime=0)


def swatch(style: ArmStyle | None, parts: Sequence[str] = ("line", "marker"), hollow: bool = False) -> Markup:
    """The arm's line and marker as the figures draw them."""
    if style is None:
        return Markup("")
    colour = page_colour(style.colour)
    drawn = [Markup('<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">')]
    if "line" in parts:
        dash = " ".join(map(str, style.dash)) or "none"
        line = '<line x1="0" y1="5" x2="26" y2="5" stroke-width="2" style="stroke:{}" stroke-dasharray="{}"/>'
        drawn.append(Markup(line).format(colour, dash))
    if "marker" in parts:
        place = Markup(
            '<path transform="translate(13 5) scale(4.5)" d="{}" style="fill:{};stroke:{}" stroke-width=".3"/>'
        )
        drawn.append(place.format(_PATHS.get(style.marker, style.marker), "none" if hollow else colour, colour))
    return Markup("").join([*drawn, Markup("</svg>")])


_PATHS = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0z",
    "square": "M-.85-.85h1.7v1.7h-1.7z",
    "triangle-up": "M0-1L1 .9H-1z",
    "triangle-down": "M0 1L1-.9H-1z",
    "diamond": "M0-1.1L1.1 0L0 1.1L-1.1 0z",
    "cross": "M-.35-1h.7v.65h.65v.7h-.65v.65h-.7v-.65h-.65v-.7h.65z",
}


def marker(style: ArmStyle) -> Markup:
    """A dot of a style's colour."""
    return Markup('<span class="dot" style="background:{}"></span>').format(page_colour(style.colour))


def _version() -> str:
    try:
        return version("legato-sae")
    except PackageNotFoundError:
        return "(not installed)"


_LOADER = jinja2.FileSystemLoader([Path(__file__).parents[1] / name for name in ("page", "browser", "runs")])
_ENVIRONMENT = jinja2.Environment(
    loader=_LOADER, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def _source(name: str) -> Markup:
    """A script or style sheet of the folders, as it stands in a page."""
    return Markup(_LOADER.get_source(_ENVIRONMENT, name)[0])


_ENVIRONMENT.globals.update(version=_version(), swatch=swatch, marker=marker, source=_source)
