"""The frame of every page: colours that follow the light or dark scheme, figures, navigation, sortable tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from legato.report.figures.drawn import Figure
from legato.report.figures.plot import Key
from legato.report.figures.style import ArmStyle, page_colour


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


def render(template: str, **values: Any) -> str:
    """A template of this folder as text, every value in it escaped. sections: what the navigation lists."""
    return _ENVIRONMENT.get_template(template).render(values)


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


def key_swatch(key: Key) -> Markup:
    """Draw the sample of a legend's entry."""
    return swatch(key.style, key.parts, key.hollow)


def marker(style: ArmStyle) -> Markup:
    """A dot of a style's colour."""
    return Markup('<span class="dot" style="background:{}"></span>').format(page_colour(style.colour))


def _version() -> str:
    try:
        return version("legato-sae")
    except PackageNotFoundError:
        return "(not installed)"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader([Path(__file__).parents[1] / name for name in ("page", "browser", "runs")]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals.update(version=_version(), swatch=swatch, key_swatch=key_swatch, marker=marker)
