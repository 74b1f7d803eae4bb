"""Tell what the latents of a run's main SAEs are like: their kinds, their redundancy, the offset test."""

from collections.abc import Mapping
from typing import Any

from legato.evaluation.redundancy.classes import CLASSES
from legato.report.text.matched_tables import Table
from legato.report.text.words import paragraphs
from legato.results.saved_run import SavedRun

SHOWN = 2  # the baseline and the first named arm: the table has the others


def latents_in_words(run: SavedRun) -> dict[str, list[str]]:
    """Sentences by arm, on the kinds of latents and on the offset test; only the arms that measured one of them."""
    told = {}
    for arm in run.highlighted[:SHOWN]:
        kinds, offset = arm.metrics.get("specialisation"), arm.metrics.get("offset")
        clauses = [] if offset is None else offset_lines(offset)
        lines = [] if kinds is None else specialisation_lines(kinds)
        told[arm.name] = [*lines, *(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)]
    return {name: lines for name, lines in told.items() if lines}


def offset_lines(section: Mapping[str, Any]) -> list[str]:
    """The section of one SAE in words."""
    modes = ("prefix",) if section["model_positions"] == "relative" else ("position_ids", "prefix")
    return paragraphs(
        "offset",
        moved=[(mode, section[mode][-1]) for mode in modes if section[mode]],
        still=section["stands_still"],
        jaccard=section["position_ids"][-1]["jaccard"] if section["stands_still"] else None,
    )


def redundancy_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of a table for notes.txt from the content of metrics.json; none where no arm has the section."""
    rows = []
    for arm, values in metrics.items():
        if section := values.get("redundancy"):
            shares = [f"{100 * section[key]:.1f}" for key in ("share_of_latents", "share_of_firing")]
            rows.append([arm, *(str(section["pairs"][name]) for name in CLASSES), str(section["groups"]), *shares])
    head = ("arm", "duplicate", "position split", "lead-lag", "antipodal", "groups", "% of latents", "% of firing")
    return Table("", head, rows).text().splitlines() if rows else []


def specialisation_lines(section: Mapping[str, Any]) -> list[str]:
    """The section in words: what kinds of latents there are, and how far to trust that."""
    kinds = {
        by: [(name, share) for name, share in section.get(by, {}).items() if share["latents"]]
        for by in ("by_name", "by_latent")
    }
    return paragraphs("kinds", **{**section, **kinds})
