"""The frame of every page: colours that follow the light or dark scheme, figures, navigation, sortable tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from legato.report.figures.style import PAGE_COLOURS, WIDTH, ArmStyle, LineStyle, page_colour
from legato.report.plots.spec import Plot
from legato.report.registry import svg_markup


@dataclass(frozen=True)
class PageFigure:
    """A drawing, or an interactive plot that the page draws; name: its file among the run's figures."""

    title: str
    caption: str
    svg: Markup | None = None
    name: str = ""
    plot: Plot | None = None


@dataclass(frozen=True)
class Gap:
    title: str
    reason: str


@dataclass
class Section:
    """short: its title in the navigation, where that is another one."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    figures: list[PageFigure] = field(default_factory=list)
    missing: list[Gap] = field(default_factory=list)
    short: str = ""


def render(template: str, **values: Any) -> str:
    """A template of this folder as text, every value in it escaped. sections: what the navigation lists."""
    return _ENVIRONMENT.get_template(template).render(values)


def page_svg(figure: Figure, name: str) -> Markup:
    markup = svg_markup(figure, name)
    for colour, variable in PAGE_COLOURS.items():
        markup = markup.replace(colour, f"var(--{variable})")
    share = min(1.0, figure.get_figwidth() / WIDTH)
    return Markup(markup.replace("<svg", f'<svg style="--share:{share:.2f}" aria-hidden="true"', 1))


def swatch(style: ArmStyle | None) -> Markup:
    """The arm's line and marker as the figures draw them."""
    if style is None:
        return Markup("")
    colour = page_colour(style.colour)
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
        'stroke-width="2" style="stroke:{}" stroke-dasharray="{}"/><path d="{}" style="fill:{}"/></svg>'
    ).format(colour, _dashes(style.line), _MARKERS[style.marker], colour)


_MARKERS = {
    "o": "M9 5a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "s": "M9.5 1.5h7v7h-7z",
    "^": "M13 0.5l4.5 8.5h-9z",
    "D": "M13 0l5 5l-5 5l-5 -5z",
    "v": "M13 9.5l4.5 -8.5h-9z",
    "P": "M11.4 0.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2v-2.9h-2.9v-3.2h2.9z",
    "X": "M10.5 0.5l2.5 2.5l2.5 -2.5l2 2l-2.5 2.5l2.5 2.5l-2 2l-2.5 -2.5l-2.5 2.5l-2 -2l2.5 -2.5l-2.5 -2.5z",
}


def marker(style: ArmStyle) -> Markup:
    """A dot of a style's colour."""
    return Markup('<span class="dot" style="background:{}"></span>').format(page_colour(style.colour))


def _dashes(line: LineStyle) -> str:
    return "none" if isinstance(line, str) else " ".join(f"{2 * length:g}" for length in line[1])


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
_ENVIRONMENT.globals.update(version=_version(), swatch=swatch, marker=marker)
