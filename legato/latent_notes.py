"""What the latents of a run's main SAEs are like, in words: their kinds, their redundancy, the offset test."""

import textwrap
from collections.abc import Sequence

from legato.evaluation.offset import offset_lines
from legato.evaluation.redundancy_table import redundancy_lines
from legato.evaluation.specialisation import specialisation_lines
from legato.results import Arm, SavedRun

SHOWN = 2  # the baseline and the first named arm: the table has the others


def latents_in_words(run: SavedRun) -> str:
    """Text for notes.txt; empty where the run measured none of it."""
    arms = run.highlighted
    parts = [text for arm in arms[:SHOWN] if (text := _one(arm))]
    pairs = redundancy_lines({arm.name: arm.metrics for arm in arms})
    if pairs:
        legend = "Redundancy: pairs of latents by class, and what lies in groups of duplicates or position splits."
        parts.append("\n".join([legend, *pairs]))
    return "\n\n".join(parts)


def _one(arm: Arm) -> str:
    lines: list[str] = []
    if "specialisation" in arm.metrics:
        lines += specialisation_lines(arm.metrics["specialisation"])
    if "offset" in arm.metrics:
        lines += [f"{line[0].upper()}{line[1:]}." for line in offset_lines(arm.metrics["offset"])]
    return "\n".join([f"{arm.name}:", *_listed(lines)]) if lines else ""


def _listed(lines: Sequence[str]) -> list[str]:
    return [textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines]
