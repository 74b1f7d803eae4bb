"""What the latents of a run's main SAEs are like, in words: their kinds, their redundancy, the offset test."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from legato.evaluation.redundancy.classes import CLASSES
from legato.results.saved_run import Arm, SavedRun

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


def offset_lines(section: Mapping[str, Any]) -> list[str]:
    """The section of one SAE in words."""
    lines = []
    for mode, told in (("position_ids", "with its position ids shifted"), ("prefix", "behind a neutral prefix")):
        if mode == "position_ids" and section["model_positions"] == "relative":
            continue
        for entry in (section[mode] or [])[-1:]:
            lines.append(
                f"the same text {told} by {entry['shift']} tokens: support Jaccard {_told(entry['jaccard'])} "
                f"(another token of the document: {_told(entry['jaccard_null'])}), code cosine "
                f"{_told(entry['cosine'])}; the activation itself moves by {_told(entry['movement'])} of its norm, "
                f"{_told(entry['variance_moved'])} of its variance"
            )
    if still := section["stands_still"]:
        verdict = "rounding, as it should be with rotary positions" if still["holds"] else "MORE THAN ROUNDING: a fault"
        floor = section["position_ids"][-1]["jaccard"]
        lines.append(
            f"shifted position ids alone: the activation moves by {still['movement']:.4f} of its norm, support Jaccard "
            f"{_told(floor)}: {verdict}"
        )
    return lines


def _told(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def redundancy_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Lines of a table for notes.txt from the content of metrics.json; none where no arm has the section."""
    sections = {arm: values["redundancy"] for arm, values in metrics.items() if "redundancy" in values}
    if not sections:
        return []
    head = ["arm", "duplicate", "position split", "lead-lag", "antipodal", "groups", "% of latents", "% of firing"]
    rows = [head]
    for arm, section in sections.items():
        counts = [str(section["pairs"][name]) for name in CLASSES]
        shares = [f"{100 * section[key]:.1f}" for key in ("share_of_latents", "share_of_firing")]
        rows.append([arm, *counts, str(section["groups"]), *shares])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def specialisation_lines(section: Mapping[str, Any]) -> list[str]:
    """The section in words: what kinds of latents there are, and how far to trust that."""
    if section["note"] is not None:
        return [f"Kinds of latents: {section['note']}."]

    def shares(by: str) -> str:
        return "; ".join(
            f"{name} {share['share_of_latents']:.1%} ({share['share_of_firing']:.1%} of firing)"
            for name, share in section[by].items()
            if share["latents"]
        )

    beyond = section["silhouette"] - section["silhouette_null"]
    ari = section["ari"]
    across = "" if ari["sae_seeds"] is None else f", {ari['sae_seeds']:.2f} between SAEs of different seeds"
    return [
        f"Kinds of latents ({section['latents']} that fire {section['min_firings']} times or more, "
        f"{section['share_of_firing']:.0%} of all firing), by the cluster they lie in: {shares('by_name')}.",
        f"The same rule on each latent by itself: {shares('by_latent')}.",
        f"{section['k']} clusters, silhouette {section['silhouette']:.2f} against {section['silhouette_null']:.2f} for "
        f"permuted descriptors: {'a continuum more than groups' if beyond < 0.2 else 'groups apart'}. They come back "
        f"with an ARI of {ari['bootstrap']:.2f} over bootstraps, {ari['clusterer_seeds']:.2f} over starts{across}.",
    ]
