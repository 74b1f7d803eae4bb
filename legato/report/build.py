"""Everything that is drawn and written from a run's saved results, which are opened and verified once."""

from dataclasses import dataclass
from pathlib import Path

from legato.report.registry import write_figures
from legato.report.run_page import write_report
from legato.report.text.notes import write_notes
from legato.results.ablation_table import write_ablation
from legato.results.final_info import write_final_info
from legato.results.matched.compare import write_matched
from legato.results.saved_run import SavedRun


@dataclass(frozen=True)
class Outputs:
    """The files that a person reads first."""

    notes: Path
    report: Path


def build_outputs(run: SavedRun | str | Path) -> Outputs:
    """Write ablation.parquet and .csv, matched.json, figures/, notes.txt, final_info.json and report.html of a run.

    Raises UsageError where the folder holds no results, LegatoError where they are damaged.
    """
    run = SavedRun.of(run)
    write_ablation(run)
    write_matched(run)
    figures = write_figures(run)
    notes = write_notes(run)
    write_final_info(run)
    return Outputs(notes, write_report(run, figures))
