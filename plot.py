"""Compare the run_* folders beside this file:  python plot.py

Reads saved results only; writes figures/comparison.html, one page with everything, and its figures as
figures/compare_*.png. `python plot.py RUN [RUN...]` compares the folders named.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from legato.common.command import Interrupts
from legato.common.command_line import Command, Task, call
from legato.common.errors import UsageError
from legato.common.record import option, record, words
from legato.report.runs.page import write_comparison
from legato.results.integrity import blame_unverified_files
from legato.results.saved_run import SavedRun

# Which runs to compare and what to call them; empty: every finished run_* folder found, by its name.
labels: dict[str, str] = {}


HERE = Path(__file__).resolve().parent


@record
class Plot(Task):
    """Compare runs of experiment.py by their saved results."""

    runs: tuple[Path, ...] = words("run folders (default: the run_* folders beside plot.py)", "RUN", default=())
    out: Path = option(HERE / "figures", "folder for the page and the figures")

    def run(self, interrupts: Interrupts) -> None:
        runs = {labels.get(path.name, path.name): SavedRun.open(path) for path in self.runs or _found(HERE)}
        try:
            with blame_unverified_files([run.path for run in runs.values()]):
                for path in write_comparison(runs, self.out).values():
                    print(path)
        except OSError as error:
            raise UsageError(f"{self.out} cannot be written ({error.strerror}): choose another --out") from error


def main(arguments: Sequence[str] | None = None) -> int:
    return call(Command.of("plot.py", Plot), arguments, "plot.py")


def _found(here: Path) -> list[Path]:
    """The folders in `labels`, or every run_* folder with results, in the order of their numbers."""
    if labels:
        return [here / name for name in labels]
    folders = sorted((p for p in here.glob("run_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))
    finished = [path for path in folders if (path / "metrics.json").is_file()]
    for path in folders:
        if path not in finished:
            print(f"{path.name} has no metrics.json yet: left out")
    if not finished:
        raise UsageError(f"no finished run_* folder in {here}: first run  python experiment.py --out_dir=run_1")
    return finished


if __name__ == "__main__":
    sys.exit(main())
