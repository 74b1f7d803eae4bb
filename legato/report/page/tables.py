"""The tables of a run's page: arms side by side with intervals, and the matched comparison with its targets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from legato.report.figures.style import ArmStyle, arm_styles
from legato.report.text.arm_table import COLUMNS, Column, number
from legato.report.text.matched_tables import Table, tables
from legato.results.matched.compare import bins_ahead
from legato.results.matched.points import ALL, MEASURES
from legato.results.saved_run import Arm, SavedRun, seed_groups, standard_error

_INTERVALS = {f"consistency.{key}": key for key in ("kappa1_excess_within", "kappa1_excess_cross", "ac1_excess_within")}


@dataclass(frozen=True)
class Cell:
    """value: what a column is sorted by. difference: small text below; tone: good or bad, or neither."""

    text: str
    value: str = ""
    difference: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    arm: str
    cells: Sequence[Cell]
    style: ArmStyle | None = None
    baseline: bool = False


def recipe_rows(run: SavedRun) -> tuple[list[Row], list[Row]]:
    """(baseline, named recipes and controls with their intervals, every other arm as it is).

    A recipe with several seeds is their mean; the interval is then two standard errors over seeds, else the bootstrap
    over documents that was saved.
    """
    groups, roles = seed_groups(run), ("baseline", "named", "control")
    styles = {run.arm(name).group: style for name, style in arm_styles(run.highlighted).items()}
    baseline = groups[run.baseline.group] if run.baseline else None
    main = [arms for arms in groups.values() if arms[0].role in roles]
    rows = [
        Row(
            arms[0].group if arms[0].trained else f"{arms[0].group} (control)",
            [_cell(column, arms, baseline) for column in COLUMNS],
            styles.get(arms[0].group),
            arms is baseline,
        )
        for arms in sorted(main, key=lambda arms: roles.index(arms[0].role))
    ]
    single = [arm for arms in groups.values() for arm in arms if arms[0].role not in roles or len(arms) > 1]
    return rows, [Row(arm.name, [_cell(column, [arm], None) for column in COLUMNS]) for arm in single]


def _cell(column: Column, arms: Sequence[Arm], baseline: Sequence[Arm] | None) -> Cell:
    values = [value for arm in arms if (value := column.of(arm)) is not None]
    if not values:
        return Cell("–")
    mean = float(np.mean(values))
    text = minus(number(mean, column.digits))
    below, tone = _interval(column, arms, values), ""
    if not below and baseline is not None and arms is not baseline:
        below, tone = _difference(column, mean, [v for arm in baseline if (v := column.of(arm)) is not None])
    return Cell(text, f"{mean:.6g}", below, tone)


def _interval(column: Column, arms: Sequence[Arm], values: Sequence[float]) -> str:
    if column.key not in _INTERVALS:
        return ""
    if len(values) > 1:
        return f"\u00b1{2 * standard_error(values):.{column.digits}f}"
    saved = arms[0].series(f"consistency.interval95.{_INTERVALS[column.key]}")
    return "" if saved is None else minus(f"{saved[0]:.{column.digits}f} to {saved[1]:.{column.digits}f}")


def _difference(column: Column, mean: float, reference: Sequence[float]) -> tuple[str, str]:
    if not reference:
        return "", ""
    base = float(np.mean(reference))
    if float(f"{mean - base:.{column.digits}f}") == 0:
        return "\u00b10", ""
    tone = "" if not column.better else "good" if (mean > base) == (column.better == "higher") else "bad"
    return minus(f"{mean - base:+.{column.digits}f}"), tone


def minus(text: str) -> str:
    """With a minus sign where a hyphen stands before a digit; no sign where nothing but zeros follows."""
    return re.sub(r"-(?=[\d.])", "\u2212", re.sub(r"[-+](?=0\.0+(?!\d))", "", text))


@dataclass(frozen=True)
class PageTable:
    title: str
    columns: Sequence[str]
    rows: Sequence[Row]


def matched_tables(run: SavedRun) -> list[PageTable]:
    """The targets first, then per firing-rate bin, then the tables of the notes; none where nothing was matched."""
    if run.matched is None:
        return []
    styles = {run.arm(name).group: style for name, style in arm_styles(run.highlighted).items()}
    found = [_targets(run.matched, styles), _by_bin(run.matched, styles)]
    found += [_as_it_is(table, styles) for table in tables(run.matched) if not table.title.startswith("Targets")]
    return [table for table in found if table.rows]


def _targets(matched: Mapping[str, Any], styles: Mapping[str, ArmStyle]) -> PageTable:
    columns: list[str] = []
    rows = []
    for name, method in matched["methods"].items():
        if method["verdict"] is None or method["role"] != "named":
            continue
        signs = str.maketrans({">": "\u2265", "<": "\u2264", "=": None, "x": "\u00d7"})
        columns = [f"{row['criterion']} {minus(row['bound'].translate(signs))}" for row in method["verdict"]]
        rows.append(Row(name, [_target(row, method) for row in method["verdict"]], styles.get(name)))
    return PageTable("Targets at the baseline's L0", columns, rows)


def _target(row: Mapping[str, Any], method: Mapping[str, Any]) -> Cell:
    value = row["value"]
    if value is None:
        return Cell("–", "", "not measured")
    if row["criterion"] in ("kappa", "AC"):
        text = f"{value:.2f}\u00d7"
    elif row["criterion"] == "bins":
        text = "{} of {}".format(*bins_ahead(method["at_l0"]["populations"][ALL]))
    else:
        text = minus(f"{value:.0%}" if row["criterion"] == "absent" else f"{value:+.1%}")
    if not row["met"]:
        return Cell(text, f"{value:.6g}", "\u2717 missed", "bad")
    surely = "met" if row["beyond_intervals"] is not False else "not surely"
    return Cell(text, f"{value:.6g}", f"\u2713 {surely}", "good")


def _by_bin(matched: Mapping[str, Any], styles: Mapping[str, ArmStyle]) -> PageTable:
    """Kappa excess as a multiple of the baseline's, bin by bin."""
    bins: list[tuple[float, float]] = []
    found: dict[str, dict[tuple[float, float], Cell]] = {}
    for name, method in matched["methods"].items():
        if not method["at_l0"]["matched"]:
            continue
        for row in method["at_l0"]["populations"][ALL]["by_rate_bin"]:
            edges, entry, latents = tuple(row["bin"]), row[MEASURES[0]], row.get("latents")
            bins += [edges] if edges not in bins else []
            text = f"{entry['value']:.3f}" if entry["ratio"] is None else f"{entry['ratio']:.2f}\u00d7"
            small = f"{entry['value']:.3f} : {entry['baseline']:.3f}"
            if latents is not None:
                small += f", n {latents['value']:.0f} : {latents['baseline']:.0f}"
            found.setdefault(name, {})[edges] = Cell(minus(text), f"{entry['ratio'] or 0:.6g}", minus(small))
    rows = [
        Row(name, [cells.get(edges, Cell("–")) for edges in sorted(bins)], styles.get(name))
        for name, cells in found.items()
    ]
    columns = [
        f"fires {100 * low:g} %–{100 * high:g} %" if low < 0.1 else f"dense, {100 * low:g} %+"
        for low, high in sorted(bins)
    ]
    return PageTable("Kappa excess by firing rate, at the baseline's L0 (method : baseline)", columns, rows)


def _as_it_is(table: Table, styles: Mapping[str, ArmStyle]) -> PageTable:
    rows = []
    for name, *texts in table.rows:
        if texts[-1] != "not matched":  # the legend says why
            leading = [re.match(r"[-+]?\d+(\.\d+)?", text) for text in texts]
            cells = [
                Cell(minus(text) or "–", found[0] if found else "") for text, found in zip(texts, leading, strict=True)
            ]
            rows.append(Row(name, cells, styles.get(name), name == "baseline"))
    return PageTable(table.title, table.headings[1:], rows)
