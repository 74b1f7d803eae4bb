"""The feature browser of report.html: every latent with the passages it fires on, searched and sorted in the page."""

from pathlib import Path

from markupsafe import Markup

from legato.report.browser.data import browser_islands
from legato.report.figures.plot import MissingResult
from legato.report.page.render import render
from legato.results.saved_run import SavedRun

_SCRIPTS = ("unpack.js", "strips.js", "table.js", "latent.js", "browser.js")


def browser_section(run: SavedRun) -> Markup | MissingResult:
    """The browser as one piece of the page, with its own style, scripts and data; MissingResult where the run saved no
    passages, its message a phrase that goes on after "is not in this report: ".

    Raises LegatoError, naming the file, for saved passages that are damaged.
    """
    try:
        islands = browser_islands(run)
    except MissingResult as missing:
        return missing
    return Markup(
        render(
            "browser.html",
            style=_own_file("browser.css"),
            islands=islands,
            scripts=[_own_file(name) for name in _SCRIPTS],
        )
    )


def _own_file(name: str) -> Markup:
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))
