"""Commands for finished runs: `legato check`, `legato compare`, `legato report`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from legato.common.command import Interrupts
from legato.common.command_line import Task
from legato.common.errors import UsageError
from legato.common.progress import log
from legato.common.record import option, record, words
from legato.report.build import build_outputs
from legato.report.runs.page import write_comparison
from legato.report.text.matched_tables import legend, tables
from legato.results.integrity import blame_unverified_files, check_all, rebuilding
from legato.results.matched.compare import match_methods
from legato.results.run_dir import write_json
from legato.results.saved_run import SavedRun


@record
class Check(Task):
    """Tell whether a run's files are as it wrote them."""

    runs: tuple[Path, ...] = words("folders of finished runs", "RUN")

    def run(self, interrupts: Interrupts) -> None:
        with blame_unverified_files(self.runs):
            for path in self.runs:
                log(f"{path}: {check_all(path)} files are as the run wrote them")


@record
class Compare(Task):
    """Set methods side by side at the baseline's L0 and FVU."""

    runs: tuple[Path, ...] = words("run folders made with the same settings", "RUN")
    out: Path | None = option(None, "file for the numbers (default: matched.json in the run, none for several runs)")

    def run(self, interrupts: Interrupts) -> None:
        with blame_unverified_files(self.runs):
            runs = [SavedRun.open(path) for path in self.runs]
            matched = match_methods(runs)
            if not matched["methods"]:
                raise UsageError(f"{', '.join(matched['runs'])}: there is nothing to compare but the baseline")
            console = Console()
            for found in tables(matched):
                table = Table(title=found.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
                for number, heading in enumerate(found.headings):
                    table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0)
                for row in found.rows:
                    table.add_row(*row)
                console.print(table)
                console.print()
            for sentence in legend(matched):
                console.print(f"- {sentence}", highlight=False, markup=False)
            out = self.out or (runs[0].path / "matched.json" if len(runs) == 1 else None)
            if out is not None:
                with _writing(out), rebuilding(out.parent, [out.name]):
                    write_json(out, matched)
                console.print(f"\nnumbers: {out}", highlight=False, markup=False)


@record
class Report(Task):
    """Build a run's tables, figures, notes and report again."""

    runs: tuple[Path, ...] = words("run folders with a metrics.json", "RUN")
    out: Path = option(Path("figures"), "folder for comparison.html and its figures (several runs)")

    def run(self, interrupts: Interrupts) -> None:
        with blame_unverified_files(self.runs):
            runs = {path: SavedRun.open(path) for path in self.runs}
            for path, run in runs.items():
                with _writing(path), rebuilding(path):
                    print(build_outputs(run).report)
            if len(runs) > 1:
                names = [path.name for path in runs]
                labels = {path.name if names.count(path.name) == 1 else str(path): run for path, run in runs.items()}
                with _writing(self.out):
                    for figure in write_comparison(labels, self.out).values():
                        print(figure)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}): choose another place") from error
