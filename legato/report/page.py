"""The frame of every page: colours that follow the light or dark scheme, figures, navigation, sortable tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from legato.report.figures import svg_markup
from legato.report.plots import Plot
from legato.report.style import PAGE_COLOURS, WIDTH, ArmStyle, LineStyle, page_colour


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
    name: str
    title: str
    sentences: Sequence[str] = ()
    figures: list[PageFigure] = field(default_factory=list)
    missing: list[Gap] = field(default_factory=list)


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
    """The arm's line as the figures draw it."""
    if style is None:
        return Markup("")
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
        'stroke-width="2.4" style="stroke:{}" stroke-dasharray="{}"/></svg>'
    ).format(page_colour(style.colour), _dashes(style.line))


def _dashes(line: LineStyle) -> str:
    return "none" if isinstance(line, str) else " ".join(f"{2 * length:g}" for length in line[1])


def _version() -> str:
    try:
        return version("legato-sae")
    except PackageNotFoundError:
        return "(not installed)"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals.update(version=_version(), swatch=swatch)
