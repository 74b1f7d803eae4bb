"""comparison.html: several runs side by side in one self-contained page, with its figures, from saved results alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from legato.common.files import write_atomically
from legato.report.figures.drawn import write_pngs
from legato.report.figures.style import run_styles
from legato.report.page.render import Section, render_page, sections_with
from legato.report.page.tables import Cell, Row, minus
from legato.report.runs.figures import draw_comparison
from legato.report.runs.recipes import Recipe, recipes_of
from legato.report.text.arm_table import COLUMNS, number
from legato.report.text.matched_tables import legend, tables
from legato.report.text.notes import described
from legato.report.text.verdict import headline
from legato.results.matched.comparability import barriers, places, pooled, settings
from legato.results.matched.compare import match_methods
from legato.results.saved_run import SavedRun, joined

_SECTIONS = (
    ("overview", "Verdict", ""),
    ("settings", "What differs", ""),
    ("arms", "Arms by run", ""),
    ("matched", "At equal cost", ""),
    ("tradeoff", "Trade-off", ""),
    ("consistency", "Over lag", ""),
    ("training", "Training", ""),
    ("details", "Shared settings", ""),
)
_ENVIRONMENT = ("versions.", "python", "commit", "processor", "threads")


def write_comparison(runs: Mapping[str, SavedRun], out_dir: str | Path) -> dict[str, Path]:
    """Write comparison.html and the figures `<name>.png` into out_dir for runs by label; return the paths by name.

    A figure whose data no run has saved is left out, and named in the page.
    """
    out = Path(out_dir)
    figures = draw_comparison(runs)
    written = write_pngs(figures, out)
    written["comparison"] = out / "comparison.html"
    sections = list(sections_with(_SECTIONS, figures).values())
    write_atomically(written["comparison"], _page(runs, sections, out).encode())
    return written


def _page(runs: Mapping[str, SavedRun], sections: list[Section], folder: Path) -> str:
    differing, shared = settings(runs)
    return render_page(
        "runs.html",
        sections,
        names=list(runs),
        verdict=_verdict(runs),
        cards=_cards(runs, folder),
        barriers=barriers(runs),
        apart=len(places(runs)) > 1,
        differing=[row for row in differing if not row[0].startswith(_ENVIRONMENT)],
        environments=[row for row in differing if row[0].startswith(_ENVIRONMENT)],
        shared=shared,
        columns=["run", *(column.heading for column in COLUMNS)],
        rows=[_row(recipe) for recipe in recipes_of(runs)],
        further_rows=[_row(recipe) for recipe in recipes_of(runs, highlighted=False)],
        groups=[_matched(group) for group in pooled(runs)],
    )


def _verdict(runs: Mapping[str, SavedRun]) -> str:
    together = places(runs)
    count = f"These {len(runs)} runs"
    if len(runs) == 1:
        return "One run: there is nothing to compare it with."
    if len(together) == 1:
        return f"{count} read the same activations and were judged on the same text: their numbers compare directly."
    if len(together) == len(runs):
        return f"{count} do not compare number by number: each is to be read against its own baseline."
    groups = "; ".join(f"{joined(labels)} do" for labels in together if len(labels) > 1)
    alone = [labels[0] for labels in together if len(labels) == 1]
    rest = f"; {joined(alone)} only against {'its' if len(alone) == 1 else 'their'} own baseline" if alone else ""
    return f"Not all of these {len(runs)} runs compare number by number: {groups}{rest}."


def _cards(runs: Mapping[str, SavedRun], folder: Path) -> list[dict[str, Any]]:
    styles = run_styles(list(runs))
    cards = []
    for label, run in runs.items():
        report = run.path / "report.html"
        link = Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix() if report.is_file() else ""
        card = {"run": label, "style": styles[label], "link": link}
        cards.append({**card, "outcome": headline(run), "about": described(run)})
    return cards


def _row(recipe: Recipe) -> Row:
    cells = [Cell(recipe.run)]
    for column in COLUMNS:
        estimate, interval = recipe.estimate(column.key), recipe.interval(column.key)
        value = None if estimate is None else column.scale * estimate[0]
        ends = [minus(f"{column.scale * end:.{column.digits}f}") for end in interval or ()]
        cells.append(Cell(number(value, column.digits), "" if value is None else f"{value:.6g}", " to ".join(ends)))
    name = recipe.name if len(recipe.arms) == 1 else f"{recipe.name}, {len(recipe.arms)} seeds"
    return Row(name, cells, recipe.style, recipe.baseline)


def _matched(group: Mapping[str, SavedRun]) -> dict[str, Any]:
    """The matched comparison of runs whose seeds and methods stand together, or why there is none (`gap`)."""
    found = {"title": " and ".join(group), "tables": [], "legend": [], "gap": ""}
    if not any(run.baseline for run in group.values()):
        return found | {"gap": "it has no baseline to compare with"}
    matched = match_methods(list(group.values()))
    if not matched["methods"]:
        return found | {"gap": "it holds nothing but the baseline"}
    return found | {"tables": tables(matched), "legend": legend(matched)}
