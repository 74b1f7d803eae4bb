"""report.html: one self-contained page per run, rebuilt from the saved results alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from legato.common.files import write_atomically
from legato.report.browser.data import browser_section
from legato.report.figures.drawn import Figure
from legato.report.figures.plot import MissingResult
from legato.report.figures.style import FAINT, ArmStyle, arm_styles, page_colour
from legato.report.page import latent_tables
from legato.report.page.render import Section, render_page, sections_with
from legato.report.page.tables import matched_tables, minus, recipe_rows
from legato.report.registry import draw_figures
from legato.report.text.arm_table import COLUMNS, number, raw_stream_sentence
from legato.report.text.latents import offset_lines
from legato.report.text.matched_tables import legend
from legato.report.text.notes import ablation_in_words, described, scope, warnings
from legato.report.text.summary import answers
from legato.report.text.verdict import KAPPA_EXCESS, SHUFFLED_EXCESS, compare, headline
from legato.results.matched.comparability import flat
from legato.results.saved_run import SavedRun, mean, seed_groups

# name, title, and what the navigation calls it
_SECTIONS = (
    ("overview", "Verdict", ""),
    ("arms", "All arms", "Arms"),
    ("matched", "Matched comparison", "Matched"),
    ("training", "Training", ""),
    ("reconstruction", "Reconstruction and sparsity", "Reconstruction"),
    ("consistency", "Consistency", ""),
    ("position", "Position", ""),
    ("redundancy", "Redundancy", ""),
    ("specialisation", "Specialisation", "Kinds"),
    ("ablation", "Trade-off and ablation", "Trade-off"),
    ("features", "Feature browser", "Features"),
    ("details", "Run details", "Details"),
)


def write_report(run: SavedRun | str | Path, figures: Sequence[Figure] | None = None) -> Path:
    """Write `report.html` in a run folder and return its path. figures: of the run, drawn here by default.

    What the run did not save is named in the page. Raises UsageError where the folder holds no results.
    """
    run = SavedRun.of(run)
    path = run.path / "report.html"
    write_atomically(path, report_html(run, figures).encode())
    return path


def report_html(run: SavedRun, figures: Sequence[Figure] | None = None) -> str:
    """The page as text. Every name and number from the run is escaped."""
    styles = arm_styles(run.highlighted)
    rows, further_rows = recipe_rows(run)
    browser = browser_section(run)
    cards = _cards(run, styles)
    sections = _sections(run, browser, draw_figures(run) if figures is None else figures)
    return render_page(
        "run.html",
        sections,
        run_name=run.name,
        described=described(run),
        headline=headline(run),
        answers=answers(run),
        cards=[card for card in cards if card["style"]] or cards,
        further_cards=[card for card in cards if not card["style"]] if any(card["style"] for card in cards) else [],
        warnings=warnings(run),
        scope=scope(run),
        columns=[column.heading for column in COLUMNS],
        rows=rows,
        further_rows=further_rows,
        seeds=max(len(arms) for arms in seed_groups(run).values()),
        matched=matched_tables(run),
        matched_legend=[] if run.matched is None else legend(run.matched),
        redundancy_counts=latent_tables.redundancy_counts(run),
        pairs=latent_tables.pairs_by_arm(run),
        cluster_cards=latent_tables.cluster_cards(run),
        card_columns=latent_tables.CARD_COLUMNS,
        class_told={name.replace("_", " "): told for name, told in latent_tables.CLASS_TOLD.items()},
        browser=browser if isinstance(browser, Markup) else "",
        raw_stream=raw_stream_sentence(run),
        not_measured=[c.heading for c in COLUMNS if any(c.of(arm) is None for arm in run.arms)],
        settings=flat(run.config.get("config") or run.config),
        measured=[pair for part in ("resolved", "environment") for pair in flat(run.config.get(part) or {})],
    )


def _sections(run: SavedRun, browser: Markup | MissingResult, figures: Sequence[Figure]) -> list[Section]:
    sections = sections_with(_SECTIONS, figures)
    sections["ablation"].sentences = list(filter(None, [" ".join(ablation_in_words(run))]))
    sections["specialisation"].sentences = list(filter(None, [" ".join(latent_tables.stability(run))]))
    sections["position"].sentences = [
        f"{arm.name}: {'; '.join(offset_lines(section))}."
        for arm in run.highlighted[:2]
        if (section := arm.metrics.get("offset"))
    ]
    if isinstance(browser, MissingResult):
        sections["features"].missing.append(("The feature browser", str(browser)))
    return list(sections.values())


def _cards(run: SavedRun, styles: Mapping[str, ArmStyle]) -> list[dict[str, Any]]:
    """A card per comparison; its bars: kappa excess in order, in shuffled order and the baseline's, on one scale."""
    groups = seed_groups(run)
    of_group = {run.arm(name).group: style for name, style in styles.items()}
    found = compare(run)
    shown = [*(groups[c.arm] for c in found), *([groups[run.baseline.group]] if run.baseline else [])]
    top = max((value for arms in shown if (value := mean(arms, KAPPA_EXCESS)) is not None), default=0.0)
    cards = []
    for comparison in found:
        assert run.baseline is not None
        arms, base = groups[comparison.arm], groups[run.baseline.group]
        bars = [
            {
                "name": name,
                "percent": f"{100 * max(0.0, value) / top:.1f}",
                "colour": page_colour(of_group[one[0].group].colour if one[0].group in of_group else FAINT),
                "faded": key == SHUFFLED_EXCESS,
                "text": minus(number(value, 3)),
            }
            for name, one, key in (
                ("this arm", arms, KAPPA_EXCESS),
                ("on shuffled text", arms, SHUFFLED_EXCESS),
                ("baseline", base, KAPPA_EXCESS),
            )
            if (value := mean(one, key)) is not None and top > 0
        ]
        outcome = comparison.headline.removeprefix(comparison.arm).lstrip(": ")
        card = {"arm": comparison.arm, "style": of_group.get(comparison.arm), "bars": bars}
        cards.append({**card, "outcome": f"{outcome[:1].upper()}{outcome[1:]}.", "details": comparison.details})
    return cards
