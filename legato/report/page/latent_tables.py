"""Cards and tables of latents on the page: redundant pairs with their contexts, clusters with their share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from legato.evaluation.redundancy.classes import CLASSES
from legato.report.figures.latent_data import clusters_of
from legato.report.figures.style import arm_styles
from legato.report.page.tables import Cell, PageTable, Row, minus
from legato.report.text.latents import specialisation_lines
from legato.results.saved_run import SavedRun

PAIRS_SHOWN = 6  # of a class and arm
EXAMPLES_SHOWN = 3
EXAMPLE_LATENTS = 4  # of a cluster
_MARKED = re.compile(r"\[([^\[]+?|[^\]]*?\[)\](\u2081\u2082|\u2081|\u2082)")
_WHO = {"\u2081": "a", "\u2082": "b", "\u2081\u2082": "ab"}
CLASS_TOLD = {
    "duplicate": "the same firings and nearly the same direction: one feature twice",
    "position_split": "one direction, each latent at its own positions: one feature cut by position",
    "lead_lag": "the second fires some tokens after the first: a sequence, not redundancy",
    "antipodal": "opposite directions",
}


@dataclass(frozen=True)
class Piece:
    """Text of a context; who: the latents that fire there, `a`, `b` or `ab`, empty where neither does."""

    text: str
    who: str = ""


def redundancy_counts(run: SavedRun) -> PageTable | None:
    """Count an arm's pairs of each class, and the share in redundant groups; None where none was measured."""
    styles, rows = arm_styles(run.highlighted), []
    for arm in run.highlighted:
        section = arm.metrics.get("redundancy")
        if section:
            counts = [str(section["pairs"].get(name, 0)) for name in CLASSES]
            shares = [section.get(key) for key in ("share_of_latents", "share_of_firing")]
            cells = [Cell(count, count) for count in (*counts, str(section["groups"]))]
            cells += [Cell("–") if share is None else Cell(f"{share:.1%}", f"{share:.6g}") for share in shares]
            rows.append(Row(arm.name, cells, styles[arm.name], arm is run.baseline))
    columns = [*(name.replace("_", " ") for name in CLASSES), "groups", "latents in groups", "their firing"]
    return PageTable("Pairs of latents by class", columns, rows) if rows else None


def pairs_by_arm(run: SavedRun) -> dict[str, list[dict[str, Any]]]:
    """The strongest pairs of each class with their contexts, by highlighted arm; an arm without pairs is left out."""
    found = {}
    for arm in run.highlighted:
        saved = run.redundant_pairs(arm.name, PAIRS_SHOWN)
        totals = (arm.metrics.get("redundancy") or {}).get("pairs") or {}
        classes = [
            {
                "name": name.replace("_", " "),
                "total": totals.get(name, len(saved[name])),
                "pairs": list(map(_pair, saved[name])),
            }
            for name in CLASSES
            if saved.get(name)
        ]
        if classes:
            found[arm.name] = classes
    return found


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [f"lag {row['lag']}"] if row.get("lag") else []
    numbers += [f"{key} {row[key]:.2f}" for key in ("excess", "cosine") if row.get(key) is not None]
    contexts = [pieces(text) for text in (row.get("examples") or [])[:EXAMPLES_SHOWN]]
    return {"a": row["latent_a"], "b": row["latent_b"], "numbers": minus(", ".join(numbers)), "contexts": contexts}


def pieces(example: str) -> list[Piece]:
    """A saved context (`17: of the[ United]₁[ States]₂`) cut at its marks, without the position in front."""
    text = re.sub(r"^\d+: ", "", example)
    found, end = [], 0
    for match in _MARKED.finditer(text):
        if match.start() > end:
            found.append(Piece(text[end : match.start()]))
        found.append(Piece(match[1], _WHO[match[2]]))
        end = match.end()
    return [*found, Piece(text[end:])] if end < len(text) else found


CARD_COLUMNS = ("latents", "firing", "rate", "kappa", "half-life")


def cluster_cards(run: SavedRun) -> list[dict[str, Any]]:
    """A card per cluster with its share and medians in every highlighted arm, and typical latents of one of them."""
    arms = [(arm, clusters_of(arm)) for arm in run.highlighted]
    styles = arm_styles(run.highlighted)
    found = {cluster.number: cluster for _, clusters in arms for cluster in clusters}
    cards = []
    for number in sorted(found):
        members = [(arm, c) for arm, clusters in arms for c in clusters if c.number == number]
        shown = next((m for m in members if m[0].role == "named"), members[0])
        examples = [
            (entry["latent"], [token.replace("\n", "\u21b5") for token in entry["tokens"]])
            for entry in (shown[1].found.get("examples") or [])[:EXAMPLE_LATENTS]
        ]
        rows = [Row(arm.name, _card_cells(c.found), styles[arm.name]) for arm, c in members]
        card = {"label": found[number].label, "style": found[number].style, "rows": rows}
        cards.append({**card, "examples_of": shown[0].name, "examples": examples})
    return cards


def _card_cells(entry: Mapping[str, Any]) -> list[Cell]:
    centre = entry.get("centroid") or {}

    def of(name: str, form: str, base: float | None = None) -> Cell:
        value = centre.get(name)
        if value is None:
            return Cell("–")
        return Cell(minus(f"{value if base is None else base**value:{form}}"))

    shares = [Cell(f"{entry[key]:.0%}") for key in ("share_of_latents", "share_of_firing")]
    return [*shares, of("log10_density", ".2%", 10), of("kappa1", ".2f"), of("log2_half_life", ".1f", 2)]


def stability(run: SavedRun) -> list[str]:
    """Say how far to trust the clusters, a sentence each; they are the same for every arm."""
    for arm in run.highlighted:
        section = arm.metrics.get("specialisation")
        if section and section.get("note") is None and section.get("clusters"):
            sentences = [specialisation_lines(section)[-1]]
            if fitted := section.get("fitted_on"):
                sentences.append(f"Found once over {fitted['latents']} latents of {len(fitted['saes'])} SAEs together.")
            if left_out := section.get("left_out"):
                few = section["min_firings"]
                sentences.append(f"Latents that fire fewer than {few} times are left out: {left_out} of {arm.name}.")
            return sentences
    return []
