"""The matched comparison as tables and sentences, for the terminal and for notes.txt.

Everything is read from the content of matched.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from legato.report.text.words import paragraphs
from legato.results.matched.compare import HOW, MIN_LATENTS_IN_BIN, bins_ahead, widest
from legato.results.matched.points import ALL, MEASURES

KAPPA, AC = MEASURES[:2]
_GONE = ""


@dataclass(frozen=True)
class Table:
    """rows: a name, then a cell per heading after the first."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]

    def without(self, headings: Sequence[str]) -> "Table":
        kept = [i for i, heading in enumerate(self.headings) if heading not in headings]
        return Table(self.title, tuple(self.headings[i] for i in kept), [[row[i] for i in kept] for row in self.rows])

    def text(self) -> str:
        """In columns of plain text, the first to the left, the others to the right."""
        lines = [self.headings, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headings))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )


def tables(matched: Mapping[str, Any]) -> list[Table]:
    """At the baseline's L0, at its FVU, group by group where an arm has groups of latents, and the targets."""
    found = [at_l0(matched), at_fvu(matched), by_group(matched), targets(matched)]
    return [table for table in found if table.rows]


def at_l0(matched: Mapping[str, Any]) -> Table:
    headings = ("", "L0", "FVU", "CE", "alive", "kappa", "kappa ratio", "AC", "AC ratio", "bins", "absent")
    *base, ac = _as_trained(matched["baseline"]["as_trained"])
    rows = [["baseline", *base, _GONE, ac, _GONE, _GONE, _GONE]]
    for name, method in matched["methods"].items():
        at = method["at_l0"]
        missing = len(method["seeds"]) < len(matched["baseline"]["seeds"])
        name += f", {len(method['seeds'])} seed{'s' * (len(method['seeds']) > 1)}" if missing else ""
        if not at["matched"]:
            *plain, ac = _as_trained(method["as_trained"])
            rows.append([name, *plain, "not matched", ac, "not matched", _GONE, _GONE])
            continue
        everything = at["populations"][ALL]
        ahead, bins = bins_ahead(everything)
        costs = [_value(at.get("l0"), ".1f"), *(_change(at.get(key)) for key in ("fvu", "ce_loss_score", "frac_alive"))]
        rows.append([name, *costs, *_measures(everything), f"{ahead}/{bins}", _absent(at["shuffled"])])
    return Table("At the baseline's L0", headings, rows)


def at_fvu(matched: Mapping[str, Any]) -> Table:
    headings = ("", "FVU", "L0", "kappa", "kappa ratio", "AC", "AC ratio", "how")
    rows = []
    for name, method in matched["methods"].items():
        at = method["at_fvu"]
        if not at["matched"]:
            rows.append([name, *[_GONE] * (len(headings) - 2), "not matched"])
            continue
        l0 = at.get("l0")
        both = f"{_value(l0, '.1f')} : {l0['baseline']:.1f}" if l0 is not None else _GONE
        measures, how = _measures(at["populations"][ALL]), HOW[at["along"]].removeprefix("along the ")
        rows.append([name, _value(at.get("fvu"), ".3f"), both, *measures, how])
    return Table("At the baseline's FVU (L0: the method's against the baseline's there)", headings, rows)


def by_group(matched: Mapping[str, Any]) -> Table:
    headings = ("", "alive latents", "kappa", "kappa ratio", "AC", "AC ratio", "bins")
    rows = []
    for name, method in matched["methods"].items():
        if not method["at_l0"]["matched"]:
            continue
        for group, found in method["at_l0"]["populations"].items():
            if group == ALL or KAPPA not in found:
                continue
            ahead, bins = bins_ahead(found)
            latents = _value(found.get("latents"), ".0f")
            rows.append([f"{name}, {group}", latents, *_measures(found), f"{ahead}/{bins}"])
    return Table("Groups of latents against all of the baseline's, at its L0", headings, rows)


def targets(matched: Mapping[str, Any]) -> Table:
    """Tabulate the targets that each named method reaches."""
    rows, headings = [], [""]
    for name, method in matched["methods"].items():
        if method["verdict"] is None or method["role"] != "named":
            continue
        headings = ["", *(f"{row['criterion']} {row['bound']}" for row in method["verdict"])]
        surely = ("yes" if row["beyond_intervals"] is not False else "yes*" for row in method["verdict"])
        reached = {None: "?", False: "no"}
        rows.append([name, *(reached.get(row["met"], yes) for row, yes in zip(method["verdict"], surely, strict=True))])
    return Table("Targets at the baseline's L0 (*: the interval reaches below)", tuple(headings), rows)


def legend(matched: Mapping[str, Any]) -> list[str]:
    """Explain the columns, the way each method was matched and the methods that were not, a sentence each."""
    ways: dict[tuple[str, str], list[str]] = {}
    for place, what in (("at_l0", "L0"), ("at_fvu", "FVU")):
        for name, method in matched["methods"].items():
            at = method[place]
            way = HOW[at["along"]] if at["matched"] else f"not matched ({next(iter(at['reasons'].values()))})"
            partly = at["matched"] and at["reasons"]
            some = f" ({len(at['seeds'])} of {len(method['seeds'])} seeds)" if partly else ""
            ways.setdefault((what, way), []).append(name + some)
    return paragraphs(
        "matched",
        seeds=len(matched["baseline"]["seeds"]),
        latents_in_bin=MIN_LATENTS_IN_BIN,
        left_out=matched["left_out"],
        ways=ways,
    )


def _as_trained(values: Mapping[str, Any]) -> list[str]:
    forms = {"l0": ".1f", "fvu": ".3f", "ce_loss_score": ".3f", "frac_alive": ".1%", KAPPA: ".3f", AC: ".3f"}
    return [f"{values[key]['mean']:{form}}" if key in values else _GONE for key, form in forms.items()]


def _measures(population: Mapping[str, Any]) -> list[str]:
    """Kappa excess and AC excess, each with its ratio to the baseline's."""
    entries = [population.get(measure) for measure in (KAPPA, AC)]
    return [text for entry in entries for text in (_value(entry, ".3f"), _ratio(entry))]


def _value(entry: Mapping[str, Any] | None, form: str) -> str:
    return _GONE if entry is None else f"{entry['value']:{form}}"


def _change(entry: Mapping[str, Any] | None) -> str:
    return _GONE if entry is None or entry["ratio"] is None else f"{entry['ratio'] - 1:+.1%}"


def _ratio(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["ratio"] is None:
        return _GONE
    interval = widest(entry)
    return f"{entry['ratio']:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _absent(shuffled: Mapping[str, Any]) -> str:
    shares = [found["absent"] for m in (KAPPA, AC) if (found := shuffled.get(m)) and found["absent"] is not None]
    return f"{min(shares):.0%}" if len(shares) == 2 else _GONE
