"""The overview of a run: a row per arm, the quantities that every table of it shows, and how they are written."""

from dataclasses import dataclass

from legato.report.text.matched_tables import Table
from legato.report.text.verdict import KAPPA_EXCESS
from legato.report.text.words import form, render
from legato.results.saved_run import Arm, SavedRun


@dataclass(frozen=True)
class Column:
    """A quantity of the overview tables: its key in metrics.json, its heading, and how to write it."""

    key: str
    heading: str
    digits: int
    better: str = ""  # "lower" or "higher" where one of them is
    scale: float = 1.0

    def of(self, arm: Arm) -> float | None:
        value = arm.value(self.key)
        return None if value is None else self.scale * value

    def text(self, arm: Arm) -> str:
        return number(self.of(arm), self.digits)


def number(value: float | None, digits: int) -> str:
    return form(value, f".{digits}f")


COLUMNS = (
    Column("core.fvu", "FVU", 3, "lower"),
    Column("core.l0", "L0", 1),
    Column("core.ce_loss_score", "CE score", 3, "higher"),
    Column("core.frac_alive", "alive %", 1, "higher", scale=100),
    Column(KAPPA_EXCESS, "kappa excess", 3, "higher"),
    Column("consistency.kappa1_excess_cross", "beyond position", 3, "higher"),
    Column("consistency.ac1_excess_within", "AC excess", 3, "higher"),
    Column("consistency.half_life_median", "half-life", 1, "higher"),
)


def results_table(run: SavedRun) -> str:
    """A plain-text table, a row per arm, with a legend below it."""
    headings = ("arm", *(column.heading for column in COLUMNS))
    rows = [[arm.name, *(column.text(arm) for column in COLUMNS)] for arm in run.arms]
    return render("results", table=Table("", headings, rows), raw=_raw_stream(run)).rstrip("\n")


def raw_stream_sentence(run: SavedRun) -> str:
    """The AC excess of the language model's own activations; empty where it was not measured."""
    return render("raw_stream", raw=_raw_stream(run)).strip()


def _raw_stream(run: SavedRun) -> float | None:
    excess = run.arms[0].series("consistency.raw_stream.ac.excess_within")
    return None if excess is None else float(excess[0])
